"""The stage certify-cascade: its thresholds, certificates and records, killed processes and many processes."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import Answer, change, exit_codes, files_of, stage, start, start_all
from numpy.testing import assert_array_equal

from rrcm import CascadedClassifier, choose_thresholds
from rrcm.certification.noise import PREDICT
from rrcm.certification.recompute import recompute_radii
from rrcm.certification.record import read_record
from rrcm.certification.results import read_certificates, read_samples
from rrcm.certification.split_votes import is_possible_votes, vote_stream
from rrcm.certification.validation_votes import (
    choose_by_votes,
    new_validation_states,
    read_votes_table,
    votes_table,
)
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder
from rrcm.utils.errors import RRCMError


@pytest.fixture
def copied(cascaded, tmp_path) -> Path:
    """A copy of the project without certificates, where a test may do as it likes."""
    ignored = shutil.ignore_patterns("certificates", "timings", "runs")
    return Path(shutil.copytree(cascaded, tmp_path / "copy", symlinks=True, ignore=ignored))


def finished(answer: Answer) -> None:
    assert answer.returncode == 0, answer.stderr


def load_cascade(folder: Path, thresholds: list[float], **options: object) -> CascadedClassifier:
    models = [load_model_folder(folder / f"models/rrcm/sigma_{sigma}").classifier for sigma in (0.25, 0.5)]
    options = {"batch_size": 200, "precision": "auto"} | options
    return CascadedClassifier(models, [0.25, 0.5], thresholds, 10, **options)


@pytest.mark.parametrize(("name", "certificates"), [("cascade", "label-aware"), ("multi_scale", "multi-scale")])
def test_the_stage_certifies_as_the_library_does(cascaded, name, certificates):
    path = cascaded / f"certificates/rrcm/{name}.tsv"
    record, frame = read_record(path.with_suffix(".json")), read_certificates(path)
    cascade = load_cascade(cascaded, record.thresholds)
    pixels, labels, indices = read_split(ShardedDataset(cascaded / "data/shards", "test"), 8, every=10)
    step = load_config(cascaded / "params.yaml").certify.radius_step
    settings = {"n": 1000, "radius_step": step, "certificates": certificates}
    answers = cascade.certify(pixels.float() / 255, labels, indices=indices, **settings)
    assert frame["idx"].tolist() == indices == list(range(0, 360, 10))
    assert frame["predict"].tolist() == [answer.prediction for answer in answers]
    assert frame["radius"].tolist() == [answer.radius for answer in answers] and frame["radius"].max() > 0
    assert read_samples(path.with_suffix(".samples.tsv"))["samples"].tolist() == [each.samples for each in answers]
    assert recompute_radii(path)["radius"].equals(frame["radius"])
    assert (record.certificates, len(record.models), record.labelled) == (certificates, 2, True)
    assert set(record.files) == {f"{name}.tsv", f"{name}.samples.tsv", "thresholds.tsv"}


def test_thresholds_are_chosen_on_the_validation_images(cascaded):
    images, record = ShardedDataset(cascaded / "data/shards", "val"), read_record_of(cascaded)
    pixels, labels, indices = read_split(images, 8)
    votes = load_cascade(cascaded, [0.0]).votes(pixels.float() / 255, 40, indices=indices)
    thresholds, score = choose_thresholds(votes, labels, [0.25, 0.5], n=1000)
    assert record.thresholds == list(thresholds) and record.chosen.score == score
    assert (record.chosen.by, record.chosen.n, record.chosen.images) == ("acr", 40, len(images))
    table = read_votes_table(cascaded / "certificates/rrcm/thresholds.tsv", [0.25, 0.5], 40)
    assert [state.label for state in table] == labels.tolist()
    for state, expected in zip(table, votes, strict=True):
        found = [[each.get(str(c), 0) for c in range(10)] for each in state.votes]
        assert_array_equal(found, expected)
    again, chosen = choose_by_votes(table, load_config(cascaded / "params.yaml"), 10)
    assert list(again) == record.thresholds and chosen == record.chosen.model_dump()


def read_record_of(folder: Path, method: str = "rrcm"):
    return read_record(folder / f"certificates/{method}/cascade.json")


def test_the_timings_cover_each_file(cascaded):
    timing = json.loads((cascaded / "timings/certify_cascade/rrcm.json").read_text())
    for name, costs in (("cascade", timing), ("multi_scale", timing["multi_scale"])):
        samples = read_samples(cascaded / f"certificates/rrcm/{name}.samples.tsv")
        assert costs["samples"] == samples["samples"].sum()
        assert list(costs["seconds_by_image"]) == [str(idx) for idx in samples["idx"]]
        assert sum(costs["seconds_by_image"].values()) == pytest.approx(costs["seconds"]) and costs["seconds"] > 0
    validation = len(ShardedDataset(cascaded / "data/shards", "val"))
    assert timing["thresholds"]["samples"] == 2 * 40 * validation and timing["thresholds"]["seconds"] > 0


def test_a_joint_model_serves_all_sigmas(copied):
    finished(stage(copied, "certify_cascade", "rrcm_joint"))
    record = read_record_of(copied, "rrcm_joint")
    assert len(record.models) == 1 and record.sigmas == [0.25, 0.5] and not record.can_pass
    assert recompute_radii(copied / "certificates/rrcm_joint/cascade.tsv")["radius"].max() > 0


def test_thresholds_may_be_given_and_the_published_rule_left_out(cascaded, copied):
    """Files of an earlier run with other settings are deleted."""
    shutil.copytree(cascaded / "certificates", copied / "certificates", ignore=shutil.ignore_patterns("sigma*"))
    change(copied, cascade__thresholds=[-0.1], cascade__multi_scale=False)
    finished(stage(copied, "certify_cascade", "rrcm"))
    assert set(files_of(copied / "certificates/rrcm")) == {"cascade.tsv", "cascade.samples.tsv", "cascade.json"}
    record = read_record_of(copied)
    assert (record.thresholds, record.chosen) == ([-0.1], None)
    timing = json.loads((copied / "timings/certify_cascade/rrcm.json").read_text())
    assert not {"multi_scale", "thresholds"} & set(timing)


def test_thresholds_follow_the_weights_of_the_radii(cascaded, copied):
    change(copied, cascade__choose_by={0.1: 2, 0.3: 1.0}, cascade__multi_scale=False)
    finished(stage(copied, "certify_cascade", "rrcm"))
    record, file = read_record_of(copied), "certificates/rrcm/thresholds.tsv"
    assert (copied / file).read_bytes() == (cascaded / file).read_bytes()
    states = read_votes_table(copied / file, [0.25, 0.5], 40)
    votes = [[[each.get(str(c), 0) for c in range(10)] for each in state.votes] for state in states]
    labels, weights = [state.label for state in states], {0.1: 2, 0.3: 1}
    thresholds, score = choose_thresholds(votes, labels, [0.25, 0.5], n=1000, weights=weights)
    assert (record.thresholds, record.chosen.score) == (list(thresholds), score) and 0 < score < 3
    assert record.chosen.by == {"0.1": 2.0, "0.3": 1.0}


def test_a_fixed_number_of_samples(copied):
    change(copied, certify__stopping="fixed", certify__bound="margin", certify__every=40)
    finished(stage(copied, "certify_cascade", "rrcm"))
    for name in ("cascade", "multi_scale"):
        path = copied / f"certificates/rrcm/{name}.tsv"
        assert recompute_radii(path)["radius"].equals(read_certificates(path)["radius"])


def test_two_processes_write_the_same_bytes(copied, cascaded):
    assert exit_codes(start_all(copied, "certify_cascade", ["rrcm"], 2)) == [0, 0]
    assert files_of(copied / "certificates/rrcm") == cascade_files(cascaded)


def cascade_files(folder: Path) -> dict[str, bytes]:
    """The files that the stage writes for rrcm, without those of single sigmas."""
    return {name: file for name, file in files_of(folder / "certificates/rrcm").items() if "sigma" not in name}


def kill_at(folder: Path, name: str, lines: int, processes: list) -> None:
    """SIGKILL the processes when the journals of this part have this many lines."""
    while sum(path.read_text().count("\n") for path in folder.glob(f"runs/{name}-*/journal-*.txt")) < lines:
        assert any(process.is_alive() for process in processes), "it was done before it could be killed"
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.thorough
def test_killed_in_each_part_on_any_number_of_processes(copied, cascaded):
    begin = partial(start, copied, "certify_cascade", "rrcm")
    kill_at(copied, "thresholds", 20, [begin()])
    kill_at(copied, "thresholds", 60, start_all(copied, "certify_cascade", ["rrcm"], 2))
    kill_at(copied, "certify-label-aware", 20, [begin()])
    kill_at(copied, "certify-multi-scale", 20, start_all(copied, "certify_cascade", ["rrcm"], 2))
    assert not (copied / "certificates").exists()
    finished(stage(copied, "certify_cascade", "rrcm"))
    assert files_of(copied / "certificates/rrcm") == cascade_files(cascaded)
    assert not list((copied / "runs").glob("*"))


def test_the_votes_do_not_depend_on_how_images_are_grouped(cascaded):
    images, scales = ShardedDataset(cascaded / "data/shards", "val"), load_cascade(cascaded, [0.0]).scales
    states = [new_validation_states(images)[:7] for _ in range(2)]
    for some, at_once in zip(states, (None, 2), strict=True):
        groups = list(vote_stream(scales, images, PREDICT, 30, 8, iter(some), at_once=at_once))
        assert all(len(group) <= (at_once or 7) for group in groups)
    assert votes_table(states[0], [0.25, 0.5]) == votes_table(states[1], [0.25, 0.5])
    saved = [vars(state) for state in states[0]]
    possible = {"n": 30, "outputs": [10, 11]}
    assert all(is_possible_votes(each, **possible) for each in saved)
    wrong = {"samples": [59, 60.0], "stop_reason": [""], "seconds": [-1.0, None]}
    wrong["votes"] = [[], None, [{"0": 30}], [{"0": 30}, {"11": 30}], [{"10": 30}, {"0": 30}], [{"0": 31}, {"0": 29}]]
    for name, values in wrong.items():
        assert not any(is_possible_votes(saved[0] | {name: value}, **possible) for value in values), name
    assert is_possible_votes(saved[0] | {"votes": [{"0": 30}, {"10": 30}]}, **possible)  # "pass"


@pytest.mark.parametrize(
    "content",
    [
        "idx\tlabel\n0\t1\n",
        "idx\tlabel\tvotes\n0\tx\t0.5=0:40 0.25=0:40\n",
        "idx\tlabel\tvotes\n0\t1\t0.7=0:40 0.25=0:40\n",
        "idx\tlabel\tvotes\n0\t1\t0.25=0:40\n",
        "idx\tlabel\tvotes\n0\t1\t0.5=0:40 0.25=0:39\n",
        "",
    ],
)
def test_a_damaged_file_of_votes_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "thresholds.tsv"
    path.write_text(content)
    with pytest.raises(RRCMError) as error:
        read_votes_table(path, [0.25, 0.5], 40)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_models_are_named_in_one_line(copied):
    shutil.rmtree(copied / "models/rrcm/sigma_0.25")
    answer = stage(copied, "certify_cascade", "rrcm")
    assert answer.returncode == 1 and "models/rrcm/sigma_0.25" in answer.stderr and "Traceback" not in answer.stderr
    assert "no such method" in stage(copied, "certify_cascade", "nope").stderr
