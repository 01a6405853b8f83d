"""The margin bound: exact error of each test, soundness of the whole procedure by simulation, and brute force.

Where chance decides, a test compares a count of false certificates with the largest that 200,000 images can have at
rate alpha but with probability 1e-9. Seeds are fixed.
"""

import math

import numpy as np
import pytest
import test_stopping
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom, multinomial
from test_stopping import published_probabilities
from torch import nn

from rrcm.certification import stopping
from rrcm.certification.margin import BINARY, PAIR, TWO_BOUNDS, MarginRule, choose_test, margin_radius, pair_radius
from rrcm.certification.noise import ESTIMATE, SELECT
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.certification.stopping import FUTILE, WHOLE_GRID, GroupSequential, fixed_sample, group_sequential
from rrcm.utils.errors import RRCMError

IMAGES, SIGMA = 200_000, 0.5
PUBLISHED = list(test_stopping.PUBLISHED)
TESTS = (BINARY, TWO_BOUNDS, PAIR)


def most_false(alpha: float) -> int:
    """More false certificates than this among IMAGES have probability < 1e-9 at rate alpha."""
    return int(binom.isf(1e-9, IMAGES, alpha))


def edge(p_a: float, radius: float, classes: int, tied: bool = False) -> np.ndarray:
    """Class probabilities with the largest true radius below `radius`: p_A, the runner-up, the rest evenly spread.

    With `tied` all other classes are runners-up, and p_A follows.
    """
    if tied:
        low, high = 0.0, 1.0
        for _ in range(200):
            p_a = (low + high) / 2
            reached = ndtri(p_a) - ndtri((1 - p_a) / (classes - 1)) >= 2 * radius / SIGMA
            low, high = (low, p_a) if reached else (p_a, high)
        return np.array([low] + [(1 - low) / (classes - 1)] * (classes - 1))
    runner_up = float(ndtr(ndtri(p_a) - 2 * radius / SIGMA)) * (1 + 1e-12)
    if classes == 2:
        p_a = float(ndtr(radius / SIGMA)) * (1 - 1e-12)
        return np.array([p_a, 1 - p_a])
    rest = (1 - p_a - runner_up) / (classes - 2)
    assert 0 <= rest <= runner_up
    return np.array([p_a, runner_up] + [rest] * (classes - 2))


# Exactly


@pytest.mark.parametrize("test", [TWO_BOUNDS, PAIR])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("m", [40, 100])
def test_each_test_errs_with_probability_at_most_alpha(test: str, alpha: float, m: int):
    """All outcomes of the votes for A and c, at 60 points of the edge for each of five radii."""
    assert 0.3 * alpha < largest_error(test, alpha, m) <= alpha * (1 + 1e-9)  # the bounds are not just loose


@pytest.mark.parametrize(("test", "times"), [(PAIR, 2), (TWO_BOUNDS, 4)])
def test_alpha_spent_more_than_once_is_caught(test: str, times: int):
    """Two bounds are cautious: both seldom err at once, so that twice alpha does not show."""
    assert largest_error(test, times * 0.05, 100) > 0.05


def largest_error(test: str, alpha: float, m: int) -> float:
    """The largest probability to certify a radius falsely, over the edges of five radii."""
    top, other = (counts.ravel() for counts in np.meshgrid(np.arange(m + 1), np.arange(m + 1), indexing="ij"))
    possible = top + other <= m
    top, other = top[possible], other[possible]
    certified = margin_radius(test, SIGMA, top, other[:, None], m, alpha)
    votes, largest = np.stack([top, other, m - top - other], 1), 0.0
    for radius in (0.0, 0.1, 0.25, 0.5, 0.9):
        for p_a in np.linspace(0.02, 1, 60) * ndtr(radius / SIGMA):  # up to p_A of two classes
            p_c = ndtr(ndtri(p_a) - 2 * radius / SIGMA)
            chance = multinomial.pmf(votes, m, [p_a, p_c, max(0.0, 1 - p_a - p_c)])
            largest = max(largest, float(chance[certified >= radius].sum()))
    return largest


