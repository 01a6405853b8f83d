"""The report's figures in one house style, as PNG and SVG that are byte-identical when drawn again.

Every function draws what it is given and returns the figure; `save` writes it. Colours are Okabe and Ito's, told
apart by colour-blind readers; a method keeps its colour in every figure and report, and matched-compute variants are
dashed in the colour of their base method.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import ROUND_DOWN, Decimal
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from rrcm.certification.results import ABSTAIN
from rrcm.config import METHODS
from rrcm.evaluation.metrics import Certificates, envelope, wilson_interval
from rrcm.utils.files import atomic_path

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
OTHERS = list(product([(0, (1, 1)), (0, (3, 1, 1, 1))], ["#000000", "#808080"]))  # line styles of other groups' curves
FORMATS = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}  # and what not to write into them
RADIUS = "L2 radius r (pixels in [0, 1])"
TEXT_COLOR = "#404040"


class Thumbnail(NamedTuple):
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
def figure_style() -> Iterator[None]:
    """Drawing inside depends on nothing outside: no matplotlibrc, no earlier settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@figure_style()
def save(figure: Figure, path: Path) -> None:
    """Write a file of `FORMATS`, named by the suffix, atomically and without date or version inside."""
    with atomic_path(path) as scratch:
        figure.savefig(scratch, format=path.suffix[1:], metadata=FORMATS[path.suffix])


def _line(method: str) -> dict:
    """How a method's line is drawn."""
    kind = METHODS[method]
    colour = OKABE_ITO[BASES.index(method.removesuffix("_matched")) % len(OKABE_ITO)]
    return {"color": colour, "linestyle": (0, (4, 1.5)) if kind.matched else "-", "label": kind.label}


def _plain(text: str) -> str:
    """A label that somebody gave, as it is: nothing in it is mathematics."""
    return text.replace("$", r"\$")


