"""Certificates and what is computed from them, against hand-made cases and a plain loop."""

import getpass
import json
import math
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_certificates, write_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, multinomial, norm, sem, t

from rrcm.certification.results import (
    COLUMNS,
    SAMPLES,
    VOTES,
    read_certificates,
    read_samples,
    sigma_name,
)
from rrcm.evaluation.metrics import (
    accuracy_difference,
    acr_difference,
    average_certified_radius,
    best_sigma_table,
    certified_accuracy,
    differences_table,
    envelope,
    mean_over_seeds,
    per_sigma_table,
    wilson_interval,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.provenance import describe_environment

HEADER = "\t".join(COLUMNS)
COHEN = f"""{HEADER}
0\t3\t3\t0.536\t1\t0:00:17.540437
20\t7\t1\t0.244\t0\t0:00:17.112
40\t8\t-1\t0.0\t0\t1 day, 1:00:02
60\t0\t0\t0.25\t1\t17.5
"""


def frame_of(*images: tuple[int, float]) -> pd.DataFrame:
    """A frame from (correct, radius) pairs; the label is 1 and a wrong answer 2."""
    rows = [(i, 1, 1 if correct else 2, radius, correct, 0.0) for i, (correct, radius) in enumerate(images)]
    return pd.DataFrame(rows, columns=COLUMNS)


def test_reads_the_published_format(tmp_path: Path):
    path = tmp_path / "published.tsv"
    path.write_text(COHEN)
    frame = read_certificates(path)
    assert list(frame.columns) == COLUMNS
    assert frame["idx"].tolist() == [0, 20, 40, 60]
    assert frame["predict"].tolist() == [3, 1, -1, 0]
    assert frame["time"].tolist() == pytest.approx([17.540437, 17.112, 90002.0, 17.5])
    assert certified_accuracy(frame, [0, 0.25, 0.5, 0.536, 0.54]).tolist() == [0.5, 0.5, 0.25, 0.25, 0]
    assert average_certified_radius(frame) == pytest.approx((0.536 + 0.25) / 4)


def test_reads_the_files_of_other_groups(tmp_path: Path):
    """Windows line ends, a byte order mark, blank lines at the end, further columns in any place."""
    (tmp_path / "plain.tsv").write_text(COHEN)
    plain = read_certificates(tmp_path / "plain.tsv")
    lines = COHEN.splitlines()
    wide = [f"{'method' if i == 0 else 'x y'}\t{line}\t{'sigma' if i == 0 else ''}" for i, line in enumerate(lines)]
    backwards = ["\t".join(reversed(line.split("\t"))) for line in lines]
    variants = {
        "windows": "\r\n".join([*lines, "", ""]),
        "unfinished": "\n".join(lines),
        "blank": COHEN + "\n\n",
        "mark": "\ufeff" + COHEN,
        "wide": "\n".join(wide),
        "backwards": "\n".join(backwards),
    }
    for name, text in variants.items():
        (tmp_path / name).write_bytes(text.encode())
        pd.testing.assert_frame_equal(read_certificates(tmp_path / name), plain, check_exact=True)
        (tmp_path / name).write_bytes(text.removeprefix("\ufeff").encode("utf-16"))
        pd.testing.assert_frame_equal(read_certificates(tmp_path / name), plain, check_exact=True)


def test_samples_read_back_as_written(tmp_path: Path):
    rows = [(3, 200, "futile"), (0, 100, "wrong class"), (6, 1100, "all samples"), (9, 850, "whole grid")]
    frame = pd.DataFrame(rows, columns=SAMPLES[:3])
    frame = frame.assign(
        binary_samples=[200, 100, 600, 850], binary_predict=[-1, 4, -1, 2], binary_radius=[0, 0, 0, 0.1 + 0.2]
    )
    frame = frame.assign(margin_predict=[3, 4, -1, 2], margin_radius=[1 / 3, 0, 0, 0.3])
    frame = frame.assign(selection=["3:9", "4:8 10:1", "1:9", "2:9"], votes=["100=3:100", "", "", "100=2:99,5:1"])
    write_samples(tmp_path / "samples.tsv", frame.assign(label=0))
    pd.testing.assert_frame_equal(read_samples(tmp_path / "samples.tsv"), frame)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("3\t100", "has 2 tab-separated fields, must have 10"),
        ("3\tmany\tfutile\t100\t-1\t0\t-1\t0\t3:9\t", "invalid literal for int"),
        ("3\t0\tfutile\t0\t-1\t0\t-1\t0\t3:9\t", "idx 3, samples 0, binary_samples 0: must be at least 0 and 1"),
        (
            "3\t100\tfutile\t101\t-1\t0\t-1\t0\t3:9\t",
            "101: must be at least 0 and 1, and not more than samples",
        ),
        ("-3\t100\tfutile\t100\t-1\t0\t-1\t0\t3:9\t", "idx -3, samples 100"),
        (
            "3\t100\tbored\t100\t-1\t0\t-1\t0\t3:9\t",
            "stop_reason 'bored': must be all samples or whole grid or",
        ),
        (
            "3\t100\tfutile\t100\t-1\t0.5\t-1\t0\t3:9\t",
            "predict -1, radius 0.5: must be a class and its radius, or -1 and 0",
        ),
        ("3\t100\tfutile\t100\t-1\t0\t2\tnan\t3:9\t", "predict 2, radius nan: must be a class"),
        ("0\t100\tfutile\t100\t-1\t0\t-1\t0\t3:9\t", "idx 0 occurs twice"),
    ],
)
def test_malformed_samples_name_file_and_line(tmp_path: Path, row: str, message: str):
    path = tmp_path / "bad.samples.tsv"
    first = "0\t100\tfutile\t100\t-1\t0\t-1\t0\t3:9\t"
    path.write_text("\t".join(SAMPLES + VOTES) + f"\n{first}\n{row}\n")
    with pytest.raises(RRCMError) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)