@pytest.mark.parametrize("test", TESTS)
def test_more_votes_for_the_top_class_certify_more(test: str):
    for m, alpha in ((100, 0.001), (100, 1e-6), (1000, 0.05)):
        for other in (0, 1, 7, 30, m // 2):
            radii = margin_radius(test, SIGMA, np.arange(m - other + 1), np.full((m - other + 1, 1), other), m, alpha)
            assert (np.diff(radii[np.isfinite(radii)]) >= -1e-12).all()


def test_a_sign_test_at_radius_0():
    """The pair certifies r = 0 when Clopper and Pearson's bound on its share is at least one half."""
    m, alpha = 200, 0.01
    for top, other in ((60, 20), (40, 22), (30, 17), (12, 0), (5, 0)):
        tail = binom.sf(top - 1, top + other, 0.5)
        assert (pair_radius(SIGMA, np.array(top), np.array(other), m, alpha) >= 0) == (tail <= 0.9 * alpha)


def test_the_selection_chooses_the_sharpest_test():
    assert choose_test({3: 100}, 3, 10_000, 0.001) == BINARY
    assert choose_test({3: 90, 1: 10}, 3, 10_000, 0.001) == BINARY  # two classes
    assert choose_test({3: 80, 1: 5, 2: 5, 4: 5, 5: 5}, 3, 10_000, 0.001) == TWO_BOUNDS
    assert choose_test({3: 35, 1: 20, 2: 15, 4: 15, 5: 15}, 3, 10_000, 0.001) == PAIR


def test_unanimous_votes_lose_nothing():
    rule = group_sequential(SIGMA, n=1000)
    one = rule.decide(5, np.array([240]), np.array([0]))
    assert MarginRule(rule).certify(BINARY, 5, np.array([240]), np.array([[8]]), np.array([0])) == one[0]


def test_settings_that_certify_nothing_are_refused():
    numbers = {"n0": 100, "radius_step": 0.25}
    for name in ("fixed", "sequential"):
        with pytest.raises(RRCMError, match=r"n = 9: certifies nothing at alpha = 0.001, .*; set n to 10"):
            make_stopping_rule(name, 0.5, n=9, alpha=0.001, **numbers)
        make_stopping_rule(name, 0.5, n=10, alpha=0.001, **numbers)
        with pytest.raises(RRCMError, match=r"bound = 'triple': must be binary or margin"):
            make_stopping_rule(name, 0.5, n=10, alpha=0.001, bound="triple", **numbers)
    smoothed = SmoothedClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 0.5, 3)
    with pytest.raises(RRCMError, match=r"n = 10: always abstains at alpha = 0.001, .*; set n to 11"):
        smoothed.predict(torch.rand(1, 1, 2, 2), n=10)
    smoothed.predict(torch.rand(1, 1, 2, 2), n=11)


# By simulation


def hardest(others: np.ndarray) -> np.ndarray:
    """The two largest counts and the smallest of each row: leaving out others can only certify more."""
    if others.shape[1] <= 3:
        return others
    return np.sort(np.partition(others, (0, -2, -1)), 1)[:, [0, -2, -1]]


def draw_votes(rng: np.random.Generator, m: int, p: np.ndarray, images: int) -> np.ndarray:
    """(images, K) votes of m samples."""
    if len(p) < 100:
        return rng.multinomial(m, p, images)
    cumulative = np.cumsum(p)
    votes = np.searchsorted(cumulative / cumulative[-1], rng.random((images, m), np.float32)).clip(max=len(p) - 1)
    flat = votes + np.arange(images)[:, None] * len(p)
    return np.bincount(flat.ravel(), minlength=images * len(p)).reshape(images, -1).astype(np.int32)


