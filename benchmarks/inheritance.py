"""Certificates that a dear network f inherits from a cheap one g: do they cost less than certifying f itself?

With c the chosen class, both networks on the same noise, and lost = P(g = c, f != c), gained = P(g != c, f = c):

    P(f = c) = P(g = c) - lost + gained

Many cheap votes bound the first term, and few pairs of votes the other two (incremental randomized smoothing, Ugare et
al. 2024, bounds both kinds of disagreement as if each were lost).

    python benchmarks/inheritance.py theory
    python benchmarks/inheritance.py vote DEAR CHEAP SHARDS student_0.5.npz --sigma 0.5
    python benchmarks/inheritance.py compare student_0.5.npz
    python benchmarks/inheritance.py figure docs/inheritance.png student_0.5.npz
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from time import process_time
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from scipy.special import ndtri
from scipy.stats import binom
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification.noise import ESTIMATE, SELECT, counter_normal
from rrcm.certification.packing import SampleRequest
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.stopping import clopper_pearson_lower, group_sequential
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder
from rrcm.report.figures import OKABE_ITO, figure_style, save

app = make_app()
ALPHA = 0.001
N0 = 100  # selection samples
SPLITS = [  # of alpha: for g, for what is lost, for what is gained
    (1 - lost - gained, lost, gained) for lost in (0.1, 0.3, 0.5) for gained in (0.0, 0.1, 0.3)
]
PRICES = (2.3, 10.0, np.inf)  # of a vote of f, in votes of g
LEVELS = (np.arange(25) + 0.5) / 25
POWER = 0.9  # probability with which a design certifies
ROUNDS = 7  # in which the price is measured


# Bounds and closed forms


def inherited_lower(
    top: np.ndarray, n: int, lost: np.ndarray, gained: np.ndarray, pairs: int, alphas: tuple[float, float, float]
) -> np.ndarray:
    """A lower bound on P(f = c) that exceeds it with probability at most sum(alphas). Vectorized over the counts.

    `top` of n votes of g are for c. Of `pairs` pairs, `lost` have g = c and f != c, and `gained` the reverse. The union
    bound lets the three counts depend on each other, so votes of g in a pair may be among the n.
    """
    fewest_lost = clopper_pearson_lower(pairs - lost, pairs, alphas[1])
    return (
        clopper_pearson_lower(top, n, alphas[0]) - (1 - fewest_lost) + clopper_pearson_lower(gained, pairs, alphas[2])
    )


def correlation(p: np.ndarray, lost: np.ndarray, gained: np.ndarray) -> np.ndarray:
    """The correlation of 1(f = c) and 1(g = c), where P(f = c) = p. 0 where one of them never varies."""
    other = p + lost - gained
    variance = p * (1 - p) * other * (1 - other)
    return np.where(variance > 0, (p - gained - p * other) / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)


def least_price(r: np.ndarray) -> np.ndarray:
    """How many times the cheap network's cost a vote of f must cost, or nothing can be gained at correlation r."""
    rest = np.sqrt(np.maximum(1 - np.square(r), 0))
    return (1 + rest) / np.where(rest < 1, 1 - rest, 1e-300)


def needed_correlation(price: float) -> float:
    """The correlation above which inheritance can pay: the inverse of `least_price`."""
    if price == np.inf:
        return 0.0
    return float(2 * np.sqrt(price) / (price + 1)) if price > 1 else 1.0


def least_cost(r: np.ndarray, price: float) -> np.ndarray:
    """The least cost of many votes relative to f's votes alone, for equally narrow bounds at correlation r.

    It is the variance of the best control variate times its cost (Peherstorfer et al. 2016). For binary votes this is
    the efficient estimator, so no bound from c's votes can do better.
    """
    cost = np.square(np.sqrt(np.maximum(1 - np.square(r), 0)) + r / np.sqrt(price))
    return np.where(price > least_price(r), cost, 1.0)


# Designs: whether inheritance certifies with fewer votes, by binomial distributions of counts taken as independent


