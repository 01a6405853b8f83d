"""Figures of certified accuracy against radius: by sigma, with the best sigma, of any files, and beside an attack."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rrcm.evaluation.metrics import Certificates, envelope, wilson_interval
from rrcm.methods import CASCADE, METHODS
from rrcm.report.figures import OKABE_ITO, figure_style, line_style, parse_series_id, series_id
from rrcm.report.panels import OTHERS, Group, draw_legend, draw_legends, fewer_images, panel_groups

MARKS = 4  # markers on a curve
EXTERNAL_DASHES = [(0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2)), (0, (6, 1, 1, 1, 1, 1))]
EXTERNAL_STYLES = list(product(EXTERNAL_DASHES, ["#000000", "#808080"]))  # dashes, colour


@figure_style()
def draw_certified_accuracy(certificates: Certificates, external: Certificates) -> Figure:
    """Exact curves of certified accuracy against radius: a column of panels per sigma, a row per group of methods.

    Bands are 95 % Wilson intervals, drawn for solid lines only. `external` holds other groups' certificates by (label,
    sigma). They appear in the panels of their sigma, if there is one. If there is a row for each family of methods,
    they have a row of their own.
    """
    sigmas = sorted({sigma for _, sigma in certificates})
    groups, label_ends = panel_groups(method for method, _ in certificates), fewer_images(certificates)
    labels = list(dict.fromkeys(label for label, sigma in external if sigma in sigmas))
    styles = {
        label: {"color": colour, "linestyle": dashes, "label": label, "gid": series_id(f"external-{i}")}
        for i, (label, (dashes, colour)) in enumerate(zip(labels, cycle(EXTERNAL_STYLES), strict=False))
    }
    many = len(groups) > 1
    rows = [(group, [] if many else labels) for group in groups]
    if many and labels:
        rows.append((Group("other groups", groups[0].methods[:1]), labels))
    figure = Figure(figsize=(max(3.4 * len(sigmas), 4.2) + 2.2 * many, 0.6 + 2.3 * len(rows) if many else 3.6))
    panels = figure.subplots(len(rows), len(sigmas), sharey=True, sharex="col", squeeze=False)
    for column, sigma in zip(panels.T, sigmas, strict=True):
        own, others = _of_sigma(certificates, sigma), _of_sigma(external, sigma)
        reach = 0.0
        for panel, (group, shown) in zip(column, rows, strict=True):
            reach = max(reach, _draw_group(panel, own, group, label_ends, bands=True))
            for label in [label for label in shown if label in others]:
                radii, _ = draw_curve(panel, others[label], **styles[label])
                reach = max(reach, radii[-1])
        for panel in column:
            set_axes(panel, reach or sigma)
            panel.label_outer()
        column[0].set_title(f"σ = {sigma:g}")
    for row in panels:
        row[0].set_ylabel("certified accuracy (%)")
    draw_legends(figure, panels, [group for group, _ in rows])
    return figure


@figure_style()
def draw_envelope(certificates: Certificates) -> Figure:
    """Certified accuracy against radius, with the best sigma at each radius: a line per method, a panel per group."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for (method, _), frame in certificates.items():
        frames.setdefault(method, []).append(frame)
    groups, label_ends = panel_groups(frames), fewer_images(certificates)
    columns = min(len(groups), 2)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.6, 4.2) if len(groups) == 1 else (5.6 * columns, 0.4 + 2.6 * rows))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.remove()
    shown = panels.flat[: len(groups)]
    reach = max(_draw_group(panel, frames, group, label_ends) for panel, group in zip(shown, groups, strict=True))
    for panel in shown:
        set_axes(panel, reach or 1)
        panel.set_ylabel("certified accuracy (%)")
    for panel in shown[:columns]:
        panel.set_title("best σ at each radius")
    draw_legends(figure, shown[:, None], groups)
    return figure


@figure_style()
def draw_comparison(certificates: Mapping[str, pd.DataFrame]) -> Figure:
    """Exact curves of certified accuracy against radius, one line per name."""
    figure = Figure(figsize=(5.6, 4.2))
    axes = figure.subplots()
    reach = 0.0
    line_styles = cycle(product(["-", "--", ":"], OKABE_ITO))
    for i, ((name, frame), (dashes, colour)) in enumerate(zip(certificates.items(), line_styles, strict=False)):
        style = {"linestyle": dashes, "color": colour, "label": name, "gid": series_id(f"file-{i}")}
        radii, _ = draw_curve(axes, [frame], **style)
        reach = max(reach, radii[-1])
    set_axes(axes, reach or 1)
    axes.set_ylabel("certified accuracy (%)")
    draw_legend(figure, [axes])
    return figure


