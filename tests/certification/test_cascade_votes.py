"""The votes in the samples files of a cascade: its certificates follow from them, and nothing else does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cascade import CLASSES, IMAGES, SETTINGS, SIGMAS, make

import rrcm
from rrcm.certification.cascade_rules import CERTIFICATES, CascadeRule, make_cascade_rule
from rrcm.certification.cascade_votes import (
    cascade_frame,
    parse_selection,
    parse_votes,
    recompute_cascade,
    selection_text,
    votes_text,
)
from rrcm.certification.record import CascadeRecord, make_cascade_record, read_record, record_bytes, record_path
from rrcm.certification.results import (
    CASCADE_SAMPLES,
    COLUMNS,
    SAMPLES,
    VOTES,
    certificate_tables,
    read_certificates,
    read_samples,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json

NEEDED = ["idx", "label", "selection", "votes"]
THRESHOLDS = (0.1, -0.1)


@cache
def outcomes(stopping: str, bound: str, certificates: str, passes: bool) -> tuple[pd.DataFrame, CascadeRule]:
    """The frame of 16 images, most of which have the label that is chosen for them."""
    options = {"bound": bound, "certificates": certificates, **SETTINGS}
    rule = make_cascade_rule(stopping, SIGMAS, THRESHOLDS, **options)
    classifier = make(THRESHOLDS, passes)
    chosen = [max(each.prediction, 0) for each in classifier.certify(IMAGES, **options)]
    labels = [0 if index % 4 == 3 else label for index, label in enumerate(chosen)]
    states = classifier.image_states(IMAGES, labels, range(5, 21), rule)
    for _ in classifier.certify_stream(states, rule):
        pass
    return cascade_frame(states, rule, CLASSES), rule


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("certificates", CERTIFICATES)
@pytest.mark.parametrize("bound", ["binary", "margin"])
@pytest.mark.parametrize("stopping", ["sequential", "fixed"])
def test_everything_follows_from_the_votes(stopping: str, bound: str, certificates: str, passes: bool, tmp_path: Path):
    """And files read back as they were written."""
    frame, rule = outcomes(stopping, bound, certificates, passes)
    again = recompute_cascade(frame[NEEDED], rule, CLASSES, labelled=True)
    pd.testing.assert_frame_equal(again, frame, check_exact=True)
    assert frame["radius"].max() > 0 or (stopping, certificates) == ("sequential", "multi-scale")
    assert frame.columns.tolist() == [*COLUMNS, *CASCADE_SAMPLES[1:], *VOTES]
    assert passes == frame["selection"].str.contains(f"{CLASSES}:").any()
    paths = certificate_tables(tmp_path / "cascade.tsv", frame)
    for path, content in paths.items():
        path.write_bytes(content)
    table, samples = read_certificates(tmp_path / "cascade.tsv"), read_samples(tmp_path / "cascade.samples.tsv")
    pd.testing.assert_frame_equal(table.join(samples.drop(columns="idx")), frame, check_exact=True, check_dtype=False)


def test_files_are_the_same_for_any_batches_order_and_number_of_images_at_once():
    frame, rule = outcomes("sequential", "margin", "label-aware", True)
    files = certificate_tables(Path("cascade.tsv"), frame)
    for batch_size, at_once, step in ((40, 1, 1), (1000, 3, -1), (7, None, -1)):
        classifier = make(THRESHOLDS, True, batch_size=batch_size)
        states = classifier.image_states(IMAGES, frame["label"].tolist(), range(5, 21), rule)
        for _ in classifier.certify_stream(states[::step], rule, at_once=at_once):
            pass
        assert certificate_tables(Path("cascade.tsv"), cascade_frame(states, rule, CLASSES)) == files


def test_a_path_is_shown_with_its_sigmas():
    frame, _ = outcomes("sequential", "binary", "label-aware", False)
    certified = frame[frame["path"] != ""]
    assert len(certified) > 3 and (certified["path"].str.startswith(tuple(map(str, SIGMAS)))).all()
    assert (frame.loc[frame["path"] == "", "radius"] == 0).all()
    for row in frame.itertuples():
        by_sigma = dict(cell.split("=") for cell in row.samples_by_sigma.split(" "))
        assert list(by_sigma) == ["0.1", "0.25", "0.5"] and sum(map(int, by_sigma.values())) == row.samples


COUNTS = st.dictionaries(st.integers(0, 2000).map(str), st.integers(1, 10**6), min_size=1, max_size=8)
LOOK = st.tuples(st.integers(0, 2), st.integers(1, 10**6), COUNTS).map(list)


@given(st.lists(st.one_of(st.just({}), COUNTS), min_size=3, max_size=3).filter(any), st.lists(LOOK, max_size=5))
@settings(deadline=None)
def test_votes_read_back_as_written(selection: list, votes: list):
    for sigmas in (SIGMAS, (0.1, 0.1000001, 1e-7 + 1)):
        assert parse_selection(selection_text(selection, sigmas), sigmas) == selection
        assert parse_votes(votes_text(votes, sigmas), sigmas) == votes


@pytest.mark.parametrize(
    "text", ["", "3:5", "0.5=3", "0.5=", "0.50=3:5", "0.7=3:5", "0.1=3:5 0.5=3:5", "0.5=3:5 0.5=3:5", "0.5=8:3,3:97"]
)
def test_a_selection_has_one_spelling(text: str):
    with pytest.raises(ValueError, match=r"selection .*: must be votes of some sigmas by class"):
        parse_selection(text, SIGMAS)


@pytest.mark.parametrize("text", [" ", "0.5/100", "0.5/100=", "0.7/100=3:98", "0.5/0100=3:98", "0.5/9=3:9 ", "9=3:9"])
def test_votes_have_one_spelling(text: str):
    with pytest.raises(ValueError, match=r"votes .*: must be votes by class at looks of some sigmas"):
        parse_votes(text, SIGMAS)


def one_more(look: list) -> None:
    look[2][max(look[2], key=look[2].get)] += 1


def moved_to_a_class_there_is_not(look: list) -> None:
    look[2][str(CLASSES + 1)] = look[2].pop(max(look[2], key=look[2].get))


IMPOSSIBLE: dict[str, tuple[Callable[[list], object], str]] = {
    "all forgotten": (lambda votes: votes.clear(), "votes end before the stopping rule stops: "),
    "the last forgotten": (lambda votes: votes.pop(), "votes end before the stopping rule stops: "),
    "the last twice": (lambda votes: votes.append(votes[-1]), "sampling has stopped before ("),
    "one vote more": (lambda votes: one_more(votes[-1]), "samples: are "),
    "between two looks": (lambda votes: votes[-1].__setitem__(1, votes[-1][1] - 1), "were not asked for"),
    "of another class": (lambda votes: moved_to_a_class_there_is_not(votes[-1]), "must be votes by class, for "),
    "at another scale": (lambda votes: votes[-1].__setitem__(0, (votes[-1][0] + 1) % 3), "were not asked for"),
}


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_impossible_votes_are_refused_in_words(change: str):
    frame, rule = outcomes("sequential", "binary", "label-aware", False)
    forge, problem = IMPOSSIBLE[change]
    row = frame[frame["votes"].str.count("=") > 1].iloc[[0]]
    votes = parse_votes(row["votes"].iloc[0], SIGMAS)
    forge(votes)
    with pytest.raises(RRCMError) as error:
        recompute_cascade(row.assign(votes=votes_text(votes, SIGMAS)), rule, CLASSES, labelled=True)
    assert str(error.value).startswith(f"image {row['idx'].iloc[0]}: ") and problem in str(error.value)


@pytest.mark.parametrize(
    ("selection", "problem"),
    [
        ("0.5=0:49", "49 selection votes at sigma 0.5: must be 50"),
        ("0.25=0:50", "0 selection votes at sigma 0.5: must be 50"),
        ("0.5=0:50 0.1=0:50", "the selection has votes at a sigma that was not asked"),
        ("0.5=9:50", "the selection at sigma 0.5: must be votes by class, for 5 classes at most"),
        ("0.5=4:50 0.25=4:50 0.1=4:50", "the selection at sigma 0.1: must be votes by class, for 4 classes"),
    ],
)
def test_impossible_selections_are_refused_in_words(selection: str, problem: str):
    _, rule = outcomes("sequential", "binary", "label-aware", False)
    frame = pd.DataFrame({"idx": [7], "label": [0], "selection": [selection], "votes": [""]})
    with pytest.raises(RRCMError, match=f"^image 7: {problem}"):
        recompute_cascade(frame, rule, CLASSES, labelled=True)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("3\t0\tfutile\t\t\t0.5=0:50\t", "idx 3, samples 0: must be at least 0 and 1"),
        ("3\t9\tbored\t\t\t0.5=0:50\t", "stop_reason 'bored': must be all samples or "),
        ("3\t9\tfutile", "has 3 tab-separated fields, must have 7"),
    ],
)
def test_malformed_samples_name_file_and_line(tmp_path: Path, row: str, problem: str):
    path = tmp_path / "cascade.samples.tsv"
    path.write_text("\t".join(CASCADE_SAMPLES + VOTES) + f"\n{row}\n")
    with pytest.raises(RRCMError) as error:
        read_samples(path)
    assert str(error.value).startswith(f"{path}, line 2: ") and problem in str(error.value)


# Records


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A certificate file of a cascade, with its samples and its record."""
    path, (frame, _) = tmp_path / "cascade.tsv", outcomes("sequential", "margin", "label-aware", True)
    tables = certificate_tables(path, frame)
    record = make_cascade_record(
        make(THRESHOLDS, True),
        250,
        tables,
        models=[{"kind": "classifier", "sha256": digit * 64} for digit in "abc"],
        data={"sha256": "0" * 64, "split": "test"},
        image_size=2,
        labelled=True,
        compile=False,
        stopping="sequential",
        bound="margin",
        certificates="label-aware",
        chosen={"by": {"0.5": 1.0}, "n": 1000, "images": 100, "score": 0.75},
        **SETTINGS,
    )
    for each, content in (tables | {record_path(path): record_bytes(record)}).items():
        each.write_bytes(content)
    return path


