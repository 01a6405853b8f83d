"""`make verify` accepts an honest result on any machine, and names each forgery.

The forgers here also correct all hashes and commit, so the change itself has to be found.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, change, change_model, commit, in_own_mounts, stage, write_certificates

from rrcm.certification.flips import AVX2
from rrcm.certification.record import read_record, record_bytes
from rrcm.certification.results import read_certificates, samples_path
from rrcm.config import load_config
from rrcm.data import datasets
from rrcm.data.sharding import write_shards
from rrcm.publication.objects import folder_md5, tracked_md5
from rrcm.publication.result import Result, hash_files
from rrcm.publication.verify import check_repository, compare_folders, compare_images, verify_result
from rrcm.report.build import write_report
from rrcm.utils.files import sha256_file, sha256_folder, write_json
from rrcm.utils.tensors import load_tensors, save_tensors

CERTIFICATES = "run/certificates/rrcm/sigma_0.5.tsv"
MODEL = "run/models/rrcm/sigma_0.5"
VERDICT = re.compile(
    r"verified: results/tiny/seed_0, 36 rows in 1 files, 5 voted again: equal \(would detect \d+\.\d% forged rows with "
    r"99 %\), computed by 1111111 \(clean\), tree ([0-9a-f]{7} \(clean\)|without git), \d+ s\n"
)


@pytest.fixture
def result(repository) -> Result:
    return Result(repository, "tiny", 0)


@pytest.fixture
def same_report(monkeypatch) -> None:
    """Take the report for the published one. To draw it again takes most of the time of `verify_result`."""
    monkeypatch.setattr("rrcm.publication.verify.check_report", lambda *_: [])


@pytest.fixture
def same_votes(monkeypatch) -> None:
    """Neither vote again nor make the test images again, which takes seconds."""
    for check in ("vote_again", "check_images"):
        monkeypatch.setattr(f"rrcm.publication.verify.{check}", lambda *_: [])


def problems_of(result: Result, rows: int | None = 3) -> list[str]:
    return verify_result(result, rows, seed=0, shared=check_repository(result.root)).problems


def rehash(result: Result) -> None:
    """Correct all hashes, for git and for DVC, and commit."""
    path = result.folder / CERTIFICATES
    record = read_record(path.with_suffix(".json"))
    files = {name: sha256_file(path.with_name(name)) for name in record.files}
    path.with_suffix(".json").write_bytes(record_bytes(record.model_copy(update={"files": files})))
    values = result.read().model_dump(mode="json") | {"files": hash_files(result.folder)}
    write_json(result.folder / "result.json", values)
    tracked = result.folder / "run.dvc"
    tracked.write_text(tracked.read_text().replace(tracked_md5(result), folder_md5(result.folder / "run")))
    commit(result.root)


def change_tables(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the certificates and the columns beside them in the same way."""
    frame = change(read_certificates(path))
    write_certificates(path, frame)
    samples = pd.read_csv(samples_path(path), sep="\t", dtype={"selection": str, "votes": str}, keep_default_na=False)
    for bound in ("binary", "margin"):
        samples[f"{bound}_radius"] = np.where(samples[f"{bound}_radius"] > 0, frame["radius"], 0.0)
    samples.to_csv(samples_path(path), sep="\t", index=False, lineterminator="\n")


@pytest.mark.thorough
def test_an_honest_result_is_verified_by_the_command(repository):
    before = (repository / "results/tiny/seed_0/run.dvc").read_bytes()
    answer = stage(repository, "verify", "tiny", "--rows", "5", "--seed", "1")
    assert answer.returncode == 0 and VERDICT.fullmatch(answer.stdout), answer.stdout + answer.stderr
    assert "vote again on 5 of 36 rows, in about" in answer.stderr and "--seed 1" in answer.stderr
    assert (repository / "results/tiny/seed_0/run.dvc").read_bytes() == before


@pytest.mark.usefixtures("same_report")
def test_an_audit_of_all_rows_finds_any_forged_row(result):
    verdict = verify_result(result, None, seed=0)
    assert not verdict.problems and verdict.audited == verdict.rows == 36
    assert verdict.share == pytest.approx(1 / 36)


@pytest.mark.thorough
def test_a_read_only_archive_without_git_is_verified_from_the_objects(repository):
    for name in (".git", ".dvc/cache", "results/tiny/seed_0/run"):
        shutil.rmtree(repository / name)
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" || exit 77; cd "$1"; shift; exec "$@"'
    command = [sys.executable, str(REPOSITORY / "stages/verify.py"), "--rows", "5"]
    answer = in_own_mounts(script, repository, *command)
    assert answer.returncode == 0 and VERDICT.fullmatch(answer.stdout), answer.stdout + answer.stderr