def false_certificates(
    p: np.ndarray, rules: list[GroupSequential], *, only_selected: bool = False, chunk: int = 20_000
) -> list[dict[str, int]]:
    """How many of IMAGES margin certificates are false, by rule and stopping rule. All rules see the same samples.

    "any look" is an adversary who knows the truth, and thereby the worst of all stopping rules; "as built" is ours.
    With `only_selected` the procedure is broken: it compares with the class that the selection has second, alone.
    """
    rng, rows, largest = np.random.default_rng(0), np.arange(chunk), np.sort(p)[::-1]
    false = [{"any look": 0, "as built": 0} for _ in rules]
    for _ in range(IMAGES // chunk):
        selection = draw_votes(rng, rules[0].n0, p, chunk)
        chosen = selection.argmax(1)
        without = selection.copy()
        without[rows, chosen] = -1
        second = without.argmax(1)
        rival = np.where(p[chosen] == largest[0], largest[1], largest[0])  # the largest probability of another class
        truth = SIGMA / 2 * (ndtri(p[chosen]) - ndtri(rival))
        images = [Simulated(rule, selection[rows, chosen], without.max(1), truth) for rule in rules]
        counts = np.zeros_like(selection, np.int64)
        for look, m in enumerate(rules[0].looks):
            counts += draw_votes(rng, m - (rules[0].looks[look - 1] if look else 0), p, chunk)
            if only_selected:
                others = counts[rows, second][:, None]
            else:
                others = hardest(np.delete(counts.ravel(), rows * len(p) + chosen).reshape(chunk, -1))
            for each in images:
                each.look(look, counts[rows, chosen], others)
        for found, each in zip(false, images, strict=True):
            found["any look"] += int(each.wrong.sum())
            found["as built"] += int(each.built.sum())
    return false


class Simulated:
    """Images under one rule: what is certified so far, and what of it is false."""

    def __init__(self, rule: GroupSequential, best: np.ndarray, second: np.ndarray, truth: np.ndarray):
        self.bound, self.allowed = MarginRule(rule), np.searchsorted(rule.radii, truth, side="right")
        self.test = chosen_tests(self.bound, best, second)
        self.level, self.running = np.zeros(len(best), np.int64), np.ones(len(best), bool)
        self.wrong, self.built = np.zeros(len(best), bool), np.zeros(len(best), bool)

    def look(self, look: int, top: np.ndarray, others: np.ndarray) -> None:
        for kind in np.unique(self.test):
            of_kind = np.flatnonzero(self.test == kind)
            found = levels_of(self.bound, kind, look, top[of_kind], others[of_kind])
            self.level[of_kind] = np.maximum(self.level[of_kind], found)
            cases = np.stack([top, others.max(1), self.level], 1)[of_kind]
            cases, where = np.unique(cases, axis=0, return_inverse=True)
            reasons = np.asarray(self.bound.reason_to_stop(kind, look, cases[:, 0], cases[:, 1:2], cases[:, 2]))
            self.built[of_kind] |= (self.level > self.allowed)[of_kind] & self.running[of_kind]
            self.running[of_kind] &= (reasons == "")[where.ravel()]
        self.wrong |= self.level > self.allowed


def chosen_tests(bound: MarginRule, best: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The test of each image, by the two largest numbers of its selection votes."""
    pairs, where = np.unique(np.stack([best, second], 1), axis=0, return_inverse=True)
    tests = []
    for one, two in pairs.tolist():
        rest = bound.rule.n0 - one - two
        votes = {0: one, 1: two} | {k: min(two, rest - two * (k - 2)) for k in range(2, 2 + -(-rest // max(two, 1)))}
        tests.append(bound.choose_test({k: count for k, count in votes.items() if count}, 0))
    return np.array(tests)[where.ravel()]


def levels_of(bound: MarginRule, test: str, look: int, top: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`MarginRule.certify` of many images, computed once for each pair of counts that occurs."""
    m = bound.rule.looks[look]
    codes, where = np.unique(top[:, None] * (m + 1) + others, return_inverse=True)
    levels = bound.certify(test, look, codes // (m + 1), (codes % (m + 1))[:, None], np.zeros(len(codes), np.int64))
    return levels[where.reshape(others.shape)].min(-1)


CASES = {
    "two classes, r 0.25": edge(0, 0.25, 2),
    "ten classes, p_A 0.35, r 0.25": edge(0.35, 0.25, 10),
    "ten classes, p_A 0.45, r 0": edge(0.45, 0.0, 10),
    "ten classes, p_A 0.6, r 0.25": edge(0.6, 0.25, 10),
    "ten classes, p_A 0.8, r 0.5": edge(0.8, 0.5, 10),
    "ten classes, p_A 0.9, r 0.75": edge(0.9, 0.75, 10),
    "ten classes tied, r 0.25": edge(0, 0.25, 10, tied=True),
    "all of ten classes alike": np.full(10, 0.1),
}
ALPHAS, LONGEST = (0.001, 0.05), "ten classes, p_A 0.6, r 0.25"


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_certificates_are_false_no_more_often_than_alpha(case: str):
    n = 1000 if case == LONGEST else 350
    rules = [group_sequential(SIGMA, n=n, alpha=alpha) for alpha in ALPHAS]
    for alpha, found in zip(ALPHAS, false_certificates(CASES[case], rules), strict=True):
        assert max(found.values()) <= most_false(alpha), (alpha, found)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "p",
    [
        pytest.param(edge(0.4, 0.25, 1000), id="runner-up", marks=pytest.mark.thorough),
        pytest.param(edge(0, 0.5, 1000, tied=True), id="tied"),
    ],
)
def test_a_thousand_classes_need_no_correction(p: np.ndarray):
    (found,) = false_certificates(p, [group_sequential(SIGMA, n=130, alpha=0.05)], chunk=5000)
    assert max(found.values()) <= most_false(0.05)


@pytest.mark.thorough
def test_broken_procedures_are_caught(monkeypatch: pytest.MonkeyPatch):
    """Only the selection's runner-up compared, though another class may be it; alpha spent anew at every look."""
    rule = group_sequential(SIGMA, n=1000, alpha=0.001)
    close = np.array([0.4, 0.12] + [0.48 / 18] * 18)  # r = 0.25 is false against the second class alone
    (sound,), (broken,) = (false_certificates(close, [rule], only_selected=only) for only in (False, True))
    assert max(sound.values()) <= most_false(0.001) < min(broken.values())

    monkeypatch.setattr(stopping, "alpha_spending", lambda alpha, looks: (alpha,) * looks)
    (found,) = false_certificates(CASES["ten classes, p_A 0.8, r 0.5"], [group_sequential(SIGMA, n=1000, alpha=0.05)])
    assert min(found.values()) > most_false(0.05)


# Never materially worse


@pytest.mark.thorough
@pytest.mark.parametrize("n", [10_000, 100_000])
@pytest.mark.parametrize(("data", "sigma"), PUBLISHED)
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["two classes", "half of the rest"])
def test_no_entry_of_a_table_falls_by_more_than_an_image(data: str, sigma: float, n: int, share: float):
    """500 images with the published p_A. The runner-up has all votes that p_A leaves, or half of them."""
    p_a = published_probabilities(data, sigma, 500)
    p_a = p_a[p_a > 0]  # a wrong class is chosen otherwise
    rest = 1 - p_a
    p = np.stack([p_a, share * rest, *[(1 - share) * rest / 8] * 8], 1)
    rule, rng, rows = group_sequential(sigma, n=n), np.random.default_rng(0), np.arange(len(p))
    selection = rng.multinomial(rule.n0, p)
    without = np.delete(selection, 0, 1)
    images = Simulated(rule, selection[:, 0], without.max(1), p_a)
    binary, counts = np.zeros(len(p), np.int64), np.zeros(p.shape, np.int64)
    running = np.ones(len(p), bool)
    for look, m in enumerate(rule.looks):
        counts += rng.multinomial(m - (rule.looks[look - 1] if look else 0), p)
        top = counts[rows, 0]
        level, reason = rule.decide(look, top, binary)
        binary = np.where(running, level, binary)
        running &= reason == ""
        images.look(look, top, hardest(np.delete(counts, 0, 1)))
    by_margin, by_binary = ((level[:, None] > np.arange(len(rule.radii))).sum(0) for level in (images.level, binary))
    assert (by_margin >= by_binary - 1).all()
    if share < 1:
        assert by_margin.sum() > by_binary.sum()


# By brute force


class Wedges(nn.Module):
    """Classes that are sectors of the plane of the first two pixels, so that any probabilities can occur."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        angle = torch.atan2(noisy[:, 0, 0, 0] - 0.5, noisy[:, 0, 0, 1] - 0.5) / (2 * math.pi) + 0.5
        return nn.functional.one_hot((angle * self.classes).long().clamp(0, self.classes - 1), self.classes).float()


def brute_force(votes: list[int], top: int, m: int, alpha: float, test: str) -> float:
    """The certified radius, from the theorem, one class after the other, with scipy's beta distribution."""

    def lower(k: int, n: int, a: float) -> float:
        return float(beta.ppf(a, k, n - k + 1)) if k else 0.0

    radii = []
    for c, count in enumerate(votes):
        if c == top:
            continue
        if test == BINARY:
            p_a = lower(votes[top], m, alpha)
            p_c = 1 - p_a
        elif test == TWO_BOUNDS:
            p_a = lower(votes[top], m, alpha / 2)
            p_c = min(1 - lower(m - count, m, alpha / 2), 1 - p_a)
        else:
            s = lower(votes[top] + count, m, alpha / 10)
            q = lower(votes[top], votes[top] + count, alpha - alpha / 10)
            p_a, p_c = s * q, s * (1 - q)
        radii.append(SIGMA / 2 * (ndtri(p_a) - ndtri(p_c)) if p_a > 0 else -math.inf)
    return min(radii)


@pytest.mark.parametrize("classes", [2, 3, 7, 40])
def test_certificates_agree_with_brute_force(classes: int):
    smoothed = SmoothedClassifier(Wedges(classes), SIGMA, classes, batch_size=500)
    images = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(classes))
    n0, n, alpha, step = 100, 700, 0.01, 0.05
    rule = group_sequential(SIGMA, n0=n0, n=n, alpha=alpha, radius_step=step)
    numbers = {"n0": n0, "n": n, "alpha": alpha}
    fixed = smoothed.certify(images, stopping="fixed", bound="margin", **numbers)
    sequential = smoothed.certify(images, bound="margin", radius_step=step, **numbers)
    plain = smoothed.certify(images, radius_step=step, **numbers)
    seen = set()
    for index, image in enumerate(images):

        def votes(purpose: int, stop: int, image=image, index=index) -> list[int]:
            return smoothed.count_votes([SampleRequest(image, index, purpose, 0, stop)])[0].tolist()

        selection = votes(SELECT, n0)
        top = max(range(classes), key=lambda k: (selection[k], -k))
        test = choose_test({k: count for k, count in enumerate(selection) if count}, top, n, alpha)
        seen.add(test)
        expected = brute_force(votes(ESTIMATE, n), top, n, alpha, test)
        if expected < 0:
            assert fixed[index].prediction == -1 and fixed[index].margin_radius is None
        else:
            assert fixed[index].prediction == top
            assert fixed[index].radius == pytest.approx(expected, abs=1e-9)
        share, level = choose_test({k: c for k, c in enumerate(selection) if c}, top, n, rule.alphas[-1]), 0
        for look, m in enumerate(rule.looks):
            if m > sequential[index].samples - n0:
                break
            counts = votes(ESTIMATE, m)
            if share == BINARY:
                level = rule.decide(look, counts[top], level)[0]
            else:
                radius = brute_force(counts, top, m, rule.alphas[look], share)
                level = max(level, sum(r <= radius for r in rule.radii))
        assert sequential[index].margin_radius == (rule.radii[level - 1] if level else None)
        assert sequential[index].binary_radius == plain[index].binary_radius  # as if it had been asked for
        assert sequential[index].binary_samples == plain[index].samples <= sequential[index].samples
        if sequential[index].samples < n0 + n:
            assert sequential[index].stop_reason in (FUTILE, WHOLE_GRID)
    assert classes > 2 or seen == {BINARY}


def test_fixed_certificates_have_both_radii():
    smoothed = SmoothedClassifier(Wedges(5), SIGMA, 5, batch_size=500)
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    binary = smoothed.certify(images, stopping="fixed", n=500)
    by_margin = smoothed.certify(images, stopping="fixed", n=500, bound="margin")
    for one, other in zip(binary, by_margin, strict=True):
        assert (one.binary_radius, one.margin_radius) == (other.binary_radius, other.margin_radius)
        assert one.radius == (one.binary_radius or 0) and other.radius == (one.margin_radius or 0)
    rule = fixed_sample(SIGMA, n=500)
    assert any(one.binary_radius is None and one.margin_radius is not None for one in binary)
    assert rule.bound == "binary"