def test_a_record_has_everything_that_decides(written: Path):
    record = read_record(record_path(written))
    assert isinstance(record, CascadeRecord) and record_bytes(record) == record_path(written).read_bytes()
    assert (tuple(record.sigmas), tuple(record.thresholds)) == (SIGMAS, THRESHOLDS) and record.can_pass
    assert record.num_outputs == [CLASSES, CLASSES + 1, CLASSES + 1] and record.chosen.by == {"0.5": 1.0}
    _, rule = outcomes("sequential", "margin", "label-aware", True)
    assert repr(record.rule()) == repr(rule)


def test_one_line_of_python_gives_every_radius(written: Path):
    frame = read_certificates(written)
    pd.testing.assert_frame_equal(rrcm.recompute_radii(written), frame[["idx", "predict", "radius"]], check_exact=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"thresholds": [0.0]}, "thresholds: 1 for 3 sigmas; must be 2, one for each sigma but the smallest"),
        ({"sigmas": [0.5, 0.25, 0.1]}, "sigmas = [0.5, 0.25, 0.1]: must increase, above 0 and finite, in pixel units"),
        ({"models": []}, "models: List should have at least 1 item"),
        ({"models": [{"kind": "a", "sha256": "a" * 64}] * 2}, "2 models for 3 sigmas"),
        ({"certificates": "best of three"}, "certificates: Input should be 'label-aware' or 'multi-scale'"),
        ({"sigma": 0.5}, "sigma: Extra inputs are not permitted"),
    ],
)
def test_damaged_records_are_named(written: Path, change: dict, problem: str):
    path = record_path(written)
    write_json(path, read_json(path) | change)
    with pytest.raises(RRCMError) as error:
        read_record(path)
    assert str(error.value).startswith(f"{path}: ") and problem in str(error.value)
    assert str(error.value).endswith("it is no record of a certification: certify again")


def test_samples_of_the_other_kind_are_refused(written: Path):
    lines = [f"{index}\t100\tfutile\t100\t-1\t0\t-1\t0\t3:9\t" for index in read_certificates(written)["idx"]]
    written.with_suffix(".samples.tsv").write_text("\n".join(["\t".join(SAMPLES + VOTES), *lines, ""]))
    with pytest.raises(RRCMError, match="only one of the record and the samples file is of a cascade"):
        rrcm.recompute_radii(written)
