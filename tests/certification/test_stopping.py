"""The statistics of certificates: numbers against scipy, soundness by simulation and exactly, samples saved.

Where chance decides, a test compares a count of false certificates with the largest that 200,000 images can have at
rate alpha but with probability 1e-9. There are fewer than 1,000 such comparisons in this file, so by chance it fails
with probability below 1e-6. Seeds are fixed: it passes always or never.
"""

import math

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from scipy.special import ndtr, ndtri
from scipy.stats import beta, binom, binomtest

from rrcm.certification import stopping
from rrcm.certification.margin import MarginRule
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import (
    ALL_SAMPLES,
    FUTILE,
    FUTILITY_CONFIDENCE,
    MIN_CONDITIONAL_POWER,
    WHOLE_GRID,
    FixedSample,
    GroupSequential,
    binomial_test,
    check_prediction,
    check_settings,
    clopper_pearson_lower,
    fixed_sample,
    group_sequential,
    in_reach,
    look_schedule,
)
from rrcm.utils.errors import RRCMError

IMAGES = 200_000  # of each simulated case


def most_false(alpha: float) -> int:
    """More false certificates than this among IMAGES have probability < 1e-9 at rate alpha."""
    return int(binom.isf(1e-9, IMAGES, alpha))


# Numbers


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(
    ("k", "n"),
    [(0, 1), (1, 1), (0, 100), (1, 100), (50, 100), (99, 100), (100, 100)]
    + [(k, 100_000) for k in (0, 1, 50_000, 50_489, 99_999, 100_000)],
)
def test_clopper_pearson_against_scipy(k: int, n: int, alpha: float):
    expected = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert clopper_pearson_lower(k, n, alpha) == pytest.approx(expected, rel=1e-7, abs=1e-12)
    if k == n:
        assert clopper_pearson_lower(k, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-12)


def test_a_bound_that_underflows_certifies_nothing():
    """scipy's inverse of the incomplete beta function gives NaN here."""
    assert clopper_pearson_lower(5, 6, 1e-300) == 0
    assert FixedSample(0.5, n0=100, n=6, alpha=1e-300).radius(5, 0) is None


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1001, 100_000])
def test_binomial_test_against_scipy(n: int):
    half, spread = -(-n // 2), math.isqrt(n)
    for successes in {half, half + 1, half + spread, half + 2 * spread, n}:
        if successes <= n:
            assert binomial_test(successes, n) == pytest.approx(binomtest(successes, n).pvalue, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 125, 126, 1000, 12_345, 100_000, 2**31 - 1])
@pytest.mark.parametrize("alpha", [1e-9, 0.001, 0.3])
def test_looks_grow_and_alpha_is_spent_once(n: int, alpha: float):
    n = max(n, math.ceil(-math.log2(alpha)))  # fewer certify nothing
    rule = group_sequential(0.5, n=n, alpha=alpha)
    assert rule.looks[-1] == n
    assert (np.diff(rule.looks) > 0).all()
    assert all(look >= 100 for look in rule.looks[:-1])
    assert len(rule.alphas) == len(rule.looks)
    assert min(rule.alphas) > 0
    assert math.fsum(rule.alphas) == pytest.approx(alpha, rel=1e-12)
    assert rule.efficacy_counts.shape == (len(rule.looks), len(rule.radii))


def test_looks_of_a_hundred_thousand():
    assert look_schedule(110) == (110,)
    assert look_schedule(111) == (100, 111)
    assert look_schedule(500) == (100, 120, 144, 172, 207, 248, 298, 358, 429, 500)
    assert len(look_schedule(100_000)) == 39


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.5), (99, 0.001), (126, 0.05), (1000, 0.001), (100_000, 0.001)])
def test_the_efficacy_boundary_is_a_binomial_quantile(sigma: float, n: int, alpha: float):
    """P(count >= needed) <= alphas[j] and what was left under p_A = Phi(r / sigma); one vote less would not do."""
    rule = group_sequential(sigma, n=n, alpha=alpha)
    threshold = ndtr(np.array(rule.radii) / sigma)
    unspent = np.zeros(len(rule.radii))
    for m, share, needed in zip(rule.looks, rule.alphas, rule.efficacy_counts, strict=True):
        unspent += share
        assert (needed == binom.isf(unspent, m, threshold) + 1).all()
        unspent -= binom.sf(needed - 1, m, threshold)
        assert (unspent >= 0).all()