@pytest.mark.thorough
def test_an_honest_result_is_verified_on_another_type_of_machine(repository):
    """On a CPU without AVX-512 and bfloat16, vote counts may differ by rounding."""
    command = [sys.executable, str(REPOSITORY / "stages/verify.py"), "--all", "--seed", "1"]
    answer = subprocess.run(command, cwd=repository, env=os.environ | AVX2, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    if "voted again: equal" not in answer.stdout:  # or this machine is of that type itself
        assert re.search(r"36 voted again: \d+ of [\d,]+ votes differ, as rounding explains \(would", answer.stdout)


def test_unknown_names_and_an_empty_repository_are_refused(repository):
    answer = stage(repository, "verify", "other")
    assert (answer.returncode, answer.stderr) == (1, "error: results/other: no such result; published are tiny\n")
    shutil.rmtree(repository / "results/tiny")
    answer = stage(repository, "verify")
    assert answer.returncode == 1 and answer.stderr.startswith("error: results/: nothing is published here")


@pytest.mark.thorough  # test_pipeline.py has the same, of a whole run
def test_the_exit_status_shows_a_forgery(repository):
    path = repository / "README.md"
    path.write_text(path.read_text().replace("| tiny, rRCM | ", "| tiny, rRCM | 1"))
    answer = stage(repository, "verify", "--rows", "1")
    assert answer.returncode == 1 and answer.stdout.startswith("NOT verified: results/tiny/seed_0: 2 problems, listed")
    assert "  README.md, row 'tiny, rRCM', column 'r = 0': has '1" in answer.stderr
    assert "  README.md: is not committed" in answer.stderr and "(dirty)" in answer.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "message"),
    [("report/per_sigma.csv", "was changed"), ("run/models/rrcm/sigma_0.5/model.safetensors", "was changed")],
)
def test_a_changed_byte_of_any_file_is_named(result, name, message):
    path = result.folder / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert any(line.startswith(f"results/tiny/seed_0/{name}: {message}") for line in problems_of(result))


@pytest.mark.thorough
def test_missing_and_extra_files_are_named(result):
    (result.folder / "report/report.md").unlink()
    (result.folder / "run/models/rrcm/more").touch()
    problems = "\n".join(problems_of(result))
    assert "results/tiny/seed_0/report/report.md: is missing" in problems
    assert "results/tiny/seed_0/run/models/rrcm/more: is no file of the result; delete it" in problems


@pytest.mark.usefixtures("same_votes")
def test_a_changed_cell_of_the_report_is_found_despite_matching_hashes(result):
    path = result.folder / "report/best_sigma.md"
    path.write_text(re.sub(r"\d\.\d", "9.9", path.read_text(), count=1))
    rehash(result)
    assert problems_of(result) == [
        "results/tiny/seed_0/report/best_sigma.md: differs when drawn again (with the versions of constraints.txt?)"
    ]


