"""`rrcm audit`: honest certificate files are verified on any machine, and each kind of forgery is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, change_model, files_of
from safetensors.torch import load_file, save_file

from rrcm.certification.audit import audit_file, check_file, find_inputs, verdict
from rrcm.certification.flips import measure_flips
from rrcm.certification.record import read_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables, samples_path
from rrcm.certification.revote import Settings
from rrcm.certification.votes import parse_votes, recompute, votes_text
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, sha256_file, sha256_folder, write_json

NAME = "certificates/rrcm/sigma_0.5.tsv"
MODEL = "models/rrcm/sigma_0.5"


@pytest.fixture
def result(trained: Path, tmp_path: Path) -> Path:
    """A published result with one certified model, which a test may forge."""
    for name in ("certificates", MODEL):
        shutil.copytree(trained / name, tmp_path / name)
    shutil.copytree(trained / "data/shards", tmp_path / "shards")
    torch.set_num_threads(1)  # as the stages of the tests do
    return tmp_path


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the flip rate of this machine quickly. Its upper bound is the higher for that."""
    monkeypatch.setattr("rrcm.certification.audit.SAMPLES_HERE", 1000)


def audit(result: Path, **options: object):
    return audit_file(result / NAME, str(result / MODEL), result / "shards", **options)


def forge(result: Path, change: Callable[[pd.DataFrame], pd.DataFrame], *, follow: bool = True) -> None:
    """Change the tables, and with `follow` let all columns follow from the votes. The record is made to fit."""
    path = result / NAME
    record, frame, problems = check_file(path)
    assert not problems
    frame = change(frame)
    if follow:
        frame = recompute(frame, record.rule(), record.num_classes, labelled=True)
    for file, content in certificate_tables(path, frame).items():
        file.write_bytes(content)
    seal(result)


def seal(result: Path, **entries: object) -> None:
    """Make the hashes in the record fit the tables, and change other entries."""
    path = result / NAME
    record = read_json(record_path(path))
    files = {name: sha256_file(path.with_name(name)) for name in record["files"]}
    write_json(record_path(path), record | {"files": files} | entries)


@pytest.mark.thorough
def test_an_honest_file_is_verified_vote_by_vote(result: Path):
    before = files_of(result)
    found = audit(result, rows=20, seed=1)
    assert not found.problems and found.exact and (found.rows, found.audited, found.moved) == (36, 20, 0)
    assert found.detectable == 6 / 36  # all lie among the 16 others with 16! 30! / (10! 36!) < 1 %, and five with more
    assert files_of(result) == before


OTHERWISE = {
    "float32": Settings(precision="fp32"),
    "bfloat16": Settings(precision="bf16"),
}
FURTHER = {"small batches": Settings(batch_size=100), "threads": Settings(threads=2)}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, id=name) for name, each in OTHERWISE.items()]
    + [pytest.param(each, id=name, marks=pytest.mark.thorough) for name, each in FURTHER.items()],
)
def test_an_honest_file_is_verified_with_other_rounding(result: Path, settings: Settings):
    """The flip rate is measured here, as none is published."""
    published = read_record(record_path(result / NAME))
    found = audit(result, settings=settings)
    same = settings.precision == published.precision and not settings.threads
    assert not found.problems and found.audited == 36 and found.exact == same
    assert same or found.notes == (
        f"no flip rate is published for {settings.precision or published.precision}; it was measured here",
    )