@dataclass(frozen=True)
class Image:
    """The probabilities of an image."""

    p: float  # P(f = c)
    lost: float
    gained: float

    def inherits(self, goal: float, price: float, n: int) -> bool:
        """Whether inheritance certifies P(f = c) > `goal` with probability POWER, for the cost of n votes of f.

        `price` is what a vote of f costs in votes of g. At infinity P(g = c) is known for nothing.
        """
        cheap_p = self.p + self.lost - self.gained
        for pairs in np.unique(np.geomspace(n / 100, n, 16).astype(int)):
            for split in SPLITS:
                needed = goal + self._excess(pairs, ALPHA * split[1], ALPHA * split[2])
                if price == np.inf:
                    chance = needed < cheap_p
                else:
                    cheap = int(price * (n - pairs))  # votes of g that the rest of the budget pays, the pairs' included
                    if cheap < pairs:
                        continue
                    count = binom.isf(ALPHA * split[0], cheap, needed.clip(0, 1)) + 1
                    chance = np.where(needed < 1, binom.sf(count - 1, cheap, cheap_p), 0)
                if chance.mean() >= POWER:
                    return True
        return False

    def _excess(self, pairs: int, lost_alpha: float, gained_alpha: float) -> np.ndarray:
        """LEVELS equally likely values of the bound on lost - gained."""
        lost, gained = (binom.ppf(LEVELS, pairs, q) for q in (self.lost, self.gained))
        bound = 1 - clopper_pearson_lower(pairs - lost, pairs, lost_alpha)[:, None]
        bound = np.sort((bound - clopper_pearson_lower(gained, pairs, gained_alpha)).ravel())
        return bound.reshape(len(LEVELS), -1).mean(1)


def goal_of(p: float, n: int) -> float:
    """The largest lower bound that n votes of f reach with probability POWER."""
    return float(clopper_pearson_lower(binom.ppf(1 - POWER, n, p), n, ALPHA))


def most_disagreement(p: float, n: int, price: float) -> float | None:
    """The largest P(f != g), half of it lost, at which inheritance certifies what n votes of f do. None: not even 0."""
    goal, low, high = goal_of(p, n), 0.0, 2 * p * (1 - p)
    if not Image(p, 0.0, 0.0).inherits(goal, price, n):
        return None
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if Image(p, middle / 2, middle / 2).inherits(goal, price, n) else (low, middle)
    return low


@app.command()
@exit_on_error
def theory() -> None:
    """Print the largest disagreement (%) at which inheritance certifies what n votes of f do, for their cost."""
    rows = []
    for price in PRICES:
        needed = needed_correlation(price)
        for p in (0.6, 0.9, 0.99, 0.999):
            most = [most_disagreement(p, n, price) for n in (1_000, 10_000, 100_000)]
            cells = ["never" if each is None else f"{100 * each:.3g}" for each in most]
            rows.append([f"{price:g}", f"{p:g}", *cells, f"{200 * p * (1 - p) * (1 - needed):.3g}", f"{needed:.2f}"])
    head = ["price", "p_A", "n = 1,000", "10,000", "100,000", "no bound beyond", "correlation"]
    print(tabulate(rows, head, "github", disable_numparse=True))


@app.command()
@exit_on_error
def figure(output: Path, votes: Annotated[list[Path], typer.Argument(help="files NAME_SIGMA.npz of `vote`")]) -> None:
    """Draw the least costs, and the correlations that were measured."""
    save(draw([path.stem.partition("_")[0] for path in votes], [Pair.read(path) for path in votes]), output)


@figure_style()
def draw(names: list[str], pairs: list["Pair"]) -> Figure:
    """The least cost against the correlation for some prices, and the correlations of pairs against p_A."""
    figure = Figure(figsize=(8.2, 3.2))
    left, right = figure.subplots(1, 2)
    r = np.linspace(0, 1, 400)
    for price, colour, dashes in zip(PRICES, OKABE_ITO, ("-", "--", "-."), strict=False):
        name = "g paid" if price == np.inf else f"price {price:g}"
        left.plot(r, least_cost(r, price), color=colour, linestyle=dashes, label=name)
        if price < np.inf:
            right.axhline(needed_correlation(price), color=colour, linestyle=dashes)
            right.annotate(f"needed at {name}", (0.5, needed_correlation(price)), (2, 3), textcoords="offset points")
    left.set(xlabel="correlation of the two votes for the class", ylabel="least cost / cost of f alone", ylim=(0, 1.05))
    left.legend(loc="lower left")
    for name, pair, colour, marker in zip(names, pairs, OKABE_ITO[3:], "o^sD", strict=False):
        p, measured = pair.correlations()
        label = f"{name}, σ = {pair.sigma:g}"
        right.plot(p, measured, linestyle="", marker=marker, markersize=4, color=colour, label=label)
    right.set(xlabel="$p_A$ of an image", ylabel="correlation", xlim=(0.5, 1.005), ylim=(0, 1.04))
    right.legend(loc="lower left")
    return figure