@pytest.mark.thorough
def test_raised_radii_are_found_despite_a_matching_report(result):
    def raised(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(radius=np.where(frame["radius"] > 0, (frame["radius"] + 0.05).round(2), 0.0))

    change_tables(result.folder / CERTIFICATES, raised)
    shutil.rmtree(result.folder / "report")
    write_report(load_config(result.folder / "params.yaml"), result.folder / "run", result.folder / "report")
    rehash(result)
    problems = problems_of(result)
    assert any(
        re.search(rf"{CERTIFICATES}: image \d+: radius is 0.\d+, but its votes give 0.\d+", each) for each in problems
    )


def test_votes_that_the_network_does_not_give_are_found(result):
    """One image gets the votes of another image of its class, so radii, report and hashes match."""
    path = result.folder / CERTIFICATES
    table = pd.read_csv(samples_path(path), sep="\t", dtype=str, keep_default_na=False)
    frame = read_certificates(path)
    best = frame["radius"].idxmax()
    poor = frame[(frame["label"] == frame["label"][best]) & (frame.index != best)]["radius"].idxmin()
    table.loc[poor, table.columns[1:]] = table.loc[best, table.columns[1:]]
    table.to_csv(samples_path(path), sep="\t", index=False, lineterminator="\n")
    frame.loc[poor, ["predict", "radius", "correct"]] = frame.loc[best, ["predict", "radius", "correct"]]
    write_certificates(path, frame)
    rehash(result)
    problems = problems_of(result, rows=None)
    assert any(re.search(rf"image {frame['idx'][poor]}: \d+ of \d+ .*votes differ", each) for each in problems)


@pytest.mark.thorough
@pytest.mark.parametrize("also_record", [False, True])
def test_a_swapped_model_is_found(result, also_record):
    """The forger replaces the network that voted, and corrects its hashes."""
    path = result.folder / MODEL / "model.safetensors"
    save_tensors(path, {name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in load_tensors(path).items()})
    change_model(result.folder / MODEL)
    if also_record:
        path = (result.folder / CERTIFICATES).with_suffix(".json")
        record = read_record(path)
        swapped = record.model.model_copy(update={"sha256": sha256_folder(result.folder / MODEL)})
        path.write_bytes(record_bytes(record.model_copy(update={"model": swapped})))
    rehash(result)
    problems = "\n".join(problems_of(result, rows=None))
    assert ("votes differ" if also_record else "certificates/rrcm/sigma_0.5.json: model.sha256 is") in problems


@pytest.mark.thorough
@pytest.mark.parametrize("also_record", [False, True])
def test_certificates_of_another_seed_are_found(result, trained, tmp_path, also_record):
    shutil.copytree(trained, tmp_path / "seed_1", symlinks=True)
    change(tmp_path / "seed_1", seed=1)
    answer = stage(tmp_path / "seed_1", "certify", "rrcm", "0.5")
    assert answer.returncode == 0, answer.stderr
    for path in (tmp_path / "seed_1/certificates/rrcm").iterdir():
        shutil.copy(path, result.folder / "run/certificates/rrcm")
    path = (result.folder / CERTIFICATES).with_suffix(".json")
    record = read_record(path)
    if also_record:
        path.write_bytes(record_bytes(record.model_copy(update={"seed": 0})))
    rehash(result)
    problems = "\n".join(problems_of(result, rows=None))
    assert (
        "votes differ" if also_record else "sigma_0.5.json: seed is 1, by settings, model and data it is 0"
    ) in problems


@pytest.mark.usefixtures("same_report", "same_votes")
def test_a_dirty_tree_is_named(result):
    (result.root / "rrcm").mkdir()
    (result.root / "rrcm/more.py").touch()
    verdict = verify_result(result, 1, 0, check_repository(result.root))
    assert verdict.problems == ["rrcm/more.py: is not committed; commit it, or restore it with git"]
    assert "(dirty)" in str(verdict) and str(verdict).startswith("NOT verified: results/tiny/seed_0: 1 problem, listed")


@pytest.mark.usefixtures("same_report", "same_votes")
def test_a_result_of_dirty_code_is_not_verified(result):
    values = result.read().model_dump(mode="json")
    values["code"]["dirty"] = True
    write_json(result.folder / "result.json", values)
    commit(result.root)
    assert problems_of(result) == ["results/tiny/seed_0: was computed or published with code that is in no commit"]


@pytest.mark.usefixtures("same_report", "same_votes")
def test_a_commit_that_no_stage_ran_from_is_found(result):
    values = result.read().model_dump(mode="json")
    values["stages"]["certify"]["environments"][0]["git"]["revision"] = "2" * 40
    write_json(result.folder / "result.json", values)
    commit(result.root)
    message = "results/tiny/seed_0/result.json: stages.certify does not follow from run/timings; restore it with git"
    assert problems_of(result) == [message]


@pytest.mark.usefixtures("same_report", "same_votes")
def test_a_result_without_networks_is_not_verified(result):
    values = result.read().model_dump(mode="json") | {"models": []}
    write_json(result.folder / "result.json", values)
    commit(result.root)
    (problem,) = problems_of(result)
    assert "result.json: includes no network, so no row can be voted on again" in problem


@pytest.mark.parametrize(
    ("values", "message"),
    [({"format": "rrcm-result-2"}, "format"), ({"seed": 3}, "is of tiny, seed 3"), ({"models": 5}, "models")],
)
def test_an_invalid_record_is_refused(result, values, message):
    write_json(result.folder / "result.json", result.read().model_dump(mode="json") | values)
    problem = problems_of(result)[-1]
    assert message in problem and "restore it with git, or publish again" in problem and "\n" not in problem


def test_swapped_test_images_are_found(tmp_path, tiny_shards, trained, monkeypatch):
    config = load_config(trained / "params.yaml")
    honest = datasets.DATASETS["digits"](config.data)
    honest.train.images[:] = np.flip(honest.train.images, axis=2)
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda data: honest)
    write_shards(config.data, config.seed, tmp_path / "shards")
    assert compare_images(tiny_shards, tiny_shards) == []
    assert compare_images(tmp_path / "shards", tiny_shards) == [
        "data/shards: test image 0 differs from the one in digits"
    ]


def test_a_change_of_any_byte_or_file_of_the_report_is_found(tmp_path):
    for name in ("published", "drawn"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub/a.png").write_bytes(b"abc")
        (tmp_path / name / "b.md").write_bytes(b"b")
    folders = tmp_path / "published", tmp_path / "drawn"
    assert compare_folders(*folders, "x") == []
    (tmp_path / "published/sub/a.png").write_bytes(b"abd")
    (tmp_path / "published/b.md").unlink()
    (tmp_path / "published/c.csv").write_bytes(b"")
    problems = compare_folders(*folders, "x")
    assert ["x/b.md: is missing" in problems[0], "not drawn" in problems[1], "x/sub/a.png: differs" in problems[2]] == [
        True
    ] * 3
