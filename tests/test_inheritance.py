"""`benchmarks/inheritance.py`: the inherited bound holds, and the closed forms are those of its sources.

A simulated count of false bounds is compared with the largest that 10,000 images can have at rate alpha but with
probability 1e-9. Seeds are fixed: it passes always or never.
"""

import numpy as np
import pytest
from scipy.stats import binom

from benchmarks.inheritance import correlation, inherited_lower, least_cost, least_price, needed_correlation

IMAGES, ALPHA = 10_000, 0.05


def draw_counts(p: float, lost: float, gained: float, pairs: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Votes of g for the class among n, of which `pairs` have a vote of f too, and pairs that are lost and gained."""
    rng = np.random.default_rng(0)
    agree, lost_pairs, gained_pairs, _ = rng.multinomial(pairs, [p - gained, lost, gained, 1 - p - lost], IMAGES).T
    return agree + lost_pairs + rng.binomial(n - pairs, p + lost - gained, IMAGES), lost_pairs, gained_pairs


@pytest.mark.parametrize(
    ("p", "lost", "gained", "pairs", "n", "shares"),
    [
        (0.8, 0.1, 0.0, 50, 5000, (0.1, 0.9, 0.0)),
        (0.8, 0.1, 0.1, 200, 200, (0.3, 0.3, 0.4)),
        (0.99, 0.001, 0.008, 300, 3000, (0.5, 0.5, 0.0)),
        (0.6, 0.0, 0.2, 100, 5000, (0.05, 0.05, 0.9)),
    ],
)
def test_the_inherited_bound_is_wrong_at_most_at_rate_alpha(p, lost, gained, pairs, n, shares):
    top, lost_pairs, gained_pairs = draw_counts(p, lost, gained, pairs, n)
    alphas = tuple(ALPHA * share for share in shares)
    wrong = inherited_lower(top, n, lost_pairs, gained_pairs, pairs, alphas) > p
    assert wrong.sum() <= binom.isf(1e-9, IMAGES, ALPHA)
    all_lost = inherited_lower(top, n, lost_pairs + gained_pairs, 0 * gained_pairs, pairs, alphas)
    assert (all_lost > p).sum() <= binom.isf(1e-9, IMAGES, ALPHA)


def test_without_the_bound_on_what_is_lost_it_would_be_wrong():
    """The simulation can fail: votes of a better g do not bound p_A of f."""
    top, lost_pairs, gained_pairs = draw_counts(0.8, 0.1, 0.0, 50, 2000)
    wrong = inherited_lower(top, 2000, 0 * lost_pairs, gained_pairs, 50, (0.025, 0.025, 0.0)) > 0.8
    assert wrong.sum() > 2 * ALPHA * IMAGES


def test_of_unanimous_votes_the_bound_has_a_closed_form():
    bound = inherited_lower(np.array(1000), 1000, np.array(0), np.array(0), 100, (0.0004, 0.0005, 0.0001))
    assert bound == pytest.approx(0.0004 ** (1 / 1000) - (1 - 0.0005 ** (1 / 100)), rel=1e-12)


def test_the_correlation_is_that_of_the_votes():
    table = np.array([[0.7, 0.02], [0.05, 0.23]])  # rows: f = c or not; columns: g = c or not
    f, g = np.array([1, 1, 0, 0]), np.array([1, 0, 1, 0])
    cov = np.cov(np.array([f, g]), aweights=table.ravel(), ddof=0)
    expected = cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    assert correlation(np.array(0.72), np.array(0.05), np.array(0.02)) == pytest.approx(expected)
    assert correlation(np.array(1.0), np.array(0.0), np.array(0.0)) == 0  # it never varies


@pytest.mark.parametrize("price", [2.3, 10.0, 100.0])
@pytest.mark.parametrize("r", [0.6, 0.95, 0.999])
def test_the_least_cost_is_that_of_the_best_numbers_of_votes(r, price):
    """The variance of the control variate times its cost, relative to those of f alone, over all shares of the cost."""
    pairs = np.linspace(1e-4, 1 - 1e-4, 100_001)  # of the cost; g's votes have the rest
    cheap = price * (1 - pairs)
    variance = np.where(cheap >= pairs, (1 - r**2) / pairs + r**2 / cheap, 1)
    assert least_cost(np.array(r), price) == pytest.approx(min(1, variance.min()), abs=1e-4)


def test_the_needed_correlation_and_the_least_price_are_inverse():
    for price in (1.5, 2.3, 10.0):
        assert least_price(np.array(needed_correlation(price))) == pytest.approx(price)
    assert needed_correlation(1.0) == 1
    assert needed_correlation(np.inf) == 0