@pytest.mark.parametrize("n", [100_000, 12_345])
@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_the_grid_ends_with_the_last_radius_in_reach(sigma: float, n: int):
    rule = group_sequential(sigma, n=n)
    assert rule.radii == tuple(0.25 * k for k in range(len(rule.radii)))
    assert rule.efficacy_counts[-1, -1] <= n
    assert binom.sf(n - 1, n, ndtr((rule.radii[-1] + 0.25) / sigma)) > rule.alpha


def test_radii_are_decimal_numbers():
    assert group_sequential(0.5, n=1000, radius_step=0.1).radii[:7] == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@pytest.mark.parametrize(("sigma", "n"), [(0.5, 101), (0.25, 337), (1.0, 500)])
def test_conditional_power_by_brute_force(sigma: float, n: int):
    """Conditional power of every count, with scipy's distributions."""
    rule = group_sequential(sigma, n=n, alpha=0.01)
    for j, m in enumerate(rule.looks):
        count = np.arange(m + 1)
        optimistic = np.append(beta.ppf(FUTILITY_CONFIDENCE, count[:-1] + 1, m - count[:-1]), 1.0)
        for g in range(len(rule.radii)):
            hopeful = binom.sf(rule.efficacy_counts[-1, g] - count - 1, n - m, optimistic) >= MIN_CONDITIONAL_POWER
            assert (hopeful == in_reach(count, m, rule.efficacy_counts[-1, g], n)).all()
            _, reasons = rule.decide(j, count, np.full(m + 1, g))
            following = (count < rule.efficacy_counts[j, g]) & (m < n)  # the radius stays the next one
            assert ((reasons == FUTILE) == ~hopeful)[following].all()


@pytest.mark.parametrize(("sigma", "n", "alpha"), [(0.5, 1000, 0.001), (0.25, 150, 0.05), (1.0, 600, 0.3)])
def test_a_radius_is_certified_when_the_exact_bound_reaches_it(sigma: float, n: int, alpha: float):
    """Of every count at every look: the radii that the Clopper-Pearson bounds at the alphas left for them reach."""
    rule = group_sequential(sigma, n=n, alpha=alpha)
    threshold = ndtr(np.array(rule.radii) / sigma)
    left = np.zeros(len(threshold))
    for look, m in enumerate(rule.looks):
        left += rule.alphas[look]
        reached = [[clopper_pearson_lower(k, m, a) for a in left] >= threshold for k in range(m + 1)]
        levels, _ = rule.decide(look, np.arange(m + 1), np.zeros(m + 1, int))
        assert (levels == np.logical_and.accumulate(reached, axis=1).sum(1)).all()
        left -= binom.sf(rule.efficacy_counts[look] - 1, m, threshold)


def test_decide_gives_a_reason_to_stop():
    rule = group_sequential(0.5, n=1000)
    last, all_radii = len(rule.looks) - 1, len(rule.radii)
    assert rule.decide(0, 60, 0) == (0, "")
    assert rule.decide(0, 20, 0) == (0, FUTILE)
    assert rule.decide(last, 20, 0) == (0, ALL_SAMPLES)
    assert rule.decide(last, 1000, 0) == (all_radii, WHOLE_GRID)
    assert rule.decide(2, 100, 3)[0] == 3  # what is certified stays so
    levels, stopped = rule.decide(0, np.array([60, 20]), np.array([0, 0]))
    assert (levels.tolist(), stopped.tolist()) == ([0, 0], ["", FUTILE])


def test_radius_of_a_level():
    rule = group_sequential(0.5, n=1000)
    assert [rule.radius(0, level) for level in range(4)] == [None, 0.0, 0.25, 0.5]
    assert fixed_sample(0.5, n=1000).radius(540, 0) is None
    assert fixed_sample(0.5, n=1000).radius(1000, 0) == pytest.approx(0.5 * ndtri(0.001 ** (1 / 1000)), rel=1e-12)