@given(st.lists(st.floats(0, 10, allow_subnormal=True), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_written_certificates_read_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, radii: list[float]):
    path = tmp_path_factory.mktemp("round") / "certificates.tsv"
    frame = frame_of(*((i % 2, radius) for i, radius in enumerate(radii)))
    write_certificates(path, frame.assign(time=0))
    pd.testing.assert_frame_equal(read_certificates(path), frame, check_exact=True)
    assert path.read_text().splitlines()[0] == HEADER
    assert path.read_text().splitlines()[1].endswith("\t0")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1\t1\t1\t0.5\t1", "has 5 tab-separated fields, must have 6"),
        ("1\t1\t1\t0.5\t1\t0\t0", "has 7 tab-separated fields, must have 6"),
        ("", "has 1 tab-separated fields"),
        ("1\tcat\t1\t0.5\t1\t0", "invalid literal for int"),
        ("1\t1\t1\tfar\t1\t0", "could not convert string to float"),
        ("1\t1\t1\tnan\t1\t0", "radius nan: must be a finite number"),
        ("1\t1\t1\tinf\t1\t0", "radius inf: must be a finite number"),
        ("1\t1\t1\t-0.5\t1\t0", "radius -0.5: must be a finite number >= 0"),
        ("1\t1\t-1\t0.5\t0\t0", "radius 0.5: must be a finite number >= 0, and 0 when abstained"),
        ("1\t1\t2\t0.5\t1\t0", "correct 1 does not fit label 1 and predict 2"),
        ("1\t1\t1\t0.5\t0\t0", "correct 0 does not fit"),
        ("1\t-1\t-1\t0\t0\t0", "label -1: the true class is unknown"),
        ("1\t-2\t-1\t0\t0\t0", "must be at least 0"),
        ("1\t1\t-2\t0\t0\t0", "predict at least -1"),
        ("0\t1\t1\t0.5\t1\t0", "idx 0 occurs twice"),
        ("1\t1\t1\t0.5\t1\tsoon", "could not convert string to float: 'soon'"),
    ],
)
def test_malformed_row_names_file_and_line(tmp_path: Path, row: str, message: str):
    path = tmp_path / "bad.tsv"
    path.write_text(f"{HEADER}\n0\t1\t1\t0.5\t1\t0\n{row}\n2\t1\t1\t0.5\t1\t0\n")
    with pytest.raises(RRCMError) as error:
        read_certificates(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "line 1: must be a tab-separated header"),
        (HEADER.replace("\t", ",").encode(), "line 1: must be a tab-separated header with each of idx label"),
        (HEADER.replace("radius\t", "").encode(), "line 1: must be a tab-separated header"),  # as of Cohen's PREDICT
        (f"{HEADER}\tradius".encode(), "line 1: .* once"),
        (HEADER.encode() + b"\n", "has a header but no rows"),
        (b"\xff\xff", "cannot be read as text"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "bad.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RRCMError, match=message) as error:
        read_certificates(path)
    assert str(path) in str(error.value)


outcomes = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.5])), min_size=1)


