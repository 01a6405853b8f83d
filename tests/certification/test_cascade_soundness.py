"""The cascade is sound: its theorem by brute force with exact probabilities, its statistics by simulation.

Where chance decides, a test compares a count of false certificates with the largest that IMAGES can have at rate alpha
but with probability 1e-9. Seeds are fixed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from test_margin import draw_votes

from rrcm.certification import stopping
from rrcm.certification.cascade_radii import (
    acceptance_radii,
    cascade_answer,
    cascade_radius,
    multi_scale_radius,
    path_radii,
)
from rrcm.certification.cascade_rules import (
    ABOVE,
    BELOW,
    PASSED,
    CascadeRule,
    claim_radius,
    make_cascade_rule,
)
from rrcm.certification.cascade_selection import choose_claims, selected_class
from rrcm.certification.margin import BINARY, PAIR, TWO_BOUNDS

ROUNDING = 1e-6
DIGITS = (1e-9, 1 - 1e-9)  # probabilities closer to 0 and 1 have too few digits left

# The theorem


@dataclass
class World:
    """A cascade of random step functions, with the exact p_k(c) at each point of a fine grid."""

    points: np.ndarray  # (G, D)
    p: np.ndarray  # (G, K, C)
    sigmas: np.ndarray
    thresholds: np.ndarray


def random_world(rng: np.random.Generator, dimensions: int) -> World:
    """2 to 5 classes, 2 to 4 sigmas, thresholds of either sign; in every third world some cells say "pass"."""
    classes, scales, passes = rng.integers(2, 6), rng.integers(2, 5), rng.random() < 1 / 3
    sigmas = np.sort(rng.uniform(0.1, 2, scales)) + 0.01 * np.arange(scales)
    thresholds = rng.normal(0, rng.choice([0.05, 0.3, 1.0]), scales - 1) * sigmas[1:]
    axis = np.linspace(-5, 5, 1501 if dimensions == 1 else 61)
    common = rng.integers(0, classes, (12,) * dimensions)  # the scales often agree
    p = []
    for k, sigma in enumerate(sigmas):
        edges = np.sort(rng.uniform(-4, 4, (dimensions, 11)))
        shape = (12,) * dimensions
        cells = np.where(rng.random(shape) < rng.choice([0.2, 0.6]), rng.integers(0, classes, shape), common)
        if passes and k:
            cells = np.where(rng.random(shape) < 0.3, classes, cells)
        bounds = np.pad(edges, ((0, 0), (1, 1)), constant_values=((0, 0), (-np.inf, np.inf)))
        weights = np.diff(ndtr((bounds[:, None] - axis[:, None]) / sigma))  # (D, G, cells)
        voted = (cells[..., None] == np.arange(classes)).astype(float)
        p.append(weights[0] @ voted if dimensions == 1 else np.einsum("xi,yj,ijc->xyc", *weights, voted))
    points = np.stack(np.meshgrid(*[axis] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    return World(points, np.stack([each.reshape(len(points), -1) for each in p], 1), sigmas, thresholds)


def violations(world: World, radius: Callable, rng: np.random.Generator, points: int) -> tuple[int, int, float]:
    """At some points with a radius: how many there are, how many have another answer closer than that, mean radius."""
    answers = cascade_answer(world.p, world.sigmas, world.thresholds)
    which = rng.choice(len(world.points), min(points, len(world.points)), replace=False)
    radii = radius(world.p[which].clip(*DIGITS), world.sigmas, world.thresholds, answers[which])
    distances = cdist(world.points[which], world.points)
    nearest = np.where(answers != answers[which, None], distances, np.inf).min(1)
    broken = (radii > ROUNDING) & (nearest < radii - ROUNDING)
    return len(which), int(broken.sum()), float(np.clip(radii, 0, 10).mean())


def brute_force(radius: Callable, dimensions: int, worlds: int, points: int = 200) -> tuple[int, int, float]:
    rng = np.random.default_rng(dimensions)
    found = [violations(random_world(rng, dimensions), radius, rng, points) for _ in range(worlds)]
    return sum(f[0] for f in found), sum(f[1] for f in found), float(np.mean([f[2] for f in found]))


@pytest.mark.parametrize("dimensions", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_no_point_in_the_radius_has_another_answer(dimensions: int):
    checked, broken, mean = brute_force(cascade_radius, dimensions, worlds=110)
    assert (checked, broken) == (22_000, 0)
    _, broken, published = brute_force(multi_scale_radius, dimensions, worlds=40)
    assert broken == 0
    assert 0 < published < mean


def without_keeping_out(p: np.ndarray, sigmas: np.ndarray, thresholds: np.ndarray, c: np.ndarray) -> np.ndarray:
    return acceptance_radii(p, sigmas, thresholds, c)[0].max(-1)


def own_votes(p: np.ndarray, sigmas: np.ndarray, thresholds: np.ndarray, c: np.ndarray) -> np.ndarray:
    """B_k from the votes for the own class: it keeps the own class out."""
    accept, _ = acceptance_radii(p, sigmas, thresholds, c)
    r = sigmas * ndtri(np.take_along_axis(p, c[:, None, None], -1)[..., 0])
    return path_radii(accept, np.array([-np.inf, *thresholds]) - r).max(-1)


def without_being_ahead(p: np.ndarray, sigmas: np.ndarray, thresholds: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A_k without M_k: below p = 1/2 the class may pass the threshold, but another one be ahead of it."""
    accept, keep_out = acceptance_radii(p, sigmas, thresholds, c)
    r = sigmas * ndtri(np.take_along_axis(p, c[:, None, None], -1)[..., 0])
    return path_radii(np.where(np.arange(len(sigmas)), r - np.array([0, *thresholds]), accept), keep_out).max(-1)


