"""Figures of the votes: the distribution of the probability of the right class, and a reliability diagram."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtr

from rrcm.evaluation.calibration import reliability
from rrcm.evaluation.classes import top_shares
from rrcm.evaluation.metrics import Certificates, envelope
from rrcm.report.figures import figure_style, line_style
from rrcm.report.panels import OTHERS, draw_legends, fewer_images, panel_groups

FEWEST = 5  # images in a bin that is drawn
DrawCurve = Callable[..., None]


@figure_style()
def draw_probabilities(certificates: Certificates) -> Figure:
    """The share of images that are certified as their class with p_A of at least p, against p."""

    def draw(panel: Axes, sigma: float, frame: pd.DataFrame, phase: float, style: dict) -> None:
        radii, share = envelope([frame])
        p = ndtr(radii / sigma)
        marks = np.searchsorted(p[:-1], 0.5 + 0.5 * (np.arange(4) + phase) / 4).clip(max=len(p) - 2)
        panel.plot(p, 100 * share, drawstyle="steps-pre", markevery=sorted(set(marks.tolist())), **style)

    figure, panels = _draw_by_sigma(certificates, draw)
    for panel in panels.flat:
        panel.set(xlim=(0.5, 1), ylim=(0, 102))
    for panel in panels[-1]:
        panel.set_xlabel("p (lower bound on the class's probability)")
    for panel in panels[:, 0]:
        panel.set_ylabel("images (%)")
    return figure


@figure_style()
def draw_reliability(certificates: Certificates) -> Figure:
    """Accuracy against the vote share of the top class, in bins of at least FEWEST images, with Wilson intervals."""

    def draw(panel: Axes, sigma: float, frame: pd.DataFrame, phase: float, style: dict) -> None:
        top, shares = top_shares(frame)
        bins = reliability(shares, top == frame["label"].to_numpy())
        bins = 100 * bins[bins["images"] >= FEWEST].drop(columns="images")
        panel.plot(bins["share"], bins["accuracy"], clip_on=False, **style)
        if "label" in style:
            panel.vlines(bins["share"], bins["low"], bins["high"], color=style["color"], linewidth=0.9, alpha=0.45)

    figure, panels = _draw_by_sigma(certificates, draw)
    for panel in panels.flat:
        panel.plot([0, 100], [0, 100], color="#808080", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        panel.set(xlim=(0, 100), ylim=(0, 102))
    for panel in panels[-1]:
        panel.set_xlabel("votes for the top class (%)")
    for panel in panels[:, 0]:
        panel.set_ylabel("top class is right (%)")
    return figure


def _draw_by_sigma(certificates: Certificates, draw: DrawCurve) -> tuple[Figure, np.ndarray]:
    """A column of panels per sigma and a row per group of methods, as in the figure of certified accuracy."""
    sigmas = sorted({sigma for _, sigma in certificates})
    groups, label_ends = panel_groups(method for method, _ in certificates), fewer_images(certificates)
    many = len(groups) > 1
    figure = Figure(figsize=(max(3.4 * len(sigmas), 4.2) + 2.2 * many, 0.6 + 2.3 * len(groups) if many else 3.4))
    panels = figure.subplots(len(groups), len(sigmas), sharey=True, sharex=True, squeeze=False)
    for column, sigma in zip(panels.T, sigmas, strict=True):
        frames = {method: frame for (method, other), frame in certificates.items() if other == sigma}
        for panel, group in zip(column, groups, strict=True):
            for method in group.others(frames):
                draw(panel, sigma, frames[method], 0.5, OTHERS)
            for i, method in enumerate(group.methods):
                style = line_style(method)
                style["label"] += label_ends[method]
                draw(panel, sigma, frames[method], (i + 0.5) / len(group.methods), style)
        column[0].set_title(f"σ = {sigma:g}")
    draw_legends(figure, panels, groups)
    return figure, panels
