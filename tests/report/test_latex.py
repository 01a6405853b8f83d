"""Tables as LaTeX: syntax, alignment of numbers, bold cells, and the papers that are cited."""

import re

import pandas as pd
import pytest
from invented_run import frame_of

from rrcm.evaluation.metrics import leaders
from rrcm.methods import METHODS
from rrcm.report.latex import bibliography, citation_keys, escape_latex, latex_text, read_bibliography
from rrcm.report.tables import Table

S_COLUMN = r"S\[table-format=([-+]?)(\d+)(?:\.(\d+))?\]"


def problems(text: str) -> list[str]:
    """What would keep a table from compiling: unbalanced braces and dollars, bare signs, cells that do not fit."""
    *_, head = (line for line in text.splitlines() if line.startswith(r"\begin{tabular}"))
    layout = re.fullmatch(rf"\\begin{{tabular}}{{((?:[lr]|{S_COLUMN})+)}}", head)
    columns = [match[0] for match in re.finditer(rf"[lr]|{S_COLUMN}", layout[1])] if layout else []
    found = [] if columns else [f"layout {head}"]
    body = text[text.index(head) + len(head) : text.index(r"\end{tabular}")]
    plain = re.sub(r"\\[\\&%$#_{}]", "", body)
    found += [] if plain.count("{") == plain.count("}") else ["braces"]
    found += [] if plain.count("$") % 2 == 0 else ["dollars"]
    found += [f"sign {sign}" for sign in "%#~^" if sign in plain.replace("~\\cite", "")]
    found += [f"{word} is no command" for word in re.findall(r"\\([a-zA-Z]+)", plain) if word not in COMMANDS]
    rows = [line.removesuffix(r" \\").split(" & ") for line in body.splitlines() if line.endswith(r"\\")]
    found += [f"{len(row)} cells" for row in rows if len(row) != len(columns)]
    for row in rows[1:]:
        for cell, column in zip(row, columns, strict=False):
            if column[0] == "S" and not fits(cell.removeprefix(r"\bfseries "), column):
                found.append(f"{cell} in {column}")
    found += [f"head {cell}" for cell, c in zip(rows[0], columns, strict=False) if c[0] == "S" and cell[0] != "{"]
    return found


COMMANDS = {"toprule", "midrule", "bottomrule", "sigma", "tau", "pm", "le", "ge", "infty", "times", "cite", "bfseries"}
COMMANDS |= {"textbf", "textbackslash", "textasciitilde", "textasciicircum"}


def fits(cell: str, column: str) -> bool:
    """Whether an S column reads a cell, which has as many digits as its format has room for at most."""
    sign, whole, decimals = re.fullmatch(S_COLUMN, column).groups()
    number = re.fullmatch(r"([-+]?)(\d+)(?:\.(\d+))?", cell)
    return not cell or bool(
        number
        and (not number[1] or sign)
        and len(number[2]) <= int(whole)
        and len(number[3] or "") <= int(decimals or 0)
    )


def test_every_table_of_a_report_would_compile(invented_report):
    _, root = invented_report
    tables = {path.stem: path.read_text() for path in (root / "reports/digits").glob("*.tex")}
    assert {"best_sigma", "per_sigma", "differences", "budgets", "latency", "threats", "classes"} <= tables.keys()
    assert {name: found for name, text in tables.items() if (found := problems(text))} == {}
    assert all(text.isascii() for text in tables.values())
    cited = {
        key for text in tables.values() for keys in re.findall(r"\\cite\{(.*?)\}", text) for key in keys.split(",")
    }
    entries = re.findall(r"^@inproceedings\{(.*),$", (root / "reports/digits/methods.bib").read_text(), re.MULTILINE)
    assert cited == set(entries) == {"lei2025rrcm", "jeong2020consistency"}


def test_numbers_are_aligned_and_minus_signs_are_in_math():
    text = pd.DataFrame(
        {"method": ["rRCM", "x_y"], "n": ["1,009", ""], "d": ["-0.5", "+2"], "gap": ["-1 (-2 to 3)", ""]}
    )
    lines = latex_text(Table(pd.DataFrame(), text, frozenset({(0, "n"), (0, "gap")}))).splitlines()
    assert r"\begin{tabular}{lS[table-format=4]S[table-format=-1.1]r}" in lines
    assert r"method & {n} & {d} & gap \\" in lines
    cite = r"~\cite{lei2025rrcm,jeong2020consistency}"
    assert rf"rRCM{cite} & \bfseries 1009 & -0.5 & \textbf{{$-$1}} ($-$2 to 3) \\" in lines
    assert r"x\_y &  & +2 &  \\" in lines
    assert escape_latex("a_b & 50% #1 $ -σ' 2019-09 ~^{}\\") == (
        r"a\_b \& 50\% \#1 \$ -$\sigma$' 2019-09 \textasciitilde{}\textasciicircum{}\{\}\textbackslash{}"
    )


def test_every_method_cites_papers_with_complete_entries():
    entries = read_bibliography()
    assert {key for method in METHODS for key in citation_keys(method)} == set(entries)
    for key, entry in entries.items():
        assert [re.search(rf"^  {field} = {{.+}},$", entry, re.MULTILINE) for field in ("title", "author", "booktitle")]
        year, arxiv = (re.search(rf"{field} = {{(.*)}}", entry)[1] for field in ("year", "eprint"))
        assert year in key and re.fullmatch(r"\d{4}\.\d{5}", arxiv) and 0 <= int(year) - 2000 - int(arxiv[:2]) <= 1
        assert entry.count("{") == entry.count("}")
    assert [METHODS[name].label for name in METHODS if not citation_keys(name)] == []
    assert citation_keys("dds_finetuned") == ["carlini2023certified", "cohen2019certified"]
    assert bibliography(["gaussian"]) == entries["cohen2019certified"]


def test_leaders_are_the_best_and_those_not_significantly_below():
    idx = {"idx": range(60)}
    frames = {"high": frame_of(*[1.0] * 60), "near": frame_of(*[1.0] * 58, 0.1, 0.1), "low": frame_of(*[0.2] * 60)}
    frames = {name: frame.assign(**idx) for name, frame in frames.items()}
    assert leaders(frames, 0.5) == {"high", "near"}
    assert leaders(frames, 0.0) == {"high", "near", "low"}
    assert leaders(frames, 2.0) == set()
    assert leaders(frames) == {"high", "near"}
    assert leaders({"few": frames["low"].head(2), "high": frames["high"]}, 0.5) == {"few", "high"}  # two images


@pytest.mark.parametrize("bad", ["a & b", "50%", "{", "1.25"])
def test_a_planted_problem_is_found(bad):
    good = latex_text(Table(pd.DataFrame(), pd.DataFrame({"a": ["x"], "b": ["1.5"]})))
    assert problems(good) == [] and problems(good.replace("1.5", bad)) != []