def raise_radii(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(radius=(frame["radius"] + 0.05 * (frame["radius"] > 0)).round(2))


def raise_votes(frame: pd.DataFrame) -> pd.DataFrame:
    """All votes since the look before the last become votes for the class, in the row where that moves most votes."""
    forged = []
    for row in frame[(frame["stop_reason"] == "all samples") & (frame["radius"] > 0)].itertuples():
        looks, top = parse_votes(row.votes), str(row.predict)
        before, (drawn, last) = list(looks.values())[-2], list(looks.items())[-1]
        moved = sum(last[k] - before.get(k, 0) for k in last.keys() - {top})
        votes = votes_text(looks | {drawn: before | {top: last[top] + moved}})
        forged.append((moved, row.Index, votes))
    moved, row, votes = max(forged)
    assert moved > 20
    frame.loc[row, "votes"] = votes
    return frame


def test_radii_that_were_raised_are_named(result: Path):
    path = result / NAME
    lines = path.read_text().splitlines()
    fields = next(line.split("\t") for line in lines[1:] if float(line.split("\t")[3]) > 0)
    claim = "\t".join([*fields[:3], str(round(float(fields[3]) + 0.01, 2)), *fields[4:]])
    path.write_text(path.read_text().replace("\t".join(fields), claim))
    (problem, other) = audit(result).problems
    assert problem == f"{path}: is not the file that sigma_0.5.json describes"
    assert other == f"{path}: image {fields[0]}: radius is {claim.split(chr(9))[3]}, but its votes give {fields[3]}"
    seal(result)
    assert audit(result).problems == [other]


def test_many_raised_radii_are_counted(result: Path):
    forge(result, raise_radii, follow=False)
    found = audit(result)
    assert (
        len(found.problems) == 4 and "radius is" in found.problems[0] and "more lines like that" in found.problems[-1]
    )
    assert found.audited == 0 and verdict(result / NAME, found, 1.0).startswith("NOT verified: ")


@pytest.mark.parametrize("settings", [Settings(), Settings(batch_size=100)])
def test_radii_and_votes_that_were_raised_together_are_found(result: Path, settings: Settings):
    forge(result, raise_votes)
    assert not check_file(result / NAME)[2]
    (problem,) = [p for p in audit(result, settings=settings).problems if "image" in p]
    assert "votes differ when counted again" in problem


def change_weights(result: Path) -> None:
    path = result / MODEL / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("head.weight") or "head" in name)
    save_file(tensors | {name: tensors[name].roll(1, 0)}, path)
    change_model(result / MODEL)


def test_another_model_is_found(result: Path):
    change_weights(result)
    assert audit(result).problems == [f"{result / MODEL}: is not the model that was certified"]
    model = read_json(record_path(result / NAME))["model"] | {"sha256": sha256_folder(result / MODEL)}
    seal(result, model=model)
    for settings in (Settings(), Settings(batch_size=100)):
        problems = audit(result, rows=10, settings=settings).problems
        assert problems and all("differ when counted again" in p or "more lines" in p for p in problems)


def test_votes_of_another_seed_are_found(result: Path):
    seal(result, seed=1)
    for settings in (Settings(), Settings(batch_size=100)):
        problems = audit(result, rows=10, settings=settings).problems
        assert problems and all("differ when counted again" in p or "more lines" in p for p in problems)


def test_a_row_that_was_left_out_is_found(result: Path):
    forge(result, lambda frame: frame.iloc[:-1])
    assert audit(result).problems == [f"{result / NAME}: has other images than every = 10 and the limits choose"]


def test_labels_that_were_changed_are_found(result: Path):
    change = {"sequential": {"stopping": "sequential"}}["sequential"]
    forge(
        result,
        lambda frame: frame.assign(label=frame["label"].where(frame["stop_reason"] != "wrong class", 0)),
        follow=False,
    )
    assert change and any("label" in p or "votes" in p for p in audit(result).problems)


def test_other_images_are_found(result: Path):
    seal(result, data=read_json(record_path(result / NAME))["data"] | {"sha256": "0" * 64})
    assert audit(result).problems == [f"{result / 'shards'}: its images are not those that were certified"]
    shard = next((result / "shards").rglob("*test*.tar"))
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert any(str(shard) in p for p in audit(result).problems)


