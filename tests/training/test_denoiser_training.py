"""The stage denoiser, and the methods that are made from a denoiser: what is written, resumed, and refused."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import assert_same_gradients, change, exit_codes, files_of, kill_when, make_project, stage, start_all
from safetensors.torch import load_file
from torch import nn

from rrcm.certification.results import read_certificates
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.denoised import denoise_pixels
from rrcm.models.denoiser import EDMDenoiser, PixelViT, load_denoiser, save_denoiser
from rrcm.models.load import load_model_folder
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives.base import StepRandomness
from rrcm.objectives.denoising import Denoising, denoising_loss
from rrcm.training.finetune import WrappedClassifier
from rrcm.training.start import load_denoise
from rrcm.utils.files import read_json

METHODS = ["dds", "dds_finetuned", "densepure", "diffsmooth"]
SMALL = {
    "steps": 40,
    "batch_size": 64,
    "warmup_steps": 4,
    "lr": 6e-3,
    "ema_decay": 0.9,
    "checkpoint_every": 5,
    "evaluate_every": 20,
    "precision": "fp32",
}


def succeed(answer) -> None:
    assert answer.returncode == 0, answer.stderr


def prepare(project: Path, **settings: object) -> Path:
    """Settings with all methods that denoise, made small."""
    change(project, methods=METHODS, pretrain__objectives=[], finetune__epochs=2, sigmas=[0.5])
    change(project, **{f"denoiser__{name}": value for name, value in SMALL.items()})
    change(project, denoised__densepure={"runs": 2, "steps": 2}, denoised__diffsmooth__num_noise=2, **settings)
    return project


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_shards) -> Path:
    """A project with a denoiser and both classifiers, shared; do not change it."""
    folder = prepare(make_project(tmp_path_factory.mktemp("parts"), tiny_shards))
    for command in (["denoiser"], ["finetune", "gaussian", "0.001"], ["finetune", "gaussian", "0.25"]):
        succeed(stage(folder, *command))
    return folder


@pytest.fixture
def ready(project, parts) -> Path:
    """A project of its own with these parts."""
    shutil.copytree(parts / "models", project / "models")
    return prepare(project)


def small_denoiser() -> EDMDenoiser:
    torch.manual_seed(0)
    denoiser = EDMDenoiser(PixelViT(NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=1, num_heads=2)))
    nn.init.normal_(denoiser.network.head.weight, std=0.1)
    return denoiser


def test_the_loss_is_that_of_edm():
    """Against its definition: F's error with weight 1 at each level, which the levels' distribution decides."""
    image, objective = torch.rand(256, 1, 8, 8) * 2 - 1, Denoising(noise_mean=-1.2, noise_std=1.2)
    random = StepRandomness(0, 3, range(256), 256, torch.device("cpu"))
    seen = {}

    def denoiser(noisy, t, *, num_chunks):
        seen.update(noisy=noisy, t=t)
        return noisy

    loss = objective(denoiser, {"image": image}, random)["loss"]
    t, noise = seen["t"], (seen["noisy"] - image) / seen["t"][:, None, None, None]
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    torch.testing.assert_close(loss, (weight * (t[:, None, None, None] * noise).square().mean((1, 2, 3))).mean())
    assert float(t.log().mean()) == pytest.approx(-1.2, abs=4 * 1.2 / 16)
    assert float(t.log().std()) == pytest.approx(1.2, rel=0.2) and float(noise.std()) == pytest.approx(1, rel=0.02)


def test_a_perfect_estimate_has_no_loss_and_the_target_is_the_clean_image():
    image = torch.rand(4, 1, 8, 8)
    assert denoising_loss(image, image, torch.ones(4)).tolist() == [0] * 4
    assert (denoising_loss(image + torch.randn_like(image), image, torch.ones(4)) > 0).all()


def test_chunks_change_no_gradient():
    image, random = torch.rand(12, 1, 8, 8), StepRandomness(0, 0, range(12), 12, torch.device("cpu"))
    gradients = []
    for chunks in (1, 3):
        denoiser = small_denoiser()
        loss = Denoising(noise_mean=0.0, noise_std=1.0, num_chunks=chunks)(denoiser, {"image": image}, random)["loss"]
        loss.backward()
        gradients.append({name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None})
    assert_same_gradients(gradients[1], gradients[0])


def test_the_outputs_of_the_stage(parts):
    config, folder = load_config(parts / "params.yaml"), parts / "models/denoiser"
    assert read_json(folder / "config.json")["compute"] == 3 * 64 * 40
    history, errors = pd.read_csv(folder / "history.csv"), pd.read_csv(folder / "denoising.csv")
    assert history["step"].tolist()[-1] == 40 and history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert errors["step"].tolist() == [20, 40] and set(errors["sigma"]) == {0.5}
    denoiser = load_denoiser(folder)
    pixels, _, _ = read_split(ShardedDataset(parts / "data/shards", "val"), 8)
    clean = pixels.float() / 255
    noisy = clean + 0.5 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = 4 * (denoise_pixels(denoiser, noisy, sigma=0.5) - clean).square().mean()
    assert error < 4 * (noisy.clamp(0, 1) - clean).square().mean()
    assert float(error) == pytest.approx(errors["mean_squared_error"].iloc[-1], rel=0.2)
    assert read_json(parts / "timings/denoiser.json")["images_per_second"] > 0 and config.trains_denoiser


@pytest.mark.thorough
@pytest.mark.parametrize("world", [1, 2])
def test_kills_and_processes(project, parts, world):
    """Killed and continued by one process: the same bytes. By two: the same up to rounding."""
    prepare(project)
    kill_when(project, "runs/denoiser-*/[0-9]*.safetensors", "denoiser")
    assert not (project / "models").exists()
    assert exit_codes(start_all(project, "denoiser", [], world)) == [0] * world
    found, expected = project / "models/denoiser", parts / "models/denoiser"
    if world == 1:
        assert files_of(found) == files_of(expected)
    else:
        weights = [load_file(folder / "model.safetensors") for folder in (found, expected)]
        for name, value in weights[1].items():
            torch.testing.assert_close(weights[0][name], value, atol=2e-3, rtol=0, msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_made_certified_and_timed(ready, method):
    succeed(stage(ready, "finetune", method, "0.5"))
    folder = ready / f"models/{method}/sigma_0.5"
    config, loaded = read_json(folder / "config.json"), load_model_folder(folder)
    assert loaded.sigma == 0.5 and config["parameters"] > 0 and config["compute"]["pretrain_share"] > 0
    trained = method == "dds_finetuned"
    assert (config["parts"]["classifier"]["path"] == "classifier") == trained
    assert config["initial_weights"] == f"models/gaussian/sigma_{0.25 if method == 'diffsmooth' else 0.001}"
    if trained:
        assert read_json(folder / "classifier/config.json")["initial_weights"] == config["initial_weights"]
    assert (config["compute"]["finetune"] > 0) == trained and (config["training"]["epochs"] == 2) == trained
    if not trained:
        assert not list(folder.rglob("*.safetensors"))  # the parts are named, not copied
    change(ready, denoised__max_images={method: 7})
    succeed(stage(ready, "certify", method, "0.5"))
    frame = read_certificates(ready / f"certificates/{method}/sigma_0.5.tsv")
    assert len(frame) == 7 and frame["idx"].iloc[-1] > 300  # spread over the test images
    if method == "dds":
        change(ready, attack={**load_config(ready / "params.yaml").attack.model_dump(), "methods": ["dds"], "n": 100})
        succeed(stage(ready, "attack", "dds"))


@pytest.mark.thorough
def test_certificates_of_a_stochastic_method_survive_kills_and_processes(ready):
    change(ready, certify__every=5, certify__batch_size=50)
    succeed(stage(ready, "finetune", "diffsmooth", "0.5"))
    succeed(stage(ready, "certify", "diffsmooth", "0.5"))
    expected = files_of(ready / "certificates")
    shutil.rmtree(ready / "certificates")
    for size in (500, 5000, 10_000):
        kill_when(ready, "runs/certify-*/journal-*.txt", "certify", "diffsmooth", "0.5", larger_than=size)
    assert exit_codes(start_all(ready, "certify", ["diffsmooth", "0.5"], 2)) == [0, 0]
    assert files_of(ready / "certificates") == expected


def test_fine_tuning_sees_denoised_images_and_leaves_the_denoiser_alone(ready):
    denoise = load_denoise(ready / "models/denoiser", 0.5, torch.device("cpu"))
    noisy = torch.rand(4, 1, 8, 8) + 0.5 * torch.randn(4, 1, 8, 8)
    denoiser = load_denoiser(ready / "models/denoiser")
    assert torch.equal(denoise(noisy), denoise_pixels(denoiser, noisy, sigma=0.5).detach())
    assert not denoise(noisy).requires_grad

    class Training:
        def wrap_ddp(self, module):
            return module

        def autocast(self):
            return torch.autocast("cpu", enabled=False)

    classifier = load_model_folder(ready / "models/gaussian/sigma_0.001").classifier
    wrapped = WrappedClassifier(classifier, Training(), 1, denoise)
    torch.testing.assert_close(wrapped(noisy), classifier(denoise(noisy)))


@pytest.mark.thorough
def test_kills_of_a_fine_tuning_on_denoised_images_change_no_byte(ready):
    change(ready, finetune__epochs=3)
    succeed(stage(ready, "finetune", "dds_finetuned", "0.5"))
    expected = files_of(ready / "models/dds_finetuned")
    shutil.rmtree(ready / "models/dds_finetuned")
    kill_when(ready, "runs/finetune-*/[0-9]*.safetensors", "finetune", "dds_finetuned", "0.5")
    assert not (ready / "models/dds_finetuned").exists()
    succeed(stage(ready, "finetune", "dds_finetuned", "0.5"))
    assert files_of(ready / "models/dds_finetuned") == expected and not list(ready.glob("runs/*"))


def learn_epsilon(unet: nn.Module, scheduler: Any, images: torch.Tensor) -> None:
    """A short training at the levels of noise around pixel sigma 0.5; images in [-1, 1]."""
    optimizer = torch.optim.Adam(unet.parameters(), 1e-2)
    for _ in range(200):
        batch = images[torch.randint(len(images), (64,))]
        noise, step = torch.randn(batch.shape), torch.randint(100, 500, (64,))
        loss = (unet(scheduler.add_noise(batch, noise, step), step).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.thorough
def test_a_public_denoiser_takes_the_place_of_a_trained_one(ready, tmp_path):
    """A small model of diffusers, saved by the library itself."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "public")
    change(ready, denoiser__public=str(tmp_path / "public"))
    shutil.rmtree(ready / "models/denoiser")
    answer = stage(ready, "denoiser")  # of random weights
    assert answer.returncode == 1 and "public: does not denoise: at sigma 0.5" in answer.stderr
    assert answer.stderr.count("\n") == 1 and not (ready / "models/denoiser").exists()
    pixels, _, _ = read_split(ShardedDataset(ready / "data/shards", "train"), 8)
    learn_epsilon(unet, DDPMScheduler(), pixels.float() / 127.5 - 1)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "public")
    succeed(stage(ready, "denoiser"))
    config = read_json(ready / "models/denoiser/config.json")
    (step,) = config["discrete_steps"]
    assert config["source"] == str(tmp_path / "public") and step["sigma_of_step"] == pytest.approx(0.5, rel=0.02)
    succeed(stage(ready, "finetune", "dds", "0.5"))
    change(ready, certify__every=100)
    succeed(stage(ready, "certify", "dds", "0.5"))
    colour = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(colour, DDPMScheduler()).save_pretrained(tmp_path / "colour")
    change(ready, denoiser__public=str(tmp_path / "colour"))
    answer = stage(ready, "denoiser")
    assert answer.returncode == 1 and "is for images of 3 x 8 pixels, not of 1 x 8" in answer.stderr


