"""The report's figures in one house style, as PNG and SVG that are byte-identical when drawn again.

Every function draws what it is given and returns the figure; `save` writes it. Colours are Okabe and Ito's, told
apart by colour-blind readers; a method keeps its colour in every figure and report, and matched-compute variants are
dashed in the colour of their base method.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from rrcm.config import METHODS
from rrcm.results import ABSTAIN, Certificates, envelope, wilson_interval

STYLE = {
    "backend": "agg",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "rrcm",  # else element names are random
}
OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
BASES = list(dict.fromkeys(name.removesuffix("_matched") for name in METHODS))
RADIUS = "L2 radius r (pixels in [0, 1])"
INK = "#404040"


class Tile(NamedTuple):
    """A noisy test image of the sheet and what the smoothed classifier says of it."""

    pixels: np.ndarray  # (H, W, C), in [0, 1]
    label: str
    predict: str
    radius: float  # L2, pixel units
    verdict: str  # a key of VERDICTS


# sign, colour, line style: never told apart by colour alone
VERDICTS = {"correct": ("✓", OKABE_ITO[2], "-"), "wrong": ("✗", OKABE_ITO[1], "--"), "abstains": ("?", "#808080", ":")}


def verdict(predict: int, label: int) -> str:
    """A key of VERDICTS."""
    return "abstains" if predict == ABSTAIN else "correct" if predict == label else "wrong"


@contextmanager
def house_style() -> Iterator[None]:
    """Drawing inside depends on nothing outside: no matplotlibrc, no earlier settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@house_style()
def save(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/name.png and folder/name.svg, without date or version inside."""
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _line(method: str) -> dict:
    """How a method's line is drawn."""
    kind = METHODS[method]
    colour = OKABE_ITO[BASES.index(method.removesuffix("_matched")) % len(OKABE_ITO)]
    return {"color": colour, "linestyle": (0, (4, 1.5)) if kind.matched else "-", "label": kind.label}


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handlelength=2.4)


@house_style()
def draw_certified_accuracy(certificates: Certificates) -> Figure:
    """Certified accuracy against radius, exact: a panel a sigma, all methods. Bands: 95 % intervals, unmatched only."""
    sigmas = sorted({sigma for _, sigma in certificates})
    figure = Figure(figsize=(max(3.4 * len(sigmas), 4.2), 3.6))
    panels = figure.subplots(1, len(sigmas), sharey=True, squeeze=False)[0]
    for panel, sigma in zip(panels, sigmas, strict=True):
        reach = 0.0
        for (method, its_sigma), frame in certificates.items():
            if its_sigma == sigma:
                radii, accuracy = envelope([frame])
                panel.plot(radii, 100 * accuracy, drawstyle="steps-pre", **_line(method))
                if not METHODS[method].matched:
                    low, high = wilson_interval(accuracy[:-1], len(frame))
                    colour = _line(method)["color"]
                    panel.fill_between(
                        radii[:-1], 100 * low, 100 * high, step="pre", color=colour, alpha=0.12, linewidth=0
                    )
                reach = max(reach, radii[-1])
        panel.set(title=f"σ = {sigma:g}", xlabel=RADIUS, xlim=(0, 1.03 * (reach or sigma)), ylim=(0, 102))
    panels[0].set_ylabel("certified accuracy (%)")
    _legend(figure, panels[0], columns=5 if len(panels) > 2 else 2)
    return figure


@house_style()
def draw_envelope(certificates: Certificates) -> Figure:
    """Certified accuracy against radius with the best sigma at each radius, a line a method."""
    figure = Figure(figsize=(5.6, 4.2))
    axes = figure.subplots()
    reach = 0.0
    for method in dict.fromkeys(method for method, _ in certificates):
        radii, accuracy = envelope(frame for (name, _), frame in certificates.items() if name == method)
        axes.plot(radii, 100 * accuracy, drawstyle="steps-pre", **_line(method))
        reach = max(reach, radii[-1])
    axes.set(xlabel=RADIUS, ylabel="certified accuracy, best σ at each r (%)", xlim=(0, 1.03 * (reach or 1)))
    axes.set_ylim(0, 102)
    _legend(figure, axes, columns=2)
    return figure


@house_style()
def draw_latency(latency: Mapping[str, dict], accuracy: Mapping[str, float], n: int, radius: float) -> Figure:
    """Certified accuracy at `radius` (best sigma) against the seconds that one image takes with n samples.

    `latency` is what the latency stage measured of each method; marker area is proportional to the parameters.
    """
    figure = Figure(figsize=(7.2, 3.8))
    axes = figure.subplots()
    seconds = {method: record["seconds"][str(n)] for method, record in latency.items()}
    ranked = sorted(latency, key=lambda method: accuracy[method])
    axes.set_xscale("log")
    axes.set_xlim(min(seconds.values()) / 5, max(seconds.values()) * 5)  # equal latencies shall look equal
    axes.set_ylim(0, max(118 * accuracy[ranked[-1]], 5))
    subdivided = max(seconds.values()) < 10 * min(seconds.values())
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if subdivided else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    largest = max(record["parameters"] for record in latency.values())
    heights = _spread([100 * accuracy[method] for method in ranked], room=0.07 * axes.get_ylim()[1])
    for method, height in zip(ranked, heights, strict=True):
        colour, point = _line(method)["color"], (seconds[method], 100 * accuracy[method])
        parameters = latency[method]["parameters"]
        face = "none" if METHODS[method].matched else colour
        area = 90 * parameters / largest
        axes.scatter(*point, area, facecolor=face, edgecolor=colour, linewidth=1.6, zorder=3, clip_on=False)
        axes.annotate(
            f"{METHODS[method].label}: {point[1]:.1f} %, {parameters / 1e6:.3g} M",
            point,
            (1.03, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 6,
            },
        )
    first = latency[ranked[0]]
    axes.set_xlabel(
        f"seconds to certify one image, n = {n:,}\n{first['device']}, {first['dtype']}, batch {first['batch_size']:,}"
    )
    axes.set_ylabel(f"certified accuracy at r = {radius:g}, best σ (%)")
    axes.set_title("marker area and M (millions): parameters", loc="right", color=INK, fontsize=8)
    return figure


