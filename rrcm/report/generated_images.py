"""The figures of stage `generate`: the Frechet distance along the noise levels, and generated images."""

from matplotlib.figure import Figure

from rrcm.evaluation.generation import CURVES, ENCODERS, Generated
from rrcm.report.figures import OKABE_ITO, TEXT_COLOR, figure_style

STYLES = {
    "noisy": {"color": OKABE_ITO[0], "marker": "o"},
    "generated": {"color": OKABE_ITO[1], "marker": "D", "linestyle": "--"},
    "untrained": {"color": "#808080", "marker": "s"},
}
FLOORS = {"noisy": "two halves of the clean test images", "untrained": "the same, encoder not trained"}  # by curve
ROWS = [  # a row of `draw_generated_images`: key of `Generated.images`, whether its neighbours are shown, its label
    ("test", False, "test image"),
    ("from_test", False, "generated from\nits representation"),
    ("from_test", True, "nearest\ntraining image"),
    ("from_noise", False, "generated from a\nrepresentation\nmade of noise"),
    ("from_noise", True, "nearest\ntraining image"),
]
GAP = 3  # row before which there is some space


@figure_style()
def draw_frechet_distance(results: Generated) -> Figure:
    """The distance from the representations of clean test images against the noise level, on log axes.

    It is divided by the variance of these representations, so that encoders can be compared. Representations that are
    all equal to their mean would have 1. Dotted lines are the floors: the distance between two halves of the images.
    """
    figure = Figure(figsize=(5.6, 4.6))
    axes = figure.subplots()
    for curve, distances in results.distance.items():
        relative = [distance / results.variance[ENCODERS[curve]] for distance in distances]
        axes.plot(results.t, relative, markersize=4.5, label=CURVES[curve], **STYLES[curve])
        if curve == "generated":
            axes.plot(results.t[0], relative[0], "*", color="black", markersize=11, zorder=4, label="pure noise")
    for curve, label in FLOORS.items():
        floor = results.floor[ENCODERS[curve]] / results.variance[ENCODERS[curve]]
        axes.axhline(floor, color=STYLES[curve]["color"], linestyle=":", linewidth=1.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="noise level t (pixels in [-1, 1])")
    axes.set_ylabel("Frechet distance from clean test images\n(their variance: 1)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=2, handlelength=2.4)
    return figure


@figure_style()
def draw_generated_images(results: Generated) -> Figure:
    """Generated images in columns below the test image whose representation they were given, with the nearest training
    image and its distance below each. In the last two rows the representation is one of pure noise."""
    columns = len(results.shown)
    figure = Figure(figsize=(1.6 + 1.0 * columns, 1.14 * len(ROWS) + 0.8))
    heights = [1.0] * len(ROWS)
    heights.insert(GAP, 0.12)
    layout = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axes in layout[GAP]:
        axes.set_axis_off()
    grid = [row for number, row in enumerate(layout) if number != GAP]
    for row, (name, neighbours, label) in zip(grid, ROWS, strict=True):
        pixels = results.neighbours[name] if neighbours else results.images[name][results.shown]
        for axes, image in zip(row, pixels, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=TEXT_COLOR, linewidth=0.8)
        row[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        if neighbours:
            for axes, distance in zip(row, results.nearest[name].distance[results.shown].tolist(), strict=True):
                axes.set_xlabel(f"{distance:.2f}", fontsize=7.5, color=TEXT_COLOR, labelpad=2)
    mean = {name: float(found.distance.mean()) for name, found in results.nearest.items()}
    figure.suptitle(
        "L2 distance to the nearest training image (pixels in [0, 1]) below it. Its mean over all: generated\n"
        f"{mean['from_test']:.2f} from representations of test images, {mean['from_noise']:.2f} from those of noise; "
        f"test images themselves {mean['test']:.2f}",
        fontsize=8,
    )
    return figure