@pytest.mark.parametrize("stopping", [fixed_sample, group_sequential])
@pytest.mark.parametrize(
    "wrong",
    [{"sigma": value} for value in (0.0, -1.0, math.inf, math.nan)]
    + [{"alpha": value} for value in (0.0, 1.0, 1 - 1e-16, -0.1, math.nan)]
    + [{name: value} for name in ("n0", "n") for value in (0, -5, 2**31, 1e3, 100.5, math.nan)],
    ids=str,
)
def test_impossible_settings_are_refused(stopping, wrong: dict):
    with pytest.raises(RRCMError) as error:
        stopping(**{"sigma": 0.5} | wrong)
    assert "\n" not in str(error.value)
    assert str(next(iter(wrong.values()))) in str(error.value)


@pytest.mark.parametrize("radius_step", [0.0, -0.25, math.inf, math.nan, 1e-6, 1e-320])
def test_impossible_grids_are_refused(radius_step: float):
    with pytest.raises(RRCMError, match=r"^radius_step = .*$"):
        group_sequential(0.5, radius_step=radius_step)


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
@pytest.mark.parametrize("stopping", [fixed_sample, group_sequential])
def test_samples_that_certify_nothing_are_refused(stopping, alpha: float):
    """The fewest that do are those of which n equal ones have a probability of at most alpha under a fair coin."""
    least = next(n for n in range(1, 99) if 0.5**n <= alpha)
    rule = stopping(0.5, n=least, alpha=alpha)
    assert rule.radius(least, rule.decide(0, least, 0)[0]) is not None
    for n in {max(1, least // 2), least - 1} - {least, 0}:
        for refused in (lambda n=n: stopping(0.5, n=n, alpha=alpha), lambda n=n: check_settings(0.5, 100, n, alpha)):
            with pytest.raises(RRCMError, match=rf"^n = {n}: certifies nothing at .*; set n to {least}$"):
                refused()


def test_shares_of_alpha_that_certify_nothing_are_refused():
    """All shares together are a little less than alpha, and the margin bound does not get all of it."""
    for n, alpha, bound in [(111, 2**-111, "binary"), (40, 2**-40, "margin"), (20, 1e-6, "margin")]:
        settings = {"n0": 100, "radius_step": 0.25, "alpha": alpha, "bound": bound}
        with pytest.raises(RRCMError, match=rf"^n = {n}: certifies nothing at .*; set n higher[^\n]*$"):
            make_stopping_rule("sequential", 0.5, n=n, **settings)
        make_stopping_rule("sequential", 0.5, n=n + 3, **settings)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, torch.tensor])
def test_settings_of_any_number_type_are_those_of_python(kind):
    expected = repr(group_sequential(0.5, n0=100, n=200, alpha=0.25, radius_step=0.5))
    real = torch.tensor if kind is torch.tensor else np.float32
    assert repr(group_sequential(real(0.5), n0=kind(100), n=kind(200), alpha=real(0.25), radius_step=real(0.5))) == (
        expected
    )
    assert check_prediction(kind(100), real(0.25)) == (100, 0.25)


@pytest.mark.parametrize("name", ["sigma", "alpha", "radius_step", "n0", "n"])
@pytest.mark.parametrize(
    "value",
    ["0.5", True, None, [0.25], np.array([0.25]), 1j, 10**400, 10**5000, torch.zeros((), device="meta")],
    ids=["text", "bool", "None", "list", "array", "complex", "long", "longer", "meta"],
)
def test_settings_of_another_type_are_refused(name: str, value: object):
    with pytest.raises(RRCMError, match=rf"^{name} = [^\n]*: must be [^\n]*$") as error:
        group_sequential(**{"sigma": 0.5, name: value})
    assert len(str(error.value)) < 150


def test_a_long_grid_of_many_samples_takes_no_long_work():
    """Work before the first sample is bounded: one count for each look and radius."""
    rule = group_sequential(0.5, n=2**31 - 1, radius_step=0.01)
    assert rule.efficacy_counts.shape == (94, 291)
    for radius_step in (0.0003, 0.0005):
        with pytest.raises(RRCMError, match=r"radii up to 2.9, more than 4,255; take a larger step$"):
            group_sequential(0.5, n=2**31 - 1, radius_step=radius_step)


# Soundness


