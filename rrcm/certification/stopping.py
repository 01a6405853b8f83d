"""Binomial bounds and stopping rules: how counts of votes become certified radii. Pure functions of counts.

p_A is the probability that the base classifier gives a noisy copy of the image the chosen class. The certified radius
is sigma Phi^-1(lower bound on p_A) (Cohen et al. 2019, theorem 1). Radii and sigma are in L2 pixel units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from scipy.special import bdtr, bdtrc, betaincinv, ndtr, ndtri  # importing scipy.stats takes a second

from rrcm.utils.arguments import real_number, whole_number
from rrcm.utils.errors import RRCMError

# Why sampling stopped.
ALL_SAMPLES = "all samples"
WHOLE_GRID = "whole grid"
FUTILE = "futile"  # the next radius of the grid is out of reach
WRONG_CLASS = "wrong class"  # in an evaluation with labels: the chosen class is not the label

STOPPING = ("fixed", "sequential")
BOUNDS = ("binary", "margin")  # p_B = 1 - p_A, or p_B from the votes of every class (margin.py)
ABSTAIN = -1  # the predicted class when nothing is certified
FUTILITY_CONFIDENCE = 0.9  # confidence of the upper bound on p_A for which conditional power is computed
MIN_CONDITIONAL_POWER = 0.001  # sampling gives up on a radius with less conditional power
LOOK_GROWTH = 1.2  # factor between the sample sizes of consecutive looks
MOST_RADII, MOST_BOUNDS = 10_000, 400_000  # radii of the grid, times looks; the latter take up to ten seconds


def clopper_pearson_lower(
    successes: int | np.ndarray, trials: int | np.ndarray, alpha: float | np.ndarray
) -> float | np.ndarray:
    """One-sided Clopper-Pearson lower bound on a proportion. It exceeds the truth with probability at most alpha.

    Vectorized over all three.
    """
    bound = np.nan_to_num(betaincinv(successes, trials - successes + 1, alpha))  # NaN for some alpha below 1e-100
    return np.where(np.asarray(successes) > 0, bound, 0.0)[()]  # [()]: a number stays one


def binomial_test(successes: int, trials: int) -> float:
    """Two-sided p-value of `successes` >= trials / 2 under a fair coin, as in PREDICT (Cohen et al. 2019)."""
    return min(1.0, 2 * float(bdtr(trials - successes, trials, 0.5)))


@dataclass(frozen=True)
class FixedSample:
    """CERTIFY of Cohen et al. 2019: n0 samples choose the class, n fresh samples give the exact bound.

    It has one look, at which all of alpha is spent. It has no grid: a certificate may have any radius.
    """

    sigma: float
    n0: int
    n: int
    alpha: float
    bound: str = "binary"  # one of BOUNDS, by which the certificates are

    stops_early: ClassVar[bool] = False
    radii: ClassVar[tuple[float, ...]] = ()

    @property
    def looks(self) -> tuple[int, ...]:
        """Samples drawn at each look."""
        return (self.n,)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Error probability spent at each look."""
        return (self.alpha,)

    def decide(self, look: int, count: int, num_certified: int) -> tuple[int, str]:
        """How many radii of the grid are certified, which is none as there is no grid, and why to stop."""
        return num_certified, ALL_SAMPLES

    def reason_to_stop(self, look: int, num_certified: np.ndarray, futile: np.ndarray) -> str:
        """Why to stop after the look."""
        return ALL_SAMPLES

    def radius(self, count: int, num_certified: int) -> float | None:
        """The certified radius for `count` votes of n, or None when nothing is certified."""
        bound = clopper_pearson_lower(count, self.n, self.alpha)
        return None if bound < 0.5 else self.sigma * float(ndtri(bound))


