"""The statistics of a certificate: binomial bounds, and when to stop sampling. Pure functions of counts.

p_A is the probability that the classifier gives the chosen class to a noisy copy of the image; the certified radius is
sigma Phi^-1 of a lower bound on it (Cohen et al. 2019, theorem 1). Radii and sigma are L2 in pixel units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import numpy as np
from scipy.special import bdtr, bdtrc, betaincinv, ndtr, ndtri  # scipy.stats takes a second to import

from rrcm.utils.errors import RRCMError

# Why sampling stopped.
ALL_SAMPLES = "all samples"
WHOLE_GRID = "whole grid"
FUTILE = "hopeless"  # the next radius of the grid is out of reach
WRONG_CLASS = "wrong class"  # of an evaluation: the chosen class is not the label

ABSTAIN = -1  # the class of an image of which nothing is certified
OPTIMISM = 0.9  # confidence of the upper bound on p_A under which the chances of a radius are seen
FUTILITY = 0.001  # a radius whose chance, seen so, is below this is given up
GROWTH = 1.2  # of the samples from look to look


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """One-sided lower confidence bound of a binomial proportion: it is above the truth with probability <= alpha."""
    return 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, alpha))


def binomial_test(successes: int, trials: int) -> float:
    """Two-sided p-value of `successes` >= trials / 2 under a fair coin: PREDICT's test."""
    return min(1.0, 2 * float(bdtr(trials - successes, trials, 0.5)))


@dataclass(frozen=True)
class Fixed:
    """CERTIFY of Cohen et al. 2019: n0 samples choose the class, n fresh ones give the exact bound."""

    sigma: float
    n0: int
    n: int
    alpha: float

    @property
    def looks(self) -> tuple[int, ...]:
        """How many samples have been drawn when counts are looked at."""
        return (self.n,)

    def judge(self, look: int, count: int, level: int) -> tuple[int, str]:
        """There is one look, and after it nothing more to draw."""
        return level, ALL_SAMPLES

    def radius(self, count: int, level: int) -> float | None:
        """The certified radius for `count` votes of n; None: nothing is certified."""
        bound = clopper_pearson_lower(count, self.n, self.alpha)
        return None if bound < 0.5 else self.sigma * float(ndtri(bound))


@dataclass(frozen=True)
class GroupSequential:
    """Group-sequential CERTIFY: looks at growing sample sizes, alpha split over them, radii of a grid one by one.

    A radius r is certified at look j when the count has a chance under p_A = Phi(r / sigma) that is at most alphas[j]
    and what earlier looks left unspent for r (few samples can say nothing of a large radius: 100 votes of 100 have a
    chance of 98 % there), and only after all smaller radii of the grid. For the smallest radius above the true one that
    happens, at any look, with probability at most the sum of alphas = alpha, and no larger one can follow without it:
    so an image's certificate is false with probability at most alpha, whatever stops the sampling.
    """

    sigma: float
    n0: int
    looks: tuple[int, ...]  # samples drawn at each look, J of them
    alphas: tuple[float, ...]  # chance of error granted at each look, for every radius
    radii: tuple[float, ...]  # the grid, G of them from 0 on
    needed: np.ndarray  # (J, G) int64, the smallest count that certifies radius g at look j (may be above the look)
    hope: np.ndarray  # (J, G) int64, the smallest count that leaves a chance to certify radius g later

    @property
    def alpha(self) -> float:
        """Chance of error of all looks together."""
        return math.fsum(self.alphas)

    def judge(
        self, look: int, count: int | np.ndarray, level: int | np.ndarray
    ) -> tuple[int | np.ndarray, str | np.ndarray]:
        """After the look: how many radii of the grid are certified now, and why to stop, or "". Vectorised over
        `count` and `level` of shape (B,)."""
        enough = np.asarray(count)[..., None] >= self.needed[look]
        certified = enough | (np.arange(len(self.radii)) < np.asarray(level)[..., None])
        level = np.logical_and.accumulate(certified, axis=-1).sum(-1)  # none before all smaller ones
        out_of_reach = count < np.append(self.hope[look], 0)[level]
        last = look == len(self.looks) - 1
        stopped = np.select([level == len(self.radii), last, out_of_reach], [WHOLE_GRID, ALL_SAMPLES, FUTILE], "")
        return (level, stopped) if np.ndim(count) else (int(level), str(stopped))

    def radius(self, count: int, level: int) -> float | None:
        """The largest certified radius of the grid; None: nothing is certified."""
        return self.radii[level - 1] if level else None


Procedure = Fixed | GroupSequential


def fixed(sigma: float, *, n0: int = 100, n: int = 100_000, alpha: float = 0.001) -> Fixed:
    """Cohen's CERTIFY. Raises `RRCMError` for impossible settings."""
    check(sigma, n0, n, alpha)
    return Fixed(sigma, n0, n, alpha)


