"""The figures, in one style, as PNG and SVG files that are byte-identical when drawn again.

Each function returns a figure, and `save` writes it. The colours are those of Okabe and Ito, which colour-blind readers
can tell apart. A method has the same colour in every figure, and its family the same marker. Methods at equal total
compute are dashed, with hollow markers. More than `MAX_TOGETHER` methods are drawn in small multiples: one family in
each, with rRCM, and all others in grey behind them. Letters that DejaVu Sans lacks, as in Chinese names, are drawn in a
font of the machine.
"""

import functools
import io
import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import ROUND_DOWN, Decimal
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from rrcm.certification.results import ABSTAIN
from rrcm.evaluation.metrics import Certificates, best_sigma_table, envelope, wilson_interval
from rrcm.methods import METHODS, REFERENCE
from rrcm.report.tables import reference_method
from rrcm.utils.errors import UNPRINTABLE
from rrcm.utils.files import atomic_path

FONT = "DejaVu Sans"  # comes with matplotlib: the same glyphs on every machine
NO_LETTERS = "Last Resort"  # a font of boxes, which comes with matplotlib
CJK = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}  # first words of the names of characters
STYLE = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "rrcm",  # else element names are random
}
OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = {  # by family
    "rRCM": "o",
    "other pre-training": "v",
    "noise": "s",
    "regularization": "^",
    "adversarial": "D",
    "ensemble": "P",
    "denoise, then classify": "X",
}
MAX_TOGETHER = 6  # methods in one panel
NEARLY_EQUAL = 1.3  # ratio of latencies
MARKS = 4  # markers on a curve
OTHERS = {"color": "#d4d4d4", "linewidth": 0.8, "zorder": 1}  # methods behind those of a panel
EXTERNAL_STYLES = list(product([(0, (1, 1)), (0, (3, 1, 1, 1))], ["#000000", "#808080"]))  # dashes, colour
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}  # metadata left out of the files
RADIUS_LABEL = "L2 radius r (pixels in [0, 1])"
TEXT_COLOR = "#404040"
NOT_LOSSES = {"step", "loss", "grad_norm", "levels", "teacher_decay", "lr"}  # columns of a pre-training's history


class Thumbnail(NamedTuple):
    """An image of a gallery and the smoothed classifier's answer to it."""

    pixels: np.ndarray  # (H, W, C), in [0, 1]
    label: str  # the true class; in `draw_certified_images` the file's name
    predict: str  # the predicted class; "" when the classifier abstains
    radius: float  # L2, pixel units
    verdict: str  # a key of VERDICTS


# sign, colour, line style; colour is never the only difference
VERDICTS = {"correct": ("✓", OKABE_ITO[2], "-"), "wrong": ("✗", OKABE_ITO[1], "--"), "abstains": ("?", "#606060", ":")}