@figure_style()
def draw_attack(
    method: str,
    certificates: Mapping[str, pd.DataFrame],
    radii: Sequence[float],
    summaries: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
    """Certified accuracy and accuracy under attack within each of `radii`: a panel for each sigma and for the cascade.

    `certificates` and `summaries`, the results of `attack.summarize`, have the names of certificate files as keys. The
    attacked classifier abstains in the shaded area between the two black lines.
    """
    figure = Figure(figsize=(max(3.4 * len(certificates), 4.2), 3.6))
    panels = figure.subplots(1, len(certificates), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, _by_sigma(certificates), strict=True):
        frame, summary = certificates[name], summaries[name]
        correct, not_wrong = (100 * np.array(summary[each]) for each in ("accuracy", "not_wrong"))
        certified = line_style(method) | {"label": f"{METHODS[method].label}, certified"}
        reach, _ = draw_curve(panel, [frame], **certified)
        panel.plot(radii, correct, "o-", color="black", markersize=4, label="correct under attack", clip_on=False)
        panel.plot(radii, not_wrong, ":", color="black", label="correct or abstains under attack")
        panel.fill_between(radii, correct, not_wrong, color="black", alpha=0.08, linewidth=0)
        if "unsmoothed_accuracy" in summary:
            unsmoothed, label = 100 * np.array(summary["unsmoothed_accuracy"]), "correct under attack, not smoothed"
            panel.plot(radii, unsmoothed, "s--", color="#808080", markersize=4, label=label)
        set_axes(panel, max(radii[-1], reach[-1]))
        deployed = name if name == CASCADE else f"σ = {float(name.removeprefix('sigma_')):g}"
        panel.set_title(f"{deployed}: {summary['broken']} of {summary['certificates']} certificates broken")
    panels[0].set_ylabel("accuracy (%)")
    draw_legend(figure, panels)
    return figure


def _by_sigma(names: Iterable[str]) -> list[str]:
    """Names of certificate files by increasing sigma, the cascade last."""
    return sorted(names, key=lambda name: math.inf if name == CASCADE else float(name.removeprefix("sigma_")))


def _of_sigma(certificates: Certificates, sigma: float) -> dict[str, list[pd.DataFrame]]:
    return {name: [frame] for (name, other), frame in certificates.items() if other == sigma}


def _draw_group(
    panel: Axes,
    frames: Mapping[str, Sequence[pd.DataFrame]],
    group: Group,
    label_ends: Mapping[str, str],
    *,
    bands: bool = False,
) -> float:
    """Draw the curves of `group` in colour and the others in grey, and return the largest radius.

    With `bands`, each method has one frame, and solid lines have their 95 % intervals.
    """
    reach = 0.0
    for method in group.others(frames):
        radii, _ = draw_curve(panel, frames[method], **OTHERS, gid=series_id(method))
        reach = max(reach, radii[-1])
    for i, method in enumerate(group.methods):
        style = line_style(method)
        style["label"] += label_ends[method]
        radii, accuracy = draw_curve(panel, frames[method], (i + 0.5) / len(group.methods), **style)
        if bands and style["linestyle"] == "-":
            low, high = (100 * bound for bound in wilson_interval(accuracy[:-1], len(frames[method][0])))
            band = {"color": style["color"], "alpha": 0.12, "linewidth": 0, "gid": style["gid"]}
            panel.fill_between(radii[:-1], low, high, step="pre", **band)
        reach = max(reach, radii[-1])
    return reach


def draw_curve(
    axes: Axes, frames: Iterable[pd.DataFrame], phase: float = 0.5, **style: object
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the envelope of `frames` and return its radii and accuracies (shares), as `metrics.envelope` does.

    A marker shows the value at r = 0 if the curve falls right after it, as it can with radii on a grid. `phase` in
    [0, 1] shifts the other markers along the curve, so that curves with different phases can be distinguished.
    """
    frames = list(frames)
    radii, accuracy = envelope(frames)
    if series := parse_series_id(style.get("gid")):
        style["gid"] = series_id(series.key, len(frames[0]))
    falls = accuracy[1] < accuracy[0] and "label" in style
    marks = np.searchsorted(radii[:-1], radii[-1] * (np.arange(MARKS) + phase) / MARKS).clip(max=len(radii) - 2)
    marked = sorted({*([0] if falls else []), *marks.tolist()})
    axes.plot(radii, 100 * accuracy, drawstyle="steps-pre", markevery=marked, clip_on=False, **style)
    if falls and "marker" not in style:
        axes.plot(
            0, 100 * accuracy[0], "o", markersize=4, clip_on=False, zorder=3, color=style["color"], gid=style.get("gid")
        )
    return radii, accuracy


def set_axes(axes: Axes, reach: float) -> None:
    """Labels and limits of a panel of curves that end at radius `reach`."""
    axes.set(xlabel="L2 radius r (pixels in [0, 1])", xlim=(0, 1.03 * reach), ylim=(0, 102))