def sequential(
    sigma: float, *, n0: int = 100, n: int = 100_000, alpha: float = 0.001, radius_step: float = 0.25
) -> GroupSequential:
    """Group-sequential CERTIFY with at most n samples, for radii 0, radius_step, 2 radius_step, ... as far as n can reach.

    Looks are at 100, 120, 144, ... samples; half of alpha is kept for the last, the rest split evenly over the others,
    and what a look cannot spend on a radius is carried on. Raises `RRCMError` for impossible settings.
    """
    check(sigma, n0, n, alpha)
    if not 0 < radius_step < np.inf:
        raise RRCMError(f"radius_step = {radius_step}: must be above 0, in pixel units")
    looks = growing_looks(n)
    alphas = spend(alpha, len(looks))
    reach = max(sigma * float(ndtri(alpha ** (1 / n))), 0.0)  # the radius of n votes out of n
    if reach / radius_step > 10_000:
        raise RRCMError(
            f"radius_step = {radius_step}: {reach / radius_step:.3g} radii up to {reach:.3g}; take a coarser one"
        )
    steps = 1 + int(reach / radius_step)
    radii = np.array([float(f"{radius_step * k:.12g}") for k in range(steps)])  # 0.6, not 0.6000000000000001
    needed = boundaries(looks, alphas, ndtr(radii / sigma))
    kept = max(1, int((needed[-1] <= n).sum()))  # not one that is out of reach by a rounding error
    radii, needed = radii[:kept], needed[:, :kept]
    m = np.array(looks)[:, None]

    def hopeful(count: np.ndarray) -> np.ndarray:
        """Conditional power: the chance to have enough at n if p_A is at the upper end of what the count allows."""
        optimistic = betaincinv(count + 1, np.maximum(m - count, 1e-9), OPTIMISM)
        missing = needed[-1] - count
        return _tail(missing, looks[-1] - m, optimistic) >= FUTILITY

    hope = smallest(hopeful, m, len(radii))
    return GroupSequential(sigma, n0, looks, alphas, tuple(radii.tolist()), needed, hope)


def make_stopping_rule(stopping: str, sigma: float, *, n0: int, n: int, alpha: float, radius_step: float) -> Procedure:
    """`fixed` or `sequential`, by name; the first has no use for `radius_step`. Raises `RRCMError`."""
    if stopping == "fixed":
        return fixed(sigma, n0=n0, n=n, alpha=alpha)
    if stopping == "sequential":
        return sequential(sigma, n0=n0, n=n, alpha=alpha, radius_step=radius_step)
    raise RRCMError(f"stopping = {stopping!r}: must be fixed or sequential")


def growing_looks(n: int) -> tuple[int, ...]:
    """Sample sizes 100, 120, 144, ... that end with n; none within a tenth below it, where it would gain nothing."""
    looks, size = [], 100.0
    while 1.1 * size < n:
        looks.append(int(size))
        size *= GROWTH
    return (*looks, n)


def spend(alpha: float, looks: int) -> tuple[float, ...]:
    """Half of alpha for the last look, the rest evenly for the others."""
    return (*[0.5 * alpha / max(looks - 1, 1)] * (looks - 1), 0.5 * alpha if looks > 1 else alpha)


def boundaries(looks: tuple[int, ...], alphas: tuple[float, ...], thresholds: np.ndarray) -> np.ndarray:
    """(J, G) int64: the smallest count at look j whose chance under p_A = thresholds[g] (G of them, rising) is at most
    alphas[j] and what the looks before left unspent; look + 1 where no count is."""
    needed, unspent = [], np.zeros(len(thresholds))
    for m, granted in zip(looks, alphas, strict=True):
        unspent += granted
        least = smallest(partial(_improbable, m, thresholds, unspent), np.array([[m]]), len(thresholds))[0]
        unspent -= _tail(least, m, thresholds)
        needed.append(least)
    return np.array(needed)


def _improbable(m: int, p: np.ndarray, alpha: np.ndarray, k: np.ndarray) -> np.ndarray:
    return bdtrc(k - 1, m, p) <= alpha


def smallest(holds: Callable[[np.ndarray], np.ndarray], m: np.ndarray, columns: int) -> np.ndarray:
    """The smallest count k in 0..m + 1 for which `holds`, which must be monotone: m (J, 1) -> (J, columns) int64.

    m + 1 stands for never.
    """
    low = np.zeros((len(m), columns), np.int64)
    high = np.broadcast_to(m + 1, low.shape).copy()
    while (low < high).any():
        middle = (low + high) // 2
        true = holds(np.minimum(middle, m))  # middle is m + 1 only where never is the answer already
        high = np.where(true, middle, high)
        low = np.where(true, low, np.minimum(middle + 1, high))
    return high


def _tail(k: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
    """P(Bin(n, p) >= k) for any integer k, also below 0 and above n."""
    inside = bdtrc(np.clip(k - 1, 0, n), n, p)
    return np.select([k <= 0, k > n], [1.0, 0.0], inside)


def check(sigma: float, n0: int, n: int, alpha: float) -> None:
    """Raises `RRCMError` for settings that no certificate can be made with."""
    if not 0 < sigma < np.inf:
        raise RRCMError(f"sigma = {sigma}: must be above 0 and finite, in pixel units")
    for name, samples in (("n0", n0), ("n", n)):
        if not (isinstance(samples, Integral) and 0 < samples < 2**31):
            raise RRCMError(f"{name} = {samples}: must be a whole number of samples, above 0 and below 2^31")
    if not 0 < alpha <= 0.5:
        raise RRCMError(f"alpha = {alpha}: must be above 0 and at most 0.5")
