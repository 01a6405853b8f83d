"""Joint trainings of the pipeline: one model folder for all sigmas, its certificates, kills and processes."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import change, exit_codes, files_of, kill_when, make_project, stage, start_all
from safetensors.torch import load_file
from torch import nn

from rrcm.certification.audit import audit_file, find_inputs
from rrcm.certification.results import read_certificates
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.soft_labels import write_votes
from rrcm.models.load import load_base_classifier
from rrcm.training.finetune import WrappedClassifier
from rrcm.training.validation import JointValidation, NoisyValidation
from rrcm.utils.distributed import DistEnv
from rrcm.utils.files import read_json
from rrcm.utils.pixels import to_unit_range

SIGMAS = [0.25, 0.5, 1.0]
CPU = torch.device("cpu")


def succeed(answer) -> None:
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def joint(tmp_path_factory, tiny_shards, trained) -> Path:
    """A project with a joint rRCM that is certified at three sigmas, shared by all tests; do not change it."""
    overrides = ["sigmas=[0.25,0.5,1.0]", "methods=[rrcm,rrcm_joint_third]", "finetune.joint_interval=[0.2,1.1]"]
    folder = make_project(tmp_path_factory.mktemp("joint"), tiny_shards, *overrides)
    (folder / "models/pretrain").mkdir(parents=True)
    (folder / "models/pretrain/rrcm").symlink_to(trained / "models/pretrain/rrcm")
    succeed(stage(folder, "finetune", "rrcm_joint_third", "joint"))
    for sigma in SIGMAS:
        succeed(stage(folder, "certify", "rrcm_joint_third", str(sigma)))
    return folder


def test_one_folder_says_what_it_covers_and_what_it_cost(joint):
    config = read_json(joint / "models/rrcm_joint_third/joint/config.json")
    assert config["kind"] == "classifier" and not {"sigma", "t"} & config.keys()
    assert config["joint"] == {"sigmas": SIGMAS, "interval": [0.2, 1.1]}
    assert config["compute"] == {
        "finetune": 6 * 6 * 128 * (1294 // 128),  # as one expert
        "pretrain_share": 12 * 64 * 30,  # the shares of three
        "soft_label_share": 0.0,
    }
    history = pd.read_csv(joint / "models/rrcm_joint_third/joint/history.csv")
    best = history.loc[history["val_accuracy"].idxmax()]
    assert config["selected"] == {"epoch": best["epoch"], "val_accuracy": pytest.approx(best["val_accuracy"])}
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert (joint / "timings/finetune/rrcm_joint_third/joint.json").exists()


def test_the_weights_are_selected_by_the_mean_accuracy_over_the_sigmas(joint):
    config = load_config(joint / "params.yaml")
    folder = joint / "models/rrcm_joint_third/joint"
    pixels, labels, _ = read_split(ShardedDataset(joint / "data/shards", "val"), 8)
    env = DistEnv(0, 1, CPU)
    each = [NoisyValidation(pixels, labels, sigma, config.seed, "fp32", env) for sigma in SIGMAS]
    accuracies = [
        one(load_base_classifier(folder, sigma=sigma).classifier) for one, sigma in zip(each, SIGMAS, strict=True)
    ]
    selected = read_json(folder / "config.json")["selected"]["val_accuracy"]
    assert selected == pytest.approx(sum(accuracies) / 3) and accuracies[0] > accuracies[2]
    validation = JointValidation(each)
    classifier = load_base_classifier(folder, sigma=0.37).classifier
    assert validation(classifier) == pytest.approx(selected) and classifier.sigma == 0.37
    assert validation.chance == each[0].chance


@pytest.mark.parametrize("sigma", SIGMAS)
def test_each_sigma_has_its_certificates(joint, sigma):
    """Those of the network that is conditioned on this sigma."""
    settings = load_config(joint / "params.yaml").certify
    frame = read_certificates(joint / f"certificates/rrcm_joint_third/sigma_{sigma}.tsv")
    classifier = load_base_classifier(joint / "models/rrcm_joint_third/joint", sigma=sigma).classifier
    pixels, labels, indices = read_split(ShardedDataset(joint / "data/shards", "test"), 8, settings.every)
    smoothed = SmoothedClassifier(classifier, sigma, 10, batch_size=200, precision=settings.precision)
    answers = smoothed.certify(to_unit_range(pixels), labels, indices=indices, **settings.rule)
    assert frame["radius"].tolist() == pytest.approx([answer.radius for answer in answers])
    assert frame["predict"].tolist() == [answer.prediction for answer in answers]
    assert read_json(joint / f"certificates/rrcm_joint_third/sigma_{sigma}.json")["sigma"] == sigma


def test_its_certificates_can_be_audited_timed_and_attacked(joint, tmp_path):
    certificates = joint / "certificates/rrcm_joint_third/sigma_1.0.tsv"
    models, images = find_inputs(certificates, None, None)
    assert models == [str(joint / "models/rrcm_joint_third/joint")]
    assert audit_file(certificates, models, images, rows=5, seed=0).problems == []
    folder = Path(shutil.copytree(joint, tmp_path / "attacked", symlinks=True))
    own = {"steps": 2, "num_noise": 2, "n": 100, "max_images": 4, "methods": ["rrcm_joint_third"], "batch_size": 8}
    change(folder, methods=["rrcm_joint_third"], attack=own, report__radii=[0.0, 0.25], latency__rounds=1)
    succeed(stage(folder, "latency"))
    assert read_json(folder / "timings/latency.json")["methods"]["rrcm_joint_third"]["passes"]["classifier"] == 1
    succeed(stage(folder, "attack", "rrcm_joint_third"))
    summary = read_json(folder / "attack/rrcm_joint_third/summary.json")
    assert {"sigma_0.25", "sigma_0.5", "sigma_1.0"} <= summary.keys() and summary["broken"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "soft"),
    [("smoothadv_joint", False), ("smoothmix_joint_third", False), ("cat_rs_joint_third", True)],
)
def test_objectives_with_attacks_train_jointly(project, tiny_shards, method, soft):
    methods = ["gaussian", method]
    change(project, methods=methods, pretrain__objectives=[], finetune__epochs=1, finetune__warmup_epochs=0)
    own = {"finetune__objectives__smoothadv__attack_warmup_epochs": 1}
    change(project, **own, finetune__objectives__smoothmix__mix_warmup_epochs=1)
    change(project, finetune__objectives__cat_rs__attack_radius={"default": 1.0, "sigma_0.5": 0.0})
    if soft:
        images = ShardedDataset(tiny_shards, "train")
        votes = nn.functional.one_hot(torch.from_numpy(images.labels.copy()), 10) * 9 + 1
        write_votes(project / "data/soft_labels.safetensors", votes, images)
    succeed(stage(project, "finetune", method, "joint"))
    config = read_json(project / f"models/{method}/joint/config.json")
    assert config["joint"] == {"sigmas": [0.25, 0.5], "interval": None}
    if soft:
        assert config["training"]["attack_radius"] == [1.0, 0.0]


@pytest.mark.thorough
def test_a_joint_ensemble_and_a_network_without_condition(project):
    settings = {"finetune__epochs": 1, "finetune__warmup_epochs": 0, "pretrain__objectives": []}
    change(project, methods=["consistency_ensemble_joint_third"], finetune__ensemble_members=2, **settings)
    succeed(stage(project, "finetune", "consistency_ensemble_joint_third", "joint"))
    ensemble = project / "models/consistency_ensemble_joint_third/joint"
    assert load_base_classifier(ensemble, sigma=0.3).classifier.members[1].t == 0.6
    assert read_json(ensemble / "config.json")["selected"]["val_accuracy"] > 0
    succeed(stage(project, "certify", "consistency_ensemble_joint_third", "0.5"))
    change(project, methods=["consistency_joint"], model__architecture="resnet18", finetune__layer_decay=1.0)
    change(project, finetune__batch_size=512)
    succeed(stage(project, "finetune", "consistency_joint", "joint"))
    network = load_base_classifier(project / "models/consistency_joint/joint", sigma=0.3)
    assert read_json(project / "models/consistency_joint/joint/config.json")["kind"] == "network"
    assert network.sigma == 0.3 and network.classifier(torch.rand(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.thorough
def test_a_killed_joint_training_ends_with_the_same_bytes(joint, tmp_path, tiny_shards, trained):
    folder = shutil.copytree(joint, tmp_path / "again", symlinks=True)
    expected = files_of(folder / "models/rrcm_joint_third")
    shutil.rmtree(folder / "models/rrcm_joint_third")
    kill_when(
        folder, "runs/finetune-rrcm_joint_third-joint-*/[0-9]*.safetensors", "finetune", "rrcm_joint_third", "joint"
    )
    answer = stage(folder, "finetune", "rrcm_joint_third", "joint")
    succeed(answer)
    assert "resuming" in answer.stderr and files_of(folder / "models/rrcm_joint_third") == expected


@pytest.mark.thorough
def test_two_processes_train_like_one(project):
    """A short training agrees to 2e-3, since sums are in another order."""
    change(project, methods=["smoothadv_joint_third"], pretrain__objectives=[], finetune__epochs=1)
    change(project, finetune__warmup_epochs=0, finetune__weights_dtype="fp32", finetune__joint_interval=[0.2, 0.8])
    change(project, finetune__objectives__smoothadv__attack_warmup_epochs=1)
    weights = []
    for world in (1, 2):
        arguments = ["smoothadv_joint_third", "joint", "--models", f"models-{world}"]
        assert exit_codes(start_all(project, "finetune", arguments, world)) == [0] * world
        weights.append(load_file(project / f"models-{world}/smoothadv_joint_third/joint/model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-3, rtol=0, msg=name)


def test_a_training_tells_the_network_the_noise_of_each_image(joint):
    """In chunks as well, and frozen for an attack."""
    classifier = load_base_classifier(joint / "models/rrcm_joint_third/joint", sigma=0.5).classifier
    noisy, t = torch.rand(6, 1, 8, 8), torch.linspace(0.4, 2.2, 6)
    expected = torch.cat([classifier.at(float(each) / 2)(row[None]) for each, row in zip(t, noisy, strict=True)])
    trainer = type("Trainer", (), {"wrap_ddp": lambda self, x: x, "autocast": lambda self: torch.no_grad()})()
    for num_chunks in (1, 3):
        for frozen in (False, True):
            found = WrappedClassifier(classifier, trainer, num_chunks)(noisy, frozen=frozen, t=t)
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", ["0.5", "all"])
def test_a_joint_method_has_no_training_at_one_sigma(project, sigma):
    change(project, methods=["rrcm_joint"])
    answer = stage(project, "finetune", "rrcm_joint", sigma)
    said = {"0.5": "rrcm_joint at sigma 0.5: not in params.yaml", "all": "sigma = 'all': must be a number, or joint"}
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1 and said[sigma] in answer.stderr