@pytest.mark.parametrize("broken_radius", [without_keeping_out, own_votes, without_being_ahead])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_broken_theorems_are_caught(broken_radius: Callable, dimensions: int):
    assert brute_force(broken_radius, dimensions, worlds=20)[1] > 10


def test_only_the_answer_of_the_cascade_has_a_radius():
    rng = np.random.default_rng(0)
    for dimensions, _ in product((1, 2), range(10)):
        world = random_world(rng, dimensions)
        answers = cascade_answer(world.p, world.sigmas, world.thresholds)
        for c in range(world.p.shape[-1]):
            radii = cascade_radius(world.p.clip(*DIGITS), world.sigmas, world.thresholds, np.array(c))
            assert (answers[radii > ROUNDING] == c).all()
            assert (radii[answers == c] > -ROUNDING).all()  # and it always has one


def test_certain_and_impossible_classes():
    certain = np.array([[[1.0, 0, 0], [0, 0, 1.0]]])
    assert cascade_radius(certain, [0.5, 1], [0.3], np.array([2])) == np.inf
    assert cascade_radius(certain, [0.5, 1], [0.3], np.array([0])) == -np.inf
    passed_on = np.array([[[1.0, 0, 0], [0, 0, 0]]])  # all votes at the large sigma are "pass"
    assert cascade_radius(passed_on, [0.5, 1], [0.3], np.array([0])) == np.inf


# The statistics

IMAGES, SELECTIONS = 200_000, 200  # of each simulated case
SIGMAS, STEP, RADIUS = (0.25, 0.5, 1.0), 0.125, 0.25  # RADIUS is the first radius of the grid that is false
SETTINGS = {"n0": 20, "n": 200, "radius_step": STEP}


def most_false(alpha: float) -> int:
    """More false certificates than this among IMAGES have probability < 1e-9 at rate alpha."""
    return int(binom.isf(1e-9, IMAGES, alpha))


def shares(sigma: float, *radii: float, rest: int = 1) -> np.ndarray:
    """Class probabilities with R_k(c) = `radii` for the first classes; `rest` more classes share what is left."""
    p = ndtr(np.array(radii) / sigma)
    assert p.sum() <= 1 + 1e-12
    return np.array([*p, *[max(0.0, 1 - p.sum()) / rest] * rest])