@pytest.mark.thorough
def test_a_published_flip_rate_is_measured_and_checked(result: Path):
    path = result / NAME
    flips = measure_flips(path, str(result / MODEL), result / "shards", samples=1000, device="cpu")
    record = read_record(record_path(path))
    assert set(flips) == {"fp32", "bf16"} and {each.samples for each in flips["fp32"]} == {1000}
    assert [each.against for each in flips[record.precision]] == ["batch 100, 2 threads", "AVX2"]
    record_path(path).write_bytes(record_bytes(record.model_copy(update={"flips": flips})))
    found = audit(result, settings=Settings(batch_size=100))
    assert not found.problems and not found.notes and found.moved <= 10
    many = {name: [each.model_copy(update={"flips": 250}) for each in measured] for name, measured in flips.items()}
    record_path(path).write_bytes(record_bytes(record.model_copy(update={"flips": many})))
    (problem,) = audit(result, settings=Settings(batch_size=100)).problems
    assert problem.startswith(f"{record_path(path)}: publishes a flip rate above 0.") and "on this machine" in problem


@pytest.mark.parametrize("damage", ["no record", "no samples", "no json", "more keys", "another format"])
def test_damaged_files_are_named(result: Path, damage: str):
    path = result / NAME
    record = read_json(record_path(path))
    match damage:
        case "no record":
            record_path(path).unlink()
        case "no samples":
            samples_path(path).unlink()
        case "no json":
            record_path(path).write_text("{")
        case "more keys":
            write_json(record_path(path), record | {"more": 1})
        case "another format":
            write_json(record_path(path), record | {"format": 2})
    with pytest.raises((RRCMError, FileNotFoundError)) as error:
        audit(result)
    assert "sigma_0.5." in str(error.value)


def command(result: Path, *options: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "rrcm.cli", "audit", NAME, *options]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "HOME": "/nonexistent",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(line, cwd=result, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_the_command_finds_model_and_images_and_writes_nothing(result: Path):
    before = files_of(result)
    for folder in [result, *(path for path in result.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    answer = command(result, "--rows", "9", "--seed", "3")
    for folder in [result, *(path for path in result.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    assert answer.returncode == 0, answer.stderr
    start = f"verified: {NAME}, 36 of 36 radii follow from their votes, 9 voted again as published: equal (would "
    assert answer.stdout.startswith(start) and answer.stdout.count("\n") == 1
    assert "rows are chosen with --seed 3" in answer.stderr and files_of(result) == before


@pytest.mark.thorough
def test_the_command_fails_for_anything_but_verified(result: Path):
    seal(result, seed=1)
    answer = command(result, "--all")
    assert answer.returncode == 1 and answer.stdout.startswith(f"NOT verified: {NAME}: ")
    assert answer.stderr.count("votes differ when counted again") == 3
    shutil.rmtree(result / "models")
    answer = command(result)
    assert answer.returncode == 1 and answer.stderr.endswith("give --model\n") and not answer.stdout


def test_inputs_of_a_result_are_found(result: Path):
    assert find_inputs(result / NAME, None, None) == ([str(result / MODEL)], result / "shards")
    (result / "data").mkdir()
    (result / "shards").rename(result / "data/shards")
    assert find_inputs(result / NAME, ["other"], None) == (["other"], result / "data/shards")
    shutil.rmtree(result / "data")
    with pytest.raises(RRCMError, match=r"no such folders with the images of .*; give --images"):
        find_inputs(result / NAME, None, None)


def test_the_record_explains_the_file(result: Path):
    record = json.loads(record_path(result / NAME).read_text())
    assert record["model"] == {"kind": "classifier", "sha256": sha256_folder(result / MODEL)}
    assert (record["sigma"], record["seed"], record["batch_size"], record["n"]) == (0.5, 0, 200, 1000)
    assert set(record["files"]) == {"sigma_0.5.tsv", "sigma_0.5.samples.tsv"}
    assert record["environment"]["hardware"]["threads"] == 1 and record["flips"] is None


def test_a_record_of_an_earlier_version_has_no_consensus(result: Path):
    """Such a record has the entry `consensus`: null, or a number, in which case the votes belong to another model."""
    path = record_path(result / NAME)
    record, entries = read_record(path), json.loads(path.read_text())
    path.write_text(json.dumps(entries | {"consensus": None}))
    assert read_record(path) == record and "consensus" not in json.loads(record_bytes(record))
    path.write_text(json.dumps(entries | {"consensus": 2}))
    with pytest.raises(RRCMError, match=r"was certified with consensus 2, which is no longer supported; .* again$"):
        read_record(path)
