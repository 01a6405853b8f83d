"""The page of a board: this module makes the texts, and templates/board.html.jinja has the prose."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from rrcm.evaluation.metrics import Interval
from rrcm.report.board_figure import draw_group
from rrcm.report.board_rows import Group, Row, common_settings, mean_cost
from rrcm.report.html import render_page, slug
from rrcm.report.html_figures import make_figure
from rrcm.report.html_tables import PageTable, make_table
from rrcm.report.tables import interval_text
from rrcm.utils.errors import printable


class Link(NamedTuple):
    """A name with an address, or without one if there is nothing to open."""

    text: str
    address: str | None


class Source(NamedTuple):
    """How a deployed classifier was certified, and where its files are."""

    name: str
    cells: list[str]  # as the headings SOURCE
    links: list[Link]
    files: list[Link]


class Section(NamedTuple):
    """The parts of the page about a group."""

    title: str
    figure: str  # its name
    entries: int
    images: list[int]
    runs: list[int]  # the different numbers of training runs
    single: PageTable
    best: PageTable
    sources: list[Source]


SOURCE = ["deployed", "n", "n0", "alpha", "bound", "stopping", "samples", "seconds", "runs"]


def render_board(title: str, groups: Sequence[Group], path: Path, output: Path) -> str:
    """The text of the page `output` of the board that the file `path` lists."""
    figures = {}
    for i, group in enumerate(groups):
        name, text = f"group-{i}", f"{group.data}, {group.threat}"
        about = "Certified accuracy against radius with the best sigma at each radius, and with each sigma."
        figures[name] = make_figure(draw_group(group), name, text, about)
    sections = [_section(group, name, path, output) for group, name in zip(groups, figures, strict=True)]
    files = {file.name: file.sha256 for group in groups for row in group.single for file in row.deployed[0].files}
    return render_page(
        "board.html.jinja",
        figures=figures,
        title=title,
        sections=sections,
        links=[(section.title, slug(section.title)) for section in sections],
        source=SOURCE,
        entries=sum(section.entries for section in sections),
        hashes=[f"{sha256}  {printable(file)}" for file, sha256 in files.items()],
        table=output.with_suffix(".csv").name,
        list_name=path.name,
    )


def _section(group: Group, figure: str, path: Path, output: Path) -> Section:
    return Section(
        title=f"{group.data}, {group.threat}",
        figure=figure,
        entries=len(group.best),
        images=group.images,
        runs=sorted({len(row.deployed[0].files) for row in group.single}),
        single=_single_table(group),
        best=_best_table(group),
        sources=[_source(row, path.parent, output.parent) for row in group.single],
    )


def _single_table(group: Group) -> PageTable:
    head = ["method", "deployed", "images", "ACR", *(f"r = {radius:g}" for radius in group.radii)]
    rows = [
        [
            row.entry.name,
            row.deployed[0].label,
            f"{len(row.deployed[0].frames[0]):,}",
            interval_text(row.acr, ".3f"),
            *map(_percent, row.shares),
        ]
        for row in group.single
    ]
    return make_table(head, rows)


def _best_table(group: Group) -> PageTable:
    head = ["method", "deployments", "images", "highest ACR", *(f"r = {radius:g}" for radius in group.radii)]
    rows = []
    for row in group.best:
        shares = [
            _percent(share, f"σ {each.name}" if each.sigma is not None and share.value > 0 else "")
            for share, each in zip(row.shares, row.chosen, strict=True)
        ]
        images = f"{len(row.deployed[0].frames[0]):,}"
        rows.append([row.entry.name, str(len(row.deployed)), images, interval_text(row.acr, ".3f"), *shares])
    return make_table(head, rows)


def _percent(share: Interval, addition: str = "") -> str:
    """A share in percent with its interval and an addition, both in parentheses."""
    text = interval_text(share.times(100), ".1f")
    if not addition:
        return text
    return f"{text[:-1]}; {addition})" if text.endswith(")") else f"{text} ({addition})"


def _source(row: Row, folder: Path, page: Path) -> Source:
    first, settings = row.deployed[0], common_settings(row)
    cells = [first.label, *(_setting(settings, name) for name in ("n", "n0", "alpha", "bound", "stopping"))]
    cells += [_number(mean_cost(row, "samples"), ",.0f"), _number(mean_cost(row, "seconds"), ".3g")]
    cells.append(str(len(first.files)))
    links = [Link("paper", row.entry.paper), Link("code", row.entry.code)]
    links.append(Link("report", row.entry.report and _address(folder / row.entry.report, page)))
    files = [Link(file.path.name, _address(file.path, page)) for file in first.files]
    return Source(row.entry.name, cells, [link for link in links if link.address], files)


def _setting(settings: Mapping[str, object], name: str) -> str:
    value = settings[name]
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float, digits: str) -> str:
    return "" if math.isnan(value) else f"{value:{digits}}"


def _address(path: Path, page: Path) -> str | None:
    """The relative address of a file on a page in the folder `page`, or None if the file is not here."""
    return quote(Path(os.path.relpath(path, page)).as_posix()) if path.exists() else None
