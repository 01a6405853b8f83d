"""`make publish` freezes a finished run, refuses any other, and overwrites a published result only on request."""

import re
from pathlib import Path

import pytest
from conftest import change, commit, files_of, run_in, stage

from rrcm.certification.record import read_record
from rrcm.config import load_config
from rrcm.publication import freeze
from rrcm.publication.freeze import publish, run_files, with_test_images
from rrcm.publication.objects import folder_md5, tracked_md5
from rrcm.publication.readme import BEGIN, END, check_readme
from rrcm.publication.result import Result, hash_files
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json

UNFINISHED = "stages:\n  late:\n    cmd: python stages/late.py\n    outs: [late.json]\n"


@pytest.mark.thorough
def test_all_files_of_a_run_are_frozen_with_their_hashes(honest):
    result = Result(honest, "tiny", 0)
    record = result.read()
    assert record.files == hash_files(result.folder) and len(record.files) > 30
    for name in (
        "params.yaml",
        "report/report.md",
        "report/index.html",
        "run/certificates/rrcm/sigma_0.5.json",
        "run/timings/pretrain/rrcm.json",
    ):
        assert name in record.files
    assert {"run/models/rrcm/sigma_0.5/model.safetensors", "run/data/shards/test-00000.tar"} <= record.files.keys()
    assert "run/models/pretrain/rrcm/model.safetensors" not in record.files
    assert "run/data/shards/train-00000.tar" not in record.files
    for name, content in files_of(result.folder / "run").items():
        if name != "certificates/rrcm/sigma_0.5.json":  # it has the flip rates
            assert content == (honest / name).read_bytes()
    before, after = (
        read_record(folder / "certificates/rrcm/sigma_0.5.json") for folder in (honest, result.folder / "run")
    )
    assert before.flips is None and set(after.flips) == {"fp32", "bf16"}
    assert after.model_copy(update={"flips": None}) == before


def test_provenance_comes_from_the_stages(honest):
    record = Result(honest, "tiny", 0).read()
    assert record.is_clean and record.commits == ["1111111"] and record.models == ["rrcm"]
    assert set(record.stages) == {"pretrain", "finetune", "certify"}
    timing = read_json(honest / "timings/certify/rrcm/sigma_0.5.json")
    certify = record.stages["certify"]
    assert certify.seconds == timing["seconds"] and certify.precisions == [timing["dtype"]]
    (environment,) = certify.environments
    assert environment.model_dump(mode="json") == timing["environment"]


@pytest.mark.thorough
def test_git_tracks_the_report_and_dvc_the_run(honest):
    tracked = run_in(honest, "git", "ls-files", "results").split()
    assert {"results/tiny/seed_0/result.json", "results/tiny/seed_0/run.dvc"} <= set(tracked)
    assert "results/tiny/seed_0/report/best_sigma.csv" in tracked and not [name for name in tracked if "/run/" in name]
    assert run_in(honest, "git", "status", "--porcelain") == ""


def test_a_published_result_is_overwritten_only_with_replace(repository):
    before = files_of(repository / "results")
    answer = stage(repository, "publish", "tiny")
    assert answer.returncode == 1 and answer.stderr == (
        "error: results/tiny/seed_0: is published already; choose another NAME, or replace it with --replace\n"
    )
    assert files_of(repository / "results") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Tiny"], "error: Tiny: must be letters a to z, digits and underscores; choose another NAME"),
        (["new", "--models", "dds"], "error: dds: is not in this run; the run has rrcm"),
        (["new", "--models", "rcm"], "error: rcm: no method; the run has rrcm"),
    ],
)
def test_wrong_names_are_refused(repository, options, message):
    answer = stage(repository, "publish", *options)
    assert answer.returncode == 1 and answer.stderr.startswith(message)
    assert not (repository / "results/new").exists()


def test_an_unfinished_run_is_refused(repository):
    (repository / "dvc.yaml").write_text(UNFINISHED)
    with pytest.raises(
        RRCMError, match=r"not finished, 1 stages are not up to date: late \(.*late.json.*\); run `make"
    ):
        publish(repository, "new")
    assert not (repository / "results/new").exists()