# Votes of both networks


@app.command()
@exit_on_error
def vote(
    dear: Path,
    cheap: Path,
    shards: Path,
    output: Path,
    sigma: Annotated[float, typer.Option()],
    images: int = 100,
    n: int = 4000,
    cheap_precision: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
) -> None:
    """Let both networks vote on n noisy copies of evenly spaced test images, and write the votes and their seconds."""
    networks = [(dear, "fp32"), (cheap, cheap_precision)]
    loaded = [(load_model_folder(folder, sigma=sigma), precision) for folder, precision in networks]
    both = [
        SmoothedClassifier(each.classifier, sigma, each.num_classes, precision=precision) for each, precision in loaded
    ]
    split, size = ShardedDataset(shards, "test"), loaded[0][0].image_size
    pixels, labels, indices = read_split(split, size, 1, images)
    pixels = pixels.float() / 255
    both[1].batch_size = both[0].batch_size = both[0].find_batch_size(pixels[0])
    seconds = seconds_per_sample(both, pixels[0])
    chosen = [each.count_samples(pixels, indices, SELECT, N0).argmax(1) for each in both]
    right = (chosen[0] == labels.numpy()) | (chosen[1] == labels.numpy())  # of the others no procedure needs votes
    is_label = np.zeros((2, len(pixels), n), bool)
    for i in np.flatnonzero(right).tolist():
        for k, each in enumerate(both):
            is_label[k, i] = classes(each, pixels[i], indices[i], n) == labels[i].item()
    right = np.array(chosen) == labels.numpy()
    np.savez_compressed(output, is_label=is_label, right=right, seconds=seconds, sigma=sigma)


def seconds_per_sample(both: list[SmoothedClassifier], image: torch.Tensor) -> list[float]:
    """CPU seconds of a sample of each network, its noise included, and of the noise alone: medians over the rounds."""
    size = both[0].batch_size
    rows = torch.arange(size)
    actions = [lambda each=each: each.count_votes([SampleRequest(image, 0, ESTIMATE, 0, size)]) for each in both]
    actions.append(lambda: counter_normal(image.shape, 0, rows, rows, rows))
    measured = [[timed(action) / size for action in actions] for _ in range(ROUNDS + 1)]
    return [median(column) for column in zip(*measured[1:], strict=True)]  # the first round warms up


def timed(action: Callable[[], object]) -> float:
    """CPU seconds of an action."""
    start = process_time()
    action()
    return process_time() - start


def classes(smoothed: SmoothedClassifier, image: torch.Tensor, index: int, n: int) -> np.ndarray:
    """The classes of the first n samples of an image: (n,) int64."""
    size = smoothed.batch_size
    batches = (range(first, min(n, first + size)) for first in range(0, n, size))
    requests = ([SampleRequest(image, index, ESTIMATE, k, k + 1) for k in batch] for batch in batches)
    return np.concatenate([smoothed.count_votes(each).argmax(1) for each in requests])


# Procedures at equal CPU seconds


