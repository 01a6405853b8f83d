"""The figure of latency: certified accuracy against the time to certify an image."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from rrcm.evaluation.metrics import Certificates, best_sigma_table, wilson_interval
from rrcm.methods import METHODS
from rrcm.report.figures import TEXT_COLOR, figure_style, line_style, series_id
from rrcm.report.fonts import text_width
from rrcm.report.panels import columns_that_fit, fewer_images, row_by_row
from rrcm.report.tables import reference_method

NEARLY_EQUAL = 1.3  # ratio of latencies


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

    `latency` has the numbers of `rrcm.report.latency_tables.latency`, which were measured on `device`. The area of a
    marker is proportional to the number of parameters. Vertical lines are 95 % Wilson intervals. A line of steps leads
    along the `pareto_front`. A panel below shows latencies that others have published, the rows of `published`.
    """
    latency = latency.set_index("method").assign(seconds=lambda table: table[f"seconds_n_{n}"])
    handles, label_ends, width = [], fewer_images(certificates), max(2.9 * len(radii), 8.7)
    for method, row in latency.iterrows():
        style = line_style(method) | {"linestyle": "", "markersize": 6}
        style["label"] += f"{label_ends[method]}: {_times(row['ratio'])}, {row['parameters'] / 1e6:.2g} M"
        handles.append(Line2D([], [], **style))
    latency["label"] = [handle.get_label() for handle in handles]
    columns = columns_that_fit([text_width(each.get_label(), 8) / 72 + 0.6 for each in handles], width)
    heights = [2.9 + 0.2 * math.ceil(len(handles) / columns), 0.75 + 0.22 * len(published)]
    figure = Figure(figsize=(width, sum(heights)))
    ours, theirs = figure.subfigures(2, height_ratios=heights)
    panels = ours.subplots(1, len(radii), sharex=True, sharey=True, squeeze=False)[0]
    best = best_sigma_table(certificates, radii).set_index(["method", "radius"])
    for panel, radius in zip(panels, radii, strict=True):
        _draw_panel(panel, latency, best.xs(radius, level="radius"))
        panel.set(title=f"r = {radius:g}", xlabel=f"seconds per image, n = {n:,}")
    panels[0].set(xscale="log", xlim=(latency["seconds"].min() / 2, latency["seconds"].max() * 2), ylim=(0, 102))
    panels[0].set_ylabel("certified accuracy (%), best σ")
    _set_log_ticks(panels[0])
    reference = METHODS[reference_method(latency.index)].label
    meanings = "marker area: number of parameters (M: million); line: Pareto front"
    style = {"title": f"{device}. Time relative to {reference}; {meanings}"}
    style |= {"fontsize": 8, "title_fontsize": 8, "loc": "outside lower center", "ncols": columns}
    ours.legend(handles=row_by_row(handles, columns), **style)
    _draw_published(theirs.subplots(), published)
    return figure


def _draw_panel(panel: Axes, latency: pd.DataFrame, best: pd.DataFrame) -> None:
    """The methods at one radius. The ratio to the reference is written above methods with another latency."""
    largest, tops = latency["parameters"].max(), []
    shares = 100 * best.loc[latency.index, "certified_accuracy"]
    front = pareto_front(latency["seconds"], shares)
    front.append((2 * latency["seconds"].max(), front[-1][1]))  # to the edge of the panel
    style = {"color": TEXT_COLOR, "linewidth": 0.8, "alpha": 0.5, "zorder": 1, "drawstyle": "steps-post"}
    panel.plot(*zip(*front, strict=True), **style)
    for i, (method, row) in enumerate(latency.iterrows()):
        style, share, images = line_style(method), *best.loc[method, ["certified_accuracy", "images"]]
        low, high = (100 * bound for bound in wilson_interval(share, images))
        hollow = style["markerfacecolor"] == "white"
        colours = {"facecolor": "none", "edgecolor": style["color"], "linewidth": 1.4}
        if not hollow:
            colours = {"facecolor": style["color"], "edgecolor": "white", "linewidth": 0.6}
        size = 110 * row["parameters"] / largest
        colours |= {"label": row["label"], "gid": series_id(method, int(images))}
        later = i / len(latency) / 2  # the first method lies on top
        line = {"color": style["color"], "gid": style["gid"], "linewidth": 0.9, "alpha": 0.6, "zorder": 2 - later}
        panel.plot([row["seconds"]] * 2, [low, high], **line)
        colours["zorder"] = 3 - later
        panel.scatter(row["seconds"], 100 * share, size, marker=style["marker"], clip_on=False, **colours)
        tops.append((row["seconds"], row["ratio"], high))
    for group in _neighbours(sorted(tops)):
        seconds, ratios, highs = zip(*group, strict=True)
        if max(ratios[0], 1 / ratios[0]) > NEARLY_EQUAL:
            place = (math.sqrt(seconds[0] * seconds[-1]), max(highs))
            style = {"ha": "center", "fontsize": 7.5, "color": TEXT_COLOR, "annotation_clip": False}
            panel.annotate(_times(np.median(ratios)), place, (0, 2), textcoords="offset points", **style)


def pareto_front(seconds: Iterable[float], shares: Iterable[float]) -> list[tuple[float, float]]:
    """The pairs for which no other pair has a larger share in at most as many seconds. The fastest comes first."""
    front: list[tuple[float, float]] = []
    for second, share in sorted(zip(seconds, shares, strict=True), key=lambda pair: (pair[0], -pair[1])):
        if not front or share > front[-1][1]:
            front.append((second, share))
    return front


def _times(ratio: float) -> str:
    return f"{ratio:.2g}×" if ratio < 0.5 else f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


def _neighbours(points: Sequence[tuple[float, float, float]]) -> list[list[tuple[float, float, float]]]:
    """Group points, which ascend in their first number, so that neighbours with nearly equal ones are together."""
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


def _draw_published(axes: Axes, published: pd.DataFrame) -> None:
    """The latencies that others have published, relative to rRCM's, with one row each."""
    by_label = {kind.label: name for name, kind in METHODS.items()}
    ratios = published["latency"].astype(float)
    for height, (row, ratio) in enumerate(zip(published.itertuples(), ratios, strict=True)):
        style = line_style(by_label[row.method]) | {"markersize": 6, "linestyle": "", "gid": None}
        axes.plot(ratio, height, **style)
        axes.annotate(f"{ratio:g}×", (ratio, height), (7, 0), textcoords="offset points", va="center", fontsize=7.5)
    names = [f"{row.method}, {row.model}".removesuffix(", ") for row in published.itertuples()]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0.7, 3 * ratios.max()), xscale="log")
    _set_log_ticks(axes)
    dataset, n = published.iloc[0][["dataset", "n"]]
    axes.set_xlabel(f"time to certify one image relative to rRCM's, {dataset}, n = {int(n):,}")
    axes.set_title("published by others, not measured here", loc="left", color=TEXT_COLOR, fontsize=8)
