"""An encoder that was pre-trained on another data set is fine-tuned, with DDS beside it: the profiles `kather*`."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, compose, stage
from PIL import Image
from test_pipeline import copy_repository, ran, run

from rrcm.models.checkpoints import load_encoder
from rrcm.models.kinds import load_model_folder
from rrcm.utils.files import read_json

pytestmark = [pytest.mark.thorough]
pytestmark += [pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="git lists what to copy")]
SMALL = ["data.workers=0", "data.val_fraction=0.2", "sigmas=[0.5]", "threads=1", "pretrain.steps=6"]
SMALL += [
    "pretrain.max_levels=4",
    "pretrain.min_levels=2",
    "pretrain.t_max=4",
    "finetune.epochs=10",
    "finetune.lr=4e-2",
]
SMALL += ["finetune.batch_size=16", "finetune.weights_dtype=fp32", "denoiser.batch_size=32", "denoiser.steps=200"]
SMALL += ["denoiser.warmup_steps=4", "denoiser.lr=2e-3", "denoiser.ema_decay=0.9", "denoiser.precision=fp32"]
SMALL += ["certify.n0=20", "certify.n=60", "certify.every=2", "certify.radius_step=0.25"]


def write_tissues(folder: Path, size: int) -> list[str]:
    """Images of nine tissues, each with a colour of its own; returns the settings that read them."""
    rng = np.random.default_rng(0)
    colours = np.array([[red, green, 128] for red in (20, 128, 235) for green in (20, 128, 235)])
    for split, count in (("train", 72), ("test", 9)):
        for number in range(count):
            path = folder / split / str(number % 9) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = colours[number % 9] + rng.integers(-20, 21, (size, size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return ["data.source=imagefolder", f"data.root={folder}"]


def pretrain_on_stripes(folder: Path, *settings: str) -> Path:
    """The model folder of an encoder that was pre-trained on a folder of other images, 16 x 16 pixels."""
    rng = np.random.default_rng(1)
    for name in ("across", "down"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(24):
            pixels = np.repeat(rng.integers(0, 256, (16, 1, 3), np.uint8), 16, axis=1)
            image = Image.fromarray(pixels if name == "across" else pixels.swapaxes(0, 1).copy())
            image.save(folder / "images" / name / f"{number}.png")
    stripes = ["data.source=imagefolder", f"data.root={folder / 'images'}", "pretrain.batch_size=16"]
    stripes += ["methods=[rrcm]", "pretrain.objectives=[rrcm]", "finetune.initial_weights=null"]
    compose(folder / "params.yaml", *settings, *stripes)
    do(folder, ["shard_data"], ["pretrain"])
    return folder / "models/pretrain/rrcm"


def do(folder: Path, *commands: list[str]) -> None:
    for command in commands:
        answer = stage(folder, *command)
        assert answer.returncode == 0, answer.stderr


def check_results(folder: Path, encoder: Path) -> None:
    """rRCM's classifier started from the encoder, and both methods have learned the colours."""
    assert read_json(folder / "models/rrcm/sigma_0.5/config.json")["initial_weights"] == str(encoder)
    name = "blocks.0.attn.qkv.weight"
    networks = (load_encoder(encoder), load_model_folder(folder / "models/rrcm/sigma_0.5").classifier.encoder)
    before, after = (network.state_dict()[name].flatten() for network in networks)
    assert 0.8 < torch.nn.functional.cosine_similarity(before, after, dim=0) < 1
    for method in ("rrcm", "dds"):
        certificates = pd.read_csv(folder / f"certificates/{method}/sigma_0.5.tsv", sep="\t")
        assert certificates["label"].tolist() == [0, 2, 4, 6, 8]
        assert certificates["correct"].mean() > 0.5


def test_the_whole_pipeline_at_28_pixels(tmp_path):
    settings = ["profile=kather_28", *SMALL, "model.patch_size=7"]
    encoder = pretrain_on_stripes(tmp_path / "stripes", *settings)
    folder = copy_repository(tmp_path / "repository")
    given = [*write_tissues(tmp_path / "tissue", 28), "methods=[rrcm,dds]", f"finetune.initial_weights={encoder}"]
    compose(folder / "params.yaml", *settings, *given)
    found = ran(run(folder, "python", "stages/repro.py", "--jobs", "2"))
    assert {"denoiser@trained", "finetune@gaussian-0.001", "finetune@rrcm", "certify@dds", "plot"} <= found
    assert not any(name.startswith("pretrain") for name in found)
    check_results(folder, encoder)
    report = (folder / "reports/kather_28/report.md").read_text()
    assert "DDS" in report and f"pre-trained elsewhere (`{encoder}`)" in report
    shutil.rmtree(folder / "models/rrcm")
    assert not ran(run(folder, "dvc", "repro"))  # restored from the cache


def test_training_and_certification_at_224_pixels(tmp_path):
    settings = ["profile=kather", *SMALL, "model.patch_size=56"]
    encoder = pretrain_on_stripes(tmp_path / "stripes", *settings)
    given = [*write_tissues(tmp_path / "tissue", 224), "methods=[rrcm,dds]", f"finetune.initial_weights={encoder}"]
    compose(tmp_path / "params.yaml", *settings, *given)
    do(tmp_path, ["shard_data"], ["denoiser"], ["finetune", "gaussian", "0.001"])
    for method in ("rrcm", "dds"):
        do(tmp_path, ["finetune", method, "0.5"], ["certify", method, "0.5"])
    check_results(tmp_path, encoder)
