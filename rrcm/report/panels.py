"""Panels and legends of figures that compare methods.

Up to `MAX_TOGETHER` methods share a panel. More are drawn in small multiples: each panel shows one family and rRCM in
colour, with all other methods in grey behind them.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rrcm.evaluation.metrics import Certificates
from rrcm.methods import METHODS, REFERENCE
from rrcm.report.fonts import text_width, truncate

MAX_TOGETHER = 6  # methods in one panel
OTHERS = {"color": "#d4d4d4", "linewidth": 0.8, "zorder": 1}  # style of the methods in grey


class Group(NamedTuple):
    """Methods that a panel shows in colour."""

    title: str  # "" for all methods
    methods: list[str]

    def others(self, methods: Iterable[str]) -> list[str]:
        """Those of `methods` that the panel shows in grey."""
        return [name for name in methods if name not in self.methods]


def panel_groups(methods: Iterable[str]) -> list[Group]:
    """One group of all methods if they are few, else one for each family, with rRCM in each."""
    methods = list(dict.fromkeys(methods))
    if len(methods) <= MAX_TOGETHER:
        return [Group("", methods)]
    families: dict[str, list[str]] = {}
    for name in methods:
        families.setdefault(METHODS[name].family, []).append(name)
    always = [REFERENCE] if REFERENCE in methods else []
    return [Group(family, list(dict.fromkeys([*always, *members]))) for family, members in families.items()]


def fewer_images(certificates: Certificates) -> dict[str, str]:
    """For each method the end of its label: the number of images it certifies, if other methods certify more."""
    images = {method: len(frame) for (method, _), frame in certificates.items()}
    return {name: f" ({count:,} images)" if count < max(images.values()) else "" for name, count in images.items()}


def draw_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Put one legend for all panels below them, in rows, with as many columns as fit.

    The figure grows in height by the second and later rows. A label that is wider than the figure is shortened.
    """
    lines = _labelled_lines(panels)
    width, line_width = figure.get_figwidth(), 0.7  # inches: the whole legend, and a line with the space around it
    texts = {label: truncate(label, 72 * (width - line_width) - 1, 9) for label in lines}
    columns = columns_that_fit([text_width(text, 9) / 72 + line_width for text in texts.values()], width)
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(lines) / columns) - 1))
    labels = row_by_row(list(lines), columns)
    handles, texts = [lines[label] for label in labels], [texts[label] for label in labels]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, handlelength=2.4)


def draw_legends(figure: Figure, rows: np.ndarray, groups: Sequence[Group]) -> None:
    """One legend below all panels, or for several groups one to the right of each row of panels."""
    if len(groups) == 1:
        draw_legend(figure, rows.flat)
        return
    for row, group in zip(rows, groups, strict=True):
        lines = _labelled_lines(row)
        texts = [truncate(text, 150, 8) for text in lines]
        place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.04), "alignment": "left"}
        row[-1].legend(lines.values(), texts, title=group.title, fontsize=8, handlelength=2.4, **place)


def _labelled_lines(panels: Iterable[Axes]) -> dict[str, Line2D]:
    """The lines of all panels by their labels."""
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    return {label: line for label, line in lines.items() if not re.fullmatch(r"_child\d+", label)}  # "_childN": none


def columns_that_fit(widths: Sequence[float], width: float) -> int:
    """The most columns in which entries of these widths, row by row, stay narrower than `width`; at least 1."""

    def fit(columns: int) -> bool:
        return sum(max(widths[column::columns]) for column in range(columns)) < width

    return max((n for n in range(1, 1 + len(widths)) if fit(n)), default=1)


def row_by_row(entries: Sequence, columns: int) -> list:
    """The order in which matplotlib, which fills a legend column by column, shows the entries row by row."""
    return [entry for column in range(columns) for entry in entries[column::columns]]
