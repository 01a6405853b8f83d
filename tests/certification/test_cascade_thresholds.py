"""The thresholds of a cascade: the best along each axis, by the scores of certificates."""

from itertools import product

import numpy as np
import pytest
from test_cascade import CLASSES, IMAGES, SIGMAS, THRESHOLDS, make

from rrcm.certification.cascade_rules import (
    make_cascade_rule,
)
from rrcm.certification.cascade_selection import choose_claims, selected_class
from rrcm.certification.cascade_thresholds import CANDIDATES, certified_radii, choose_thresholds, claim_bounds
from rrcm.utils.errors import RRCMError

# Thresholds


def random_votes(seed: int, images: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Votes (images, 3, 4): the larger sigma, the less the label has. On some images the largest sigma is wrong."""
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, CLASSES, images), rng.normal(0, 1, (images, 3, CLASSES))
    logits[np.arange(images), :, labels] += [3.5, 2.5, 1.5]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return rng.multinomial(1000, p), labels


@pytest.mark.parametrize("bound", ["binary", "margin"])
@pytest.mark.parametrize("weights", [None, {0.0: 1.0}, {0.1: 1.0, 0.5: 3.0}])
def test_thresholds_are_the_best_along_each_axis(bound: str, weights: dict | None):
    votes, labels = random_votes(0)
    settings = {"n": 2000, "bound": bound, "weights": weights}
    thresholds, score = choose_thresholds(votes, labels, SIGMAS, **settings)
    bounds = claim_bounds(votes, labels, SIGMAS, 2000, 0.001, bound)

    def scored(candidate: tuple[float, ...]) -> float:
        radii = certified_radii(*bounds, candidate)
        if weights is None:
            return np.maximum(radii, 0).mean()
        return sum(weight * (radii >= radius).mean() for radius, weight in weights.items())

    assert score == pytest.approx(scored(thresholds)) and score >= scored((0.0, 0.0))
    for k, share in product(range(2), CANDIDATES):
        other = list(thresholds)
        other[k] = share * SIGMAS[k + 1]
        assert scored(tuple(other)) <= score + 1e-12
    assert choose_thresholds(votes, labels, SIGMAS, **settings) == (thresholds, score)


@pytest.mark.parametrize("bound", ["binary", "margin"])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_scores_are_those_of_certificates(thresholds: tuple[float, float], bound: str):
    """The best path by the votes is the one that a selection of the same votes chooses, or nearly as good."""
    votes, labels = random_votes(1, 40)
    rule = make_cascade_rule("fixed", SIGMAS, thresholds, n0=1000, n=2000, alpha=0.001, radius_step=0.1, bound=bound)
    radii = certified_radii(*claim_bounds(votes, labels, SIGMAS, 2000, 0.001, bound), thresholds)
    checked = 0
    for at_image, label, radius in zip(votes, labels, radii, strict=True):
        downwards = list(at_image[::-1])
        if radius > 0:
            claims = next(claims for asked in (1, 2, 3) if (claims := choose_claims(rule, downwards[:asked], label)))
            expected = []
            for k, claim in claims:
                share = (at_image[k] + 0.5) / 1001
                others = np.array([2000 * np.delete(share, label).max()])
                expected.append(rule.scales[k].radius(claim, np.array(2000 * share[label]), others, 2000, 0.001))
            assert radius - 0.02 < min(expected) < radius + 1e-9
            assert selected_class(rule, downwards) == label
            checked += 1
    assert checked > 15


def test_votes_for_pass_lower_every_class():
    votes, labels = random_votes(2)
    halved = votes // np.array([1, 2, 2])[:, None]  # the other half of the samples at the larger sigmas passed
    plain, passed = (claim_bounds(each, labels, SIGMAS, 2000, 0.001, "margin") for each in (votes, halved))
    assert (passed[0][:, 1:] < plain[0][:, 1:]).all() and (passed[1][:, 1:] > plain[1][:, 1:]).all()
    assert all((one[:, 0] == other[:, 0]).all() for one, other in zip(passed, plain, strict=True))


def test_thresholds_from_the_votes_of_a_cascade():
    for passes in (False, True):
        votes = make(passes=passes).votes(IMAGES, 100)
        assert votes.shape == (len(IMAGES), 3, CLASSES) and (votes[:, 0].sum(-1) == 100).all()
        assert (votes[:, 1:].sum() < 100 * 2 * len(IMAGES)) == passes
        thresholds, score = choose_thresholds(votes, votes[:, 0].argmax(1), SIGMAS, n=1000)
        assert len(thresholds) == 2 and score > 0


def test_thresholds_without_images_are_refused():
    with pytest.raises(RRCMError, match=r"^votes have shape \(0, 3, 4\): must be \(0, 3, classes\), not empty$"):
        choose_thresholds(np.zeros((0, 3, 4)), [], SIGMAS)
