"""The margin bound: certified radii from the votes of every class. Pure functions of counts.

Theorem 1 of Cohen et al. 2019 certifies R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), where p_B is the largest probability
of another class. The binary bound of their CERTIFY sets p_B = 1 - p_A, so it certifies nothing below p_A = 1/2.

Here every other class c has a test of its own. If sigma / 2 (Phi^-1(p_A) - Phi^-1(p_c)) < r, the test certifies r
against c with probability at most alpha. A radius is certified when it is certified against every class. A certified
radius that is false is false against the true runner-up. This is a fixed class, so the test of this one class has
erred. The certificate is therefore false with probability at most alpha, however many classes there are (an
intersection-union test).

There are three tests. Which one is sharpest depends on the probabilities, so the selection samples choose it. They are
independent of the estimation samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from rrcm.certification.stopping import (
    FUTILITY_CONFIDENCE,
    StoppingRule,
    clopper_pearson_lower,
)

BINARY, TWO_BOUNDS, PAIR = "binary", "two bounds", "pair"  # the tests
PAIR_SHARE = 0.1  # of alpha, for the bound on p_A + p_c
FUTILITY_DEVIATIONS = 2.2  # of each count; both together are about as rare as MIN_CONDITIONAL_POWER says


def binary_radius(sigma: float, top: np.ndarray, m: int, alpha: float) -> np.ndarray:
    """sigma times Phi^-1 of the lower bound on p_A, for `top` votes of m. If it is negative, nothing is certified."""
    return sigma * ndtri(clopper_pearson_lower(top, m, alpha))


def two_bounds_radius(sigma: float, top: np.ndarray, other: np.ndarray, m: int, alpha: float) -> np.ndarray:
    """The radius from a lower bound on p_A and an upper bound on p_c, each at alpha / 2. It is sharpest for large p_A.

    Since p_c <= 1 - p_A, one minus the lower bound on p_A also bounds p_c from above. `top` and `other` are the votes
    of m for the chosen class and for c, respectively.
    """
    p_a = clopper_pearson_lower(top, m, alpha / 2)
    p_c = np.minimum(1 - clopper_pearson_lower(m - other, m, alpha / 2), 1 - p_a)
    return sigma / 2 * (ndtri(p_a) - ndtri(p_c))


def pair_radius(sigma: float, top: np.ndarray, other: np.ndarray, m: int, alpha: float) -> np.ndarray:
    """The radius from lower bounds on s = p_A + p_c and on q = p_A / s. It is sharpest for p_A below about 0.6.

    Given how many votes both classes have together, the votes for the chosen class are binomial with probability q.
    (The bound of Clopper and Pearson holds given any number.) The bound on s spends a small part of alpha. Among the
    probabilities (p_A, p_c) with the same radius, q falls as s grows, because Phi is log-concave. So the two lower
    bounds give the radius. At r = 0 this is a sign test.
    """
    share = PAIR_SHARE * alpha
    s, q = clopper_pearson_lower(top + other, m, share), clopper_pearson_lower(top, top + other, alpha - share)
    return sigma / 2 * (ndtri(s * q) - ndtri(s * (1 - q)))


def margin_radius(test: str, sigma: float, top: np.ndarray, others: np.ndarray, m: int, alpha: float) -> np.ndarray:
    """The radius certified against every other class: (B,) for `top` (B,) and `others` (B, C), votes of m.

    `others` need not repeat a number of votes that several classes have. If the radius is negative, nothing is
    certified.
    """
    top = np.asarray(top, float)
    with np.errstate(invalid="ignore", divide="ignore"):  # -inf, or inf - inf, where a class has no votes
        if test == BINARY:
            return np.nan_to_num(binary_radius(sigma, top, m, alpha), nan=-np.inf, neginf=-np.inf)
        radius = {TWO_BOUNDS: two_bounds_radius, PAIR: pair_radius}[test]
        radii = radius(sigma, top[..., None], np.asarray(others, float), m, alpha)
        return np.nan_to_num(radii, nan=-np.inf, posinf=np.inf, neginf=-np.inf).min(-1)


def choose_test(votes: Mapping[int, int], top_class: int, n: int, alpha: float) -> str:
    """The test with the largest radius, if n samples vote in the proportions of the selection, `votes` by class."""
    total = sum(votes.values()) + 1
    runner_up = max((count for k, count in votes.items() if k != top_class), default=0)
    shares = ((count + 0.5) / total for count in (votes[top_class], runner_up))  # no class has probability 0
    top, other = (n * share for share in shares)
    return max(
        (BINARY, TWO_BOUNDS, PAIR),  # the first one if several have the same radius
        key=lambda test: float(margin_radius(test, 1.0, np.array(top), np.array([other]), n, alpha)),
    )


@dataclass(frozen=True)
class MarginRule:
    """The margin bound at the looks of a rule of the binary bound, with its alphas and its grid.

    An image whose selection samples choose the test `BINARY` has exactly the certificate of `rule`.
    """

    rule: StoppingRule

    @property
    def looks(self) -> tuple[int, ...]:
        """Samples drawn at each look."""
        return self.rule.looks

    @property
    def alphas(self) -> tuple[float, ...]:
        """Error probability spent at each look."""
        return self.rule.alphas

    @property
    def radii(self) -> tuple[float, ...]:
        """The grid of radii; empty where a certificate may have any radius."""
        return self.rule.radii

    def can_certify(self) -> bool:
        """Whether an image whose votes all agree gets a certificate."""
        test, others = self.choose_test({0: self.rule.n0}, 0), np.array([0])
        at_looks = [(m, int(self.certify(test, look, np.array(m), others, 0))) for look, m in enumerate(self.looks)]
        return any(self.radius(test, m, others, num_certified) is not None for m, num_certified in at_looks)

    def choose_test(self, votes: Mapping[int, int], top_class: int) -> str:
        """`choose_test` for the last look and its alpha."""
        return choose_test(votes, top_class, self.looks[-1], self.alphas[-1])

    def certify(
        self, test: str, look: int, top: np.ndarray, others: np.ndarray, num_certified: np.ndarray
    ) -> np.ndarray:
        """How many radii of the grid are certified after the look, of which `num_certified` were before: (B,).

        `top` (B,) and `others` (B, C) are the votes for the chosen class and for the other classes. A single image has
        no dimension B.
        """
        if test == BINARY:
            return self.rule.decide(look, top, num_certified)[0]
        radius = margin_radius(test, self.rule.sigma, top, others, self.looks[look], self.alphas[look])
        return np.maximum(num_certified, np.searchsorted(self.radii, radius, side="right"))

    def reason_to_stop(
        self, test: str, look: int, top: np.ndarray, others: np.ndarray, num_certified: np.ndarray
    ) -> np.ndarray:
        """Why to stop after the look, when `num_certified` radii are certified: (B,) of constants, "" to continue."""
        if test == BINARY:
            return self.rule.decide(look, top, num_certified)[1]
        following = np.append(self.radii, -np.inf)[num_certified]  # the next radius of the grid
        futile = self._best_radius(test, look, top, others) < following
        return self.rule.reason_to_stop(look, num_certified, futile)

    def radius(self, test: str, top: int, others: np.ndarray, num_certified: int) -> float | None:
        """The certified radius, or None when nothing is certified."""
        if test == BINARY or self.radii:
            return self.rule.radius(top, num_certified)
        radius = float(margin_radius(test, self.rule.sigma, np.array(top), others, self.looks[-1], self.alphas[-1]))
        return None if radius < 0 else radius

    def _best_radius(self, test: str, look: int, top: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The radius at the last look, if the remaining samples vote as favourably as can be expected.

        p_A is at its upper confidence bound and p_c at its lower one (FUTILITY_CONFIDENCE), and both counts end
        FUTILITY_DEVIATIONS standard deviations better than their means.
        """
        m, n = self.looks[look], self.looks[-1]
        others, doubt, rest = np.asarray(others, float), 1 - FUTILITY_CONFIDENCE, n - m
        p_a = 1 - clopper_pearson_lower(m - top, m, doubt)
        p_c = np.minimum(clopper_pearson_lower(others, m, doubt), 1 - p_a[..., None])
        most = top + rest * p_a + FUTILITY_DEVIATIONS * np.sqrt(rest * p_a * (1 - p_a))
        least = others + rest * p_c - FUTILITY_DEVIATIONS * np.sqrt(rest * p_c * (1 - p_c))
        most = np.minimum(most, n - np.maximum(least, others).max(-1))
        return margin_radius(test, self.rule.sigma, most, np.maximum(least, others), n, self.alphas[-1])
