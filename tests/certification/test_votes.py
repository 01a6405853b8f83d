"""The votes in samples files: certificates follow from them, and nothing else does."""

import functools
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, norm
from test_outcomes import SETTINGS, outcomes

import rrcm
from rrcm.certification.results import read_certificates, read_samples
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.votes import parse_selection, parse_votes, recompute, selection_text, votes_text
from rrcm.utils.errors import RRCMError

NEEDED = ["idx", "label", "selection", "votes"]
COUNTS = st.dictionaries(st.integers(0, 2000).map(str), st.integers(1, 10**6), min_size=1, max_size=8)
LOOKS = st.dictionaries(st.integers(1, 10**6).map(str), COUNTS, max_size=5)


@pytest.mark.thorough
@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("options", SETTINGS, ids=lambda each: "-".join(map(str, each.values())))
def test_everything_follows_from_the_votes(options: dict, num_classes: int):
    """By both rules and both bounds: classes, radii, samples and reasons to stop, of 200 images each."""
    rule = make_stopping_rule(sigma=0.5, **options)
    frame = outcomes(rule, num_classes)
    again = recompute(frame[NEEDED], rule, num_classes, labelled=True)
    pd.testing.assert_frame_equal(again, frame, check_exact=True, check_dtype=False)
    assert frame["radius"].max() > 0


@functools.cache
def outcomes_with(number: int) -> pd.DataFrame:
    return outcomes(make_stopping_rule(sigma=0.5, **SETTINGS[number]), 10)


@given(st.integers(0, len(SETTINGS) - 1), st.integers(0, 199), st.sampled_from([0.05, 0.3, 1.0]))
@settings(max_examples=50, deadline=None)
def test_votes_that_are_changed_give_another_row_or_none(number: int, place: int, share: float):
    """Votes of the last look that are made votes for the top class raise a radius, or cannot be."""
    rule = make_stopping_rule(sigma=0.5, **SETTINGS[number])
    row = outcomes_with(number).iloc[[place]]
    looks = parse_votes(row["votes"].iloc[0])
    if not looks:
        return
    (drawn, votes), top = (
        list(looks.items())[-1],
        max(parse_selection(row["selection"].iloc[0]).items(), key=lambda e: e[1])[0],
    )
    taken = {k: round(share * count) for k, count in votes.items() if k != top}
    changed = {k: count - taken.get(k, 0) for k, count in votes.items()}
    changed[top] = changed.get(top, 0) + sum(taken.values())
    looks[drawn] = {k: count for k, count in changed.items() if count}
    forged = row.assign(votes=votes_text(looks))
    try:
        again = recompute(forged[NEEDED], rule, 10, labelled=True)
    except RRCMError as error:
        assert str(error).startswith(f"image {row['idx'].iloc[0]}: ")
        return
    assert again["votes"].iloc[0] == forged["votes"].iloc[0]
    assert (again["binary_radius"] >= row["binary_radius"].to_numpy()).all()


@given(COUNTS, LOOKS)
@settings(deadline=None)
def test_votes_read_back_as_written(selection: dict, votes: dict):
    assert parse_selection(selection_text(selection)) == selection
    assert parse_votes(votes_text(votes)) == votes


@pytest.mark.parametrize("text", ["", "3", "3:0", "3:5 3:5", "8:3 3:97", "03:5", "3:+5", "3:5  8:3", "3:5,8:3", "-1:5"])
def test_a_selection_has_one_spelling(text: str):
    with pytest.raises(ValueError, match=r"selection .*: must be votes by class"):
        parse_selection(text)


@pytest.mark.parametrize("text", [" ", "100", "100=", "100=3:98 100=3:98", "100=3:98,3:2", "0100=3:98", "100=3:98 "])
def test_votes_have_one_spelling(text: str):
    with pytest.raises(ValueError, match=r"votes .*: must be votes by class at each look"):
        parse_votes(text)


RULE = {"n0": 100, "n": 1000, "alpha": 0.001, "radius_step": 0.25}
SELECTION, EARLY = "3:97 8:3", "100=3:98,8:2"
END = "1000=3:990,8:10"
IMPOSSIBLE = {
    "3:97": (EARLY, "97 votes of the selection: must be 100"),
    "3:97 10:3": (EARLY, "class 10: there are 10 classes"),
    "8:97 3:3": (EARLY, "selection '8:97 3:3': must be votes by class"),
    SELECTION: ("101=3:101", "votes at 101: must be at looks of the stopping rule, in order"),
    f"{SELECTION} ": ("", "must be votes by class"),
}


@pytest.mark.parametrize("selection", IMPOSSIBLE)
def test_impossible_votes_are_refused_in_words(selection: str):
    votes, message = IMPOSSIBLE[selection]
    assert_refused(selection, votes, message)


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ("", "votes end at 0 samples, before the stopping rule stops"),
        (EARLY, "votes end at 100 samples, before the stopping rule stops"),
        ("100=3:98", "98 votes of 100 samples: must be 100"),
        (f"{EARLY} 120=3:97,8:23", "votes at 120: a class has fewer than at an earlier look"),
        (f"{EARLY} {EARLY}", "must be votes by class at each look"),
        (f"{EARLY} 120=3:117,8:3 {END}", "votes at 120: decide nothing"),
        (f"100=3:1,8:99 {END}", "votes at 1000: sampling has stopped before (futile)"),
    ],
)
def test_impossible_looks_are_refused_in_words(votes: str, message: str):
    assert_refused(SELECTION, votes, message)


def assert_refused(selection: str, votes: str, message: str) -> None:
    frame = pd.DataFrame({"idx": [7], "label": [3], "selection": [selection], "votes": [votes]})
    with pytest.raises(RRCMError) as error:
        recompute(frame, make_stopping_rule("sequential", 0.5, **RULE), 10, labelled=True)
    assert str(error.value).startswith("image 7: ") and message in str(error.value)


def test_one_line_of_python_gives_every_radius(trained: Path):
    """And it imports no torch."""
    path = trained / "certificates/rrcm/sigma_0.5.tsv"
    frame = read_certificates(path)
    pd.testing.assert_frame_equal(rrcm.recompute_radii(path), frame[["idx", "predict", "radius"]], check_exact=True)
    line = f"import rrcm, sys; print(rrcm.recompute_radii({str(path)!r}).to_csv()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], check=True, cwd=REPOSITORY, stdout=subprocess.PIPE)


def test_one_line_without_this_package_gives_the_radii_of_a_fixed_sample():
    """As stages/README.md has it."""
    n, alpha, sigma = 1000, 0.001, 0.5
    frame = outcomes(make_stopping_rule("fixed", sigma, n0=100, n=n, alpha=alpha, radius_step=0.25), 10)
    certified = frame[frame["predict"] >= 0]
    assert len(certified) > 50
    for row in certified.itertuples():
        k = parse_votes(row.votes)[str(n)][str(row.predict)]
        radius = sigma * norm.ppf(beta.ppf(alpha, k, n - k + 1))
        assert abs(radius - row.radius) <= 1e-9 * sigma


def test_votes_of_other_images_than_the_table_are_refused(trained: Path, tmp_path: Path):
    for path in (trained / "certificates/rrcm").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "sigma_0.5.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(RRCMError, match=r"sigma_0.5.tsv: has other images than .*sigma_0.5.samples.tsv"):
        rrcm.recompute_radii(path)
    assert len(read_samples(tmp_path / "sigma_0.5.samples.tsv")) == len(lines) - 1
