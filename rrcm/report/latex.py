"""Tables as LaTeX, for booktabs and siunitx, and methods.bib with the papers that they cite.

Columns of plain numbers are S columns, so siunitx aligns them at the decimal point and writes minus signs. Other
numbers have math minus signs. Bold cells are the best of their column or not significantly below it.
"""

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

import pandas as pd

from rrcm.methods import METHODS
from rrcm.report.tables import Table
from rrcm.utils.errors import printable

PREAMBLE = """\
% \\usepackage{booktabs, etoolbox, siunitx}
% \\robustify\\bfseries
% \\sisetup{detect-weight = true, detect-inline-weight = math}
"""
BIBLIOGRAPHY = "methods.bib"
NUMBER = re.compile(r"([-+]?)(\d+)(?:\.(\d+))?")
MINUS = re.compile(r"(?<![\w.])-(?=\d)")
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
SPECIAL |= {"σ": r"$\sigma$", "τ": r"$\tau$", "±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$", "∞": r"$_\infty$"}
SPECIAL |= {"×": r"$\times$"}
# The papers behind the columns of a row of the method table, as keys of methods.bib.
INITIAL_WEIGHTS = {"moco_v3": ["chen2021mocov3"], "dmae": ["wu2023dmae"], "rrcm_dmae": ["lei2025rrcm", "wu2023dmae"]}
OBJECTIVES = {
    "gaussian": ["cohen2019certified"],
    "stability": ["li2019certified"],
    "consistency": ["jeong2020consistency"],
    "macer": ["zhai2020macer"],
    "smoothadv": ["salman2019provably"],
    "smoothmix": ["jeong2021smoothmix"],
    "cat_rs": ["jeong2023confidence"],
    "distill": ["hinton2015distilling", "vaishnavi2022accelerating"],
}
CLASSIFIERS = {
    "ensemble": ["horvath2022boosting"],
    "dds": ["carlini2023certified"],
    "densepure": ["xiao2023densepure"],
    "diffsmooth": ["zhang2023diffsmooth"],
}


def citation_keys(method: str) -> list[str]:
    """The papers behind a method, as keys of methods.bib. A name that is not in the table of methods has none.

    A method is cited for its pre-training and for its loss, or for how it denoises or combines its parts.
    """
    if (row := METHODS.get(method)) is None:
        return []
    pretraining = INITIAL_WEIGHTS.get(row.initial_weights or "", ["lei2025rrcm"] if row.pretrained_here else [])
    loss = OBJECTIVES.get(row.objective or "", [])
    return list(dict.fromkeys([*pretraining, *CLASSIFIERS.get(row.classifier, []), *loss]))


def bibliography(methods: Iterable[str]) -> str:
    """The entries of methods.bib that the `methods` cite, in its order."""
    keys = {key for method in methods for key in citation_keys(method)}
    return "\n".join(text for key, text in read_bibliography().items() if key in keys)


def read_bibliography() -> dict[str, str]:
    """The entries of methods.bib by key."""
    text = (files("rrcm.report") / BIBLIOGRAPHY).read_text(encoding="utf-8")
    return {match[2]: match[0] for match in re.finditer(r"@(\w+)\{([^,]+),\n.*?\n\}\n", text, re.DOTALL)}


def latex_text(table: Table) -> str:
    """The text of a table in LaTeX. The preamble that it needs is in comments above it."""
    frame = table.text.map(lambda cell: printable(str(cell)))
    plain = {name: is_number_column(frame[name].tolist()) for name in frame.columns[1:]}
    layout = ["l", *(_number_column(frame[name]) if number else "r" for name, number in plain.items())]
    labels = {row.label: name for name, row in METHODS.items()}
    lines = [" & ".join(f"{{{escape_latex(name)}}}" if plain.get(name) else escape_latex(name) for name in frame)]
    for row, cells in enumerate(frame.to_dict("records")):
        line = []
        for name, cell in cells.items():
            text = cell.replace(",", "") if plain.get(name) else escape_latex(cell)
            if name == "method" and (keys := citation_keys(labels.get(cell, ""))):
                text += f"~\\cite{{{','.join(keys)}}}"
            line.append(_bold(text, plain.get(name, False)) if (row, name) in table.best else text)
        lines.append(" & ".join(line))
    head, *body = (f"{line} \\\\" for line in lines)
    rows = [f"\\begin{{tabular}}{{{''.join(layout)}}}", "\\toprule", head, "\\midrule", *body, "\\bottomrule"]
    return PREAMBLE + "\n".join([*rows, "\\end{tabular}"]) + "\n"


def escape_latex(text: str) -> str:
    """Text with special characters escaped, and with the minus signs of numbers in math mode."""
    marked = MINUS.sub("\0", text)
    return "".join(SPECIAL.get(sign, sign) for sign in marked).replace("\0", "$-$")


def is_number_column(cells: Sequence[str]) -> bool:
    """Whether all cells are numbers or empty, and not all are empty."""
    return any(cells) and all(not cell or NUMBER.fullmatch(cell.replace(",", "")) for cell in cells)


def _number_column(cells: pd.Series) -> str:
    """The S column that has room for all cells, such as S[table-format=-2.1]."""
    found = [match for cell in cells if (match := NUMBER.fullmatch(cell.replace(",", "")))]
    sign = next((match[1] for match in found if match[1]), "")
    whole, decimals = (max(len(match[part] or "") for match in found) for part in (2, 3))
    return f"S[table-format={sign}{whole}{f'.{decimals}' if decimals else ''}]"


def _bold(text: str, number: bool) -> str:
    """`text` in bold up to its first space, which leaves what is in parentheses as it is."""
    first, space, rest = text.partition(" ")
    return f"\\bfseries {text}" if number else f"\\textbf{{{first}}}{space}{rest}"
