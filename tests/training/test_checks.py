"""What is known before training is said before training: one line with the key, its value and the bound."""

import json

import pytest
import torch
from conftest import change, stage

from rrcm.config import load_config
from rrcm.methods import METHODS, Method
from rrcm.models import FOLDER_LOADERS, TRAINED_CLASSIFIERS
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.training.checks import check_before_training
from rrcm.utils.errors import RRCMError

TRAINING_IMAGES = 1295


def complaint(project):
    with pytest.raises(RRCMError) as caught:
        check_before_training(load_config(project / "params.yaml"), project / "data/shards")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_good_settings_pass_without_a_network(project, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "__init__", None)
    check_before_training(load_config(project / "params.yaml"), project / "data/shards")


@pytest.mark.parametrize("key", ["initial_weights", "timm__weights"])
def test_weights_that_an_experiment_leaves_behind(project, tmp_path, monkeypatch, key):
    """DVC copies what git or DVC has. It misses the weights itself, but says no more than that, and later."""
    change(project, **{f"finetune__{key}": "weights/file"})
    (project / "weights").mkdir()
    (project / "weights/file").touch()
    copy = project / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    name = key.replace("__", ".")
    assert complaint(project).startswith(f"finetune.{name} = 'weights/file': is not in the copy of the repository that")
    assert complaint(project).endswith("--copy-paths weights/file")


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        (
            {"pretrain__objectives": ["rrcm", "rcm"]},
            "pretrain.objectives.1 = 'rcm': no such objective; did you mean rrcm?",
        ),
        (
            {"pretrain__lr": {"default": 1e-3, "mocov3": 1e-3}},
            "pretrain.lr.mocov3: no such objective; did you mean moco_v3?",
        ),
        ({"pretrain__batch_size": 2048}, f"pretrain.batch_size = 2048: must be at most {TRAINING_IMAGES}, the number"),
        ({"pretrain__num_chunks": 65}, "pretrain.num_chunks = 65: must be at most 64, as pretrain.batch_size = 64"),
        (
            {"finetune__batch_size": {"default": 32, "sigma_0.5": 2048}},
            f"finetune.batch_size = 2048 (rrcm at sigma 0.5): must be at most {TRAINING_IMAGES}, the number",
        ),
        (
            {"finetune__batch_size": {"default": 32, "scratch": 2048}},
            f"finetune.batch_size = 2048 (gaussian_matched at sigma 0.25): must be at most {TRAINING_IMAGES}",
        ),
        (
            {"finetune__mixup": 0.8, "finetune__batch_size": 34, "finetune__steps_per_batch": "num_noise"},
            "finetune.batch_size = 17, a part of 34 (rrcm at sigma 0.25): must be",
        ),
        (
            {"finetune__mixup": 0.8, "finetune__batch_size": 33},
            "finetune.batch_size = 33 (rrcm at sigma 0.25): must be",
        ),
        (
            {"finetune__cutmix": {"default": 0, "sigma_0.5": 1}, "finetune__batch_size": 9},
            "at sigma 0.5): must be a mul",
        ),
        ({"finetune__num_chunks": 129}, "finetune.num_chunks = 129: must be at most 128, as finetune.batch_size = 128"),
        (
            {"finetune__initial_weights": "nowhere"},
            "finetune.initial_weights = 'nowhere': no such folder or file",
        ),
        (
            {"data__image_size": 16},
            "data.image_size = 16: the shards were written with 8; correct it, or run shard-data",
        ),
        ({"data__channels": 3}, "data.channels = 3: the shards were written with 1"),
        (
            {"methods": ["dds"], "denoiser__public": "nowhere"},
            "denoiser.public = 'nowhere': no such file or folder; a model on the hub is hf-hub:owner/name",
        ),
        ({"methods": ["dds"], "denoised__model": "nowhere"}, "nowhere: no such folder or file, and"),
        ({"methods": ["dds"], "denoiser__batch_size": 2048}, "denoiser.batch_size = 2048: must be at most 1295"),
        (
            {"methods": ["densepure"], "certify__compile": True},
            "certify.compile = True: densepure is stochastic and cannot be compiled; set it to false",
        ),
        (
            {"methods": ["rrcm", "rrcm_joint", "distill"], "student__architecture": "lenett"},
            "student.architecture = 'lenett': must be vit, lenet, resnet110 or a timm name; ",
        ),
        ({"data__source": "cifar10"}, "data.source = cifar10: the shards were written with digits"),
        ({"certify__radius_step": 1e-6, "report__radii": [0.0]}, "certify.radius_step = 1e-06: gives"),
        ({"certify__n": 2**31}, "certify.n = 2147483648: must be a whole number of samples"),
        ({"latency__n": [100, 2**31]}, "latency.n = 2147483648: must be"),
        ({"attack__methods": ["rrcm"], "attack__n": 2**31}, "attack.n = 2147483648: must be"),
        (
            {"report__external_results": [{"label": "Cohen", "sigma": 0.5, "path": "external/cohen.tsv"}]},
            "report.external_results.0: external/cohen.tsv: no such file",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data_or_each_other(project, monkeypatch, change_of, said):
    monkeypatch.chdir(project)
    change(project, **change_of)
    assert said in complaint(project)


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        ({}, "pretrain.batch_size = 64: must be a multiple of 3, the number of processes"),
        ({"pretrain__batch_size": 63}, "finetune.batch_size = 128 (rrcm at sigma 0.25): must be a multiple of 3"),
        (
            {"pretrain__batch_size": 63, "finetune__batch_size": 9, "finetune__mixup": 0.8},
            "finetune.batch_size = 9 (rrcm at sigma 0.25): must be a multiple of 6, as mixup pairs",
        ),
        ({"pretrain__batch_size": 63, "pretrain__num_chunks": 22}, "pretrain.num_chunks = 22: must be at most 21"),
    ],
)
def test_batches_are_shared_by_the_processes(project, monkeypatch, change_of, said):
    monkeypatch.setenv("WORLD_SIZE", "3")
    change(project, **change_of)
    assert said in complaint(project)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"classes": ["cat"]}, "data/shards/manifest.json: not a shard manifest (classes: List should have at least 2"),
        ({"val": None}, "data.source = digits: has 0 val images; must have 2 or more"),
        ({"val": 1}, "data.source = digits: has 1 val images; must have 2 or more"),
        ({"test": None}, "data.source = digits: has 0 test images; must have 1 or more"),
    ],
)
def test_data_sets_with_which_no_model_can_be_trained(project, part, said):
    manifest = json.loads((project / "data/shards/manifest.json").read_text())
    (project / "data/shards").unlink()
    (project / "data/shards").mkdir()
    for name, value in part.items():
        if name == "classes":
            manifest["classes"] = value
        elif value is None:
            del manifest["splits"][name]
        else:
            manifest["splits"][name]["counts"] = [value] + 9 * [0]
            manifest["splits"][name]["shards"] = [manifest["splits"][name]["shards"][0] | {"samples": value}]
    (project / "data/shards/manifest.json").write_text(json.dumps(manifest))
    assert said in complaint(project)


