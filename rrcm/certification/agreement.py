"""Whether two counts of the same noisy samples agree up to the rounding of the network. Pure functions.

Votes flip near a tie of two classes. Let z be the gap between the logits of the two classes under noise, in units of
its standard deviation, and let p be the probability that z is above 0. A rounding error flips the votes with |z| below
a small bound. The probability of such a z is twice the bound times the density of z at 0. For a normal z, this density
is phi(Phi^-1(p)). So one number, the flip rate at a tie, describes a model. An image with the vote share p has this
rate times `closeness(p)`. On the digits this explains how the flips differ between images (benchmarks/README.md,
"Audits").

Each flip moves one vote. So at most as many votes have moved as have flipped, and the flips are binomial.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import bdtrc, gammaln, ndtr, ndtri  # importing scipy.stats takes a second

from rrcm.certification.stopping import clopper_pearson_lower, smallest_count

CONFIDENCE = 0.99  # of an audit's statement that it would have detected forged rows


def moved_votes(first: Mapping[str, int], second: Mapping[str, int]) -> int:
    """How many votes have moved to another class between two counts of equally many samples.

    This is half of the sum of the differences.
    """
    return sum(abs(first.get(k, 0) - second.get(k, 0)) for k in first.keys() | second.keys()) // 2


def closeness(top: int | np.ndarray, m: int | np.ndarray) -> float | np.ndarray:
    """phi(Phi^-1(p)) / phi(0) for `top` votes of m, in (0, 1]: how close the image is to a tie.

    p = (top + 1) / (m + 2) is never 0 or 1. The closeness is 1 for p below one half, as several classes may tie there.
    """
    p = (np.asarray(top) + 1) / (np.asarray(m) + 2)
    return np.where(p > 0.5, np.exp(-(ndtri(p) ** 2) / 2), 1.0)[()]


def rate_bounds(flips: int, samples: int, close: float, alpha: float) -> tuple[float, float]:
    """Lower and upper confidence bounds on the flip rate at a tie; each errs with probability at most alpha.

    `flips` of `samples` votes flipped, over images whose mean closeness is `close`. The sum of independent flips with
    several rates has thinner tails than a binomial of their mean (Hoeffding 1956), so the bounds of Clopper and Pearson
    hold.
    """
    low = clopper_pearson_lower(flips, samples, alpha)
    high = 1 - clopper_pearson_lower(samples - flips, samples, alpha)
    return min(1.0, low / close), min(1.0, high / close)


def tail(moved: int | np.ndarray, m: int | np.ndarray, rate: float | np.ndarray) -> float | np.ndarray:
    """P(Bin(m, rate) >= moved), the p-value of `moved` votes if each of m samples flips at this rate."""
    moved = np.asarray(moved)
    return np.where(moved > 0, bdtrc(np.maximum(moved - 1, 0), m, rate), 1.0)[()]


def least_improbable(m: np.ndarray, rate: np.ndarray, level: float) -> np.ndarray:
    """The smallest number of moved votes whose p-value is at most `level`: (B,) int64 of m (B,) and `rate` (B,).

    m + 1 where there is none.
    """
    columns = m[:, None], rate[:, None]
    return smallest_count(lambda moved: tail(moved, *columns) <= level, columns[0], 1)[:, 0]


def pooled_tail(moved: Sequence[int], m: Sequence[int], rates: Sequence[float]) -> float:
    """The p-value of the sum of the moved votes of images, each with its own number of samples and rate.

    At or above its mean, a sum of independent flips has a thinner tail than a binomial variable with the mean rate
    (Hoeffding 1956, theorem 4). Below the mean the answer is 1.
    """
    total, samples = sum(moved), sum(m)
    mean = float(np.dot(m, rates))
    return float(tail(total, samples, mean / samples)) if total >= mean + 1 else 1.0


def votes_to_raise(top: np.ndarray, m: np.ndarray, shift: float) -> np.ndarray:
    """How many votes of m the top class must gain beyond its `top` votes to raise a radius by sigma * `shift`: (B,).

    The radius is taken as sigma Phi^-1(p), without its confidence bound.
    """
    p = (top + 1) / (m + 2)
    return np.ceil(m * (ndtr(ndtri(p) + shift) - p)).astype(np.int64)


def detectable_share(rows: int, audited: int, power: float) -> float | None:
    """The smallest share of forged rows among `rows` that an audit finds with CONFIDENCE.

    The audit draws `audited` rows without replacement, and finds each forged row among them with probability `power`.
    None if it would not even find that all rows are forged.
    """
    for forged in range(1, rows + 1):
        drawn = np.arange(max(0, audited - (rows - forged)), min(forged, audited) + 1)
        ways = _log_choose(forged, drawn) + _log_choose(rows - forged, audited - drawn) - _log_choose(rows, audited)
        if float((np.exp(ways) * (1 - power) ** drawn).sum()) <= 1 - CONFIDENCE:
            return forged / rows
    return None


def _log_choose(n: int, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