@given(outcomes, st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 1.0, 1.5, 2.0]), min_size=1))
@settings(max_examples=50, deadline=None)
def test_accuracy_and_acr_against_a_plain_loop(images: list[tuple[int, float]], radii: list[float]):
    frame = frame_of(*images)
    expected = [sum(1 for correct, radius in images if correct and radius >= r) / len(images) for r in radii]
    assert certified_accuracy(frame, radii).tolist() == expected
    assert average_certified_radius(frame) == pytest.approx(sum(c * r for c, r in images) / len(images))


@given(outcomes, outcomes)
@settings(max_examples=50, deadline=None)
def test_envelope_is_the_highest_curve_everywhere(one: list, other: list):
    frames = [frame_of(*one), frame_of(*other)]
    radii, accuracy = envelope(frames)
    assert radii[0] == 0
    assert accuracy[-1] == 0
    assert (np.diff(radii) >= 0).all()
    for r in np.linspace(0, 2, 17):
        step = np.searchsorted(radii[:-1], r)  # the first breakpoint at or above r
        drawn = accuracy[step] if step < len(radii) - 1 else 0.0
        assert drawn == max(certified_accuracy(frame, [r])[0] for frame in frames)


def test_tables_by_hand():
    quiet = frame_of((1, 0.5), (1, 0.25), (1, 0.1), (0, 0.5))  # 3/4 at r = 0
    loud = frame_of((1, 2.0), (1, 0.25), (0, 2.0), (0, 0.1))  # 1/2 at r = 0
    table = best_sigma_table({("rrcm", 1.0): loud, ("rrcm", 0.25): quiet}, [0.0, 0.25, 0.5, 1.0, 3.0])
    assert table["sigma"].tolist() == [0.25, 0.25, 0.25, 1.0, 0.25]  # ties go to the smaller sigma
    assert table["certified_accuracy"].tolist() == [0.75, 0.5, 0.25, 0.25, 0.0]
    assert table["at_zero"].tolist() == [0.75, 0.75, 0.75, 0.5, 0.75]
    rows = per_sigma_table({("rrcm", 0.25): quiet, ("gaussian", 1.0): loud}, [0.0, 0.5])
    assert rows[["method", "sigma", "images"]].values.tolist() == [["rrcm", 0.25, 4], ["gaussian", 1.0, 4]]
    assert rows["samples"].isna().all()
    drawn = per_sigma_table({("rrcm", 0.25): quiet.assign(samples=[100, 100, 1100, 300])}, [0.0])
    assert drawn["samples"].tolist() == [400]
    assert rows["acr"].tolist() == pytest.approx([0.2125, 0.5625])
    assert rows[["r_0", "r_0.5"]].values.tolist() == [[0.75, 0.25], [0.5, 0.25]]
    assert (rows["low_r_0"] < rows["r_0"]).all() and (rows["r_0"] < rows["high_r_0"]).all()
    errors = [np.std(each, ddof=1) / 2 for each in ([0.5, 0.25, 0.1, 0], [2, 0.25, 0, 0])]
    assert rows["acr_se"].tolist() == pytest.approx(errors)


def test_difference_of_acr_is_paired():
    one, other = frame_of((1, 1.0), (1, 2.0), (0, 9.0)), frame_of((1, 0.5), (1, 1.0), (1, 0.5))
    by_image = [0.5, 1, -0.5]
    scale = np.std(by_image, ddof=1) / np.sqrt(3)
    assert acr_difference(one, other) == pytest.approx((1 / 3, *norm.interval(0.95, 1 / 3, scale)))
    assert acr_difference(one, one) == (0, 0, 0)


def test_the_interval_of_the_acr_difference_covers():
    """2,000 samples of 120 images with many zero radii: the share that is covered has a standard error of 0.5 %."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        shared, own = rng.normal(0.3, 0.3, 120), rng.normal(0, 0.2, (2, 120))
        one, other = (pd.DataFrame({"radius": (shared + each).clip(0), "correct": 1}) for each in own)
        _, low, high = acr_difference(one, other)
        covered += low <= 0 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def pairs(gained: int, lost: int, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two classifiers that are both wrong except for `gained` images of the first and `lost` of the second."""
    one, other = np.zeros((2, count), int)
    one[:gained] = other[gained : gained + lost] = 1
    return tuple(pd.DataFrame({"correct": each, "radius": 0.5}) for each in (one, other))