def test_uncommitted_code_is_refused(repository):
    (repository / "stages").mkdir()
    (repository / "stages/more.py").touch()
    with pytest.raises(RRCMError, match=r"stages/more\.py: not committed; commit, or publish with --dirty"):
        publish(repository, "new")
    (repository / "stages/more.py").unlink()
    path = repository / "timings/certify/rrcm/sigma_0.5.json"
    record = read_json(path)
    record["environment"]["git"]["dirty"] = True
    write_json(path, record)
    with pytest.raises(RRCMError, match="certify: ran from code that was not committed; run them again, or publish"):
        publish(repository, "new")
    assert not (repository / "results/new/seed_0").exists()


@pytest.mark.thorough
def test_dirty_code_is_recorded_and_a_replaced_result_is_complete(repository, monkeypatch):
    monkeypatch.setattr(freeze, "add_flips", lambda *_: None)  # it takes long
    (repository / "stages").mkdir()
    (repository / "stages/more.py").touch()
    result = freeze.publish(repository, "tiny", replace=True, dirty=True)
    record = result.read()
    assert record.code.dirty and not record.is_clean
    assert record.files == hash_files(result.folder) and tracked_md5(result) == folder_md5(result.folder / "run")


@pytest.mark.thorough
def test_the_command_publishes_and_updates_the_readme(repository):
    (repository / "README.md").write_text(f"{BEGIN}{END}\n")
    commit(repository)
    answer = stage(repository, "publish", "tiny", "--replace", "--models", "rrcm")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("published: results/tiny/seed_0; now run: git add")
    assert check_readme(repository) == []
    (repository / "results/readme.csv").write_text("label,result,method,model,sigma\nx,other,rrcm,,\n")
    answer = stage(repository, "publish", "new")
    assert "note: README.md stays as it is until other of results/readme.csv are published" in answer.stderr


def test_chosen_networks_are_included_with_all_their_parts(repository):
    """The parts of a model are included too, even if they are in other folders."""
    config = load_config(repository / "params.yaml")
    weights = "models/rrcm/sigma_0.5/model.safetensors"
    assert weights in run_files(config, repository, ["rrcm"])
    assert weights not in run_files(config, repository, [])
    assert "models/pretrain/rrcm/model.safetensors" not in run_files(config, repository, config.methods)
    assert "models/rrcm/sigma_0.5/history.csv" in run_files(config, repository, [])
    (repository / "models/part").mkdir()
    write_json(repository / "models/part/config.json", {})
    path = repository / "models/rrcm/sigma_0.5/config.json"
    write_json(path, read_json(path) | {"members": [{"path": "../../part"}]})
    assert "models/part/config.json" in run_files(config, repository, ["rrcm"])
    write_json(path, read_json(path) | {"members": [{"path": "../../../part"}]})
    with pytest.raises(RRCMError, match="its part part lies outside models/"):
        run_files(config, repository, ["rrcm"])


def test_external_parts_have_no_folder():
    config = {"parts": {"denoiser": {"path": "../../denoiser"}, "classifier": {"model": "resnet18"}}}
    assert list(freeze._part_paths(config)) == ["../../denoiser"]
    assert list(freeze._part_paths({"kind": "vit"})) == []


def test_large_test_images_come_from_the_working_copy(repository, monkeypatch, capsys):
    monkeypatch.setattr(freeze, "MAX_TEST_BYTES", 1000)
    config = load_config(repository / "params.yaml")
    files = run_files(config, repository, ["rrcm"])
    assert "data/shards/manifest.json" in files and not any(re.search(r"test[-.]", name) for name in files)
    assert "the test images are too large to be published" in capsys.readouterr().err
    record = Result(repository, "tiny", 0).read()
    monkeypatch.setattr(freeze, "add_flips", lambda *_: None)
    freeze.freeze(config, repository, repository / "frozen", record)
    assert (repository / "frozen/report/gallery.png").exists()
    assert not (repository / "frozen/run/data/shards/test.index.npy").exists()
    run = repository / "results/tiny/seed_0/run"
    for path in (run / "data/shards").glob("test*"):
        path.unlink()
    with with_test_images(repository, run) as complete:
        assert (complete / "data/shards/test-00000.tar").exists() and (complete / "models/rrcm").is_dir()
    Path(repository / "data/shards").unlink()
    with (
        pytest.raises(RRCMError, match="test images are not published and not here; make them"),
        with_test_images(repository, run),
    ):
        pass


def test_a_run_with_models_of_another_seed_is_refused(repository):
    change(repository, seed=7)
    with pytest.raises(RRCMError, match=r"config.json: seed differs from the settings"):
        publish(repository, "tiny")  # the models are of seed 0