def simulate(looks: tuple[int, ...], p: float | np.ndarray, rng: np.random.Generator, images: int) -> np.ndarray:
    """(J, images) int64, votes for the chosen class after each look; `p` is p_A, one or (images,)."""
    return np.cumsum([binomials(fresh, p, rng, images) for fresh in np.diff(looks, prepend=0)], axis=0)


def binomials(trials: int, p: float | np.ndarray, rng: np.random.Generator, images: int) -> np.ndarray:
    """(images,) independent binomial numbers. Of one p, how often each value occurs is drawn first, then the order."""
    if np.ndim(p):
        return rng.binomial(trials, p)
    values = np.arange(trials + 1)
    chance = binom.pmf(values, trials, p)
    numbers = np.repeat(values, rng.multinomial(images, chance / chance.sum()))
    rng.shuffle(numbers)
    return numbers


# When sampling stops: `reason` is the rule's own, `level` the number of certified radii.
POLICIES = {
    "as built": lambda reason, level: reason != "",
    "never futile": lambda reason, level: (reason != "") & (reason != FUTILE),
    "at the first certificate": lambda reason, level: level > 0,
    "adversary": lambda reason, level: np.zeros(len(level), bool),  # knows the truth: at the first false certificate
}


def false_by_policy(rule: GroupSequential, counts: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """(images,) whether more than `truth` radii are certified when sampling stops, by policy.

    Certified radii only become more. So a certificate is false if it is so at any look before sampling has stopped.
    `decide` is asked once for each count and level that occur, not once for each image.
    """
    levels, level = len(rule.radii) + 1, np.zeros(counts.shape[1], np.int64)
    running = {policy: np.ones(len(level), bool) for policy in POLICIES}
    false = {policy: np.zeros(len(level), bool) for policy in POLICIES}
    for look, count in enumerate(counts):
        seen = np.arange(count.min(), count.max() + 1)
        new, reason = rule.decide(look, np.repeat(seen, levels), np.tile(np.arange(levels), len(seen)))
        case = (count - seen[0]) * levels + level
        level = new[case]
        wrong = level > truth
        for policy, stops in POLICIES.items():
            false[policy] |= wrong & running[policy]
            running[policy] &= ~stops(reason, new)[case]
    return false


def true_levels(rule: GroupSequential, p: float | np.ndarray, images: int) -> np.ndarray:
    """(images,) how many radii of the grid are within the true one, sigma Phi^-1(p)."""
    return np.broadcast_to(np.searchsorted(ndtr(np.array(rule.radii) / rule.sigma), p, side="right"), images)


def false_fixed(rule: FixedSample, count: np.ndarray, p: float) -> int:
    """How many of the certificates are above the true radius."""
    counts, images = np.unique(count, return_counts=True)
    radii = [rule.radius(int(count), 0) for count in counts]
    wrong = [radius is not None and radius > rule.sigma * ndtri(p) for radius in radii]
    return int(images[wrong].sum())


def near_thresholds(sigma: float, n: int, radii: slice) -> list[float]:
    """p_A on each threshold Phi(r / sigma), at the next number below it, the worst, and a little to both sides."""
    thresholds = ndtr(np.array(group_sequential(sigma, n=n, alpha=0.05).radii[radii]) / sigma)
    return [
        *thresholds.tolist(),
        *np.nextafter(thresholds, 0).tolist(),
        *ndtr(ndtri(thresholds) - 0.02).tolist(),
        *ndtr(ndtri(thresholds) + 0.02).tolist(),
    ]


def false_certificates(sigma: float, n: int, radii: slice) -> dict[tuple, int]:
    """How many of IMAGES certificates are false, by (p_A, alpha, policy), on the same simulated counts."""
    rng, false = np.random.default_rng(n), {}
    for p in near_thresholds(sigma, n, radii):
        counts = simulate(look_schedule(n), p, rng, IMAGES)
        for alpha in (0.001, 0.05):
            rule = group_sequential(sigma, n=n, alpha=alpha)
            for policy, wrong in false_by_policy(rule, counts, true_levels(rule, p, IMAGES)).items():
                false[p, alpha, policy] = int(wrong.sum())
            false[p, alpha, "fixed"] = false_fixed(fixed_sample(sigma, n=n, alpha=alpha), counts[-1], p)
    return false


def unsound(false: dict[tuple, int]) -> dict[tuple, int]:
    """The cases with more false certificates than alpha allows."""
    return {case: count for case, count in false.items() if count > most_false(case[1])}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("sigma", "n", "radii"),
    [(0.5, 1000, slice(None)), (0.5, 10_000, slice(None)), (0.25, 100_000, slice(0, 4, 3))],
)
def test_certificates_are_false_no_more_often_than_alpha(sigma: float, n: int, radii: slice):
    false = false_certificates(sigma, n, radii)
    assert unsound(false) == {}
    for policy, least in (("fixed", 0.5), ("adversary", 0.3)):  # the bounds are not just loose
        assert max(count for case, count in false.items() if case[1:] == (0.001, policy)) > least * 0.001 * IMAGES