@dataclass(frozen=True)
class Pair:
    """The votes of two networks, f and g, for the same noisy copies of I images, and what a vote costs."""

    is_label: np.ndarray  # (2, I, n) bool: the label has the vote of f, of g
    right: np.ndarray  # (2, I) bool: the selection samples of f, of g choose the label
    seconds: np.ndarray  # (3,) CPU seconds of a sample of f, of g, and of the noise in it
    sigma: float

    @classmethod
    def read(cls, path: Path) -> "Pair":
        """The pair in a file of the command `vote`."""
        with np.load(path) as file:
            return cls(file["is_label"], file["right"], file["seconds"], float(file["sigma"]))

    @property
    def on_drawn_noise(self) -> float:
        """CPU seconds of a vote of f on noise that was drawn for g."""
        return float(self.seconds[0] - self.seconds[2])

    @property
    def price(self) -> float:
        """What such a vote costs in votes of g."""
        return float(self.on_drawn_noise / self.seconds[1])

    @cached_property
    def top(self) -> np.ndarray:
        """(2, I, n) int64: votes of f, of g for the label among the first 1, 2, ..., n."""
        return self.is_label.cumsum(2)

    @cached_property
    def lost(self) -> np.ndarray:
        """(I, n) int64: pairs in which g has the label and f has not."""
        return (self.is_label[1] & ~self.is_label[0]).cumsum(1)

    @cached_property
    def gained(self) -> np.ndarray:
        """(I, n) int64: pairs in which f has the label and g has not."""
        return (self.is_label[0] & ~self.is_label[1]).cumsum(1)

    def correlations(self) -> tuple[np.ndarray, np.ndarray]:
        """p_A of f, and the correlation of both networks' votes for the label: (J,) each, for images that f has."""
        n, own = self.is_label.shape[2], self.right[0]
        p, lost, gained = (each[own, -1] / n for each in (self.top[0], self.lost, self.gained))
        return p, correlation(p, lost, gained)


@dataclass(frozen=True)
class Outcome:
    """What a procedure certifies and costs."""

    radii: np.ndarray  # (I,) pixel units, 0 where nothing is certified or the class is wrong
    seconds: float  # of CPU per image

    @property
    def acr(self) -> float:
        """The average certified radius."""
        return float(self.radii.mean())


def radii_of(bound: np.ndarray, pair: Pair, voter: int) -> np.ndarray:
    """sigma Phi^-1 of the lower bounds on P(f = c), and 0 where the selection samples of `voter` chose wrongly."""
    return np.where(pair.right[voter], pair.sigma * ndtri(bound.clip(0.5)), 0.0)


def direct_fixed(pair: Pair, n: int) -> Outcome:
    """f alone, by n samples."""
    bound = clopper_pearson_lower(pair.top[0, :, n - 1], n, ALPHA)
    return Outcome(radii_of(bound, pair, 0), pair.seconds[0] * (N0 + n * pair.right[0].mean()))


def direct_sequential(pair: Pair, n: int, radius_step: float) -> Outcome:
    """f alone, by the rule that all certificates of this repository have by default, with at most n samples."""
    rule = group_sequential(pair.sigma, n0=N0, n=n, alpha=ALPHA, radius_step=radius_step)
    certified, drawn = np.zeros(pair.right.shape[1], int), np.zeros(pair.right.shape[1], int)
    active = pair.right[0].copy()
    for look, m in enumerate(rule.looks):
        certified[active], reasons = rule.decide(look, pair.top[0, active, m - 1], certified[active])
        drawn[active] = m
        active[active] = reasons == ""
    radii = np.array([rule.radius(0, each) or 0.0 for each in certified.tolist()])
    return Outcome(radii, pair.seconds[0] * (N0 + drawn.mean()))


def inherit(pair: Pair, n: int, pairs: int, split: tuple[float, float, float], paid: bool, all_lost: bool) -> Outcome:
    """f by n votes of g, the first `pairs` of which f votes on too.

    `all_lost` counts every disagreement as lost. If `paid`, the votes of g cost nothing.
    """
    lost, gained = pair.lost[:, pairs - 1], pair.gained[:, pairs - 1]
    if all_lost:
        lost, gained = lost + gained, 0 * gained
    bound = inherited_lower(pair.top[1, :, n - 1], n, lost, gained, pairs, tuple(ALPHA * share for share in split))
    share = pair.right[1].mean()  # of the other images neither has votes after the selection
    of_pairs = (pair.seconds[0] if paid else pair.on_drawn_noise) * pairs * share
    cost = of_pairs if paid else of_pairs + pair.seconds[1] * (N0 + n * share)
    return Outcome(radii_of(bound, pair, 1), cost)


