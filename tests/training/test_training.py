"""The training stages: their outputs, and the settings that the default profile does not use."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, Answer, change, files_of, kill_when, stage
from safetensors.torch import load_file
from torch import nn

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.soft_labels import write_votes
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import load_encoder
from rrcm.models.kinds import load_model_folder
from rrcm.models.vit import NoiseConditionedViT
from rrcm.training.batches import Targets
from rrcm.training.finetune import WrappedClassifier
from rrcm.training.validation import NoisyValidation, warn_if_collapsed
from rrcm.utils.distributed import DistEnv
from rrcm.utils.files import read_json


def succeed(answer: Answer) -> None:
    assert answer.returncode == 0, answer.stderr


def assert_same_weights(folder: Path, other: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_outputs_of_pre_training(trained):
    history = pd.read_csv(trained / "models/pretrain/rrcm/history.csv")
    assert history["step"].tolist() == list(range(3, 31, 3))
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert history["loss"].tolist() == pytest.approx((history["contrastive"] + history["consistency"]).tolist())
    assert history["levels"].iloc[[0, -1]].tolist() == [41, 81] and history["lr"].iloc[-1] < history["lr"].max() / 50
    timing = read_json(trained / "timings/pretrain/rrcm.json")
    assert timing["images_per_second"] > 0 and len(timing["throughput"]) == len(history)
    assert timing["environment"]["software"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert read_json(trained / "models/pretrain/rrcm/config.json")["compute"] == {"pretrain": 12 * 64 * 30}


def test_fine_tuning_starts_from_the_averaged_encoder(trained):
    """Fine-tuned weights stay close to the pre-trained ones; random initial weights would not be."""
    before = load_encoder(trained / "models/pretrain/rrcm").state_dict()
    after = load_model_folder(trained / "models/rrcm/sigma_0.5").classifier.encoder.state_dict()
    name = "blocks.0.attn.qkv.weight"
    cosine = torch.nn.functional.cosine_similarity(before[name].flatten(), after[name].flatten(), dim=0)
    assert cosine > 0.8


def test_fine_tuning_keeps_the_best_epoch(trained):
    config = read_json(trained / "models/rrcm/sigma_0.5/config.json")
    history = pd.read_csv(trained / "models/rrcm/sigma_0.5/history.csv")
    best = history.loc[history["val_accuracy"].idxmax()]
    assert config["selected"] == {"epoch": best["epoch"], "val_accuracy": pytest.approx(best["val_accuracy"])}
    assert config["t"] == 1.0 and config["compute"]["pretrain_share"] == 12 * 64 * 30 / 3
    assert config["compute"]["finetune"] == 6 * 6 * 128 * (1294 // 128)


def test_matched_methods_spend_the_compute_of_rrcm(project, trained):
    (project / "models/pretrain").mkdir(parents=True)
    (project / "models/pretrain/rrcm").symlink_to(trained / "models/pretrain/rrcm")
    change(project, methods=["consistency_matched", "rrcm"], finetune__pretrain_cost_shared_by=1)
    change(project, finetune__epochs=1, finetune__warmup_epochs=0)
    succeed(stage(project, "finetune", "consistency_matched", "0.5"))
    spent = read_json(project / "models/consistency_matched/sigma_0.5/config.json")
    epoch = 6 * 128 * (1294 // 128)
    assert spent["training"]["epochs"] == 1 + round(12 * 64 * 30 / epoch)
    assert spent["compute"] == {
        "finetune": spent["training"]["epochs"] * epoch,
        "pretrain_share": 0.0,
        "soft_label_share": 0.0,
    }


@pytest.mark.slow
def test_equal_passes_end_within_an_epoch(project):
    """SmoothAdv with T = 4 and m = 2 costs 22 passes per image, rRCM's fine-tuning 6 in each of 60 steps."""
    change(project, methods=["smoothadv"], pretrain__objectives=[], finetune__equal_passes=True)
    change(project, finetune__objectives__smoothadv__num_noise=2, finetune__objectives__smoothadv__attack_steps=4)
    succeed(stage(project, "finetune", "smoothadv", "0.5"))
    spent = read_json(project / "models/smoothadv/sigma_0.5/config.json")
    assert spent["compute"]["finetune"] == 16 * 22 * 128  # 60 * 6 / 22 = 16.4 steps
    history = pd.read_csv(project / "models/smoothadv/sigma_0.5/history.csv")
    assert history["epoch"].tolist() == [1, 1.6] and history["val_accuracy"].notna().all()
    assert spent["training"]["epochs"] == 1.6 and spent["selected"]["epoch"] in (1, 1.6)
    assert history["lr"].iloc[-1] < 0.05 * history["lr"].iloc[0]  # the schedule ends with the training


