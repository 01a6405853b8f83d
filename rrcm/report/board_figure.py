"""The figure of a group of a board: a panel for the best sigma at each radius, one for each sigma, one for cascades."""

from collections.abc import Iterator, Sequence
from itertools import cycle, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rrcm.evaluation.metrics import certified_accuracy
from rrcm.report.accuracy_figures import set_axes
from rrcm.report.board_files import Deployed
from rrcm.report.board_rows import Group, Row
from rrcm.report.figures import OKABE_ITO, figure_style, series_id
from rrcm.report.panels import draw_legend

STEPS = 300  # at most, of a curve: a step is narrower than a line
MOST_COLUMNS = 2
MARKS = 4  # markers on a curve


@figure_style()
def draw_group(group: Group) -> Figure:
    """Certified accuracy against radius, the mean over training runs. An entry has the same line in all panels."""
    styles = dict(zip((row.entry.name for row in group.best), _styles(), strict=False))
    panels = list(_panels(group))
    columns = min(len(panels), MOST_COLUMNS)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.7 * columns, 0.4 + 3.1 * lines))
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.remove()
    for panel, (title, rows) in zip(axes.flat, panels, strict=False):
        reach = max(_draw_row(panel, row, styles[row.entry.name]) for row in rows)
        set_axes(panel, reach or 1)
        panel.set_title(title)
    for panel in axes[:, 0]:
        panel.set_ylabel("certified accuracy (%)")
    draw_legend(figure, axes.flat[: len(panels)])
    return figure


def _styles() -> Iterator[dict]:
    """A style for each entry: each colour has one marker, and from the eighth entry on another dash."""
    looks = enumerate(cycle(product(["-", "--", ":", "-."], zip(OKABE_ITO, "osv^DPX", strict=True))))
    for i, (dashes, (colour, marker)) in looks:
        yield {"linestyle": dashes, "color": colour, "marker": marker, "key": f"entry-{i}"}


def _panels(group: Group) -> Iterator[tuple[str, list[Row]]]:
    """The title and the rows of each panel."""
    yield "best σ at each radius", group.best
    sigmas = {row.deployed[0].sigma for row in group.single}
    for sigma in sorted(sigma for sigma in sigmas if sigma is not None):
        yield f"σ = {sigma:g}", [row for row in group.single if row.deployed[0].sigma == sigma]
    if None in sigmas:
        yield "cascade: one classifier for all radii", [row for row in group.single if row.deployed[0].sigma is None]


def _draw_row(panel: Axes, row: Row, style: dict) -> float:
    """Draw the curve of a row and return its end. A page shows intervals over images where there is a single run."""
    radii, accuracy = mean_curve(row.deployed)
    first = row.deployed[0]
    images = len(first.frames[0]) if len(first.files) == 1 else None
    look = {name: value for name, value in style.items() if name != "key"} | {"label": row.entry.name, "markersize": 4}
    start = int(style["key"].removeprefix("entry-")) % MARKS / MARKS  # markers of several curves stand side by side
    marks = np.searchsorted(radii[:-1], radii[-1] * (np.arange(MARKS) + start) / MARKS).clip(max=len(radii) - 2)
    look |= {"drawstyle": "steps-pre", "markevery": sorted(set(marks.tolist())), "clip_on": False}
    panel.plot(radii, 100 * accuracy, gid=series_id(style["key"], images), **look)
    return float(radii[-1])


def mean_curve(deployed: Sequence[Deployed]) -> tuple[np.ndarray, np.ndarray]:
    """The mean certified accuracy over the runs, with the best of the `deployed` classifiers at each radius.

    Returns (radii, accuracy), both (K,), as `metrics.envelope` does. Of more than STEPS radii, as many evenly spaced
    ones are kept; the values there are exact.
    """
    frames = [frame for each in deployed for frame in each.frames]
    radii = np.unique(np.concatenate([[0.0], *(frame.loc[frame["correct"] == 1, "radius"] for frame in frames)]))
    if len(radii) > STEPS:
        radii = np.linspace(0, radii[-1], STEPS)
    heights = [np.mean([certified_accuracy(frame, radii) for frame in each.frames], axis=0) for each in deployed]
    return np.append(radii, radii[-1]), np.append(np.max(heights, axis=0), 0.0)