def designs(pair: Pair, paid: bool, all_lost: bool) -> Iterator[Outcome]:
    """Inheritance by every number of cheap votes and of pairs, and every split of alpha."""
    n = pair.is_label.shape[2]
    sizes = np.unique(np.geomspace(50, n, 24).astype(int)).tolist()
    for cheap in [n] if paid else sizes:
        for pairs in (size for size in sizes if size <= cheap):
            for split in SPLITS:
                if not (all_lost and split[2]):
                    yield inherit(pair, cheap, pairs, split, paid, all_lost)


@app.command()
@exit_on_error
def compare(
    votes: Path,
    radius_step: Annotated[float, typer.Option(help="of the sequential procedure, pixel units")] = 0.05,
    radii: str = "0.25,0.5,0.75",
    price: Annotated[float | None, typer.Option(help="of another machine; default: as measured")] = None,
) -> None:
    """Print what each procedure certifies for the CPU seconds of the sequential one, and how the two networks agree.

    Inheritance has the design that is best for these very images, which favours it.
    """
    pair = Pair.read(votes)
    if price is not None:
        pair = replace(pair, seconds=np.array([pair.seconds[0], pair.on_drawn_noise / price, pair.seconds[2]]))
    n, at = pair.is_label.shape[2], [float(radius) for radius in radii.split(",")]
    p, r = pair.correlations()
    middle = (p > 0.6) & (p < 0.99)
    disagree = (pair.is_label[0] != pair.is_label[1])[pair.right[0]].mean()
    print(f"{votes.stem}: {len(pair.right[0])} images, f is right on {pair.right[0].sum()}, g on {pair.right[1].sum()}")
    print(
        f"samples per CPU second of f, g and the noise alone: {', '.join(f'{1 / each:,.0f}' for each in pair.seconds)}"
    )
    print(f"price {pair.price:.2f}, so a correlation of {needed_correlation(pair.price):.3f} is needed")
    print(f"disagreement {disagree:.4f}; of {middle.sum()} images with 0.6 < p_A < 0.99 the correlation is ", end="")
    print(f"{np.median(r[middle]):.3f} ({r[middle].min():.3f}-{r[middle].max():.3f}), and the least cost ", end="")
    print(f"{least_cost(r[middle], pair.price).mean():.2f}\n")
    rows = []
    for most in (n // 4, n // 2, n):
        sequential = direct_sequential(pair, most, radius_step)
        fixed = best_within((direct_fixed(pair, int(m)) for m in np.geomspace(20, n, 60)), sequential.seconds)
        rows.append(row(f"f alone, sequential, n = {most:,}", sequential, fixed, at))
        rows.append(row("f alone, fixed", fixed, fixed, at))
        for paid in (False, True):
            for all_lost in (False, True):
                name = f"inherited{', all lost' if all_lost else ''}{', g paid' if paid else ''}"
                rows.append(row(name, best_within(designs(pair, paid, all_lost), sequential.seconds), fixed, at))
    head = ["procedure", "CPU s per image", "ACR", "minus fixed", *(f"r = {radius:g}" for radius in at)]
    print(tabulate(rows, head, "github", disable_numparse=True))


def best_within(outcomes: Iterator[Outcome], seconds: float) -> Outcome:
    """The outcome with the largest ACR that costs at most `seconds`, or nothing at all."""
    nothing = Outcome(np.zeros(1), 0.0)
    return max((each for each in outcomes if each.seconds <= seconds), key=lambda each: each.acr, default=nothing)


def row(name: str, outcome: Outcome, fixed: Outcome, at: list[float]) -> list[str]:
    """A row of the table, with the 95 % interval over images of the difference from the fixed procedure."""
    difference = outcome.radii - fixed.radii
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    mean = difference.mean()
    text = "" if outcome is fixed else f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"
    accuracy = [f"{100 * (outcome.radii >= radius - 1e-9).mean():.0f}" for radius in at]
    return [name, f"{outcome.seconds:.3f}", f"{outcome.acr:.3f}", text, *accuracy]


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    app()