@pytest.mark.thorough
def test_a_step_on_each_part_of_a_batch(project):
    """m steps on the parts of a batch are steps on smaller batches, at the rate of the whole batch."""
    change(project, methods=["consistency"], sigmas=[0.5], pretrain__objectives=[], finetune__epochs=2)
    spent = []
    for name, settings in {
        "parts": {"finetune__batch_size": 128, "finetune__steps_per_batch": "num_noise", "finetune__lr": 5e-3},
        "small": {"finetune__batch_size": 64, "finetune__steps_per_batch": 1, "finetune__lr": 1e-2},
        "whole": {"finetune__batch_size": 128, "finetune__steps_per_batch": 1, "finetune__lr": 5e-3},
    }.items():
        change(project, **settings)
        succeed(stage(project, "finetune", "consistency", "0.5", "--models", name))
        spent.append(read_json(project / name / "consistency/sigma_0.5/config.json")["compute"]["finetune"])
    parts, small, whole = (project / name / "consistency/sigma_0.5" for name in ("parts", "small", "whole"))
    assert_same_weights(parts, small)
    assert (parts / "history.csv").read_bytes() == (small / "history.csv").read_bytes()
    assert (parts / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    assert spent == [2 * 6 * 64 * (1294 // 64), 2 * 6 * 64 * (1294 // 64), 2 * 6 * 128 * (1294 // 128)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.thorough)])
def test_mixed_precision(project, precision):
    change(project, pretrain__precision=precision, finetune__precision=precision, certify__precision="bf16")
    change(project, pretrain__steps=5, pretrain__max_levels=40, pretrain__batch_size=16, finetune__epochs=1)
    change(project, finetune__warmup_epochs=0, finetune__batch_size=640, certify__every=120, certify__n=100)
    for command in (["pretrain"], ["finetune", "rrcm", "0.5"], ["certify", "rrcm", "0.5"]):
        succeed(stage(project, *command))


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_training_gives_similar_weights(project):
    """Fused operations round differently, and ten steps of training amplify that."""
    change(project, pretrain__steps=10, pretrain__max_levels=40, finetune__epochs=1, finetune__warmup_epochs=0)
    weights = []
    for switch in (False, True):
        change(project, pretrain__compile=switch, finetune__compile=switch)
        succeed(stage(project, "pretrain"))
        succeed(stage(project, "finetune", "rrcm", "0.5"))
        names = ("models/pretrain/rrcm", "models/rrcm/sigma_0.5")
        weights.append([load_file(project / name / "model.safetensors") for name in names])
    for plain, compiled in zip(*weights, strict=True):
        assert plain.keys() == compiled.keys()
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, atol=2e-3, rtol=0, msg=name)


@pytest.mark.thorough
def test_loader_workers_change_no_bit(project, trained):
    change(project, data__workers=2)
    succeed(stage(project, "pretrain"))
    succeed(stage(project, "finetune", "rrcm", "0.5"))
    for name in ("models/pretrain/rrcm", "models/rrcm/sigma_0.5"):
        assert_same_weights(project / name, trained / name)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "augmentation": "randaugment"},
        {"augmentation": "crop_flip", "label_smoothing": 0.1, "num_noise": 3},
        {"linear_probe_epochs": 2, "augmentation": "flip", "num_noise": 1},
    ],
)
def test_fine_tuning_options(project, trained, settings):
    (project / "models/pretrain").mkdir(parents=True)
    (project / "models/pretrain/rrcm").symlink_to(trained / "models/pretrain/rrcm")
    change(project, **{f"finetune__{name}": value for name, value in settings.items()}, finetune__epochs=4)
    succeed(stage(project, "finetune", "rrcm", "0.25"))
    history = pd.read_csv(project / "models/rrcm/sigma_0.25/history.csv")
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


