"""Ensembles of the pipeline: their members, their records, and kills."""

import shutil

import pandas as pd
import pytest
from conftest import change, exit_codes, files_of, kill_when, stage, start_all
from safetensors.torch import load_file

from rrcm.certification.results import read_certificates
from rrcm.config import load_config
from rrcm.models.load import load_model_folder
from rrcm.training.ensemble import add_compute
from rrcm.training.finetune import finetune
from rrcm.training.plan import Files, plan_training
from rrcm.utils.files import read_json
from rrcm.utils.rng import derive_seed

FOLDER = "models/consistency_ensemble/sigma_0.5"


@pytest.fixture
def ensemble(project):
    """A project with an ensemble of three, trained for two epochs."""
    change(project, methods=["consistency_ensemble"], finetune__epochs=2, pretrain__objectives=[])
    answer = stage(project, "finetune", "consistency_ensemble", "0.5")
    assert answer.returncode == 0, answer.stderr
    return project


def test_members_share_the_pre_training_that_they_start_from():
    member = {"finetune": 2.0, "pretrain_share": 5.0, "soft_label_share": 1.0}
    assert add_compute([member] * 3) == {"finetune": 6.0, "pretrain_share": 5.0, "soft_label_share": 1.0}


@pytest.mark.thorough
def test_members_are_trainings_of_their_own_and_the_folder_says_so(ensemble, tmp_path, monkeypatch):
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "other-runs"))
    monkeypatch.chdir(tmp_path)
    config, folder = load_config(ensemble / "params.yaml"), ensemble / FOLDER
    seeds = [derive_seed(config.seed, "member", number) % 2**31 for number in range(3)]
    records = [read_json(folder / f"member_{number}/config.json") for number in range(3)]
    assert [record["seed"] for record in records] == seeds and len({config.seed, *seeds}) == 4
    heads = [load_file(folder / f"member_{number}/model.safetensors")["head.bias"] for number in range(3)]
    assert not any(heads[i].equal(heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    alone = config.model_copy(update={"seed": seeds[1]})
    files = Files(ensemble / "data/shards", tmp_path, tmp_path / "alone", tmp_path / "time.json")
    finetune(plan_training(alone, "consistency", 0.5, files))
    weights = [path / "model.safetensors" for path in (tmp_path / "alone", folder / "member_1")]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # a training of `consistency` with that seed

    described = read_json(folder / "config.json")
    assert described["compute"] == {
        "finetune": 3 * records[0]["compute"]["finetune"],
        "pretrain_share": 0.0,
        "soft_label_share": 0.0,
    }
    assert described["parameters"] == 3 * records[0]["parameters"] and described["selected"]["val_accuracy"] > 0.1
    history = pd.read_csv(folder / "history.csv")
    losses = [pd.read_csv(folder / f"member_{number}/history.csv")["loss"] for number in range(3)]
    assert history["epoch"].tolist() == [1, 2] and history["loss"].tolist() == pytest.approx(sum(losses) / 3)
    timing = read_json(ensemble / "timings/finetune/consistency_ensemble/sigma_0.5.json")
    assert timing["seconds"] * timing["images_per_second"] == pytest.approx(3 * 2 * 10 * 128, rel=1e-3)
    assert not list(ensemble.glob("runs/*-0.5-*"))


@pytest.mark.thorough
def test_kills_in_any_member_change_no_byte(ensemble):
    expected = files_of(ensemble / FOLDER)
    shutil.rmtree(ensemble / "models")
    for wanted in ("finetune-consistency_ensemble-0.5-*/*.safetensors", "ensemble-consistency_ensemble-0.5-*/member_1"):
        kill_when(ensemble, f"runs/{wanted}", "finetune", "consistency_ensemble", "0.5")
        assert not (ensemble / "models").exists()
    answer = stage(ensemble, "finetune", "consistency_ensemble", "0.5")
    assert answer.returncode == 0 and "member 1 of 3" not in answer.stderr, answer.stderr
    assert files_of(ensemble / FOLDER) == expected


@pytest.mark.thorough
def test_two_processes_train_the_members_that_a_killed_one_has_left(ensemble):
    """One process has finished the first member; the other two agree with a run of one process up to rounding."""
    expected = [load_file(ensemble / FOLDER / f"member_{number}/model.safetensors") for number in range(3)]
    shutil.rmtree(ensemble / "models")
    first = "runs/ensemble-consistency_ensemble-0.5-*/member_0.json"
    kill_when(ensemble, first, "finetune", "consistency_ensemble", "0.5")
    assert exit_codes(start_all(ensemble, "finetune", ["consistency_ensemble", "0.5"], 2)) == [0, 0]
    for number, weights in enumerate(expected):
        found = load_file(ensemble / FOLDER / f"member_{number}/model.safetensors")
        for name, value in weights.items():
            assert (found[name] - value).norm() <= 0.02 * value.norm() * (number > 0), name


@pytest.mark.thorough
def test_an_ensemble_is_certified_attacked_and_timed_like_any_other_model(ensemble):
    change(ensemble, attack__methods=["consistency_ensemble"], attack__max_images=4, sigmas=[0.5])
    for command in (["certify", "consistency_ensemble", "0.5"], ["latency"], ["attack", "consistency_ensemble"]):
        answer = stage(ensemble, *command)
        assert answer.returncode == 0, answer.stderr
    frame = read_certificates(ensemble / "certificates/consistency_ensemble/sigma_0.5.tsv")
    assert frame["correct"].mean() > 0.2
    assert load_model_folder(ensemble / FOLDER).num_classes == 10
