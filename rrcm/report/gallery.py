"""Figures of images with the class and the certified radius that a smoothed classifier gives each of them."""

from collections.abc import Mapping, Sequence
from decimal import ROUND_DOWN, Decimal
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rrcm.certification.results import ABSTAIN
from rrcm.report.figures import OKABE_ITO, TEXT_COLOR, figure_style
from rrcm.report.fonts import truncate


class Thumbnail(NamedTuple):
    """An image of a gallery and the smoothed classifier's answer to it."""

    pixels: np.ndarray  # (H, W, C), in [0, 1]
    label: str  # the true class, or in `draw_certified_images` the name of the file
    predict: str  # the predicted class; "" when the classifier abstains
    radius: float  # L2, pixel units
    verdict: str  # a key of STYLES


# sign, colour, line style; colour is never the only difference
SMALL = 64  # pixels of the side of an image
VERDICTS = {"correct": ("✓", OKABE_ITO[2], "-"), "wrong": ("✗", OKABE_ITO[1], "--"), "abstains": ("?", "#606060", ":")}
STYLES = VERDICTS | {
    "certified": ("", TEXT_COLOR, "-"),  # the true class is unknown
    "no radius": ("○", "#606060", ":"),  # right or of unknown class, but the radius is shown as 0.000
}


def verdict(predict: int, label: int) -> str:
    """The key of VERDICTS for a predicted class (or `ABSTAIN`) and the true one."""
    return "abstains" if predict == ABSTAIN else "correct" if predict == label else "wrong"


@figure_style()
def draw_gallery(clean: Sequence[np.ndarray], noisy: Mapping[float, Sequence[Thumbnail]], label: str) -> Figure:
    """Test images in columns: clean in the first row, then one row per sigma with the answers of method `label`.

    `clean` holds images (H, W, C) in [0, 1]. `noisy` holds the same number of thumbnails for each sigma.
    """
    sigmas = sorted(noisy)
    figure = Figure(figsize=(max(0.3 + 1.05 * len(clean), 4.2), 1.42 * (1 + len(sigmas)) + 0.2))
    grid = figure.subplots(1 + len(sigmas), len(clean), squeeze=False)
    for axes, pixels, thumbnail in zip(grid[0], clean, noisy[sigmas[0]], strict=True):
        _show(axes, pixels, color=TEXT_COLOR, linewidth=0.8)
        axes.set_xlabel(truncate(thumbnail.label, 68, 7.5), fontsize=7.5, labelpad=2)
    grid[0, 0].set_ylabel("clean\n(true class)", fontsize=8)
    for row, sigma in zip(grid[1:], sigmas, strict=True):
        row[0].set_ylabel(f"σ = {sigma:g}", fontsize=8)
        for axes, thumbnail in zip(row, noisy[sigma], strict=True):
            uncertified = thumbnail.verdict == "abstains" or (thumbnail.verdict == "wrong" and thumbnail.radius == 0)
            _show_answer(axes, thumbnail, 68, certified=not uncertified)
    key = [Line2D([], [], color=c, linestyle=s, linewidth=2, label=f"{v} ({g})") for v, (g, c, s) in VERDICTS.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{label}: predicted class and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure


@figure_style()
def draw_certified_images(thumbnails: Sequence[Thumbnail], settings: str) -> Figure:
    """Images with `label` above and the predicted class with its certified radius below.

    `settings` is the first line of the title.
    """
    columns = min(len(thumbnails), 8)
    rows = -(-len(thumbnails) // columns)
    figure = Figure(figsize=(max(1.25 * columns, 4.2), 1.62 * rows + 0.55))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(thumbnails) :]:
        axes.set_axis_off()
    for axes, thumbnail in zip(grid.flat, thumbnails, strict=False):
        _show_answer(axes, thumbnail, 80, certified=bool(thumbnail.predict))
        axes.set_title(truncate(thumbnail.label, 80, 6.5), fontsize=6.5, color=TEXT_COLOR, pad=3)
    figure.suptitle(f"{settings}\nclass and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure


def _show(axes: Axes, pixels: np.ndarray, **frame: object) -> None:
    """Show an image (H, W, C) in [0, 1] in a frame with the properties `frame`."""
    # PDF and SVG files hold a small image as it is; a larger one is scaled to the size of the figure and smoothed
    interpolation = "none" if max(pixels.shape) <= SMALL else "auto"
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation=interpolation)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, **frame)


def _show_answer(axes: Axes, thumbnail: Thumbnail, width: float, *, certified: bool) -> None:
    """Show an image, and below it the answer in at most `width` points, with its radius if it is certified."""
    sign, colour, dashes = STYLES[thumbnail.verdict]
    _show(axes, thumbnail.pixels, color=colour, linestyle=dashes, linewidth=2)
    answer = truncate(f"{sign} {thumbnail.predict or thumbnail.verdict}".strip(), width, 7.5)
    radius = f"r = {rounded_down(thumbnail.radius)}" if certified else ""
    axes.set_xlabel(f"{answer}\n{radius}", fontsize=7.5, color=colour, labelpad=3)


def rounded_down(radius: float) -> str:
    """`radius` with three decimals, never rounded up: the text must not claim more than is certified."""
    return str(Decimal(str(radius)).quantize(Decimal("0.001"), ROUND_DOWN))
