"""The tests of an audit: their tails are exact, they rarely err, and they find what was raised."""

import numpy as np
import pytest
from scipy.stats import binom, hypergeom, norm

from rrcm.certification.agreement import (
    closeness,
    detectable_share,
    least_improbable,
    moved_votes,
    pooled_tail,
    rate_bounds,
    tail,
    votes_to_raise,
)
from rrcm.certification.audit import Audit, Tolerance, compare_close, compare_equal
from rrcm.certification.flips import count_flips
from rrcm.certification.revote import RowVotes


def test_moved_votes_are_those_with_another_class():
    assert moved_votes({"3": 98, "8": 2}, {"3": 95, "8": 3, "1": 2}) == 3
    assert moved_votes({"3": 98, "8": 2}, {"8": 2, "3": 98}) == 0
    assert moved_votes({"3": 100}, {"8": 100}) == 100


@pytest.mark.parametrize(("m", "rate"), [(1, 0.5), (100, 1e-6), (1000, 0.003), (100_000, 0.02), (1000, 1.0)])
def test_the_tail_is_that_of_the_binomial(m: int, rate: float):
    moved = np.unique(np.linspace(0, min(m, 3000), 50).astype(int))
    np.testing.assert_allclose(tail(moved, m, rate), binom.sf(moved - 1, m, rate), rtol=1e-9, atol=1e-300)
    for level in (0.1, 1e-3, 1e-7):
        (k,) = least_improbable(np.array([m]), np.array([rate]), level)
        assert binom.sf(k - 2, m, rate) > level and (k == m + 1 or binom.sf(k - 1, m, rate) <= level)


def test_closeness_is_the_normal_density_at_the_tie():
    p = (np.array([990, 900, 600]) + 1) / 1002
    np.testing.assert_allclose(
        closeness(np.array([990, 900, 600]), 1000), norm.pdf(norm.ppf(p)) / norm.pdf(0), rtol=1e-12
    )
    assert closeness(500, 1000) == closeness(300, 1000) == 1.0 and 0 < closeness(1000, 1000) < 0.02


@pytest.mark.parametrize(
    ("rows", "audited", "power"), [(120, 100, 1.0), (120, 20, 0.7), (500, 100, 0.5), (40, 40, 1.0)]
)
def test_the_detectable_share_is_the_smallest(rows: int, audited: int, power: float):
    def missed(forged: int) -> float:
        drawn = np.arange(audited + 1)
        return float((hypergeom.pmf(drawn, rows, forged, audited) * (1 - power) ** drawn).sum())

    forged = round(detectable_share(rows, audited, power) * rows)
    assert missed(forged) <= 0.01 + 1e-12 < missed(forged - 1)


def test_forgeries_that_are_never_found_have_no_share():
    assert detectable_share(100, 50, 0.0) is None and detectable_share(100, 100, 1.0) == 0.01


def test_the_bounds_on_the_rate_cover():
    generator, rates = np.random.default_rng(0), norm.pdf(norm.ppf(np.linspace(0.5, 0.99, 40))) / norm.pdf(0)
    wrong = []
    for _ in range(2000):
        flips = generator.binomial(100, 0.02 * rates).sum()
        low, high = rate_bounds(int(flips), 4000, float(rates.mean()), 0.05)
        wrong.append((low > 0.02, high < 0.02))
    for share in np.mean(wrong, axis=0):
        assert share <= binom.ppf(1 - 1e-6, 2000, 0.05) / 2000


@pytest.mark.parametrize("top", [600, 900, 980])
def test_the_votes_needed_to_raise_a_radius(top: int):
    (added,) = votes_to_raise(np.array([top]), np.array([1000]), 0.1)
    less, more = (norm.ppf((top + 1) / 1002 + k / 1000) - norm.ppf((top + 1) / 1002) for k in (added - 1, added))
    assert less < 0.1 <= more


RATE, LOOKS = 0.01, (100, 300, 1000)


def rows_of(generator: np.random.Generator, images: int = 60) -> tuple[list[RowVotes], list[RowVotes]]:
    """Votes for images between two classes, and again with flips at RATE near a tie."""
    first, second = [], []
    for idx, z in enumerate(generator.normal(1.0, 0.7, images)):
        p = norm.cdf(z)
        gap = norm.isf(generator.random(LOOKS[-1] + 100)) + z  # of the logits
        flipped = generator.random(len(gap)) < RATE * norm.pdf(z) / norm.pdf(0)
        classes = (gap < 0).astype(int) if p > 0.5 else (gap > 0).astype(int)
        for rows, votes in ((first, classes), (second, classes ^ flipped)):
            counted = [np.bincount(votes[a:b], minlength=2) for a, b in [(0, 100), *((100, 100 + m) for m in LOOKS)]]
            selection, *looks = [{str(k): int(n) for k, n in enumerate(each) if n} for each in counted]
            rows.append(RowVotes(idx, selection, dict(zip(map(str, LOOKS), looks, strict=True))))
    return first, second


