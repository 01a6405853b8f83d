"""The curves of several training seeds: their means with bands, or their points if the seeds are too few for a band."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rrcm.evaluation.metrics import mean_over_seeds
from rrcm.report.accuracy_figures import set_axes
from rrcm.report.figures import figure_style, line_style
from rrcm.report.panels import OTHERS, Group, draw_legends, panel_groups
from rrcm.report.tables import reference_method

BEST = "best"  # in the column `sigma`: the best sigma at each radius
MARKS = 4  # markers on a curve
POINTS = 8  # of each seed where there are no bands


def curves_over_seeds(curves: pd.DataFrame, intervals: bool) -> pd.DataFrame:
    """The mean curve of each method, with its t interval `low` to `high` if there are `intervals`, else NaN.

    `curves` are from `read_curves`. Columns: `method`, `sigma` (as text, or BEST), `radius`, `certified_accuracy`,
    `low` and `high`. The intervals hold at each radius by itself, and are cut at 0 and 1.
    """
    rows = []
    for key, values in with_best_sigma(curves).groupby(["method", "sigma", "radius"], sort=False):
        mean = mean_over_seeds(values["certified_accuracy"].to_numpy()).cut(0.0, 1.0)
        rows.append((*key, *(mean if intervals else (mean.value, np.nan, np.nan))))
    return pd.DataFrame(rows, columns=["method", "sigma", "radius", "certified_accuracy", "low", "high"])


def with_best_sigma(curves: pd.DataFrame) -> pd.DataFrame:
    """`curves` with `sigma` as text, and for each method and run a curve with the best sigma at each radius.

    That curve has the radii of the largest sigma. A curve of another sigma counts with its value at its own next
    radius, which is never larger.
    """
    radii = curves.loc[curves["sigma"] == curves["sigma"].max(), "radius"].unique()
    best = []
    for (run, method), group in curves.groupby(["run", "method"], sort=False):
        heights = [_next_value(curve, radii) for _, curve in group.groupby("sigma")]
        best.append(pd.DataFrame({"radius": radii, "certified_accuracy": np.max(heights, axis=0)}))
        best[-1] = best[-1].assign(method=method, sigma=BEST, run=run)
    return pd.concat([curves.assign(sigma=[f"{sigma:g}" for sigma in curves["sigma"]]), *best], ignore_index=True)


def _next_value(curve: pd.DataFrame, radii: np.ndarray) -> np.ndarray:
    """The certified accuracy at the first radius of `curve` that is not smaller, or 0 beyond its end."""
    places = np.searchsorted(curve["radius"], radii - 1e-9)
    return np.append(curve["certified_accuracy"], 0.0)[places]


@figure_style()
def draw_seeds(means: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """Certified accuracy against radius: a column of panels per sigma and one for the best, a row per group of methods.

    A line is the mean over the seeds. Its band is the interval of `means`; without intervals, points are the seeds.
    """
    curves, sigmas = with_best_sigma(curves), list(dict.fromkeys(means["sigma"]))
    groups = seed_groups(list(dict.fromkeys(means["method"])))
    many = len(groups) > 1
    figure = Figure(figsize=(2.8 * len(sigmas) + 2.2 * many, 0.6 + 2.0 * len(groups) if many else 3.6))
    panels = figure.subplots(len(groups), len(sigmas), sharey=True, sharex="col", squeeze=False)
    for column, sigma in zip(panels.T, sigmas, strict=True):
        shown, seeds = means[means["sigma"] == sigma], curves[curves["sigma"] == sigma]
        end = seeds.loc[seeds["certified_accuracy"] > 0, "radius"].max()
        reach = min(seeds.loc[seeds["radius"] > end, "radius"], default=seeds["radius"].max())  # where all are at 0
        for panel, group in zip(column, groups, strict=True):
            _draw_means(panel, shown[shown["radius"] <= reach], group)
            if shown["low"].isna().all():
                _draw_points(panel, seeds[seeds["radius"] <= reach], group)
            set_axes(panel, reach)
            panel.label_outer()
        column[0].set_title("best σ at each radius" if sigma == BEST else f"σ = {sigma}")
    for row in panels:
        row[0].set_ylabel("certified accuracy (%)")
    draw_legends(figure, panels, groups)
    return figure


def seed_groups(methods: Sequence[str]) -> list[Group]:
    """The methods of each row of panels: the reference and one other, because more than two bands hide each other.

    Families of methods share a row if there are many methods.
    """
    groups, reference = panel_groups(methods), reference_method(methods)
    if len(groups) > 1:
        return groups
    return [Group("", [reference, name]) for name in methods if name != reference] or groups


def _draw_means(panel: Axes, means: pd.DataFrame, group: Group) -> None:
    """The mean of each method of a group in colour, with its band if it has one, and the other methods in grey."""
    for method in group.others(means["method"].unique()):
        mean = means[means["method"] == method]
        panel.plot(mean["radius"], 100 * mean["certified_accuracy"], **OTHERS)
    for i, method in enumerate(group.methods):
        mean, style = means[means["method"] == method], line_style(method)
        every = max(len(mean) // MARKS, 1)
        marks = range(i * every // len(group.methods), len(mean), every)  # those of several curves stand side by side
        if mean["low"].isna().all():
            marks, style = (), style | {"linewidth": 0.8}
        panel.plot(mean["radius"], 100 * mean["certified_accuracy"], markevery=list(marks), clip_on=False, **style)
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        panel.fill_between(mean["radius"], 100 * mean["low"], 100 * mean["high"], **band)


def _draw_points(panel: Axes, curves: pd.DataFrame, group: Group) -> None:
    """A point for each seed at some radii. The lines of the means are in the legend."""
    for i, method in enumerate(group.methods):
        style = {key: value for key, value in line_style(method).items() if key != "label"} | {"linestyle": ""}
        for _, curve in curves[curves["method"] == method].groupby("run"):
            every = max(len(curve) // POINTS, 1)
            some = curve.iloc[i * every // len(group.methods) :: every]
            panel.plot(some["radius"], 100 * some["certified_accuracy"], clip_on=False, **style)