def test_difference_of_accuracy_by_hand():
    value, low, high = accuracy_difference(*pairs(11, 3, 98), 0.5)  # with one more of each: 12 and 4 of 100
    half = 1.959964 * np.sqrt((0.16 - 0.08**2) / 100)
    assert (value, low, high) == pytest.approx((8 / 98, 0.08 - half, 0.08 + half), rel=1e-6)
    one, other = pairs(3, 11, 98)
    assert accuracy_difference(one, other, 0.5) == pytest.approx((-8 / 98, -0.08 - half, -0.08 + half), rel=1e-6)
    value, low, high = accuracy_difference(one, other, 0.51)  # nobody is certified there, which proves little
    assert value == 0 and low == -high and 0.02 < high < 0.03


def test_a_difference_of_shares_stays_within_its_scale():
    """Without a cut the interval of three images, all gained, would end at 1.3."""
    value, low, high = accuracy_difference(*pairs(3, 0, 3), 0.5)
    assert value == high == 1 and -0.2 < low < 0
    assert accuracy_difference(*pairs(0, 3, 3), 0.5) == (-1, -1, -low)


@pytest.mark.parametrize("count", [60, 120])
@pytest.mark.parametrize(("gain", "loss"), [(0.2, 0.1), (0.1, 0.1), (0.15, 0.02), (0.05, 0.05), (0.02, 0.005)])
def test_the_interval_of_the_accuracy_difference_covers(count: int, gain: float, loss: float):
    """The exact probability, summed over all outcomes. Such intervals are not exact: 93.5 % is their low end here."""
    gained, lost = np.meshgrid(np.arange(30), np.arange(30))
    outcomes = np.stack([gained, lost, count - gained - lost], axis=-1).reshape(-1, 3)
    chances = multinomial.pmf(outcomes, count, [gain, loss, 1 - gain - loss])
    likely = chances > 1e-6
    covers = [
        low <= gain - loss <= high
        for _, low, high in (accuracy_difference(*pairs(*each[:2], count), 0.5) for each in outcomes[likely].tolist())
    ]
    assert 0.935 < chances[likely][covers].sum() / chances[likely].sum() <= 1


def test_the_interval_over_seeds_is_that_of_student():
    values = [0.1, 0.3, 0.35]
    low, high = t.interval(0.95, 2, np.mean(values), sem(values))
    assert mean_over_seeds(values) == pytest.approx((0.25, low, high))
    assert mean_over_seeds([0.1]) == (0.1, -math.inf, math.inf)
    rng = np.random.default_rng(0)
    covered = [low <= 0 <= high for _, low, high in map(mean_over_seeds, rng.standard_normal((4000, 3)))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)  # standard error 0.35 %


def test_table_of_differences():
    quiet, loud = frame_of((1, 0.5), (1, 0.25), (0, 0.0)), frame_of((1, 0.75), (1, 0.1), (1, 0.0))
    runs = {("gaussian", 0.5): quiet, ("rrcm", 0.5): loud, ("gaussian", 1.0): loud, ("rrcm", 1.0): quiet}
    table = differences_table(runs, "rrcm", [0.25, 0.75]).set_index(["method", "measure", "at"]).sort_index()
    assert table.loc["rrcm", "difference"].isna().all()
    values = [("certified_accuracy", 0.25, 2 / 3), ("certified_accuracy", 0.75, 1 / 3)]
    values += [("acr", 0.5, 0.25), ("acr", 1.0, 0.85 / 3)]
    for measure, at, value in values:
        row = table.loc[("gaussian", measure, at)]
        assert row["value"] == pytest.approx(value)
        assert row["difference"] == pytest.approx(value - table.loc[("rrcm", measure, at), "value"])
        assert row["low"] < row["difference"] < row["high"] or (row["difference"] == 0)


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (3, 150), (377, 500)])
def test_wilson_interval_against_scipy(successes: int, count: int):
    expected = binomtest(successes, count).proportion_ci(0.95, "wilson")
    low, high = wilson_interval(np.array(successes / count), count)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_sigma_name_is_what_dvc_writes():
    assert [sigma_name(sigma) for sigma in (0.25, 1.0, 1)] == ["sigma_0.25", "sigma_1.0", "sigma_1.0"]


def test_environment_names_no_host_user_or_path():
    record = describe_environment("cpu")
    text = json.dumps(record)
    assert record == describe_environment("cpu")
    assert record["software"]["packages"]["torch"]
    assert record["hardware"]["memory_gib"] > 0
    assert record["hardware"]["gpus"] == []
    assert str(Path.cwd()) not in text
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert getpass.getuser() == "root" or getpass.getuser() not in text