@pytest.mark.thorough
def test_colour_images_through_every_stage(project):
    """Random images of two sizes; the class is the dominant colour channel."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for c, name in enumerate(("red", "green")):
        for i in range(60):
            pixels = rng.integers(0, 120, (20, 16 + 8 * (i % 2), 3), np.uint8)
            pixels[..., c] += 120
            (project / "pictures" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(project / "pictures" / name / f"{i}.jpg")
    (project / "data/shards").unlink()
    change(project, data__source="imagefolder", data__root="pictures", data__channels=3, data__image_size=16)
    change(project, pretrain__batch_size=32, finetune__batch_size=32, methods=["rrcm"], sigmas=[0.25])
    change(project, certify__every=3, finetune__num_noise=2)
    for command in (["shard_data"], ["pretrain"], ["finetune", "rrcm", "0.25"], ["certify", "rrcm", "0.25"]):
        succeed(stage(project, *command))
    succeed(stage(project, "latency"))
    succeed(stage(project, "plot"))
    classifier = load_model_folder(project / "models/rrcm/sigma_0.25").classifier
    red = torch.zeros(3, 16, 16) + torch.tensor([0.7, 0.25, 0.25])[:, None, None]
    (answer,) = SmoothedClassifier(classifier, 0.25, 2).certify(red[None], n=500)
    classes = read_json(project / "data/shards/manifest.json")["classes"]
    assert classes[answer.prediction] == "red" and answer.radius > 0.1


@pytest.mark.thorough
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_a_stage(project, nodes):
    """Two processes on one node, or one on each of two nodes that share a file system."""
    change(project, pretrain__steps=8, pretrain__max_levels=40)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    layout = ["--nnodes", str(nodes), "--nproc-per-node", str(2 // nodes)]
    layout += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    command = [Path(sys.executable).parent / "torchrun", *layout, REPOSITORY / "stages/pretrain.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RRCM_RUNS": str(project / "runs")}
    options = {"cwd": project, "env": environment, "stderr": subprocess.PIPE, "text": True}
    launchers = [subprocess.Popen(command, **options) for _ in range(nodes)]
    errors = [launcher.communicate()[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * nodes, errors
    assert read_json(project / "timings/pretrain/rrcm.json")["processes"] == 2


@pytest.mark.thorough
def test_shards_behind_a_url(project, trained):
    """Shards on an HTTP server give the same weights as local ones and are cached."""
    handler = partial(SimpleHTTPRequestHandler, directory=project / "data/shards")
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        succeed(stage(project, "pretrain", "--shards", f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
    assert_same_weights(project / "models/pretrain/rrcm", trained / "models/pretrain/rrcm")
    assert list(project.glob(".cache/rrcm/*.tar"))


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["smoothadv", "cat_rs"])
def test_a_killed_training_with_attacks_ends_with_the_same_bytes(project, tiny_shards, method):
    change(project, methods=["gaussian", method], finetune__epochs=4)
    images = ShardedDataset(tiny_shards, "train")
    votes = nn.functional.one_hot(torch.from_numpy(images.labels.copy()), 10) * 9 + 1
    write_votes(project / "data/soft_labels.safetensors", votes, images)
    succeed(stage(project, "finetune", method, "0.5"))
    expected = files_of(project / f"models/{method}/sigma_0.5")
    shutil.rmtree(project / "models")
    kill_when(project, "runs/finetune-*/[0-9]*.safetensors", "finetune", method, "0.5")
    assert not (project / "models").exists()
    answer = stage(project, "finetune", method, "0.5")
    succeed(answer)
    assert "resuming" in answer.stderr and files_of(project / f"models/{method}/sigma_0.5") == expected


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), (0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_soft_labels_are_those_of_the_images_and_are_mixed_like_them(project, mixup, cutmix):
    """Soft labels that are certain have to become the targets; each belongs to the index of its image."""
    settings = load_config(project / "params.yaml").finetune.settings("gaussian", 0.5)
    settings = settings.model_copy(update={"mixup": mixup, "cutmix": cutmix, "batch_size": 8})
    labels, index = torch.arange(8) % 5, torch.tensor([3, 1, 4, 11, 5, 9, 2, 6])
    soft_labels = torch.zeros(12, 5)
    soft_labels[index, labels] = 1.0
    targets = Targets(settings, 5, 0, torch.device("cpu"), {"soft_label": soft_labels})
    batch = {"image": torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 8, 8), "label": labels}
    for step in range(5):
        found = targets(batch | {"index": index}, step)
        torch.testing.assert_close(found["soft_label"], found["target"])
    assert (found["target"].max() < 1) == bool(mixup or cutmix)


def test_a_collapse_is_said_once_when_the_learning_rate_has_grown(capsys):
    training = SimpleNamespace(label="finetune smoothadv sigma 0.5", env=SimpleNamespace(is_main=True))
    training.history = []
    for epoch, accuracy in enumerate((0.11, 0.2, 0.11, 0.1, 0.3, 0.11), start=1):  # the warm-up takes one epoch
        warn_if_collapsed(accuracy, 0.11, epoch, 1.0, "smoothadv", training)
        training.history.append({"epoch": epoch, "val_accuracy": accuracy})
        assert capsys.readouterr().err == (epoch in (3, 6)) * (
            f"finetune smoothadv sigma 0.5: has collapsed at epoch {epoch}: validation accuracy is 11.0 %, and 11.0 % "
            "for the largest class alone; lower finetune.lr, or weaken finetune.objectives.smoothadv\n"
        )
    training.env.is_main, training.history = False, []
    warn_if_collapsed(0.0, 0.11, 2, 1.0, "smoothadv", training)
    assert not capsys.readouterr().err


def test_a_classifier_that_knows_one_class_has_the_accuracy_of_a_collapse(project):
    """It is right about the largest class of the validation split, whatever the noise."""
    split = ShardedDataset(project / "data/shards", "val")
    pixels, labels, _ = read_split(split, 8)
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, 32, depth=1, num_heads=2), 10, t=1.0)
    validation = NoisyValidation(pixels, labels, 0.5, 0, "fp32", DistEnv(0, 1, torch.device("cpu")))
    nn.init.zeros_(classifier.head.weight)
    classifier.head.bias.data[int(np.bincount(split.labels).argmax())] = 1.0
    assert validation(classifier) == pytest.approx(validation.chance)


def test_a_frozen_pass_is_in_eval_mode_and_leaves_training_mode_on():
    """Attacks must not update batch statistics, and the pass after them must again."""
    network = nn.BatchNorm2d(1).train()
    network.forward = lambda noisy: nn.BatchNorm2d.forward(network, noisy)
    training = SimpleNamespace(wrap_ddp=lambda module: module, autocast=contextlib.nullcontext)
    classify, noisy = WrappedClassifier(network, training, num_chunks=1), torch.rand(4, 1, 2, 2) + 3
    torch.testing.assert_close(classify(noisy, frozen=True), noisy, rtol=1e-4, atol=0)  # the initial statistics
    assert network.num_batches_tracked == 0 and network.training
    classify(noisy)
    assert network.num_batches_tracked == 1
