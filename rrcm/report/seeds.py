"""Means over training runs that differ in nothing but the seed, in tables and as a folder with a report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from rrcm.evaluation.runs import MIN_RUNS, over_runs, over_runs_and_images
from rrcm.report.deployment import deployment_label
from rrcm.report.figures import FORMATS, save_all
from rrcm.report.latex import latex_text
from rrcm.report.page import read_template
from rrcm.report.seed_curves import curves_over_seeds, draw_seeds
from rrcm.report.seed_reports import (
    DEPLOYMENT_KEY,
    KEY,
    every_report_has,
    find_reports,
    read_curves,
    read_deployments,
    read_reports,
    share_columns,
)
from rrcm.report.tables import (
    Table,
    csv_text,
    differences_text,
    interval_text,
    markdown_text,
    method_labels,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, write_text

SCALES = {  # the least and the most that a quantity can be
    ("value", "certified_accuracy"): (0.0, 1.0),
    ("value", "acr"): (0.0, math.inf),
    ("difference", "certified_accuracy"): (-1.0, 1.0),
    ("difference", "acr"): (-math.inf, math.inf),
}
FIGURE = "certified_accuracy"
NAMES = ["best_sigma", "differences", "deployment", "joint", "deployment_differences"]  # of the tables
FILES = {f"{name}.{suffix}" for name in NAMES for suffix in ("csv", "md", "tex")}
FILES |= {f"{FIGURE}{suffix}" for suffix in FORMATS} | {"curves.csv", "report.md"}


class SeedsTable(NamedTuple):
    """A table of means over seeds."""

    title: str
    table: Table
    over_images: bool  # whether its intervals cover the test images as well


def seeds_text(folders: Sequence[Path]) -> str:
    """Markdown tables of means over all reports in `folders`: for each method, and for its difference.

    If the reports have joint methods or cascades, there are tables of these too. A folder is a report, or a
    published result with a report of each seed. Raises `RRCMError` if there are fewer than two reports, if two have the
    same seed, or if they differ in methods, radii or sigmas.
    """
    reports = [report for folder in folders for report in find_reports(Path(folder))]
    return render_seeds(reports, make_tables(reports))


def write_seeds(folders: Sequence[Path], output: Path) -> None:
    """Write the tables of `seeds_text` in three formats, a figure and report.md to the folder `output`.

    An older report there is replaced. Raises `RRCMError` for a folder with other files, and as `seeds_text` does.
    """
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= FILES):
        raise RRCMError(f"--output {output}: has other files than a report of several seeds; choose another folder")
    reports = [report for folder in folders for report in find_reports(Path(folder))]
    tables, curves = make_tables(reports), read_curves(reports)
    means = curves_over_seeds(curves, len(reports) >= MIN_RUNS)
    with atomic_directory(output) as folder:
        for name, (_, table, _) in tables.items():
            write_text(folder / f"{name}.csv", csv_text(table.numbers))
            write_text(folder / f"{name}.md", markdown_text(table.text))
            write_text(folder / f"{name}.tex", latex_text(table))
        write_text(folder / "curves.csv", csv_text(means))
        save_all({FIGURE: draw_seeds(means, curves)}, folder)
        write_text(folder / "report.md", render_seeds(reports, tables, FIGURE))


def render_seeds(reports: Sequence[Path], tables: dict[str, SeedsTable], figure: str | None = None) -> str:
    """The tables with their titles and a note on their intervals. With a `figure`, the text is a page of its own."""
    seeds = sorted(read_reports(reports)["seed"].unique())
    text = read_template("seeds.md.jinja").render(
        reports=reports,
        seeds=", ".join(map(str, seeds)),
        tables=[(each.title, markdown_text(each.table.text)) for each in tables.values()],
        over_images=any(each.over_images for each in tables.values()),
        min_seeds=MIN_RUNS,
        figure=figure,
    )
    return text.rstrip("\n")


def make_tables(reports: Sequence[Path]) -> dict[str, SeedsTable]:
    """The tables by name. Raises `RRCMError` as `seeds_text` does."""
    numbers = read_reports(reports)
    (reference,) = method_labels(numbers.loc[numbers["difference"].isna(), "method"].unique())
    values, differences = over_seeds(numbers), over_seeds_and_images(numbers.dropna(subset="difference"))
    tables = {
        "best_sigma": SeedsTable(
            "Certified accuracy (%) with the best σ and ACR", Table(values, differences_text(values, "value")), False
        ),
        "differences": _differences(f"Difference to {reference}", differences),
    }
    if every_report_has(reports, "deployment.csv"):
        deployed = read_deployments(reports)
        title = f"One deployment: certified accuracy (%) and ACR by the {deployed['bound'].iloc[0]} bound"
        tables["deployment"] = SeedsTable(title, deployments_over_seeds(deployed), False)
    for name, title in (
        ("joint", "Joint networks minus their experts"),
        ("deployment_differences", "One cascade minus the best σ at each radius, and in ACR minus each σ alone"),
    ):
        if every_report_has(reports, f"{name}.csv"):
            tables[name] = _differences(title, over_seeds_and_images(read_reports(reports, f"{name}.csv")))
    return tables


def _differences(title: str, numbers: pd.DataFrame) -> SeedsTable:
    return SeedsTable(title, Table(numbers, differences_text(numbers, "difference")), True)


def over_seeds(numbers: pd.DataFrame) -> pd.DataFrame:
    """Mean `value` over the seeds of each method and measure, with the interval of `over_runs`."""
    rows = [
        (*key, *over_runs(group["value"].to_numpy(), SCALES["value", key[1]]))
        for key, group in numbers.groupby(KEY, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*KEY, "value", "low", "high"])


def over_seeds_and_images(numbers: pd.DataFrame) -> pd.DataFrame:
    """Mean of the paired differences over the seeds, with an interval for both seeds and test images.

    The interval is cut at the ends of the scale. Fewer than MIN_RUNS seeds have no interval: it is NaN.
    `low_over_seeds` and `high_over_seeds` are the t interval over seeds alone.
    """
    rows = []
    for key, group in numbers.groupby(KEY, sort=False):
        scale, differences = SCALES["difference", key[1]], group["difference"].to_numpy()
        half_widths = ((group["high"] - group["low"]) / 2).to_numpy()
        both = over_runs_and_images(differences, half_widths, half_widths).cut(*scale)
        rows.append((*key, *both, *over_runs(differences, scale)[1:]))
    return pd.DataFrame(rows, columns=[*KEY, "difference", "low", "high", "low_over_seeds", "high_over_seeds"])


def deployments_over_seeds(numbers: pd.DataFrame) -> Table:
    """The means over the seeds of each deployment. `numbers` are from `read_deployments`.

    The numbers have a row for each deployment and measure: a share such as r_0.5, `acr` and `samples_ratio`.
    """
    rows, texts = [], []
    columns = [(name, f"r = {name.removeprefix('r_')}", 100, ".1f") for name in share_columns(numbers)]
    columns += [("acr", "ACR", 1, ".3f"), ("samples_ratio", "ratio", 1, ".2f")]
    for key, group in numbers.groupby(DEPLOYMENT_KEY, sort=False):
        text = {"method": method_labels(key[:1])[0], "deployed": deployment_label(*key[2:])}
        for column, heading, unit, digits in columns:
            text[heading] = ""
            if not group[column].isna().any():
                interval = over_runs(group[column].to_numpy(), (0.0, 1.0 if unit == 100 else math.inf))
                text[heading] = interval_text(interval.times(unit), digits)
                rows.append((*key, column, *interval))
        texts.append(text)
    return Table(pd.DataFrame(rows, columns=[*DEPLOYMENT_KEY, "measure", "value", "low", "high"]), pd.DataFrame(texts))