def verdict(predict: int, label: int) -> str:
    """The key of VERDICTS for a predicted class (or `ABSTAIN`) and the true one."""
    return "abstains" if predict == ABSTAIN else "correct" if predict == label else "wrong"


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw with `STYLE` alone: neither a matplotlibrc nor earlier settings have an effect inside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@figure_style()
def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` atomically, without date or version. The suffix of `path` must be in `FORMATS`."""
    with atomic_path(path) as scratch:
        scratch.write_bytes(encode(figure, path.suffix))


@figure_style()
def encode(figure: Figure, suffix: str) -> bytes:
    """The file that `save` writes for a suffix."""
    set_fonts(figure)
    file = io.BytesIO()
    figure.savefig(file, format=suffix[1:], metadata=FORMATS[suffix])
    return file.getvalue()


def save_all(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure into `folder` under its name, in every format."""
    for name, figure in drawn.items():
        for suffix in FORMATS:
            save(figure, folder / f"{name}{suffix}")


def line_style(method: str) -> dict:
    """Colour, line style, marker and label of a row of the method table, as arguments of `Axes.plot`."""
    row = METHODS[method]
    matched = row.matched
    return {
        "color": row.colour,
        "linestyle": (0, (4, 1.5)) if matched else "-",
        "marker": MARKERS[row.family],
        "markersize": 4.5,
        "markerfacecolor": "white" if matched else row.colour,
        "markeredgewidth": 1.2,
        "label": row.label,
    }


class Group(NamedTuple):
    """Methods that a panel shows in colour."""

    title: str  # "" for all methods
    methods: list[str]


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


def _draw_curve(
    axes: Axes, frames: Iterable[pd.DataFrame], phase: float = 0.5, **style: object
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the envelope of `frames` and return its radii and accuracies (shares).

    An accuracy holds up to and including its radius. If the curve falls right after r = 0, as it can with radii on a
    grid, a marker shows the value at r = 0. `phase` in [0, 1] moves the other markers, so that curves differ in it.
    """
    radii, accuracy = envelope(frames)
    falls = accuracy[1] < accuracy[0] and "label" in style
    marks = np.searchsorted(radii[:-1], radii[-1] * (np.arange(MARKS) + phase) / MARKS).clip(max=len(radii) - 2)
    marked = sorted({*([0] if falls else []), *marks.tolist()})
    axes.plot(radii, 100 * accuracy, drawstyle="steps-pre", markevery=marked, clip_on=False, **style)
    if falls and "marker" not in style:
        axes.plot(0, 100 * accuracy[0], "o", markersize=4, clip_on=False, zorder=3, color=style["color"])
    return radii, accuracy


def _fewer_images(certificates: Certificates) -> dict[str, str]:
    """What follows the label of each method: how many images it certifies, if others certify more."""
    images = {method: len(frame) for (method, _), frame in certificates.items()}
    return {name: f" ({count:,} images)" if count < max(images.values()) else "" for name, count in images.items()}


def _others(methods: Iterable[str], group: Group) -> list[str]:
    return [name for name in methods if name not in group.methods]


def _phases(count: int) -> list[float]:
    """`phase` of so many curves in one panel."""
    return [(i + 0.5) / count for i in range(count)]


def _set_curve_axes(axes: Axes, reach: float) -> None:
    """Labels and limits of a panel of curves that end at radius `reach`."""
    axes.set(xlabel=RADIUS_LABEL, xlim=(0, 1.03 * reach), ylim=(0, 102))


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Put one legend for all panels below them, in rows, with as many columns as fit.

    The figure grows in height by the second and later rows. A label that is wider than the figure is shortened.
    """
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    labels = [label for label in lines if not re.fullmatch(r"_child\d+", label)]  # matplotlib's name for "no label"
    width, line_width = figure.get_figwidth(), 0.7  # inches; of the whole legend, and of a line with its spaces
    texts = {label: _truncate(label, 72 * (width - line_width) - 1, 9) for label in labels}
    columns = _columns_that_fit([_text_width(texts[label], 9) / 72 + line_width for label in labels], width)
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(labels) / columns) - 1))
    labels = _row_by_row(labels, columns)
    handles, texts = [lines[label] for label in labels], [texts[label] for label in labels]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, handlelength=2.4)


def _columns_that_fit(widths: Sequence[float], width: float) -> int:
    """The most columns for entries of these widths, row by row, that are together narrower than `width`; at least 1."""

    def fit(columns: int) -> bool:
        return sum(max(widths[column::columns]) for column in range(columns)) < width

    return max((n for n in range(1, 1 + len(widths)) if fit(n)), default=1)


def _row_by_row(entries: Sequence, columns: int) -> list:
    """The order in which matplotlib, which fills a legend down its columns, shows the entries row by row."""
    return [entry for column in range(columns) for entry in entries[column::columns]]


@figure_style()
def draw_certified_accuracy(certificates: Certificates, external: Certificates) -> Figure:
    """Exact curves of certified accuracy against radius: a column of panels per sigma, a row per group of methods.

    Bands are 95 % Wilson intervals, drawn for solid lines only. `external` holds other groups' certificates by (label,
    sigma). They appear in the panels of their sigma, if there is one: of many methods, in a row of their own.
    """
    sigmas = sorted({sigma for _, sigma in certificates})
    groups = panel_groups(method for method, _ in certificates)
    labels = list(dict.fromkeys(label for label, sigma in external if sigma in sigmas))
    styles = {
        label: {"color": colour, "linestyle": dashes, "label": label}
        for label, (dashes, colour) in zip(labels, cycle(EXTERNAL_STYLES), strict=False)
    }
    many = len(groups) > 1
    rows = [(group, [] if many else labels) for group in groups]
    if many and labels:
        rows.append((Group("other groups", groups[0].methods[:1]), labels))
    figure = Figure(figsize=(max(3.4 * len(sigmas), 4.2) + 2.2 * many, 0.6 + 2.3 * len(rows) if many else 3.6))
    panels = figure.subplots(len(rows), len(sigmas), sharey=True, sharex="col", squeeze=False)
    for place, sigma in enumerate(sigmas):
        of_sigma, others = _of_sigma(certificates, sigma), _of_sigma(external, sigma)
        reach = 0.0
        for panel, (group, shown) in zip(panels[:, place], rows, strict=True):
            reach = max(reach, _draw_group(panel, of_sigma, group, _fewer_images(certificates)))
            for label in [label for label in shown if label in others]:
                radii, _ = _draw_curve(panel, [others[label]], **styles[label])
                reach = max(reach, radii[-1])
        for panel in panels[:, place]:
            _set_curve_axes(panel, reach or sigma)
            panel.label_outer()
        panels[0, place].set_title(f"σ = {sigma:g}")
    for row in panels:
        row[0].set_ylabel("certified accuracy (%)")
    _legends(figure, panels, [group for group, _ in rows])
    return figure


def _draw_group(panel: Axes, frames: Mapping[str, pd.DataFrame], group: Group, label_ends: Mapping[str, str]) -> float:
    """The curves of one sigma: those of `group` in colour with their intervals, others in grey. Returns their reach."""
    reach = 0.0
    for method in _others(frames, group):
        radii, _ = _draw_curve(panel, [frames[method]], **OTHERS)
        reach = max(reach, radii[-1])
    for method, phase in zip(group.methods, _phases(len(group.methods)), strict=True):
        style, frame = line_style(method), frames[method]
        style["label"] += label_ends[method]
        radii, accuracy = _draw_curve(panel, [frame], phase, **style)
        if style["linestyle"] == "-":
            low, high = (100 * bound for bound in wilson_interval(accuracy[:-1], len(frame)))
            panel.fill_between(radii[:-1], low, high, step="pre", color=style["color"], alpha=0.12, linewidth=0)
        reach = max(reach, radii[-1])
    return reach


def _legends(figure: Figure, rows: np.ndarray, groups: Sequence[Group]) -> None:
    """One legend below all panels, or for several groups one at the right of each row of panels."""
    if len(groups) == 1:
        _legend(figure, rows.flat)
        return
    for row, group in zip(rows, groups, strict=True):
        lines = {
            line.get_label(): line for axes in row for line in axes.get_lines() if line.get_label()[:6] != "_child"
        }
        texts = [_truncate(text, 150, 8) for text in lines]
        place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.04), "alignment": "left"}
        row[-1].legend(lines.values(), texts, title=group.title, fontsize=8, handlelength=2.4, **place)


def _of_sigma(certificates: Certificates, sigma: float) -> dict[str, pd.DataFrame]:
    return {name: frame for (name, of), frame in certificates.items() if of == sigma}


@figure_style()
def draw_envelope(certificates: Certificates) -> Figure:
    """Certified accuracy against radius, with the best sigma at each radius: a line per method, a panel per group."""
    of_method: dict[str, list[pd.DataFrame]] = {}
    for (method, _), frame in certificates.items():
        of_method.setdefault(method, []).append(frame)
    groups, label_ends = panel_groups(of_method), _fewer_images(certificates)
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.6, 4.2) if len(groups) == 1 else (5.6 * columns, 0.4 + 2.6 * rows))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.remove()
    shown, reach = panels.flat[: len(groups)], 0.0
    for panel, group in zip(shown, groups, strict=True):
        for method in _others(of_method, group):
            _draw_curve(panel, of_method[method], **OTHERS)
        for method, phase in zip(group.methods, _phases(len(group.methods)), strict=True):
            style = line_style(method)
            style["label"] += label_ends[method]
            radii, _ = _draw_curve(panel, of_method[method], phase, **style)
            reach = max(reach, radii[-1])
    for panel in shown:
        _set_curve_axes(panel, reach or 1)
        panel.set_ylabel("certified accuracy (%)")
    for panel in shown[:columns]:
        panel.set_title("best σ at each radius")
    _legends(figure, shown[:, None], groups)
    return figure


@figure_style()
def draw_comparison(certificates: Mapping[str, pd.DataFrame]) -> Figure:
    """Exact curves of certified accuracy against radius, one line per name."""
    figure = Figure(figsize=(5.6, 4.2))
    axes = figure.subplots()
    reach = 0.0
    line_styles = cycle(product(["-", "--", ":"], OKABE_ITO))
    for (name, frame), (dashes, colour) in zip(certificates.items(), line_styles, strict=False):
        radii, _ = _draw_curve(axes, [frame], linestyle=dashes, color=colour, label=name)
        reach = max(reach, radii[-1])
    _set_curve_axes(axes, reach or 1)
    axes.set_ylabel("certified accuracy (%)")
    _legend(figure, [axes])
    return figure


@figure_style()
def draw_attack(
    method: str,
    certificates: Mapping[float, pd.DataFrame],
    radii: Sequence[float],
    summaries: Mapping[float, Mapping[str, Sequence[float]]],
) -> Figure:
    """Certified accuracy and accuracy under attack within each of `radii`, with one panel per sigma.

    `summaries` are the results of `attack.summarize` by sigma. In the shaded area between the two black lines the
    attacked classifier abstains.
    """
    figure = Figure(figsize=(max(3.4 * len(certificates), 4.2), 3.6))
    panels = figure.subplots(1, len(certificates), sharey=True, squeeze=False)[0]
    for panel, (sigma, frame) in zip(panels, sorted(certificates.items()), strict=True):
        summary = summaries[sigma]
        correct, not_wrong, unsmoothed = (
            100 * np.array(summary[name]) for name in ("accuracy", "not_wrong", "unsmoothed_accuracy")
        )
        certified = line_style(method) | {"label": f"{METHODS[method].label}, certified"}
        reach, _ = _draw_curve(panel, [frame], **certified)
        panel.plot(radii, correct, "o-", color="black", markersize=4, label="correct under attack", clip_on=False)
        panel.plot(radii, not_wrong, ":", color="black", label="correct or abstains under attack")
        panel.fill_between(radii, correct, not_wrong, color="black", alpha=0.08, linewidth=0)
        panel.plot(radii, unsmoothed, "s--", color="#808080", markersize=4, label="correct under attack, not smoothed")
        _set_curve_axes(panel, max(radii[-1], reach[-1]))
        panel.set_title(f"σ = {sigma:g}: {summary['broken']} of {summary['certificates']} certificates broken")
    panels[0].set_ylabel("accuracy (%)")
    _legend(figure, panels)
    return figure


@figure_style()
def draw_latency(
    latency: pd.DataFrame,
    certificates: Certificates,
    radii: Sequence[float],
    n: int,
    device: str,
    published: pd.DataFrame,
) -> Figure:
    """Certified accuracy (best sigma) against the seconds to certify one image with `n` samples: a panel per radius.

    `latency` is the table of `rrcm.report.tables.latency` in numbers, `device` what it was measured on. The area of a
    marker is proportional to the number of parameters. Vertical lines are 95 % Wilson intervals. Below is a panel of
    its own with the latencies of others, the rows of `published`.
    """
    latency = latency.set_index("method").assign(seconds=lambda table: table[f"seconds_n_{n}"])
    handles, label_ends, width = [], _fewer_images(certificates), max(2.9 * len(radii), 8.7)
    for method, row in latency.iterrows():
        style = line_style(method) | {"linestyle": "", "markersize": 6}
        style["label"] += f"{label_ends[method]}: {_times(row['ratio'])}, {row['parameters'] / 1e6:.2g} M"
        handles.append(Line2D([], [], **style))
    columns = _columns_that_fit([_text_width(each.get_label(), 8) / 72 + 0.6 for each in handles], width)
    heights = [2.9 + 0.2 * math.ceil(len(handles) / columns), 0.75 + 0.22 * len(published)]
    figure = Figure(figsize=(width, sum(heights)))
    ours, theirs = figure.subfigures(2, height_ratios=heights)
    panels = ours.subplots(1, len(radii), sharex=True, sharey=True, squeeze=False)[0]
    best = best_sigma_table(certificates, radii).set_index(["method", "radius"])
    for panel, radius in zip(panels, radii, strict=True):
        _draw_latency_panel(panel, latency, best.xs(radius, level="radius"))
        panel.set(title=f"r = {radius:g}", xlabel=f"seconds per image, n = {n:,}")
    panels[0].set(xscale="log", xlim=(latency["seconds"].min() / 2, latency["seconds"].max() * 2), ylim=(0, 102))
    panels[0].set_ylabel("certified accuracy (%), best σ")
    _set_log_ticks(panels[0])
    reference = METHODS[reference_method(latency.index)].label
    style = {"title": f"{device}. Time relative to {reference}; marker area: number of parameters (M: million)"}
    style |= {"fontsize": 8, "title_fontsize": 8, "loc": "outside lower center", "ncols": columns}
    ours.legend(handles=_row_by_row(handles, columns), **style)
    _draw_published_latencies(theirs.subplots(), published)
    return figure


def _draw_latency_panel(panel: Axes, latency: pd.DataFrame, best: pd.DataFrame) -> None:
    """The methods at one radius. Above those that are clearly slower or faster than the reference is the ratio."""
    largest, tops = latency["parameters"].max(), []
    for method, row in latency[::-1].iterrows():  # the first method lies on top
        style, share, images = line_style(method), *best.loc[method, ["certified_accuracy", "images"]]
        low, high = (100 * bound for bound in wilson_interval(share, images))
        hollow = style["markerfacecolor"] == "white"
        look = {"facecolor": "none" if hollow else style["color"], "edgecolor": style["color"] if hollow else "white"}
        look |= {"marker": style["marker"], "linewidth": 1.4 if hollow else 0.6, "zorder": 3, "clip_on": False}
        size = 110 * row["parameters"] / largest
        panel.plot([row["seconds"]] * 2, [low, high], color=style["color"], linewidth=0.9, alpha=0.6, zorder=2)
        panel.scatter(row["seconds"], 100 * share, size, **look)
        tops.append((row["seconds"], row["ratio"], high))
    for group in _neighbours(sorted(tops)):
        seconds, ratios, highs = zip(*group, strict=True)
        if max(ratios[0], 1 / ratios[0]) > NEARLY_EQUAL:
            place = (math.sqrt(seconds[0] * seconds[-1]), max(highs))
            style = {"ha": "center", "fontsize": 7.5, "color": TEXT_COLOR, "annotation_clip": False}
            panel.annotate(_times(np.median(ratios)), place, (0, 2), textcoords="offset points", **style)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def _neighbours(points: Sequence[tuple[float, float, float]]) -> list[list[tuple[float, float, float]]]:
    """Points in ascending order of their first number, with those together that are nearly equal in it."""
    groups = [[points[0]]]
    for point in points[1:]:
        if point[0] < NEARLY_EQUAL * groups[-1][-1][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _set_log_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_published_latencies(axes: Axes, published: pd.DataFrame) -> None:
    """The latencies of others relative to rRCM's, one row each."""
    by_label = {kind.label: name for name, kind in METHODS.items()}
    ratios = published["latency"].astype(float)
    for height, (row, ratio) in enumerate(zip(published.itertuples(), ratios, strict=True)):
        style = line_style(by_label[row.method]) | {"markersize": 6, "linestyle": ""}
        axes.plot(ratio, height, **style)
        axes.annotate(f"{ratio:g}×", (ratio, height), (7, 0), textcoords="offset points", va="center", fontsize=7.5)
    names = [f"{row.method}, {row.model}".removesuffix(", ") for row in published.itertuples()]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0.7, 3 * ratios.max()), xscale="log")
    _set_log_ticks(axes)
    dataset, n = published.iloc[0][["dataset", "n"]]
    axes.set_xlabel(f"time to certify one image relative to rRCM's, {dataset}, n = {int(n):,}")
    axes.set_title("published by others, not measured here", loc="left", color=TEXT_COLOR, fontsize=8)


@figure_style()
def draw_training(pretraining: Mapping[str, pd.DataFrame], finetuning: pd.DataFrame) -> Figure:
    """Pre-training losses (nats) with the number of noise levels, and validation accuracy under noise per sigma.

    `pretraining` holds the history of each pre-training objective; each gets a panel above that of its levels.
    `finetuning` has one row per evaluation: method, sigma, compute (encoder forward passes, including the share of the
    pre-training), val_accuracy (a share, or missing), selected (bool). The marker of a line is at the selected weights.
    """
    sigmas = sorted(finetuning["sigma"].unique())
    groups = panel_groups(finetuning["method"])
    layout, ratios = _training_layout(list(pretraining), sigmas, len(groups))
    width = 2.9 * len(layout[0]) + 2.2 * (len(groups) > 1)
    figure = Figure(figsize=(max(width, 4.2), 0.4 + 0.78 * sum(ratios)))
    panels = figure.subplot_mosaic(layout, height_ratios=ratios)
    for name, history in pretraining.items():
        _draw_pretraining(panels[f"{name} loss"], panels[f"{name} levels"], history)
        panels[f"{name} loss"].set_title("pre-training" if len(pretraining) == 1 else f"pre-training, {name}")
    rows = np.array([[panels[f"{row} {sigma}"] for sigma in sigmas] for row in range(len(groups))])
    for place, sigma in enumerate(sigmas):
        runs = dict(iter(finetuning[finetuning["sigma"] == sigma].groupby("method", sort=False)))
        most = max(run["compute"].max() for run in runs.values())
        for panel, group in zip(rows[:, place], groups, strict=True):
            _draw_finetuning(panel, runs, group)
            panel.set(ylim=(0, 102), xlim=(0, 1.04 * most))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.tick_params(labelleft=place == 0, labelbottom=panel is rows[-1, place])
        rows[0, place].set_title(f"fine-tuning, σ = {sigma:g}")
        rows[-1, place].set_xlabel("compute (encoder forward passes)")
    for row in rows:
        row[0].set_ylabel("validation accuracy\nunder noise (%)")
    _legends(figure, rows, groups)
    return figure


def _training_layout(
    objectives: Sequence[str], sigmas: Sequence[float], groups: int
) -> tuple[list[list[str]], list[float]]:
    """Rows of panels and their relative heights: pre-training to the left of fine-tuning, or above if there is much."""
    if len(objectives) <= 1 and groups == 1:
        rows = [
            [*(f"{name} {part}" for name in objectives), *(f"0 {s}" for s in sigmas)] for part in ("loss", "levels")
        ]
        return rows, [3, 1]
    width = max(len(sigmas), min(3, len(objectives)))
    layout, ratios = [], []
    for first in range(0, len(objectives), width):
        names = objectives[first : first + width]
        layout += [[f"{name} {part}" for name in names] for part in ("loss", "levels")]
        ratios += [2.4, 1.1]
    for row in range(groups):
        layout.append([f"{row} {sigma}" for sigma in sigmas])
        ratios.append(2.8)
    return [[*row, *["."] * (width - len(row))] for row in layout], ratios


def _draw_finetuning(panel: Axes, runs: Mapping[str, pd.DataFrame], group: Group) -> None:
    """The validation accuracies of one sigma: those of `group` in colour, others in grey."""
    for method in [*_others(runs, group), *group.methods]:
        evaluated = runs[method].dropna(subset="val_accuracy")
        kept = np.flatnonzero(evaluated["selected"]).tolist()
        style = line_style(method) | {"markevery": kept} if method in group.methods else OTHERS
        panel.plot(evaluated["compute"], 100 * evaluated["val_accuracy"], **style)


def _draw_pretraining(losses: Axes, levels: Axes, history: pd.DataFrame) -> None:
    """The terms of a pre-training's loss above, the number of noise levels below."""
    terms = [name for name in history.columns if name not in NOT_LOSSES]
    for name, dashes in zip(terms, cycle(["-", ":", "--", "-."]), strict=False):
        losses.plot(history["step"], history[name], color=TEXT_COLOR, linestyle=dashes, label=name)
    losses.set(ylabel="loss" if "reconstruction" in terms else "loss (nats)", ylim=(0, None))
    losses.tick_params(labelbottom=False)
    losses.legend()
    name, label = ("levels", "levels N") if "levels" in history else ("lr", "learning rate")  # only rRCM has levels
    levels.step(history["step"], history[name], where="post", color=TEXT_COLOR)
    levels.set(xlabel="step", ylabel=label, ylim=(0, None))
    levels.sharex(losses)


@figure_style()
def draw_representation(representations: Mapping[str, pd.DataFrame]) -> Figure:
    """Evaluations of the representations during pre-training, with one row of panels per objective.

    Each frame is a representation.csv: one row per step and pixel sigma (0: clean images), with the columns of
    `rrcm.evaluation.representations.evaluate`.
    """
    figure = Figure(figsize=(8.7, 0.4 + 2.7 * len(representations)))
    rows = figure.subplots(len(representations), 3, squeeze=False)
    for (accuracy, cosine, centred), (name, frame) in zip(rows, representations.items(), strict=True):
        sigmas = sorted(frame["sigma"].unique())
        shades = np.linspace(0.75, 0.0, len(sigmas))
        for sigma, shade, marker in zip(sigmas, shades, cycle("osD^v"), strict=False):
            run = frame[frame["sigma"] == sigma]
            style = {"color": matplotlib.colormaps["cividis"](shade), "marker": marker, "markersize": 3.5}
            label = f"σ = {sigma:g}" if sigma else "clean"
            accuracy.plot(run["step"], 100 * run["knn"], label=label, **style)
            if sigma:
                cosine.plot(run["step"], run["same_image_cosine"], **style)
                cosine.plot(run["step"], run["cross_image_cosine"], linestyle=":", linewidth=1, **style)
                centred.plot(run["step"], run["centred_cosine"], **style)
        cosine.plot([], [], "-", color=TEXT_COLOR, label="same image")
        cosine.plot([], [], ":", color=TEXT_COLOR, linewidth=1, label="other images")
        before = "" if len(representations) == 1 else f"{name}: "
        accuracy.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102), title=f"{before}k-NN accuracy")
        for axes, title in ((cosine, "cosine, noisy to clean"), (centred, "cosine, same image, centred")):
            axes.set(xlabel="step", ylabel="mean cosine", title=title)
            axes.set_ylim(min(0, axes.get_ylim()[0]), 1.02)
    _legend(figure, rows[0])
    return figure


@figure_style()
def draw_gallery(clean: Sequence[np.ndarray], noisy: Mapping[float, Sequence[Thumbnail]], label: str) -> Figure:
    """Test images in columns: clean in the first row, then one row per sigma with the answers of method `label`.

    `clean` holds images (H, W, C) in [0, 1] and `noisy` as many thumbnails per sigma.
    """
    sigmas = sorted(noisy)
    figure = Figure(figsize=(max(0.3 + 1.05 * len(clean), 4.2), 1.42 * (1 + len(sigmas)) + 0.2))
    grid = figure.subplots(1 + len(sigmas), len(clean), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    for axes, pixels, thumbnail in zip(grid[0], clean, noisy[sigmas[0]], strict=True):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_xlabel(_truncate(thumbnail.label, 68, 7.5), fontsize=7.5, labelpad=2)
        axes.spines[:].set(color=TEXT_COLOR, linewidth=0.8)
    grid[0, 0].set_ylabel("clean\n(true class)", fontsize=8)
    for row, sigma in zip(grid[1:], sigmas, strict=True):
        row[0].set_ylabel(f"σ = {sigma:g}", fontsize=8)
        for axes, thumbnail in zip(row, noisy[sigma], strict=True):
            sign, colour, dashes = VERDICTS[thumbnail.verdict]
            axes.imshow(thumbnail.pixels, cmap="gray", vmin=0, vmax=1)
            axes.spines[:].set(color=colour, linestyle=dashes, linewidth=2)
            uncertified = thumbnail.verdict == "abstains" or (thumbnail.verdict == "wrong" and thumbnail.radius == 0)
            radius = "" if uncertified else f"r = {rounded_down(thumbnail.radius)}"
            answer = _truncate(f"{sign} {thumbnail.predict or thumbnail.verdict}", 68, 7.5)
            axes.set_xlabel(f"{answer}\n{radius}", fontsize=7.5, color=colour, labelpad=3)
    key = [Line2D([], [], color=c, linestyle=s, linewidth=2, label=f"{v} ({g})") for v, (g, c, s) in VERDICTS.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{label}: predicted class and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure


def rounded_down(radius: float) -> str:
    """`radius` with three decimals, never rounded up: the text must not claim more than is certified."""
    return str(Decimal(str(radius)).quantize(Decimal("0.001"), ROUND_DOWN))


@figure_style()
def draw_certified_images(thumbnails: Sequence[Thumbnail], settings: str) -> Figure:
    """Images with `label` above and the predicted class with its certified radius below.

    `settings` is the first line of the title. A verdict may also be "certified": the true class is unknown.
    """
    columns = min(len(thumbnails), 8)
    rows = -(-len(thumbnails) // columns)
    figure = Figure(figsize=(max(1.25 * columns, 4.2), 1.62 * rows + 0.55))
    grid = figure.subplots(rows, columns, squeeze=False)
    verdicts = {"certified": ("", TEXT_COLOR, "-")} | VERDICTS
    for axes in grid.flat[len(thumbnails) :]:
        axes.set_axis_off()
    for axes, thumbnail in zip(grid.flat, thumbnails, strict=False):
        sign, colour, dashes = verdicts[thumbnail.verdict]
        axes.imshow(thumbnail.pixels, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=colour, linestyle=dashes, linewidth=2)
        axes.set_title(_truncate(thumbnail.label, 80, 6.5), fontsize=6.5, color=TEXT_COLOR, pad=3)
        answer = _truncate(f"{sign} {thumbnail.predict or thumbnail.verdict}".strip(), 80, 7.5)
        radius = f"r = {rounded_down(thumbnail.radius)}" if thumbnail.predict else ""
        axes.set_xlabel(f"{answer}\n{radius}", fontsize=7.5, color=colour, labelpad=3)
    figure.suptitle(f"{settings}\nclass and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure


def set_fonts(figure: Figure) -> None:
    """Give each text of `figure` whose letters `FONT` lacks the installed fonts that have them."""
    for text in figure.findobj(Text):
        if len(families := _families(text.get_text())) > 1:
            text.set_fontfamily(families)


def note_on_letters(names: Iterable[str]) -> str | None:
    """One line if `names` have letters that no installed font has, so that figures show boxes instead."""
    signs = {sign for name in names for sign in name if not UNPRINTABLE.match(sign) and not sign.isspace()}
    missing = sorted(sign for sign in signs if _family_of(sign) is None)
    if not missing:
        return None
    script = unicodedata.name(missing[0], "unnamed").split()[0]
    font = f"Noto Sans {'CJK' if script in CJK else script.title()}"
    shown = " ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
    return f"no font here has {shown} ({script}), so figures show boxes; install one that has, such as {font}"


def _families(text: str) -> list[str]:
    """`FONT`, and the installed fonts that have what it lacks of `text`."""
    return list(dict.fromkeys([FONT, *sorted(family for sign in set(text) if (family := _family_of(sign)))]))


@functools.cache
def _family_of(sign: str) -> str | None:
    """`FONT` if it has the character, else the first family that has, sans-serif before others; None if none has."""
    if ord(sign) in _glyphs(findfont(FONT)):
        return FONT
    regular = {e.name: e.fname for e in fontManager.ttflist if (e.style, e.weight) == ("normal", 400)}
    names = sorted(regular, key=lambda name: ("Sans" not in name, name))
    return next((name for name in names if NO_LETTERS not in name and ord(sign) in _glyphs(regular[name])), None)


@functools.cache
def _glyphs(path: str) -> frozenset[int]:
    return frozenset(get_font(path).get_charmap())


def _truncate(text: str, width: float, size: float) -> str:
    """`text` as a label of at most `width` points at font size `size`; its middle is cut out if necessary.

    A dollar sign starts no formula. A box replaces each character that no font here has, and each that has no shape of
    its own, such as a line break.
    """
    text = "".join("□" if UNPRINTABLE.match(sign) or _family_of(sign) is None else sign for sign in text)
    if _text_width(text, size) > width:

        def cut(kept: int) -> str:
            return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"

        text = cut(bisect_right(range(1, len(text)), width, key=lambda kept: _text_width(cut(kept), size)))
    return text.replace("$", r"\$")


def _text_width(text: str, size: float) -> float:
    """The width of `text`, without formulas, in points at font size `size`."""
    font = get_font([findfont(family) for family in _families(text)])
    font.set_size(size, 7200)  # a hundred pixels per point
    font.set_text(text)
    return font.get_width_height()[0] / 6400  # in 64ths of a pixel