def audit(first: list[RowVotes], second: list[RowVotes], record: object, false_alarm: float) -> Audit:
    tests = len(first) * (1 + len(LOOKS))
    return compare_close(
        "file.tsv", record, len(first), Tolerance(RATE, false_alarm / 2 / tests, false_alarm / 4), first, second
    )


@pytest.fixture
def record():
    class Record:
        sigmas = (0.5,)

    return Record


def test_honest_votes_raise_a_false_alarm_as_rarely_as_stated(record):
    """At a false alarm of 20 % there is something to count, as the bounds are exact for the worst flips only."""
    generator = np.random.default_rng(1)
    alarms = sum(bool(audit(*rows_of(generator, 20), record, 0.2).problems) for _ in range(300))
    assert alarms <= binom.ppf(1 - 1e-6, 300, 0.2)


@pytest.mark.slow
def test_a_thousand_forgeries_are_found_as_often_as_stated(record):
    """Votes are raised for a radius larger by 0.05 in some of the rows, and others flip meanwhile."""
    generator = np.random.default_rng(2)
    published, again = rows_of(generator, 120)
    honest = audit(published, again, record, 1e-3)
    forged = round(honest.detectable * len(published))
    assert not honest.problems and 1 <= forged <= 30
    found = 0
    for _ in range(1000):
        chosen = set(generator.permutation([r.idx for r in published if max(r.votes["1000"].values()) < 950])[:forged])
        rows = [raised(row) if row.idx in chosen else row for row in published]
        found += bool(audit(rows, again, record, 1e-3).problems)
    assert found >= 990


def raised(row: RowVotes) -> RowVotes:
    votes = dict(row.votes["1000"])
    top, other = sorted(votes, key=votes.get, reverse=True)[:2]
    added = int(votes_to_raise(np.array([votes[top]]), np.array([1000]), 0.1)[0])
    votes |= {top: votes[top] + added, other: votes[other] - added}
    return row._replace(votes=row.votes | {"1000": votes})


def test_one_vote_is_enough_where_counts_must_be_equal(record):
    first, _ = rows_of(np.random.default_rng(3), 5)
    votes = dict(first[2].votes["300"])
    votes |= {"0": votes["0"] + 1, "1": votes["1"] - 1}
    changed = [*first[:2], first[2]._replace(votes=first[2].votes | {"300": votes}), *first[3:]]
    assert not compare_equal("file.tsv", record, 5, first, first).problems
    found = compare_equal("file.tsv", record, 5, changed, first)
    assert found.problems == ["file.tsv: image 2: 1 of 300 votes differ when counted again"]


def test_votes_that_all_moved_a_little_are_found_together(record):
    """A dozen votes more in each of 200 rows pass every row's test, but not the test of all rows together."""
    first, _ = rows_of(np.random.default_rng(4), 200)
    forged = [row._replace(votes=row.votes | {"1000": shift(row.votes["1000"], 12)}) for row in first]
    tolerance = Tolerance(RATE, 1e-12, 1e-3)
    found = compare_close("file.tsv", record, 200, tolerance, forged, first)
    assert len(found.problems) == 1 and "votes differ when counted again" in found.problems[0]


def shift(votes: dict[str, int], moved: int) -> dict[str, int]:
    top, other = sorted(["0", "1"], key=lambda k: -votes.get(k, 0))
    moved = min(moved, votes.get(other, 0) - 1)
    return votes | {top: votes[top] + moved, other: votes[other] - moved} if moved > 0 else votes


def test_the_pooled_tail_bounds_the_truth():
    m, rates = [1000] * 50, np.linspace(0, 0.01, 50)
    generator = np.random.default_rng(5)
    totals = generator.binomial(1000, rates, (20_000, 50)).sum(1)
    for total in (270, 290, 310):
        truth = (totals >= total).mean()
        assert truth <= pooled_tail([total] + [0] * 49, m, rates) + 4 * np.sqrt(truth / 20_000)
    assert pooled_tail([0] * 50, m, rates) == 1.0


def test_flips_are_counted_and_equal_images_have_no_dispersion():
    generator = np.random.default_rng(6)
    first = (generator.random((200, 500)) < 0.3).astype(int)
    flipped = generator.random(first.shape) < 0.02
    flips = count_flips(first, first ^ flipped, "nothing")
    assert flips.flips == flipped.sum() and flips.samples == 100_000 and flips.images == 200
    assert abs(flips.flips / flips.samples / flips.closeness - 0.02 / norm.pdf(norm.ppf(0.7)) * norm.pdf(0)) < 0.003
    assert 0.6 < flips.dispersion < 1.6
