"""The table of results in README.md, which is made only from published results.

results/readme.csv lists its rows. A row with a `result` shows a method of the published result with this name, as the
mean over the seeds with half the width of the t interval over them. Its `sigma` is empty for the best sigma at each
radius, or names a row of the report's deployment.csv: "cascade", "multi-scale", a single sigma, or "best" for the best
of a cascade's sigmas. Its `label` may contain {ratio} (the latency relative to rRCM), {images}, {seeds}, and for a row
of deployment.csv {samples} (relative to the largest sigma alone). A row without a `result` quotes the row of
rrcm/report/published.csv with the same `method`, `model` and `sigma`.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rrcm.evaluation.metrics import mean_over_seeds
from rrcm.evaluation.runs import MIN_RUNS
from rrcm.publication.result import RESULTS, Result, find_results
from rrcm.report.tables import percentages, read_published
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import read_text, write_text

README, ROWS = "README.md", f"{RESULTS}/readme.csv"
COLUMNS = ["label", "result", "method", "model", "sigma"]
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
HEADINGS = ["data, method", "r = 0", *(f"{radius:g}" for radius in RADII[1:]), "source", "status"]
BEGIN, END = "<!-- made by `make publish` from results/readme.csv -->\n", "<!-- end of what is made -->"
BLOCK = re.compile(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", re.DOTALL)


def write_readme(root: Path) -> None:
    """Bring the table in README.md up to date. Raises `RRCMError` as `result_rows` does."""
    text, table = read_text(root / README), table_text(result_rows(root))
    _find_block(text)
    write_text(root / README, BLOCK.sub(lambda _: BEGIN + table + END, text))


def check_readme(root: Path) -> list[str]:
    """A line for each cell of the table in README.md that differs from the published value."""
    try:
        block, expected = _find_block(read_text(root / README)), [HEADINGS, *result_rows(root)]
    except RRCMError as error:
        return [str(error)]
    except (OSError, ValueError) as error:
        return [f"{README}: cannot be read ({one_line(error)})"]
    rows = [_cells(line) for line in block.splitlines() if not line.startswith("|---")]
    if len(rows) != len(expected):
        return [f"{README}: its table of results has {len(rows) - 1} rows, {ROWS} has {len(expected) - 1}"]
    problems = []
    for row, correct in zip(rows, expected, strict=True):
        if len(row) != len(correct):
            problems.append(f"{README}, row {row[0]!r}: has {len(row)} cells, must have {len(correct)}")
            continue
        for heading, cell, published in zip(HEADINGS, row, correct, strict=True):
            if cell != published:
                problems.append(
                    f"{README}, row {correct[0]!r}, column {heading!r}: has {cell!r}, published is {published!r}"
                )
    return problems


def missing_results(root: Path) -> list[str]:
    """The results that results/readme.csv names but that are not published."""
    published = {result.name for result in find_results(root)}
    return sorted({row["result"] for row in read_rows(root)} - published - {""})


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    lines = [HEADINGS, *rows]
    text = [f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in lines]
    return "\n".join([text[0], "|---" * len(HEADINGS) + "|", *text[1:]]) + "\n"


def result_rows(root: Path) -> list[list[str]]:
    """The cells of each row of the table. Raises `RRCMError` for a row without a published result."""
    rows = read_rows(root)
    results = find_results(root, sorted({row["result"] for row in rows} - {""}))
    return [
        _own_row(row, [each for each in results if each.name == row["result"]]) if row["result"] else _quoted_row(row)
        for row in rows
    ]


def read_rows(root: Path) -> list[dict[str, str]]:
    """The rows of results/readme.csv. Raises `RRCMError` for a file in another format."""
    path = root / ROWS
    try:
        rows = list(csv.DictReader(read_text(path).splitlines()))
    except (OSError, ValueError) as error:
        raise RRCMError(f"{path}: cannot be read ({one_line(error)}); restore it with git") from None
    for line, row in enumerate(rows, start=2):
        if list(row) != COLUMNS or None in row.values():
            raise RRCMError(f"{path}, line {line}: must have the cells {', '.join(COLUMNS)}; correct it")
    return rows


def mean_text(shares: Sequence[float]) -> str:
    """The mean over seeds in percent. With MIN_RUNS seeds or more, half the width of its t interval follows."""
    mean = mean_over_seeds(shares)
    interval = f" ± {100 * (mean.high - mean.value):.1f}" if len(shares) >= MIN_RUNS else ""
    return f"{100 * mean.value:.1f}{interval}"


def _own_row(row: Mapping[str, str], seeds: Sequence[Result]) -> list[str]:
    """The row of a method of a published result, as the mean over the seeds."""
    if row["sigma"]:
        deployed = pd.concat([_of_deployment(seed, row) for seed in seeds])
        shares = {radius: deployed[f"r_{radius:g}"] for radius in RADII if f"r_{radius:g}" in deployed}
        images, samples = deployed["images"].iloc[0], deployed["samples_ratio"].mean()
        fields = {} if np.isnan(samples) else {"samples": f"{samples:.2g}"}
    else:
        best = pd.concat([_of_method(seed, "best_sigma.csv", row) for seed in seeds])
        shares, images, fields = dict(list(best.groupby("radius")["certified_accuracy"])), best["images"].iloc[0], {}
    cells = [mean_text(shares[radius]) if radius in shares else "" for radius in RADII]
    fields |= {"images": f"{images:,}", "seeds": str(len(seeds))}
    if "{ratio}" in row["label"]:
        ratios = [_of_method(seed, "latency.csv", row)["ratio"].iloc[0] for seed in seeds]
        fields["ratio"] = f"{np.mean(ratios):.2g}"
    try:
        label = row["label"].format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        *first, last = dict.fromkeys(["ratio", *fields])
        known = f"{', '.join(first)} or {last}"
        raise RRCMError(f"{ROWS}: {row['label']!r}: knows no {one_line(error)}; use {known}") from None
    return [label, *cells, f"[{RESULTS}/{row['result']}]({seeds[0].label}/report/report.md)", "run here"]


def _of_deployment(result: Result, row: Mapping[str, str]) -> pd.DataFrame:
    """The row of deployment.csv that the `sigma` of a row names. Raises `RRCMError` if there is none."""
    table = _of_method(result, "deployment.csv", row)
    rows = table[table["deployment"].astype(str) == row["sigma"]]
    if len(rows) != 1:
        known = ", ".join(map(str, table["deployment"]))
        path = result.folder / "report/deployment.csv"
        raise RRCMError(f"{ROWS}: {row['label']!r}: {path} has no {row['sigma']} of {row['method']}; use {known}")
    return rows


def _of_method(result: Result, name: str, row: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a method in a table of a published report. Raises `RRCMError` if it has none."""
    path = result.folder / "report" / name
    try:
        table = pd.read_csv(path)
        rows = table[table["method"] == row["method"]]
    except (OSError, KeyError, ValueError) as error:
        raise RRCMError(f"{path}: cannot be read ({one_line(error)}); restore it with git") from None
    if rows.empty:
        raise RRCMError(f"{ROWS}: {row['label']!r}: {path} has no method {row['method']}; correct the row")
    return rows


def _quoted_row(row: Mapping[str, str]) -> list[str]:
    """The row that quotes rrcm/report/published.csv."""
    quoted = read_published()
    for name in ("method", "model", "sigma"):
        quoted = quoted[quoted[name] == row[name]]
    quoted = quoted[quoted["certified_accuracy"] != ""]
    if len(quoted) != 1:
        raise RRCMError(
            f"{ROWS}: {row['label']!r}: {len(quoted)} rows of published.csv fit, must be one; correct the row"
        )
    shares = percentages(quoted["certified_accuracy"].iloc[0])
    return [row["label"], *(shares.get(radius, "") for radius in RADII), quoted["source"].iloc[0], "not run"]


def _find_block(text: str) -> str:
    blocks = BLOCK.findall(text)
    if len(blocks) != 1:
        raise RRCMError(f"{README}: must have one table of results between {BEGIN.strip()} and {END}; restore them")
    return blocks[0]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
