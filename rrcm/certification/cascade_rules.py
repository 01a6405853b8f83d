"""The statistics of the cascade: which claims a certificate rests on, and how counts of votes decide them.

`cascade_radii.py` has F, the paths and the theorem. The statement that a path has at least the radius r is a
conjunction of elementary claims. Each is about one scale k and the chosen class c:

    ABOVE    R_k(c) - tau_k >= r     the votes for c
    BELOW    Q_k(c) + tau_k >= r     the votes for each other class
    M_k(c) >= r                      by one of the tests of the margin bound: BINARY, TWO_BOUNDS, PAIR
    PASSED   R_k(c) < tau_k          only for the certificates of Jeong & Shin

The selection samples choose the class, the path, and the claims where B_k is a maximum of two. The estimation samples
are independent of them, so the claims are then fixed. Each claim has its own group-sequential procedure over the grid
of radii, and each uses all of alpha. The certified radius is the smallest one over the claims. If it is too large, then
the procedure of the claim with the smallest true radius has erred, which is one fixed claim and one fixed radius of the
grid. The certificate is therefore false with probability at most alpha, however many scales and classes there are, and
whatever stops the sampling (an intersection-union test). A claim about all other classes is such a conjunction too. The
votes of different scales need not be independent of each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri

from rrcm.certification.cascade_radii import with_first_threshold
from rrcm.certification.margin import BINARY, PAIR, TWO_BOUNDS, MarginRule, margin_radius
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import (
    ALL_SAMPLES,
    FixedSample,
    StoppingRule,
    clopper_pearson_lower,
    efficacy_boundary,
)
from rrcm.utils.arguments import real_number, shown
from rrcm.utils.errors import RRCMError

ABOVE, BELOW, PASSED = "above the threshold", "others below the threshold", "passed on"
MARGIN_TESTS = (TWO_BOUNDS, PAIR)  # BINARY is a claim about the votes for the class alone
LABEL_AWARE, MULTI_SCALE = "label-aware", "multi-scale"  # certificates: ours, and Jeong & Shin's (NeurIPS 2023)
CERTIFICATES = (LABEL_AWARE, MULTI_SCALE)

Claims = list[tuple[int, str]]  # scale and elementary claim


def claim_count(claim: str, top: np.ndarray, others: np.ndarray, m: int) -> np.ndarray:
    """The votes of m that speak for a one-sided claim: (B,) for `top` (B,) and `others` (B, C)."""
    if claim == BELOW:
        return m - np.max(others, axis=-1)
    return m - top if claim == PASSED else top


def claim_shares(claim: str, radii: np.ndarray, sigma: float, threshold: float) -> np.ndarray:
    """A one-sided claim says r when the true share of its votes is at least this: (G,) for `radii` (G,)."""
    shift = {ABOVE: threshold, BELOW: -threshold, BINARY: 0.0, PASSED: -threshold}[claim]
    return ndtr(((0 if claim == PASSED else 1) * radii + shift) / sigma)


def claim_radius(
    claim: str, sigma: float, threshold: float, top: np.ndarray, others: np.ndarray, m: int, alpha: float
) -> np.ndarray:
    """The largest r that a claim says by one test at alpha: (B,) for `top` (B,) and `others` (B, C), votes of m.

    Negative: it says nothing. `others` need only have each number of votes that occurs.
    """
    if claim in MARGIN_TESTS:
        return margin_radius(claim, sigma, top, others, m, alpha)
    radius = sigma * ndtri(clopper_pearson_lower(claim_count(claim, top, others, m), m, alpha))
    if claim == PASSED:
        return np.where(radius + threshold >= 0, np.inf, -np.inf)
    return radius + {ABOVE: -threshold, BELOW: threshold, BINARY: 0.0}[claim]


def acceptance_claims(threshold: float, test: str) -> tuple[str, ...]:
    """The claims that A_k = min(R_k - tau_k, M_k) is at least r, with M_k by `test`.

    One claim suffices where it implies the other. If R_k >= r + tau_k and tau_k >= 0, then c has at least half of the
    votes, so M_k >= R_k. If R_k >= r and tau_k < 0, then R_k - tau_k >= r.
    """
    if threshold >= 0:
        return (ABOVE,)
    return (test,) if test == BINARY or threshold == -math.inf else (ABOVE, test)


@dataclass(frozen=True)
class ScaleRule:
    """How the votes of one scale decide its claims. `rules` has a stopping rule for each one-sided claim."""

    sigma: float
    threshold: float  # pixel units; -inf at the smallest sigma
    rules: Mapping[str, StoppingRule]

    def decide(
        self, claim: str, look: int, top: np.ndarray, others: np.ndarray, num_certified: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many radii of the grid the claim says after the look, and why it ends ("" to continue): two (B,).

        `top` (B,) and `others` (B, C) are the votes for the chosen class and for the others, of one image without B.
        `num_certified` (B,) are the radii that the claim said before. `FixedSample` has no grid; there the first answer
        is 1 after its only look.
        """
        rule = self.rules[BINARY]
        if isinstance(rule, FixedSample):
            return np.ones_like(num_certified), np.full(np.shape(top), ALL_SAMPLES)
        if claim in MARGIN_TESTS:
            level = MarginRule(rule).certify(claim, look, top, others, num_certified)
            return level, MarginRule(rule).reason_to_stop(claim, look, top, others, level)
        return self.rules[claim].decide(look, claim_count(claim, top, others, rule.looks[look]), num_certified)

    def radius(self, claim: str, top: np.ndarray, others: np.ndarray, m: int, alpha: float) -> np.ndarray:
        """`claim_radius` at this scale."""
        return claim_radius(claim, self.sigma, self.threshold, top, others, m, alpha)