@pytest.mark.thorough
def test_a_unet_trains(project):
    unet = {"base_channels": 8, "channel_mults": [1, 1], "layers_per_block": 1, "attention_levels": [1]}
    prepare(project, denoiser__network="unet", denoiser__unet=unet, denoiser__steps=8, denoiser__evaluate_every=8)
    succeed(stage(project, "denoiser"))
    assert load_denoiser(project / "models/denoiser").network.architecture["network"] == "unet"


def test_missing_and_foreign_parts_are_refused_in_one_line(ready):
    shutil.move(ready / "models/gaussian/sigma_0.001", ready / "elsewhere")
    missing = stage(ready, "finetune", "dds", "0.5")
    assert missing.returncode == 1 and "models/gaussian/sigma_0.001" in missing.stderr
    shutil.move(ready / "elsewhere", ready / "models/gaussian/sigma_0.001")
    shutil.rmtree(ready / "models/denoiser")
    larger = EDMDenoiser(PixelViT(NoiseConditionedViT(12, 1, 4, embed_dim=16, depth=1, num_heads=2)))
    save_denoiser(ready / "models/denoiser", larger, compute=0)
    foreign = stage(ready, "finetune", "dds", "0.5")
    assert foreign.returncode == 1 and "is for images of 1 x 12 pixels, the settings have 1 x 8" in foreign.stderr
    for answer in (missing, foreign):
        assert "Traceback" not in answer.stderr and answer.stderr.count("\n") == 1
    assert not (ready / "models/dds").exists()
