"""A published result with a cascade: its files are frozen, verified and compared, and each forgery is named."""

import shutil
from pathlib import Path

import pytest
from conftest import change, commit, finish_run

from rrcm.certification.record import read_record, record_bytes
from rrcm.certification.results import read_certificates
from rrcm.config import load_config
from rrcm.publication import freeze
from rrcm.publication.compare import compare_with_published
from rrcm.publication.readme import write_readme
from rrcm.publication.result import Result, certificate_files
from rrcm.publication.verify import check_certificates, verify_result
from rrcm.utils.files import sha256_file

pytestmark = pytest.mark.thorough
SETTINGS = {"sigmas": [0.25, 0.5], "cascade__methods": ["rrcm"]}


@pytest.fixture(scope="module")
def published(cascaded, tmp_path_factory) -> Path:
    """A repository with the published and committed result tiny; do not change it."""
    folder = finish_run(cascaded, tmp_path_factory.mktemp("published"), **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freeze, "add_flips", lambda *_: None)  # it takes minutes; test_cascade_audit.py measures flips
        freeze.publish(folder, "tiny")
    write_readme(folder)
    commit(folder)
    return folder


@pytest.fixture
def run(cascaded, tmp_path) -> Path:
    """The files of the run, which a test may change."""
    for name in ("models", "certificates", "timings", "params.yaml"):
        (shutil.copytree if (cascaded / name).is_dir() else shutil.copy)(cascaded / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to(cascaded / "data/shards")
    change(tmp_path, methods=["rrcm"], **SETTINGS)
    return tmp_path


def test_a_result_with_a_cascade_is_verified(published):
    verdict = verify_result(Result(published, "tiny", 0), None, seed=0)
    assert not verdict.problems and (verdict.rows, verdict.files, verdict.audited) == (4 * 36, 4, 4 * 36)
    record = Result(published, "tiny", 0).read()
    assert record.stages["certify_cascade"].seconds > 0
    for name in ("thresholds.tsv", "cascade.json", "multi_scale.samples.tsv"):
        assert f"run/certificates/rrcm/{name}" in record.files


def test_a_run_is_compared_with_the_published_cascade(published):
    assert compare_with_published(published).startswith("Every certificate equals the one in results/tiny/seed_0")
    path = published / "certificates/rrcm/cascade.tsv"
    before, frame = path.read_text(), read_certificates(path)
    try:
        frame["radius"] = 0.0
        frame.to_csv(path, sep="\t", index=False, lineterminator="\n")
        text = compare_with_published(published)
    finally:
        path.write_text(before)
    assert "3 of 18 figures differ" in text and "rRCM, cascade, ACR: 0.000, published" in text
    assert "rRCM, ACR" not in text


def problems_of(run: Path) -> list[str]:
    config = load_config(run / "params.yaml")
    files = certificate_files(config, ["rrcm"])
    return [problem for file in files for problem in check_certificates(config, run, file, True)]


def change_record(run: Path, **entries: object) -> None:
    """Change the record of the cascade, with hashes that fit."""
    path = run / "certificates/rrcm/cascade.json"
    record = read_record(path)
    files = {name: sha256_file(path.with_name(name)) for name in record.files}
    path.write_bytes(record_bytes(record.model_copy(update={"files": files} | entries)))


def test_an_honest_run_has_no_problems(run):
    assert problems_of(run) == []


def test_other_thresholds_than_the_votes_choose_are_found(run):
    change_record(run, thresholds=[0.123])
    assert any(
        "cascade.json: thresholds is [0.123], by settings, model and data it is" in each for each in problems_of(run)
    )


def test_a_better_score_is_found(run):
    chosen = read_record(run / "certificates/rrcm/cascade.json").chosen
    change_record(run, chosen=chosen.model_copy(update={"score": 2.0}))
    assert any("cascade.json: chosen is" in each for each in problems_of(run))


def test_forged_votes_for_thresholds_are_found(run):
    path = run / "certificates/rrcm/thresholds.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], ""]))
    assert any("thresholds.tsv: is not the file that cascade.json describes" in each for each in problems_of(run))
    change_record(run)
    assert any("thresholds.tsv: has other images than" in each for each in problems_of(run))


def test_another_model_and_other_settings_are_found(run):
    change(run, cascade__thresholds=[0.0])
    assert sum("chosen is" in each or "thresholds is" in each for each in problems_of(run)) >= 2
    path = run / "models/rrcm/sigma_0.25/history.csv"
    path.write_text(path.read_text() + "\n")
    assert sum("model.sha256 is" in each for each in problems_of(run)) == 3