@pytest.mark.parametrize("p", [0.5, np.nextafter(0.5, 0), 0.49, 0.51, np.nextafter(ndtr(0.5), 0)])
def test_choosing_the_class_and_stopping_at_a_wrong_one_keep_alpha(p: float):
    """Of two classes, p and 1 - p, n0 samples choose one; where that is not the label, nothing is claimed."""
    rng = np.random.default_rng(1)
    rule = group_sequential(0.5, n=1000)
    chosen = np.where(rng.binomial(rule.n0, p, IMAGES) >= rule.n0 / 2, p, 1 - p)  # ties: the first class
    counts = np.empty((len(rule.looks), IMAGES), np.int64)
    for p_a in {p, 1 - p}:
        counts[:, chosen == p_a] = simulate(rule.looks, p_a, rng, (chosen == p_a).sum())
    for false in false_by_policy(rule, counts, true_levels(rule, chosen, IMAGES)).values():
        for kept in (np.full(IMAGES, True), chosen == p, chosen == 1 - p):  # no labels, one label, the other
            assert (false & kept).sum() <= most_false(0.001)


def test_a_rule_that_does_not_split_alpha_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stopping, "alpha_spending", lambda alpha, looks: (alpha,) * looks)
    caught = unsound(false_certificates(0.5, 1000, slice(0, 2)))
    assert {case[1:] for case in caught} >= {(a, policy) for a in (0.001, 0.05) for policy in ("as built", "adversary")}
    assert not any(policy == "fixed" for _, _, policy in caught)


def chance_to_certify(rule: GroupSequential, g: int, p: float) -> float:
    """P(radius g is certified at any look | p_A = p), exactly: the distribution of the count of images where it is not
    yet, from look to look."""
    alive, chance, before = np.ones(1), 0.0, 0
    for look, needed in zip(rule.looks, rule.efficacy_counts[:, g], strict=True):
        alive = fftconvolve(alive, binom.pmf(np.arange(look - before + 1), look - before, p))
        chance += alive[needed:].sum()
        alive, before = alive[:needed], look
    return chance


@pytest.mark.parametrize("n", [100, 1000, 10_000, 100_000])
@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
def test_the_chance_of_a_false_certificate_is_exactly_below_alpha(sigma: float, n: int):
    """At the worst p_A, the limit from below at each threshold, whatever stops the sampling; without simulation."""
    rule = group_sequential(sigma, n=n)
    for g, radius in enumerate(rule.radii):
        assert 0 < chance_to_certify(rule, g, ndtr(radius / sigma)) <= 0.001


# Samples

STEP = 0.25
# Cohen et al. 2019, from their published certificates (github.com/locuslab/smoothing, data/certify; n = 100,000): share
# of images correct with radius >= 0, 0.25, ...; where (nearly) all samples agree; abstained. The rest is a wrong class.
PUBLISHED = {
    ("CIFAR-10", 0.25): ([0.748, 0.6, 0.428, 0.266], 0.154, 0.086),
    ("CIFAR-10", 0.5): ([0.652, 0.546, 0.414, 0.32, 0.234, 0.152, 0.094, 0.052], 0.028, 0.166),
    ("CIFAR-10", 1.0): (
        [0.472, 0.392, 0.34, 0.278, 0.216, 0.174, 0.14, 0.118, 0.1, 0.076, 0.048, 0.038, 0.02, 0.004, 0.002],
        0.0,
        0.29,
    ),
    ("ImageNet", 0.25): ([0.667, 0.581, 0.494, 0.375], 0.281, 0.089),
    ("ImageNet", 0.5): ([0.572, 0.518, 0.458, 0.424, 0.372, 0.33, 0.286, 0.22], 0.182, 0.164),
    ("ImageNet", 1.0): (
        [0.436, 0.406, 0.378, 0.354, 0.326, 0.29, 0.26, 0.224, 0.194, 0.17, 0.148, 0.126, 0.122, 0.104, 0.09, 0.076],
        0.072,
        0.296,
    ),
}