def _draw_curve(axes: Axes, frames: Iterable[pd.DataFrame], **style: object) -> tuple[np.ndarray, np.ndarray]:
    """Draw the envelope of `frames`, each value up to and with its radius; return it: radii and accuracy.

    Where it falls at 0, as it does when radii are multiples of a step, a dot shows the value at r = 0 itself.
    """
    radii, accuracy = envelope(frames)
    axes.plot(radii, 100 * accuracy, drawstyle="steps-pre", **style)
    if accuracy[1] < accuracy[0]:
        face = style["color"] if style["linestyle"] == "-" else "white"
        dot = {"color": style["color"], "markerfacecolor": face, "markersize": 4, "markeredgewidth": 1.2}
        axes.plot(0, 100 * accuracy[0], "o", clip_on=False, zorder=3, **dot)
    return radii, accuracy


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them, read row by row, with as many columns as there is room for.

    The figure grows by its second and further rows.
    """
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    labels = [label for label in lines if not label.startswith("_child")]  # that is one without a label
    widths = [TextPath((0, 0), label, size=9).get_extents().width / 72 + 0.7 for label in labels]  # inches, with line

    def fit(columns: int) -> bool:
        return sum(max(widths[column::columns]) for column in range(columns)) < figure.get_figwidth()

    columns = max((n for n in range(1, 1 + len(labels)) if fit(n)), default=1)
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(labels) / columns) - 1))
    labels = [label for column in range(columns) for label in labels[column::columns]]  # matplotlib fills down columns
    handles = [lines[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.4)


@figure_style()
def draw_certified_accuracy(certificates: Certificates, others: Certificates) -> Figure:
    """Certified accuracy against radius, exact: a panel a sigma, all methods. Bands: 95 % intervals, unmatched only.

    `others` are certificates of other groups by (label, sigma), drawn where there is a panel of their sigma.
    """
    sigmas = sorted({sigma for _, sigma in certificates})
    figure = Figure(figsize=(max(3.4 * len(sigmas), 4.2), 3.6))
    panels = figure.subplots(1, len(sigmas), sharey=True, squeeze=False)[0]
    labels = dict.fromkeys(label for label, _ in others)
    looks = {
        label: {"color": colour, "linestyle": style, "label": _plain(label)}
        for label, (style, colour) in zip(labels, cycle(OTHERS), strict=False)
    }
    for panel, sigma in zip(panels, sigmas, strict=True):
        reach = 0.0
        for (method, its_sigma), frame in certificates.items():
            if its_sigma == sigma:
                radii, accuracy = _draw_curve(panel, [frame], **_line(method))
                if not METHODS[method].matched:
                    low, high = wilson_interval(accuracy[:-1], len(frame))
                    colour = _line(method)["color"]
                    panel.fill_between(
                        radii[:-1], 100 * low, 100 * high, step="pre", color=colour, alpha=0.12, linewidth=0
                    )
                reach = max(reach, radii[-1])
        for (label, its_sigma), frame in others.items():
            if its_sigma == sigma:
                radii, _ = _draw_curve(panel, [frame], **looks[label])
                reach = max(reach, radii[-1])
        panel.set(title=f"σ = {sigma:g}", xlabel=RADIUS, xlim=(0, 1.03 * (reach or sigma)), ylim=(0, 102))
    panels[0].set_ylabel("certified accuracy (%)")
    _legend(figure, panels)
    return figure


@figure_style()
def draw_envelope(certificates: Certificates) -> Figure:
    """Certified accuracy against radius with the best sigma at each radius, a line a method."""
    figure = Figure(figsize=(5.6, 4.2))
    axes = figure.subplots()
    reach = 0.0
    for method in dict.fromkeys(method for method, _ in certificates):
        frames = (frame for (name, _), frame in certificates.items() if name == method)
        radii, _ = _draw_curve(axes, frames, **_line(method))
        reach = max(reach, radii[-1])
    axes.set(xlabel=RADIUS, ylabel="certified accuracy, best σ at each r (%)", xlim=(0, 1.03 * (reach or 1)))
    axes.set_ylim(0, 102)
    _legend(figure, [axes])
    return figure


@figure_style()
def draw_comparison(certificates: Mapping[str, pd.DataFrame]) -> Figure:
    """Certified accuracy against radius, exact, of certificates by name."""
    figure = Figure(figsize=(5.6, 4.2))
    axes = figure.subplots()
    reach = 0.0
    looks = cycle(product(["-", "--", ":"], OKABE_ITO))
    for (name, frame), (style, colour) in zip(certificates.items(), looks, strict=False):
        radii, _ = _draw_curve(axes, [frame], linestyle=style, color=colour, label=_plain(name))
        reach = max(reach, radii[-1])
    axes.set(xlabel=RADIUS, ylabel="certified accuracy (%)", xlim=(0, 1.03 * (reach or 1)), ylim=(0, 102))
    _legend(figure, [axes])
    return figure


@figure_style()
def draw_attack(
    method: str,
    certificates: Mapping[float, pd.DataFrame],
    radii: Sequence[float],
    summaries: Mapping[float, Mapping[str, Sequence[float]]],
) -> Figure:
    """Certified accuracy and accuracy under attack within each of `radii`, a panel a sigma.

    `summaries` by sigma are those of `attack.summarize`. Between the markers and the dotted line PREDICT abstains.
    """
    figure = Figure(figsize=(max(3.4 * len(certificates), 4.2), 3.6))
    panels = figure.subplots(1, len(certificates), sharey=True, squeeze=False)[0]
    for panel, (sigma, frame) in zip(panels, sorted(certificates.items()), strict=True):
        found = summaries[sigma]
        right, either, unsmoothed = (
            100 * np.array(found[name]) for name in ("accuracy", "not_wrong", "unsmoothed_accuracy")
        )
        reach, _ = _draw_curve(panel, [frame], **_line(method) | {"label": f"{METHODS[method].label}: certified"})
        panel.plot(radii, right, "o-", color="black", markersize=4, label="right under attack", clip_on=False)
        panel.plot(radii, either, ":", color="black", label="right or abstains under attack")
        panel.fill_between(radii, right, either, color="black", alpha=0.08, linewidth=0)
        panel.plot(radii, unsmoothed, "s--", color="#808080", markersize=4, label="not smoothed, right under attack")
        panel.set_title(f"σ = {sigma:g}: {found['broken']} of {found['certificates']} certificates broken")
        panel.set(xlabel=RADIUS, xlim=(0, 1.03 * max(radii[-1], reach[-1])), ylim=(0, 102))
    panels[0].set_ylabel("accuracy (%)")
    _legend(figure, panels)
    return figure


@figure_style()
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
    axes.set_title("marker area and M (millions): parameters", loc="right", color=TEXT_COLOR, fontsize=8)
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


@figure_style()
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
        losses.plot(pretraining["step"], pretraining["contrastive"], color=TEXT_COLOR, label="contrastive")
        losses.plot(
            pretraining["step"], pretraining["consistency"], color=TEXT_COLOR, linestyle=":", label="consistency"
        )
        losses.set(title="pre-training", ylabel="loss (nats)", ylim=(0, None))
        losses.tick_params(labelbottom=False)
        losses.legend()
        levels.step(pretraining["step"], pretraining["levels"], where="post", color=TEXT_COLOR)
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
    _legend(figure, [panels[f"{sigmas[0]}"]])
    return figure


@figure_style()
def draw_representation(looks: pd.DataFrame) -> Figure:
    """What pre-training does to the representations of held-out images: k-NN accuracy, and how still they stay along a
    noise trajectory, over steps, a line a noise.

    A row of `looks` is a step and pixel sigma (0: clean) with knn, cosine (to the same image at t_min), similarity
    (to other images at t_min), centred (as cosine, the mean over the images taken off).
    """
    figure = Figure(figsize=(8.7, 3.0))
    accuracy, stillness, alone = figure.subplots(1, 3)
    noises = sorted(looks["sigma"].unique())
    for sigma, shade, marker in zip(noises, np.linspace(0.75, 0.0, len(noises)), cycle("osD^v"), strict=False):
        rows = looks[looks["sigma"] == sigma]
        style = {"color": matplotlib.colormaps["cividis"](shade), "marker": marker, "markersize": 3.5}
        label = f"σ = {sigma:g}" if sigma else "clean"
        accuracy.plot(rows["step"], 100 * rows["knn"], label=label, **style)
        if sigma:
            stillness.plot(rows["step"], rows["cosine"], **style)
            stillness.plot(rows["step"], rows["similarity"], linestyle=":", linewidth=1, **style)
            alone.plot(rows["step"], rows["centred"], **style)
    accuracy.set(xlabel="step", ylabel="k-NN accuracy (%)", ylim=(0, 102), title="before any fine-tuning")
    stillness.set(xlabel="step", ylabel="mean cosine under noise", ylim=(None, 1.3), title="to images at $t_{min}$")
    stillness.plot([], [], "-", color=TEXT_COLOR, label="the same image")
    stillness.plot([], [], ":", color=TEXT_COLOR, linewidth=1, label="other images")
    stillness.legend(loc="upper right")  # above 1, where no line can be
    alone.set(xlabel="step", ylabel="mean cosine, centred", title="the same image, centred")
    alone.set_ylim(min(0, alone.get_ylim()[0]), 1.02)
    _legend(figure, [accuracy])
    return figure


@figure_style()
def draw_sheet(clean: Sequence[np.ndarray], noisy: Mapping[float, Sequence[Thumbnail]], label: str) -> Figure:
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
        axes.spines[:].set(color=TEXT_COLOR, linewidth=0.8)
    grid[0, 0].set_ylabel("clean\n(label below)", fontsize=8)
    for row, sigma in zip(grid[1:], sigmas, strict=True):
        row[0].set_ylabel(f"σ = {sigma:g}", fontsize=8)
        for axes, tile in zip(row, noisy[sigma], strict=True):
            sign, colour, style = VERDICTS[tile.verdict]
            axes.imshow(tile.pixels, cmap="gray", vmin=0, vmax=1)
            axes.spines[:].set(color=colour, linestyle=style, linewidth=2)
            claims_nothing = tile.verdict == "abstains" or (tile.verdict == "wrong" and tile.radius == 0)
            radius = "" if claims_nothing else f"r = {tile.radius:.2f}"
            answer = f"{sign} {tile.predict or tile.verdict}\n{radius}"
            axes.set_xlabel(answer, fontsize=7.5, color=colour, labelpad=3)
    key = [Line2D([], [], color=c, linestyle=s, linewidth=2, label=f"{v} ({g})") for v, (g, c, s) in VERDICTS.items()]
    figure.legend(handles=key, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{label}: predicted class and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure


def rounded_down(radius: float) -> str:
    """Three decimals: never more than is certified."""
    return str(Decimal(str(radius)).quantize(Decimal("0.001"), ROUND_DOWN))


@figure_style()
def draw_certified_images(tiles: Sequence[Thumbnail], settings: str) -> Figure:
    """Images with class and certified radius below and `label` (here: where the image is from) above; `settings` is
    part of the title. A verdict may also be "certified": then it is not known which class is right."""
    columns = min(len(tiles), 8)
    rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(max(1.25 * columns, 4.2), 1.62 * rows + 0.55))
    grid = figure.subplots(rows, columns, squeeze=False)
    looks = {"certified": ("", TEXT_COLOR, "-")} | VERDICTS
    for axes in grid.flat[len(tiles) :]:
        axes.set_axis_off()
    for axes, tile in zip(grid.flat, tiles, strict=False):
        sign, colour, style = looks[tile.verdict]
        axes.imshow(tile.pixels, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=colour, linestyle=style, linewidth=2)
        axes.set_title(_fitted(tile.label, 80, 6.5), fontsize=6.5, color=TEXT_COLOR, pad=3)
        answer = _fitted(f"{sign} {tile.predict or tile.verdict}".strip(), 80, 7.5)
        radius = f"r = {rounded_down(tile.radius)}" if tile.predict else ""
        axes.set_xlabel(f"{answer}\n{radius}", fontsize=7.5, color=colour, labelpad=3)
    figure.suptitle(f"{settings}\nclass and certified L2 radius r (pixels in [0, 1])", fontsize=9)
    return figure


def _fitted(text: str, width: float, size: float) -> str:
    """`text` without mathematics, its middle left out as far as it must be to be `width` points wide at most. Signs
    that the font lacks (it has no Chinese, for one) become boxes."""
    font = get_font(findfont("DejaVu Sans"))
    font.set_size(size, 7200)  # a hundred pixels to the point
    glyphs = font.get_charmap()

    def points(text: str) -> float:
        font.set_text(text)
        return font.get_width_height()[0] / 6400  # it counts in 64ths of a pixel

    text = short = "".join(sign if ord(sign) in glyphs else "□" for sign in text)
    kept = len(text)
    while points(short) > width:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return _plain(short)