class Simulated:
    """Estimation samples of many images with the same p (K, C) and the chosen class 0."""

    def __init__(self, rule: CascadeRule, p: list[np.ndarray], rng: np.random.Generator, images: int):
        self.rule, self.images = rule, images
        looks = np.diff(rule.looks, prepend=0)
        self.votes = [np.cumsum([draw_votes(rng, m, at_k, images) for m in looks], 0) for at_k in p]  # (J, images, C)
        self.selection = [draw_votes(rng, rule.n0, at_k, images) for at_k in p]

    def grouped(self, k: int, look: np.ndarray, which: np.ndarray, *more: np.ndarray) -> tuple:
        """The votes at a look of scale k, once for each case that occurs, and which case each image is."""
        votes = self.votes[k][look][which]
        top, others = votes[:, 0], np.sort(votes[:, 1:], 1)[:, [0, -1]]  # the other numbers certify more
        code, base = top.astype(np.int64), self.rule.looks[-1] + 1
        for column in (*others.T, *more):
            code = code * base + column
        _, first, case = np.unique(code, return_index=True, return_inverse=True)
        return top[first], others[first], [column[first] for column in more], case

    def any_look(self, claims: list[tuple[int, str]]) -> np.ndarray:
        """The radii of the grid that an adversary can get certified, who stops when he likes: (images,).

        The number of certified radii only grows, so this is the most that any stopping rule gives.
        """
        levels = []
        for k, claim in claims:
            level = np.zeros(self.images, np.int64)
            for look in range(len(self.rule.looks)):
                top, others, (before,), case = self.grouped(k, look, slice(None), level)
                level = self.rule.scales[k].decide(claim, look, top, others, before)[0][case]
            levels.append(level)
        return np.min(levels, 0)

    def as_built(self, claims: list[tuple[int, str]]) -> np.ndarray:
        """The certified radii with our stopping rule: (images,). It is `next_samples` and `_decide`, vectorized."""
        levels, ended = np.zeros((len(claims), self.images), np.int64), np.zeros((len(claims), self.images), bool)
        taken, running = np.zeros((len(SIGMAS), self.images), np.int64), np.ones(self.images, bool)
        kept = np.zeros_like(taken)  # looks of each scale, up to the last one that decided something
        while running.any():
            lowest = levels == levels.min(0)
            expected = np.minimum([self.expected(*claim, kept) for claim in claims], 1e9)  # PASSED says inf or -inf
            first = np.where(lowest, expected, np.inf).argmin(0)
            scale = np.where(running, np.array([k for k, _ in claims])[first], -1)
            for k, look in product(range(len(SIGMAS)), range(len(self.rule.looks))):
                which = np.flatnonzero((scale == k) & (taken[k] == look))
                before = levels[:, which], ended[:, which]
                for e in (e for e, claim in enumerate(claims) if claim[0] == k and len(which)):
                    self._look(e, claims[e], look, which[~ended[e, which]], levels, ended)
                decided = (levels[:, which] != before[0]) | (ended[:, which] != before[1])
                kept[k, which[decided.any(0)]] = look + 1
            taken[scale[running], np.flatnonzero(running)] += 1
            running &= ~(ended & (levels == levels.min(0))).any(0)
        return levels.min(0)

    def expected(self, k: int, claim: str, kept: np.ndarray) -> np.ndarray:
        """What a claim says if all samples vote in the proportions of the selection and of the last kept look."""
        votes, looks = self.selection[k].astype(np.int64), np.array(self.rule.looks)
        which = np.flatnonzero(kept[k])
        votes[which] += self.votes[k][kept[k][which] - 1, which]
        cases = np.stack([votes[:, 0], votes[:, 1:].max(1), votes.sum(1)], 1)
        (top, other, total), case = (each.T for each in np.unique(cases, axis=0, return_inverse=True))
        share, scale = looks[-1] / total, self.rule.scales[k]
        radii = scale.radius(claim, share * top, (share * other)[:, None], looks[-1], self.rule.last_alpha)
        return radii[case.ravel()]

    def _look(self, e: int, claim: tuple, look: int, which: np.ndarray, levels: np.ndarray, ended: np.ndarray) -> None:
        if len(which):
            k, kind = claim
            top, others, (before,), case = self.grouped(k, look, which, levels[e, which])
            level, reason = self.rule.scales[k].decide(kind, look, top, others, before)
            levels[e, which], ended[e, which] = level[case], (reason != "")[case]

    def fixed(self, claims: list[tuple[int, str]], alpha: float) -> np.ndarray:
        """The radius by CERTIFY with n samples at each sigma: (images,)."""
        radii = []
        for k, claim in claims:
            top, others, _, case = self.grouped(k, -1, slice(None))
            scale = self.rule.scales[k]
            at_n = top, others, self.rule.looks[-1], alpha
            radii.append(claim_radius(claim, scale.sigma, scale.threshold, *at_n)[case])
        return np.min(radii, 0)


def rule_of(thresholds: tuple[float, float], alpha: float, bound: str = "margin") -> CascadeRule:
    return make_cascade_rule("sequential", SIGMAS, thresholds, alpha=alpha, bound=bound, **SETTINGS)


