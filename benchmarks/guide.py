"""The figures of docs/guide.md: pictures at some L2 distance, and the largest radius that n samples can certify.

    python benchmarks/guide.py docs    # writes guide_distance.png and guide_ceiling.png

The pictures are scikit-learn's temple and flower, by danielbuechele and vultilion on Flickr (CC BY 2.0), cut and
scaled.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from rrcm.utils.app import exit_on_error, make_app
from rrcm.certification.ceiling import largest_radius
from rrcm.data.augment import centre_crop
from rrcm.report.figures import OKABE_ITO, TEXT_COLOR, figure_style, save

SIDES = (32, 64, 224)  # pixels
DISTANCE = 0.5  # L2, pixels in [0, 1]
SIGMA = 0.25  # of the noisy copy
SIGMAS = (0.25, 0.5, 1.0)
ALPHA = 0.001
SAMPLES = np.unique(np.geomspace(10, 1e6, 200).astype(int))


def read_picture(name: str, side: int) -> np.ndarray:
    """The central square of a picture: float (side, side, 3) in [0, 1]."""
    return np.asarray(centre_crop(Image.fromarray(load_sample_image(name)), side)) / 255


def at_distance(picture: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The picture at L2 distance DISTANCE in a direction. Pixels may leave [0, 1], and are cut when they are drawn."""
    return picture + DISTANCE * direction / np.linalg.norm(direction)


def changes(picture: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The picture, changes of it by their names, and a noisy copy."""
    side, patch = len(picture), np.zeros_like(picture)
    patch[side // 2 : side // 2 + 2, side // 2 : side // 2 + 2] = 1.0
    return {
        "picture": picture,
        "brighter": at_distance(picture, np.ones_like(picture)),
        "2 x 2 pixels brighter": at_distance(picture, patch),
        "random change": at_distance(picture, rng.standard_normal(picture.shape)),
        "towards another picture": at_distance(picture, other - picture),
        f"noise, σ = {SIGMA:g}": picture + SIGMA * rng.standard_normal(picture.shape),
    }


@figure_style()
def draw_distance() -> Figure:
    """One picture at several sizes in rows, and changes of one distance in columns."""
    rng = np.random.default_rng(0)
    rows = {side: changes(read_picture("flower.jpg", side), read_picture("china.jpg", side), rng) for side in SIDES}
    figure = Figure(figsize=(9.6, 5.1))
    grid = figure.subplots(len(rows), len(rows[SIDES[0]]), squeeze=False)
    for row, (side, pictures) in zip(grid, rows.items(), strict=True):
        row[0].set_ylabel(f"{side} x {side} pixels", fontsize=9, color=TEXT_COLOR)
        for axes, (name, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture.clip(0, 1), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            distance = np.linalg.norm(picture - pictures["picture"])
            axes.set_xlabel(f"distance {distance:.3g}" if distance else "", fontsize=8, labelpad=2)
            if side == SIDES[0]:
                axes.set_title(name, fontsize=8.5)
    return figure


@figure_style()
def draw_ceiling() -> Figure:
    """The largest radius against the number of samples, for several sigmas."""
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    for sigma, colour, dashes in zip(SIGMAS, OKABE_ITO, ("-", "--", "-."), strict=False):
        radii = [largest_radius(sigma, n, ALPHA) for n in SAMPLES.tolist()]
        axes.plot(SAMPLES, radii, color=colour, linestyle=dashes)
        axes.annotate(f"σ = {sigma:g}", (SAMPLES[-1], radii[-1]), (4, 0), textcoords="offset points", va="center")
    axes.set(xscale="log", xlabel="samples n", ylabel="largest certified radius", xlim=(10, 1e6), ylim=(0, None))
    return figure


def main(folder: Annotated[Path, typer.Argument()] = Path("docs")) -> None:
    """Write both figures to FOLDER."""
    save(draw_distance(), folder / "guide_distance.png")
    save(draw_ceiling(), folder / "guide_ceiling.png")


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