def published_probabilities(data: str, sigma: float, images: int) -> np.ndarray:
    """(images,) p_A of the label, 0 where a wrong class is chosen.

    Radii are quantiles of the published distribution, linear between its points and on to the largest radius that n =
    100,000 can certify; p_A = Phi(R / sigma). Where nearly all samples agree p_A = 1 - 1e-6. Where they abstained the
    label is the likeliest class, with p_A spread over 0.3 to 0.5: that takes more samples than a wrong class.
    """
    accuracy, agreed, abstained = PUBLISHED[data, sigma]
    largest = sigma * ndtri(0.001 ** (1 / 100_000))
    share = (np.arange(images) + 0.5) / images  # of images that are more robust
    radius = np.interp(share, [agreed, *accuracy[::-1]], [largest, *(STEP * np.arange(len(accuracy))[::-1])])
    spread = 0.5 - 0.2 * (share - accuracy[0]) / abstained
    return np.select(
        [share < agreed, share < accuracy[0], share < accuracy[0] + abstained],
        [1 - 1e-6, ndtr(radius / sigma), spread],
    )


def evaluate(data: str, sigma: float, images: int = 5000) -> tuple[float, np.ndarray]:
    """Mean samples of `fixed` over those of `sequential`, and how far its certified accuracy is above that of `fixed`
    at each radius of the grid; on the same simulated votes, evaluated with labels."""
    rule, other = group_sequential(sigma), fixed_sample(sigma)
    p = published_probabilities(data, sigma, images)
    right = p[p > 0]
    counts = simulate(rule.looks, right, np.random.default_rng(7), len(right))
    level, samples = np.zeros(len(right), np.int64), np.full(len(right), rule.n0)
    running = np.arange(len(right))
    for look, count in enumerate(counts):
        level[running], stopped = rule.decide(look, count[running], level[running])
        samples[running] = rule.n0 + rule.looks[look]
        running = running[stopped == ""]
    assert len(running) == 0
    mean_samples = (samples.sum() + rule.n0 * (images - len(right))) / images
    radii = np.array([-1 if (radius := other.radius(int(count), 0)) is None else radius for count in counts[-1]])
    of_sequential = (level[:, None] > np.arange(len(rule.radii))).sum(0) / images
    of_fixed = (radii[:, None] >= rule.radii).sum(0) / images
    return (other.n0 + other.n) / mean_samples, of_sequential - of_fixed


@pytest.mark.parametrize(("data", "sparing"), [("CIFAR-10", 5), ("ImageNet", 3)])
def test_sequential_takes_a_fraction_of_the_samples_for_the_same_table(data: str, sparing: float):
    results = {sigma: evaluate(data, sigma) for name, sigma in PUBLISHED if name == data}
    savings = {sigma: saving for sigma, (saving, _) in results.items()}
    assert len(savings) / sum(1 / saving for saving in savings.values()) >= sparing, savings
    for sigma, (_, difference) in results.items():
        assert np.abs(difference).max() <= 0.01, (sigma, difference)


@pytest.mark.parametrize("rule", [fixed_sample(0.5, n=1000), group_sequential(0.5, n=1000)])
def test_every_rule_says_when_it_looks_and_what_it_spends(rule):
    """A fixed sample has one look and no grid; with the margin bound the rule is the same."""
    looks, grid = (14, (0.0, 0.25)) if rule.stops_early else (1, ())
    assert rule.looks[-1] == 1000 and len(rule.looks) == len(rule.alphas) == looks and rule.radii[:2] == grid
    assert math.fsum(rule.alphas) == pytest.approx(0.001)
    margin = MarginRule(rule)
    assert (margin.looks, margin.alphas, margin.radii) == (rule.looks, rule.alphas, rule.radii)