JUST = RADIUS * (1 - 1e-9)  # a true radius that RADIUS is just above
SURE, CLEAR = shares(0.25, 1.0, rest=2), shares(1.0, 0.2, -1.2, rest=8)  # settle their claims
EDGES = {  # thresholds, claims, p by sigma; one claim is at the edge, or all are
    "binary": ((0, 0), [(0, BINARY), (2, BELOW)], [shares(0.25, JUST), None, CLEAR]),
    "two bounds": ((0, 0), [(0, TWO_BOUNDS), (2, BELOW)], [shares(0.25, 0.2, 0.2 - 2 * JUST), None, CLEAR]),
    "above": ((0, 0.1), [(2, ABOVE)], [None, None, shares(1, JUST + 0.1, rest=3)]),
    "above a negative threshold": (
        (0, -0.5),
        [(2, ABOVE), (2, TWO_BOUNDS)],
        [None, None, shares(1, JUST - 0.5, -1.5, rest=9)],
    ),
    "ahead, with a negative threshold": (
        (0, -0.6),
        [(2, ABOVE), (2, PAIR)],
        [None, None, shares(1, 0.0, -2 * JUST, rest=3)],
    ),
    "others below": ((0, 0), [(0, BINARY), (2, BELOW)], [SURE, None, shares(1, -0.4, -JUST, rest=3)]),
    "kept behind": ((0, -9), [(0, BINARY), (2, PAIR)], [SURE, None, shares(1, 0.1, 0.1 - 2 * JUST, rest=2)]),
    "passed on": ((0, 0.1), [(0, BINARY), (2, PASSED), (2, BELOW)], [SURE, None, shares(1, 0.1 - 1e-9, -1.5, rest=9)]),
    "all claims": (
        (0.1, 0),
        [(0, BINARY), (1, BELOW), (2, BELOW)],
        [shares(0.25, JUST), shares(0.5, -0.2, 0.1 - JUST, rest=2), shares(1, -0.4, -JUST, rest=3)],
    ),
}


LOOSE = ("two bounds", "all claims")  # two bounds seldom err at once, nor do three claims
QUICK = ("above", "others below", "passed on")


def false_certificates(case: str, alpha: float) -> dict[str, int]:
    """How many of IMAGES certificates are false, by stopping rule."""
    thresholds, claims, p = EDGES[case]
    rule = rule_of(thresholds, alpha)
    unused = np.ones(1)  # of a sigma that has no claims
    simulated = Simulated(rule, [unused if at_k is None else at_k for at_k in p], np.random.default_rng(0), IMAGES)
    truth = 0 if any(claim == PASSED for _, claim in claims) else int(np.searchsorted(rule.grid.radii, JUST, "right"))
    return {
        "any look": int((simulated.any_look(claims) > truth).sum()),
        "as built": int((simulated.as_built(claims) > truth).sum()),
        "fixed": int((simulated.fixed(claims, alpha) >= (RADIUS if truth else 0)).sum()),
    }


def check_edge(case: str, alpha: float) -> None:
    found = false_certificates(case, alpha)
    assert max(found.values()) <= most_false(alpha), found
    assert found["as built"] <= found["any look"]
    assert case in LOOSE or max(found.values()) > 0.1 * alpha * IMAGES, found  # the bounds are not just loose


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK)
def test_certificates_are_false_no_more_often_than_alpha(case: str):
    check_edge(case, 0.05)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("case", "alpha"), [*product(EDGES, [0.001]), *((edge, 0.05) for edge in EDGES if edge not in QUICK)]
)
def test_certificates_are_false_no_more_often_than_alpha_at_every_edge(case: str, alpha: float):
    check_edge(case, alpha)


@pytest.mark.slow
def test_alpha_spent_anew_at_every_look_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "alpha_spending", lambda alpha, looks: (alpha,) * looks)
    assert min(list(false_certificates("others below", 0.05).values())[:2]) > most_false(0.05)


def test_either_of_two_claims_at_the_full_alpha_is_caught():
    """B_k is a maximum of two. Whichever claim the estimation samples certify would need a union bound."""
    m, alpha, threshold = 1000, 0.05, -0.6
    p = shares(1.0, threshold - 1e-9, threshold, rest=3)  # both claims are just false at r = 0
    votes = draw_votes(np.random.default_rng(0), m, p, IMAGES)
    pairs, case = np.unique(np.stack([votes[:, 0], votes[:, 1:].max(1)], 1), axis=0, return_inverse=True)
    at_k = 1.0, threshold, pairs[:, 0], pairs[:, 1:], m, alpha
    below, ahead = ((claim_radius(claim, *at_k) >= 0)[case.ravel()] for claim in (BELOW, PAIR))
    assert max(below.sum(), ahead.sum()) <= most_false(alpha) < (below | ahead).sum()


