"""Figures of HTML pages: the SVG of a matplotlib figure for a page, its legend, and its data in tables.

Lines and points whose gid is from `series_id` are series, which a page can hide and read off. All colours become
classes, so that the page's style can have others on dark paper. No style is inline, which the page's policy forbids.
"""

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from rrcm.evaluation.metrics import wilson_interval
from rrcm.report.figures import FORMATS, figure_style, number_series, parse_series_id
from rrcm.report.html_tables import PageTable, make_table
from rrcm.report.svg import SVG, clean, describe, make_swatch
from rrcm.report.svg_size import limit_size, shorten

POSITIONS, FEWER = 41, 21  # of a line, at most, in the table of its data; FEWER for more than MANY lines
MANY = 12
POINTS = 72  # per inch
MARGIN = 4  # points below the lowest text of a figure


class Entry(NamedTuple):
    """An entry of a legend."""

    key: str  # of the series
    label: str
    swatch: Markup  # SVG


class Row(NamedTuple):
    """A row of a figure's data: where it is in the SVG, and its texts."""

    x: float  # in the units of the SVG
    y: float | None  # of a point; None for all lines at `x`
    key: str  # of a point's series; "" for lines


class Panel(NamedTuple):
    """The data of the series in one panel."""

    title: str
    box: tuple[float, float, float, float]  # x, y, width and height in the units of the SVG
    keys: list[str]  # of the series, by column of the table; of points none
    rows: list[Row]  # by row of the table
    table: PageTable


class PageFigure(NamedTuple):
    """A figure for a page. `title` and `description` say what it shows, for readers who cannot see it."""

    name: str
    title: str
    description: str
    svg: Markup
    width: float  # of the SVG, in its units
    legend_title: str
    legend: list[Entry]
    panels: list[Panel]
    colours: list[str]  # "#rrggbb"


@figure_style()
def make_figure(figure: Figure, name: str, title: str, description: str) -> PageFigure:
    """The form of a matplotlib figure for pages. `name` is unique on the page, of letters, digits, "_" and "-".

    The legend of the whole figure is left out of the SVG and returned apart, and so is the space below the panels that
    it took. The figure is unchanged.
    """
    number_series(figure)
    with _without_legends(figure) as legends:
        file = io.BytesIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(file, format="svg", metadata=FORMATS[".svg"])
        panels = [panel for axes in figure.axes if (panel := _read_panel(figure, axes))]
        below = max(0.0, POINTS * figure.get_tightbbox().y0 - MARGIN)  # where the legend was
    root = ET.fromstring(file.getvalue())
    _, _, width, height = (float(part) for part in root.get("viewBox").split())
    groups = {element.get("id"): element for element in root.iter(f"{SVG}g")}
    colours, shown = clean(root, name), _labelled(figure.axes)
    limit_size(root)
    legend = [Entry(key, artist.get_label(), make_swatch(groups[artist.get_gid()])) for key, artist in shown.items()]
    describe(root, name, title, description, width, round(height - below, 1))
    shorten(root)
    titles = [legend.get_title().get_text() for legend in legends]
    svg = Markup(ET.tostring(root, encoding="unicode"))
    return PageFigure(
        name, title, description, svg, width, " ".join(filter(None, titles)), legend, panels, sorted(colours)
    )


@contextmanager
def _without_legends(figure: Figure) -> Iterator[list[Legend]]:
    """Take the legends of the whole figure, or of its subfigures, away for a while. Yields them."""
    parts = [(part, list(part.legends)) for part in (figure, *figure.subfigs)]
    for part, _ in parts:
        part.legends.clear()
    try:
        yield [legend for _, legends in parts for legend in legends]
    finally:
        for part, legends in parts:
            part.legends.extend(legends)


def _labelled(panels: Iterable[Axes]) -> dict[str, Line2D | PathCollection]:
    """The first line or points of each series that have a label, by the series' key."""
    found: dict[str, Line2D | PathCollection] = {}
    for axes in panels:
        for artist in (*axes.lines, *axes.collections):
            series = parse_series_id(artist.get_gid())
            if series and not str(artist.get_label()).startswith("_"):
                found.setdefault(series.key, artist)
    return found