@dataclass(frozen=True)
class GroupSequential:
    """Group-sequential CERTIFY: looks at growing sample sizes, alpha spending, radii of a grid in order.

    Each radius r of the grid has its own error budget, to which look j adds alphas[j]. The look certifies r if a count
    this high has a probability within the budget under p_A = Phi(r / sigma). The alpha that a look cannot spend is
    carried forward. Small samples cannot certify large radii: under a large p_A even 100 votes of 100 can have a
    probability of 98 %.

    A radius is certified only after all smaller ones. A false certificate therefore includes the smallest radius of the
    grid above the true one. The probability that any look certifies that radius is at most the sum of the alphas. So
    each certificate is false with probability at most alpha, whatever rule stops the sampling.
    """

    sigma: float
    n0: int
    looks: tuple[int, ...]  # samples drawn at each look, J of them
    alphas: tuple[float, ...]  # error probability added to each radius's budget at each look
    radii: tuple[float, ...]  # the grid, G radii from 0 on
    efficacy_counts: np.ndarray  # (J, G) int64, smallest count that certifies radius g at look j; look + 1 if none does
    bound: str = "binary"  # one of BOUNDS, by which the certificates are, and which decides when to stop

    stops_early: ClassVar[bool] = True  # also when the chosen class is not the label

    @property
    def alpha(self) -> float:
        """Error probability of all looks together."""
        return math.fsum(self.alphas)

    def decide(
        self, look: int, count: int | np.ndarray, num_certified: int | np.ndarray
    ) -> tuple[int | np.ndarray, str | np.ndarray]:
        """How many radii of the grid are certified after the look, and why to stop ("" to continue).

        Vectorized over `count` and `num_certified` of shape (B,).
        """
        enough = np.asarray(count)[..., None] >= self.efficacy_counts[look]
        certified = enough | (np.arange(len(self.radii)) < np.asarray(num_certified)[..., None])
        num_certified = np.logical_and.accumulate(certified, axis=-1).sum(-1)  # none before all smaller ones
        needed = np.append(self.efficacy_counts[-1], 0)[num_certified]  # for the next radius, at the last look
        futile = ~in_reach(np.asarray(count), self.looks[look], needed, self.looks[-1])
        reason = self.reason_to_stop(look, num_certified, futile)
        return (num_certified, reason) if np.ndim(count) else (int(num_certified), str(reason))

    def reason_to_stop(self, look: int, num_certified: np.ndarray, futile: np.ndarray) -> np.ndarray:
        """Why to stop after the look: (B,) of constants, "" to continue.

        `num_certified` (B,) radii are certified, and the next one is out of reach where `futile` (B,) is true.
        """
        last = look == len(self.looks) - 1
        return np.select([num_certified == len(self.radii), last, futile], [WHOLE_GRID, ALL_SAMPLES, FUTILE], "")

    def radius(self, count: int, num_certified: int) -> float | None:
        """The largest certified radius of the grid, or None when nothing is certified."""
        return self.radii[num_certified - 1] if num_certified else None


StoppingRule = FixedSample | GroupSequential


def fixed_sample(sigma: float, *, n0: int = 100, n: int = 100_000, alpha: float = 0.001) -> FixedSample:
    """CERTIFY of Cohen et al. 2019. Raises `RRCMError` for impossible settings."""
    return FixedSample(*check_settings(sigma, n0, n, alpha))