@dataclass(frozen=True)
class CascadeRule:
    """The stopping rule of a cascade. All scales have the same looks, shares of alpha and grid of radii."""

    scales: tuple[ScaleRule, ...]  # by increasing sigma
    grid: StoppingRule  # of the largest sigma, whose radii are the most that any path can have
    certificates: str = LABEL_AWARE  # of CERTIFICATES

    @property
    def sigmas(self) -> tuple[float, ...]:
        return tuple(scale.sigma for scale in self.scales)

    @property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(scale.threshold for scale in self.scales[1:])

    @property
    def alpha(self) -> float:
        """How often a certificate may be wrong, at most."""
        return self.grid.alpha

    @property
    def n0(self) -> int:
        """Selection samples of each scale that is asked."""
        return self.grid.n0

    @property
    def looks(self) -> tuple[int, ...]:
        """Estimation samples of a scale at its looks."""
        return self.grid.looks

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests of M_k among which the selection samples choose."""
        return (BINARY, *MARGIN_TESTS) if self.grid.bound == "margin" else (BINARY,)

    @property
    def last_alpha(self) -> float:
        """The share of alpha that the last look spends."""
        return self.grid.alpha if isinstance(self.grid, FixedSample) else self.grid.alphas[-1]

    def worth(self, radii: np.ndarray) -> np.ndarray:
        """What certificates of `radii` (B,) are worth: how many radii of the grid are in each. Without a grid, how many
        times the smallest sigma."""
        if isinstance(self.grid, FixedSample):
            return np.maximum(radii, 0) / self.sigmas[0]
        return np.searchsorted(self.grid.radii, radii, side="right")


def make_cascade_rule(
    stopping: str,
    sigmas: Sequence[float],
    thresholds: Sequence[float],
    *,
    certificates: str = LABEL_AWARE,
    **settings: float | str,
) -> CascadeRule:
    """The rule named "fixed" or "sequential" for K `sigmas` and the `thresholds` of all but the smallest.

    The `settings` are n0, n, alpha, radius_step and bound, as in `make_stopping_rule`. `bound` says by which tests
    M_k is certified. Raises `RRCMError` for bad settings.
    """
    if not isinstance(certificates, str) or certificates not in CERTIFICATES:
        raise RRCMError(f"certificates = {shown(certificates)}: must be {' or '.join(CERTIFICATES)}")
    sigmas, thresholds = check_scales(sigmas, thresholds)
    grid = make_stopping_rule(stopping, sigmas[-1], **settings)
    scales = zip(sigmas, with_first_threshold(thresholds).tolist(), strict=True)
    return CascadeRule(tuple(_scale_rule(grid, *scale) for scale in scales), grid, certificates)


def check_scales(sigmas: Sequence[float], thresholds: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as floats. Raises `RRCMError` unless sigmas increase, and each but the smallest has a finite threshold."""
    numbers = []
    for name, values in (("sigmas", sigmas), ("thresholds", thresholds)):
        if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
            raise RRCMError(f"{name} = {shown(values)}: must be a sequence of numbers, in pixel units")
        numbers.append(tuple(real_number(f"{name}[{k}]", value) for k, value in enumerate(values)))
    sigmas, thresholds = numbers
    if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas) or any(np.diff(sigmas) <= 0):
        raise RRCMError(f"sigmas = {shown(list(sigmas))}: must increase, above 0 and finite, in pixel units")
    if len(thresholds) != len(sigmas) - 1:
        needed = f"must be {len(sigmas) - 1}, one for each sigma but the smallest"
        raise RRCMError(f"thresholds: {len(thresholds)} for {len(sigmas)} sigmas; {needed}")
    if not all(map(math.isfinite, thresholds)):
        raise RRCMError(f"thresholds = {shown(list(thresholds))}: must be finite, in pixel units")
    return sigmas, thresholds


def _scale_rule(grid: StoppingRule, sigma: float, threshold: float) -> ScaleRule:
    if isinstance(grid, FixedSample):
        return ScaleRule(sigma, threshold, {BINARY: replace(grid, sigma=sigma)})
    radii, rules = np.array(grid.radii), {}
    for claim in (BINARY, *((ABOVE, BELOW, PASSED) if threshold > -math.inf else ())):
        counts = efficacy_boundary(grid.looks, grid.alphas, claim_shares(claim, radii, sigma, threshold))
        rules[claim] = replace(grid, sigma=sigma, efficacy_counts=counts)
    return ScaleRule(sigma, threshold, rules)
