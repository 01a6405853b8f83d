"""The figure of classes: certified accuracy of each class, and which class the votes preferred in place of it."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from rrcm.evaluation.classes import accuracy_by_class, confusions
from rrcm.report.classes import MANY, Deployed, shown_classes
from rrcm.report.figures import OKABE_ITO, TEXT_COLOR, figure_style
from rrcm.report.fonts import truncate

CERTIFIED = LinearSegmentedColormap.from_list("certified", ["#ffffff", OKABE_ITO[0]])
MISSED = LinearSegmentedColormap.from_list("missed", ["#ffffff", OKABE_ITO[1]])
LONGEST = 90  # points, of a class name
DARKEST = 5  # images in a cell of the full colour, or more


@figure_style()
def draw_classes(shown: Deployed, classes: Sequence[str], radii: Sequence[float]) -> Figure:
    """Two heat maps with a row for each class.

    Left: certified accuracy (%) at `radii`. Right: the number of images without a correct certificate, by the class
    that the votes preferred; on the diagonal are the abstentions whose votes preferred the right class. Of many classes
    only the worst are shown.
    """
    table = accuracy_by_class(shown.frame, radii)
    labels, pairs = shown_classes(table, radii), confusions(shown.frame, shown.preferred)
    pairs = pairs[pairs["label"].isin(labels)]
    columns = _columns(labels, pairs["preferred"].tolist(), len(classes))
    accuracy = 100 * table.set_index("label").loc[labels, list(radii)].to_numpy()
    counts = np.zeros((len(labels), len(columns)))
    for pair in pairs.itertuples():
        if pair.preferred in columns:
            counts[labels.index(pair.label), columns.index(pair.preferred)] += pair.wrong + pair.abstained
    names = [truncate(classes[label], LONGEST, 8) for label in labels]
    widths = [0.5 * len(radii), 0.34 * len(columns)]
    figure = Figure(figsize=(2.2 + sum(widths), 1.3 + 0.3 * len(labels)))
    left, right = figure.subplots(1, 2, width_ratios=widths, sharey=True)
    _heat_map(left, accuracy, CERTIFIED, 100)
    left.set(title="certified accuracy (%)", xlabel="L2 radius r", ylabel="class")
    left.set_xticks(range(len(radii)), [f"{radius:g}" for radius in radii])
    left.set_yticks(range(len(labels)), names, fontsize=8)
    _heat_map(right, np.where(counts, counts, np.nan), MISSED, max(counts.max(), DARKEST))
    right.set(title="images not certified as their class", xlabel="class that the votes prefer")
    long = max(len(classes[label]) for label in columns) > 2
    turned = {"rotation": 90} if long else {}
    right.set_xticks(range(len(columns)), [truncate(classes[k], LONGEST, 8) for k in columns], fontsize=8, **turned)
    figure.suptitle(shown.label, fontsize=9)
    return figure


def _columns(labels: Sequence[int], preferred: Sequence[int], num_classes: int) -> list[int]:
    """The preferred classes to show: all if they are few, else those most often preferred, which come first."""
    if num_classes <= MANY:
        return list(range(num_classes))
    return sorted(dict.fromkeys([*preferred[: len(labels)], *labels]))[:MANY]


def _heat_map(axes: Axes, values: np.ndarray, colours: LinearSegmentedColormap, largest: float) -> None:
    """Draw `values` with their rounded numbers on them."""
    edges = (np.arange(count + 1) - 0.5 for count in values.shape[::-1])
    axes.pcolormesh(*edges, values, cmap=colours, vmin=0, vmax=largest, edgecolors="#d4d4d4", linewidth=0.6)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > 0.6 * largest else TEXT_COLOR
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