def _read_panel(figure: Figure, axes: Axes) -> Panel | None:
    """The data of a panel's series, or None if it has none."""
    # a line without points has no heights
    empty = [key for key, each in _labelled([axes]).items() if isinstance(each, Line2D) and not len(each.get_xdata())]
    series = {key: each for key, each in _labelled([axes]).items() if key not in empty}
    if not series:
        return None
    height, scale = POINTS * figure.get_figheight(), POINTS / figure.dpi
    extent = axes.get_window_extent()
    box = (extent.x0 * scale, height - extent.y1 * scale, extent.width * scale, extent.height * scale)
    above = (each.get_title() for each in figure.axes if each.get_window_extent().x0 == extent.x0)
    title = _plain(axes.get_title() or axes.get_title(loc="left") or next(above))
    beside = (each.get_ylabel() for each in figure.axes if each.get_window_extent().y0 == extent.y0)
    titles = [_plain(axes.get_xlabel()), _plain(axes.get_ylabel() or next(beside))]
    read = _read_points if any(isinstance(each, PathCollection) for each in series.values()) else _read_lines
    places, keys, table = read(axes, series, titles)
    rows = []
    for x, y, key in places:
        right, up = axes.transData.transform((x, 0 if y is None else y))
        rows.append(Row(round(right * scale, 1), None if y is None else round(height - up * scale, 1), key))
    return Panel(title, tuple(round(each, 1) for each in box), keys, rows, table)


def _plain(text: str) -> str:
    """A label of an axis on one line."""
    return " ".join(text.split())


def _read_lines(axes: Axes, series: dict[str, Line2D], titles: list[str]) -> tuple[list, list[str], PageTable]:
    """The heights of all lines at common positions: at every x of the lines if they are few, else evenly spaced."""
    xs = np.unique(np.concatenate([np.asarray(line.get_xdata(), float) for line in series.values()]))
    most = FEWER if len(series) > MANY else POSITIONS
    if len(xs) > most:
        xs = _round_positions(0 if xs[0] < 0.05 * xs[-1] else xs[0], xs[-1], most)
    columns = [_heights(line, xs) for line in series.values()]
    head = [titles[0], *(line.get_label() for line in series.values())]
    rows = [[_number(x), *(column[i] for column in columns)] for i, x in enumerate(xs)]
    return [(x, None, "") for x in xs], list(series), make_table(head, rows)


def _round_positions(low: float, high: float, most: int) -> np.ndarray:
    """The multiples of a round step from `low` to `high`, at most `most` of them."""
    step = (high - low) / (most - 1)
    power = 10.0 ** np.floor(np.log10(step))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return np.round(np.arange(first, last + 1) * step, 12)


def _heights(line: Line2D, xs: np.ndarray) -> list[str]:
    """The height of a line at each of `xs` as text, with its 95 % interval if it is a share of images in percent."""
    x, y = (np.asarray(each, float) for each in (line.get_xdata(), line.get_ydata()))
    if line.get_drawstyle() == "steps-pre":
        values = np.append(y, 0.0)[np.searchsorted(x, xs - 1e-9)]
    else:
        values = np.interp(xs, x, y, left=np.nan, right=np.nan)
    images = parse_series_id(line.get_gid()).images
    return ["" if np.isnan(value) else _value(value, images) for value in values]


def _value(value: float, images: int | None) -> str:
    """A value as text; if it is a percentage of `images`, with its 95 % Wilson interval."""
    if images is None:
        return _number(value)
    low, high = (100 * float(bound) for bound in wilson_interval(np.float64(value / 100), images))
    return f"{value:.1f} ({max(low, 0):.1f} to {min(high, 100):.1f})"


def _number(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value + 0.0:.4g}"


def _read_points(
    axes: Axes, series: dict[str, Line2D | PathCollection], titles: list[str]
) -> tuple[list, list[str], PageTable]:
    """The position of each point."""
    places, rows = [], []
    for key, artist in series.items():
        if isinstance(artist, PathCollection):
            images = parse_series_id(artist.get_gid()).images
            for x, y in artist.get_offsets().tolist():
                places.append((x, y, key))
                rows.append([artist.get_label(), f"{x:.3g}", _value(y, images)])
    return places, [], make_table(["", *titles], rows)