# Choosing the class and the path

EVEN = [shares(sigma, JUST, rest=1 + (sigma > 0.25)) for sigma in SIGMAS]
WORLDS = {  # thresholds, p by sigma; F answers class 0 up to just below RADIUS
    "all paths equal": ((0.0, 0.0), EVEN),
    "passed on by a few votes": ((0.05, 0.1), [EVEN[0], shares(0.5, 0.0, -0.4, rest=2), shares(1, 0.05, -0.9, rest=2)]),
    "negative thresholds": (
        (-0.1, -0.3),
        [EVEN[0], shares(0.5, -0.05, -0.05 - 2 * JUST, rest=3), shares(1, -0.1, -0.1 - 2 * JUST, rest=2)],
    ),
}


def select(rule: CascadeRule, selection: np.ndarray) -> tuple[int, list[tuple[int, str]]]:
    """The class and the claims for the selection votes of all sigmas, (K, C), asked from the largest sigma down."""
    for asked in range(1, len(selection) + 1):
        votes = list(selection[::-1][:asked])
        c = selected_class(rule, votes)
        if c is not None and (claims := choose_claims(rule, votes, c)):
            return c, claims
    raise AssertionError("the smallest sigma has been asked")


def groups(rule: CascadeRule, p: np.ndarray, rng: np.random.Generator) -> Iterator[tuple]:
    """IMAGES with simulated estimation samples, by the class and the claims that were chosen.

    There are SELECTIONS different ones. Given its selection, each certificate is false with probability at most alpha.
    """
    selection = np.stack([rng.multinomial(rule.n0, at_k / at_k.sum(), SELECTIONS) for at_k in p], 1)
    images: dict[tuple, int] = {}
    for votes in selection:
        c, claims = select(rule, votes)
        images[c, tuple(claims)] = images.get((c, tuple(claims)), 0) + IMAGES // SELECTIONS
    for (c, claims), count in images.items():
        order = [c, *(other for other in range(p.shape[1]) if other != c)]
        yield c, claims, Simulated(rule, [at_k[order] for at_k in p], rng, count)


@pytest.mark.parametrize("world", ["all paths equal"])
def test_choosing_class_and_path_keeps_alpha(world: str):
    check_world(world)


@pytest.mark.thorough
@pytest.mark.parametrize("world", [world for world in WORLDS if world != "all paths equal"])
def test_choosing_class_and_path_keeps_alpha_in_other_worlds(world: str):
    check_world(world)


def check_world(world: str) -> None:
    """From the first sample on, against the true radius of F for whichever class was chosen."""
    (thresholds, p), alpha, false, paths = WORLDS[world], 0.05, 0, set()
    rule = rule_of(thresholds, alpha, "binary")
    p = np.stack([np.pad(at_k, (0, max(map(len, p)) - len(at_k))) for at_k in p])
    for c, claims, simulated in groups(rule, p, np.random.default_rng(0)):
        truth = np.searchsorted(rule.grid.radii, float(cascade_radius(p, SIGMAS, thresholds, np.array(c))), "right")
        false += int((simulated.any_look(list(claims)) > truth).sum())
        paths.add((c, claims[0][0]))
    assert {scale for c, scale in paths if c == 0} == {0, 1, 2}
    assert 0 < false <= most_false(alpha)


def test_a_path_chosen_on_the_estimation_samples_is_caught():
    """Of three paths whose radii are all just below RADIUS, the one that turns out best."""
    alpha = 0.05
    rule = rule_of((0.0, 0.0), alpha)
    simulated = Simulated(rule, EVEN, np.random.default_rng(0), IMAGES)
    keep_out = [(1, BINARY)], [(2, BINARY)]
    paths = [[(2, ABOVE)], [(1, ABOVE), *keep_out[1]], [(0, BINARY), *keep_out[0], *keep_out[1]]]
    truth = np.searchsorted(rule.grid.radii, JUST, "right")
    alone = [[(k, claim)] for k, claim in ((2, ABOVE), (1, ABOVE), (0, BINARY))]  # with all else certain
    levels = [simulated.any_look(path) for path in alone]
    assert max(int((simulated.any_look(path) > truth).sum()) for path in paths) <= most_false(alpha)
    assert max(int((level > truth).sum()) for level in levels) <= most_false(alpha)
    assert int((np.max(levels, 0) > truth).sum()) > most_false(alpha)