def test_a_stochastic_classifier_cannot_be_compiled(project, monkeypatch):
    stochastic = type("Jittered", (NoiseConditionedClassifier,), {"stochastic": True})
    row = Method(None, "gaussian", "jittered", "#123456", "Jittered", family="noise")
    monkeypatch.setitem(METHODS, "jittered", row)
    monkeypatch.setitem(TRAINED_CLASSIFIERS, "jittered", stochastic)
    monkeypatch.setitem(FOLDER_LOADERS, "jittered", FOLDER_LOADERS["classifier"])
    change(project, methods=["jittered"], certify__compile=True)
    assert "certify.compile = True: jittered is stochastic and cannot be compiled" in complaint(project)


@pytest.mark.slow
@pytest.mark.parametrize("command", [("pretrain", "rrcm"), ("finetune", "gaussian_matched", "0.25")])
def test_a_stage_fails_before_it_starts(project, command):
    """For a setting of another training, which runs hours later."""
    change(project, finetune__batch_size={"default": 32, "sigma_0.5": 2048})
    answer = stage(project, *command)
    assert answer.returncode == 1 and answer.stderr.startswith("error: finetune.batch_size = 2048 (rrcm at sigma 0.5)")
    assert len(answer.stderr.splitlines()) == 1
    assert not (project / "models").exists() and not (project / "runs").exists()
