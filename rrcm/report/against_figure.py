"""The figure of this run against published certificates: a panel for each published method, with ours in all."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rrcm.evaluation.metrics import certified_accuracy, envelope
from rrcm.methods import METHODS
from rrcm.report.accuracy_figures import draw_curve, set_axes
from rrcm.report.against import Against, Frames
from rrcm.report.figures import MARKERS, TEXT_COLOR, figure_style
from rrcm.report.panels import draw_legend

MOST = 4  # methods of this run, the first in the settings
COLUMNS = 4
DASHES = ["-", (0, (5, 1.5)), (0, (4, 1, 1, 1)), (0, (1, 1))]  # of ours, in their order
PUBLISHED = {"color": "black", "linewidth": 1.2, "zorder": 4}
STEP = 0.01  # distance of the radii at which differences are drawn if ours are on no grid, pixel units


@figure_style()
def draw_against(against: Against, ours: Mapping[str, Frames], step: float | None = None) -> Figure:
    """Certified accuracy against radius, with the best of the frames at each radius, and below it the differences.

    Each published method has a column in a band of two panels: its curve in black with `ours` in colour, and ours minus
    it in percentage points. At most `MOST` of ours are drawn, each with its own line style, marker and colour. `step`
    is the distance of our radii if they are on a grid; between two of them ours would look worse than they are.
    """
    shown = dict(list(ours.items())[:MOST])
    columns = min(COLUMNS, len(against.published))
    bands = -(-len(against.published) // columns)
    figure = Figure(figsize=(max(2.5 * columns + 0.5, 4.2), 0.5 + 3.9 * bands))
    heights = [1.15, 1.0] * bands
    panels = figure.subplots(2 * bands, columns, squeeze=False, height_ratios=heights, sharex=True)
    reach = max(envelope(frames.values())[0][-1] for frames in (*shown.values(), *against.published.values())) or 1.0
    radii = np.arange(0, reach + (step or STEP), step or STEP)
    limits = _difference_limits(against, shown, radii)
    for number, (label, frames) in enumerate(against.published.items()):
        band, column = divmod(number, columns)
        above, below = panels[2 * band, column], panels[2 * band + 1, column]
        _draw_curves(above, label, frames, shown, reach)
        _draw_differences(below, frames, shown, radii)
        below.tick_params(labelbottom=True)
        below.set_ylim(*limits)
        if column == 0:
            above.set_ylabel("certified accuracy (%)")
            below.set_ylabel("ours minus published\n(points)")
        else:
            above.tick_params(labelleft=False)
            below.tick_params(labelleft=False)
    for number in range(len(against.published), bands * columns):
        band, column = divmod(number, columns)
        panels[2 * band, column].remove()
        panels[2 * band + 1, column].remove()
    draw_legend(figure, [panels[0, 0]])
    return figure


def _style(method: str, number: int) -> dict:
    row = METHODS[method]
    marked = {"marker": MARKERS[row.family], "markersize": 4, "markerfacecolor": "white", "markeredgewidth": 1.1}
    return {"color": row.colour, "linestyle": DASHES[number % len(DASHES)], "label": row.label, **marked}


def _draw_curves(panel: Axes, label: str, frames: Frames, ours: Mapping[str, Frames], reach: float) -> None:
    for number, (method, own) in enumerate(ours.items()):
        draw_curve(panel, own.values(), (number + 0.5) / len(ours), **_style(method, number))
    draw_curve(panel, frames.values(), **PUBLISHED, label="published")
    set_axes(panel, reach)
    panel.set(xlabel="")
    panel.set_title(label)


def _draw_differences(panel: Axes, frames: Frames, ours: Mapping[str, Frames], radii: np.ndarray) -> None:
    panel.axhline(0, color="black", linewidth=1.2)
    for number, (method, own) in enumerate(ours.items()):
        style = _style(method, number)
        first = int((number + 0.5) / len(ours) * len(radii) / 4)
        panel.plot(radii, differences(own, frames, radii), markevery=(first, max(1, len(radii) // 4)), **style)
    panel.set_xlabel("L2 radius r")
    panel.text(0.98, 0.96, "ours ahead", transform=panel.transAxes, ha="right", va="top", color=TEXT_COLOR, fontsize=7)


def differences(ours: Frames, published: Frames, radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Certified accuracy of ours minus the published one at each of `radii`, with the best sigma of each, in points."""
    best = [_best(frames, radii) for frames in (ours, published)]
    return 100 * (best[0] - best[1])


def _best(frames: Mapping[float, pd.DataFrame], radii: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.max([certified_accuracy(frame, radii) for frame in frames.values()], axis=0)


def _difference_limits(against: Against, ours: Mapping[str, Frames], radii: np.ndarray) -> tuple[float, float]:
    """The limits that all panels of differences share."""
    values = [differences(own, frames, radii) for own in ours.values() for frames in against.published.values()]
    low, high = min(0.0, float(np.min(values))), max(0.0, float(np.max(values)))
    margin = 0.08 * max(high - low, 1.0)
    return low - margin, high + margin