def group_sequential(
    sigma: float, *, n0: int = 100, n: int = 100_000, alpha: float = 0.001, radius_step: float = 0.25
) -> GroupSequential:
    """Group-sequential CERTIFY with at most n samples, for all multiples of radius_step that n samples can reach.

    `look_schedule` and `alpha_spending` give the looks and their shares of alpha. Raises `RRCMError` for impossible
    settings.
    """
    sigma, n0, n, alpha = check_settings(sigma, n0, n, alpha)
    radius_step = real_number("radius_step", radius_step)
    if not 0 < radius_step < np.inf:
        raise RRCMError(f"radius_step = {radius_step}: must be above 0 and finite, in pixel units")
    looks = look_schedule(n)
    alphas = alpha_spending(alpha, len(looks))
    reach = max(sigma * float(ndtri(alpha ** (1 / n))), 0.0)  # the radius for n votes of n
    if reach / radius_step > (most := min(MOST_RADII, MOST_BOUNDS // len(looks))):
        given = f"gives {reach / radius_step:.3g} radii up to {reach:.3g}, more than {most:,}"
        raise RRCMError(f"radius_step = {radius_step}: {given}; take a larger step")
    steps = 1 + int(reach / radius_step)
    radii = np.array([float(f"{radius_step * k:.12g}") for k in range(steps)])  # 0.6, not 0.6000000000000001
    efficacy_counts = efficacy_boundary(looks, alphas, ndtr(radii / sigma))
    if (efficacy_counts[:, 0] > looks).all():  # the sum of the shares is rounded
        raise certifies_nothing(n, alpha, "set n higher")
    kept = max(1, int((efficacy_counts[-1] <= n).sum()))  # without a radius that only rounding puts within reach
    return GroupSequential(sigma, n0, looks, alphas, tuple(radii[:kept].tolist()), efficacy_counts[:, :kept])


def look_schedule(n: int) -> tuple[int, ...]:
    """Sample sizes 100, 120, 144, ..., n. A look within a tenth below n is left out, as it would save little."""
    looks, size = [], 100.0
    while 1.1 * size < n:
        looks.append(int(size))
        size *= LOOK_GROWTH
    return (*looks, n)


def alpha_spending(alpha: float, num_looks: int) -> tuple[float, ...]:
    """Half of alpha for the last look, the rest split evenly over the others."""
    if num_looks == 1:
        return (alpha,)
    return (*[0.5 * alpha / (num_looks - 1)] * (num_looks - 1), 0.5 * alpha)


def efficacy_boundary(looks: tuple[int, ...], alphas: tuple[float, ...], thresholds: np.ndarray) -> np.ndarray:
    """The smallest count at look j that certifies radius g: (J, G) int64; look + 1 where no count does.

    `thresholds` (G,) increasing are the p_A to reject. A count certifies when its probability under thresholds[g] is at
    most alphas[j] plus the alpha that earlier looks left unspent.
    """
    boundary, unspent = [], np.zeros(len(thresholds))
    for m, alpha in zip(looks, alphas, strict=True):
        unspent += alpha
        counts = smallest_count(partial(_improbable, m, thresholds, unspent), np.array([[m]]), len(thresholds))[0]
        unspent -= _upper_tail(counts, m, thresholds)
        boundary.append(counts)
    return np.array(boundary)


def in_reach(count: np.ndarray, m: int, needed: np.ndarray, n: int) -> np.ndarray:
    """Whether a radius that needs `needed` votes of n is still in reach after `count` votes of m: (B,) bool.

    It is while its conditional power is at least MIN_CONDITIONAL_POWER. The conditional power is the probability to get
    `needed` (B,) votes, with p_A at an upper confidence bound (FUTILITY_CONFIDENCE).
    """
    optimistic = betaincinv(count + 1, np.maximum(m - count, 1e-9), FUTILITY_CONFIDENCE)
    return _upper_tail(needed - count, n - m, optimistic) >= MIN_CONDITIONAL_POWER


def _improbable(m: int, p: np.ndarray, alpha: np.ndarray, k: np.ndarray) -> np.ndarray:
    return bdtrc(k - 1, m, p) <= alpha


def smallest_count(holds: Callable[[np.ndarray], np.ndarray], m: np.ndarray, columns: int) -> np.ndarray:
    """The smallest count k in 0..m for which the monotone `holds` is true: m (J, 1) -> (J, columns) int64.

    m + 1 where it is never true.
    """
    low = np.zeros((len(m), columns), np.int64)
    high = np.broadcast_to(m + 1, low.shape).copy()
    while (low < high).any():
        middle = (low + high) // 2
        true = holds(np.minimum(middle, m))  # middle is m + 1 only where the search has ended
        high = np.where(true, middle, high)
        low = np.where(true, low, np.minimum(middle + 1, high))
    return high


def _upper_tail(k: np.ndarray, n: np.ndarray, p: np.ndarray) -> np.ndarray:
    """P(Bin(n, p) >= k) for any integer k, below 0 and above n included."""
    inside = bdtrc(np.clip(k - 1, 0, n), n, p)
    return np.select([k <= 0, k > n], [1.0, 0.0], inside)


def check_prediction(n: int, alpha: float) -> tuple[int, float]:
    """n and alpha as Python numbers. Raises `RRCMError` if PREDICT is impossible with them or always abstains."""
    _, _, n, alpha = _numbers(1.0, 1, n, alpha)
    if n < (least := _fewest_votes(alpha / 2)):  # its test is two-sided
        raise RRCMError(f"n = {n}: always abstains at alpha = {alpha}, even if all votes agree; set n to {least}")
    return n, alpha


def check_settings(sigma: float, n0: int, n: int, alpha: float) -> tuple[float, int, int, float]:
    """sigma, n0, n and alpha as Python numbers. Raises `RRCMError` if nothing can be certified with them."""
    sigma, n0, n, alpha = _numbers(sigma, n0, n, alpha)
    if n < (least := _fewest_votes(alpha)):
        raise certifies_nothing(n, alpha, f"set n to {least}")
    return sigma, n0, n, alpha


def certifies_nothing(n: int, alpha: float, advice: str) -> RRCMError:
    return RRCMError(f"n = {n}: certifies nothing at alpha = {alpha}, even if all votes agree; {advice}")


def _numbers(sigma: float, n0: int, n: int, alpha: float) -> tuple[float, int, int, float]:
    """The settings as Python numbers. Raises `RRCMError` for a number out of its range."""
    sigma, alpha = real_number("sigma", sigma), real_number("alpha", alpha)
    n0, n = whole_number("n0", n0), whole_number("n", n)
    if not 0 < sigma < np.inf:
        raise RRCMError(f"sigma = {sigma}: must be above 0 and finite, in pixel units")
    for name, samples in (("n0", n0), ("n", n)):
        if not 0 < samples < 2**31:
            raise RRCMError(f"{name} = {samples}: must be a whole number of samples, above 0 and below 2^31")
    if not 0 < alpha <= 0.5:
        raise RRCMError(f"alpha = {alpha}: must be above 0 and at most 0.5")
    return sigma, n0, n, alpha


def _fewest_votes(alpha: float) -> int:
    """The smallest n for which n equal tosses of a fair coin have a probability of at most alpha."""
    return math.ceil(-math.log2(alpha) - 1e-9)  # the logarithm may be rounded up