def _spread(values: Sequence[float], room: float) -> list[float]:
    """Ascending `values` moved apart until neighbours are `room` apart, the middle of each cluster kept."""
    clusters = [[value, 1] for value in values]  # centre, members
    i = 0
    while i + 1 < len(clusters):
        (low, below), (high, above) = clusters[i], clusters[i + 1]
        if high - low < room * (below + above) / 2:
            clusters[i : i + 2] = [[(low * below + high * above) / (below + above), below + above]]
            i = max(i - 1, 0)
        else:
            i += 1
    return [centre + room * (k - (size - 1) / 2) for centre, size in clusters for k in range(size)]


@house_style()
def draw_training(pretraining: pd.DataFrame | None, finetuning: pd.DataFrame) -> Figure:
    """Pre-training losses over the number of noise levels, and validation accuracy under noise, a panel a sigma.

    `finetuning` has a row an epoch: method, sigma, compute (encoder forward passes spent, the share of the pre-training
    included), val_accuracy (may be missing), selected (bool).
    """
    sigmas = sorted(finetuning["sigma"].unique())
    before = [] if pretraining is None else ["pre"]
    mosaic = [before and ["losses"], before and ["levels"]]
    mosaic = [row + [f"{sigma}" for sigma in sigmas] for row in mosaic]
    columns = len(mosaic[0])
    figure = Figure(figsize=(max(2.9 * columns, 4.2), 3.5))
    panels = figure.subplot_mosaic(mosaic, height_ratios=[3, 1])
    if pretraining is not None:
        losses, levels = panels["losses"], panels["levels"]
        losses.plot(pretraining["step"], pretraining["contrastive"], color=INK, label="contrastive")
        losses.plot(pretraining["step"], pretraining["consistency"], color=INK, linestyle=":", label="consistency")
        losses.set(title="pre-training", ylabel="loss (nats)", ylim=(0, None))
        losses.tick_params(labelbottom=False)
        losses.legend()
        levels.step(pretraining["step"], pretraining["levels"], where="post", color=INK)
        levels.set(xlabel="step", ylabel="levels N", ylim=(0, None))
        levels.sharex(losses)
    for sigma in sigmas:
        panel = panels[f"{sigma}"]
        for method, run in finetuning[finetuning["sigma"] == sigma].groupby("method", sort=False):
            looks = run.dropna(subset="val_accuracy")
            panel.plot(looks["compute"], 100 * looks["val_accuracy"], **_line(method))
            kept = looks[looks["selected"]]
            panel.plot(kept["compute"], 100 * kept["val_accuracy"], "o", color=_line(method)["color"], markersize=5)
        panel.set(title=f"fine-tuning, σ = {sigma:g}", ylim=(0, 102), xlim=(0, None))
        panel.set_xlabel("compute (encoder forward passes)")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.tick_params(labelleft=sigma == sigmas[0])
    panels[f"{sigmas[0]}"].set_ylabel("validation accuracy under noise (%)")
    _legend(figure, panels[f"{sigmas[0]}"], columns=5 if columns > 2 else 2)
    return figure


@house_style()
def draw_sheet(clean: Sequence[np.ndarray], noisy: Mapping[float, Sequence[Tile]], label: str) -> Figure:
    """Test images (columns) clean and with noise of each sigma (rows), with the answer of the method called `label`."""
    sigmas = sorted(noisy)
    figure = Figure(figsize=(max(0.3 + 1.05 * len(clean), 4.2), 1.42 * (1 + len(sigmas)) + 0.2))
    grid = figure.subplots(1 + len(sigmas), len(clean), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
    for axes, pixels, tile in zip(grid[0], clean, noisy[sigmas[0]], strict=True):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_xlabel(tile.label, fontsize=7.5, labelpad=2)
        axes.spines[:].set(color=INK, linewidth=0.8)
    grid[0, 0].set_ylabel("clean\n(label below)", fontsize=8)
    for row, sigma in zip(grid[1:], sigmas, strict=True):
        row[0].set_ylabel(f"σ = {sigma:g}", fontsize=8)
        for axes, tile in zip(row, noisy[sigma], strict=True):
            sign, colour, style = VERDICTS[tile.verdict]
            axes.imshow(tile.pixels, cmap="gray", vmin=0, vmax=1)
            axes.spines[:].set(color=colour, linestyle=style, linewidth=2)
            answer = "abstains\n" if tile.verdict == "abstains" else f"{tile.predict}\nr = {tile.radius:.2f}"
            axes.set_xlabel(f"{sign} {answer}", fontsize=7.5, color=colour, labelpad=3)
    key = [Line2D([], [], color=c, linestyle=s, linewidth=2, label=f"{v} ({g})") for v, (g, c, s) in VERDICTS.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{label}: predicted class and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure
