"""Denoisers of other networks: the UNet of diffusers, public diffusion models, and their conversion to D(x; t)."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import assert_close, change_model
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from rrcm.models.denoiser import (
    DiscreteDenoiser,
    EDMDenoiser,
    PixelViT,
    UNet,
    load_denoiser,
    loss_weight,
    save_denoiser,
)
from rrcm.models.public_denoisers import OLD_NAMES, denoising_errors, load_public_denoiser, read_public_denoiser
from rrcm.models.vit import SIGMA_DATA, NoiseConditionedViT, time_embedding
from rrcm.utils.errors import RRCMError

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
UNET = {"image_size": 8, "channels": 1, "base_channels": 8, "channel_mults": (1, 2), "layers_per_block": 1}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alphas_cumprod(schedule: str = "linear", num_steps: int = 1000) -> torch.Tensor:
    """abar_k of the library's schedule: (num_steps,) float64."""
    return DDPMScheduler(num_steps, beta_schedule=schedule).alphas_cumprod.double()


def by_image(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.float()[:, None, None, None]


def answer(network: nn.Module, *inputs: torch.Tensor | float) -> torch.Tensor:
    with torch.no_grad():
        return network(*inputs)


def refused(message: str, load: Callable, *arguments: object, **options: object) -> None:
    """`load` raises an `RRCMError` of one line with `message`, a regular expression."""
    with pytest.raises(RRCMError, match=message) as error:
        load(*arguments, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


# The UNet of diffusers, trained by us


def small_unet(**changes: object) -> UNet:
    torch.manual_seed(0)
    return UNet(**UNET | {"attention_levels": (1,)} | changes)


def trained(network: nn.Module) -> EDMDenoiser:
    """A denoiser whose output is not zero."""
    nn.init.normal_(network.unet.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return EDMDenoiser(network).eval()


def test_an_untrained_unet_answers_zero():
    x, t = randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    assert not answer(small_unet(), x, t).any()
    clean = answer(EDMDenoiser(small_unet()), x, t)
    torch.testing.assert_close(clean, SIGMA_DATA**2 / (by_image(t) ** 2 + SIGMA_DATA**2) * x)


def test_a_unet_gets_scaled_images_and_the_trunks_embedding_of_the_time():
    network, x, t = trained(small_unet()).network, randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    seen = {}
    network.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.update(image=inputs[0]))
    network.unet.time_embedding.register_forward_pre_hook(lambda _, inputs: seen.update(time=inputs[0]))
    assert answer(network, x, t).shape == x.shape
    torch.testing.assert_close(seen["image"], x / (by_image(t) ** 2 + 0.25).sqrt())
    assert_close(seen["time"], time_embedding(t, 8), 2e-5)


def test_a_unet_has_attention_where_it_is_wanted():
    def count(levels: tuple[int, ...]) -> list[int]:
        blocks = small_unet(channel_mults=(1, 2, 2), attention_levels=levels).unet
        parts = [*blocks.down_blocks, blocks.mid_block, *blocks.up_blocks]
        return [sum(name.endswith("to_q.weight") for name, _ in part.named_parameters()) for part in parts]

    assert count(()) == [0] * 7
    assert count((1,)) == [0, 1, 0, 1, 0, 2, 0]
    assert count((0, 2)) == [1, 0, 1, 1, 2, 0, 2]


def test_a_unet_learns():
    torch.manual_seed(0)
    denoiser = EDMDenoiser(small_unet()).train()
    optimizer = torch.optim.Adam(denoiser.parameters(), 1e-2)
    clean, losses = SIGMA_DATA * torch.ones(32, 1, 8, 8), []
    t = torch.linspace(0.5, 2, 32)
    for step in range(12):
        x = clean + by_image(t) * randn(32, 1, 8, 8, seed=step)
        loss = (by_image(loss_weight(t)) * (denoiser(x, t, num_chunks=2) - clean).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in denoiser.parameters())


@pytest.mark.parametrize("kind", ["vit", "unet"])
def test_our_denoisers_come_back_from_their_folder(kind):
    torch.manual_seed(0)
    network = small_unet() if kind == "unet" else PixelViT(NoiseConditionedViT(8, 1, 4, 16, 1, 2))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    denoiser = EDMDenoiser(network).eval()
    save_denoiser(Path("folder"), denoiser, steps=7)
    loaded = load_denoiser("folder")
    x = randn(2, 1, 8, 8)
    assert torch.equal(answer(loaded, x, 0.7), answer(denoiser, x, 0.7))
    config = json.loads(Path("folder/config.json").read_text())
    assert (config["kind"], config["architecture"]["network"], config["steps"]) == ("denoiser", kind, 7)
    assert (loaded.image_size, loaded.channels, loaded.training) == (8, 1, False)


def test_a_unet_in_bfloat16_rounds_its_input_itself():
    x = randn(4, 1, 8, 8)
    expected = answer(trained(small_unet()), x, 0.5)
    rounded = answer(trained(small_unet()).bfloat16(), x, 0.5)
    assert rounded.dtype == torch.float32 and 0 < (rounded - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, r"^a UNet of 2 levels needs images of a multiple of 2 pixels, not 9$"),
        ({"base_channels": 10}, r"^the base channels of a UNet must be a multiple of 4, not 10$"),
        ({"attention_levels": (2,)}, r"^a UNet of 2 levels has attention at some of the levels 0 to 1, not at \[2\]$"),
    ],
)
def test_sizes_of_a_unet_that_do_not_fit_are_refused(changes, message):
    refused(message, small_unet, **changes)


# From the steps of a discrete diffusion to any noise level


class BestNetwork(nn.Module):
    """The best network's prediction for images of independent pixels from N(0, SIGMA_DATA^2)."""

    image_size, channels, out_channels = 8, 1, 2

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str):
        super().__init__()
        self.abar, self.prediction_type = alphas_cumprod, prediction_type

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        abar = by_image(self.abar[step])
        clean = abar.sqrt() * SIGMA_DATA**2 / (abar * SIGMA_DATA**2 + 1 - abar) * x
        noise = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
        v = abar.sqrt() * noise - (1 - abar).sqrt() * clean
        prediction = {"epsilon": noise, "v_prediction": v, "sample": clean}[self.prediction_type]
        return torch.cat([prediction, torch.full_like(x, torch.nan)], dim=1)  # and a variance


def closed_form(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The mean of the clean image given x."""
    return x * SIGMA_DATA**2 / (SIGMA_DATA**2 + by_image(t) ** 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("schedule", "num_steps", "accuracy"), [("linear", 1000, 0.004), ("squaredcos_cap_v2", 100, 0.04)]
)
def test_the_best_network_gives_the_closed_form_between_steps(schedule, num_steps, accuracy, prediction_type):
    abar = alphas_cumprod(schedule, num_steps)
    denoiser = DiscreteDenoiser(BestNetwork(abar, prediction_type), abar, prediction_type)
    levels = denoiser.levels[(denoiser.levels > 0.1) & (denoiser.levels < 1.5)]  # pixel sigmas .05 to .75
    x = randn(1, 1, 8, 8).expand(len(levels), -1, -1, -1)
    assert_close(denoiser(x, levels), closed_form(x, levels))
    low, high = levels[:-1], levels[1:]
    for share in (0.1, 0.45, 0.55, 0.9):  # of the way from one step to the next
        t, nearest = low ** (1 - share) * high**share, low if share < 0.5 else high
        truth = closed_form(x[1:], t)
        error = (denoiser(x[1:], t) - truth).abs().amax((1, 2, 3))
        error_of_the_steps_own_level = (closed_form(x[1:], nearest) - truth).abs().amax((1, 2, 3))
        assert (error <= error_of_the_steps_own_level + 1e-6).all()
        assert error.sum() < 0.9 * error_of_the_steps_own_level.sum()
        assert error.max() < accuracy * x.abs().max()


def test_the_nearest_step_is_nearest_in_the_logarithm_and_the_ends_serve_what_is_beyond():
    abar = torch.tensor([0.9, 0.5, 0.2])  # levels 1/3, 1 and 2
    steps = []

    class Recording(BestNetwork):
        def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            steps.extend(step.tolist())
            return x

    denoiser = DiscreteDenoiser(Recording(abar, "epsilon"), abar, "epsilon")
    torch.testing.assert_close(denoiser.levels, torch.tensor([1 / 3, 1, 2]).double(), rtol=1e-6, atol=0)
    t = torch.tensor([0.01, 0.57, 0.58, 1.41, 1.42, 99.0])  # between 1/3 and 1: 0.577; between 1 and 2: 1.414
    x = randn(6, 1, 8, 8)
    clean = denoiser(x, t)
    assert steps == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(clean, x - by_image(t / (1 + t**2).sqrt()) * x)  # it is given x / (1 + t^2)^(1/2)
    for row, level in enumerate(t.tolist()):
        assert torch.equal(denoiser(x[[row]], level), clean[[row]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type 'score' must be epsilon, v_prediction or sample"),
        ({"alphas_cumprod": torch.tensor([0.5, 0.9])}, "must fall"),
        ({"alphas_cumprod": torch.tensor([0.9, 0.9])}, "must fall"),
        ({"alphas_cumprod": torch.tensor([1.1, 0.5])}, "must fall"),
        ({"alphas_cumprod": torch.tensor([0.5, torch.nan])}, "must fall"),
    ],
)
def test_a_discrete_denoiser_checks_its_arguments(change, message):
    abar = torch.tensor([0.9, 0.5])
    arguments = {"network": BestNetwork(abar, "sample"), "alphas_cumprod": abar, "prediction_type": "sample"}
    with pytest.raises(ValueError, match=message):
        DiscreteDenoiser(**arguments | change)


# Models that diffusers has saved


def save_pipeline(scheduler: type, prediction_type: str = "epsilon", schedule: str = "linear", **changes: object):
    """Save a pipeline as the folder "public"; returns its network and its scheduler."""
    torch.manual_seed(0)
    unet = UNet2DModel(**SMALL | changes).eval()
    settings = {"prediction_type": prediction_type, "beta_schedule": schedule, "clip_sample": False}
    if unet.config.out_channels > unet.config.in_channels:
        settings["variance_type"] = "learned_range"
    pipeline = DDIMPipeline if scheduler is DDIMScheduler else DDPMPipeline
    pipeline(unet, scheduler(**settings)).save_pretrained("public")
    return unet, scheduler(**settings)


def edit(path: str, **changes: object) -> None:
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


LIBRARY = [
    (DDPMScheduler, "epsilon", "linear", {}),
    (DDPMScheduler, "v_prediction", "squaredcos_cap_v2", {}),
    (DDPMScheduler, "sample", "linear", {"in_channels": 3, "out_channels": 3}),
    (DDPMScheduler, "epsilon", "linear", {"out_channels": 2}),  # with a variance
    (DDIMScheduler, "epsilon", "scaled_linear", {}),
    (DDIMScheduler, "v_prediction", "linear", {"flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None}),
    (DDIMScheduler, "sample", "squaredcos_cap_v2", {}),
]


@pytest.mark.parametrize(("scheduler", "prediction_type", "schedule", "changes"), LIBRARY)
def test_a_pipeline_predicts_what_the_library_says(scheduler, prediction_type, schedule, changes):
    unet, library = save_pipeline(scheduler, prediction_type, schedule, **changes)
    denoiser = read_public_denoiser("public")
    library.set_timesteps(1000)
    scaled = randn(2, denoiser.channels, 8, 8)
    for step in (20, 300, 600):
        output = answer(unet, scaled, step).sample
        if scheduler is DDIMScheduler:
            output = output[:, : denoiser.channels]
        expected = library.step(output, step, scaled).pred_original_sample
        x = scaled / library.alphas_cumprod[step].sqrt()
        assert_close(answer(denoiser, x, float(denoiser.levels[step])), expected)
    assert (denoiser.image_size, denoiser.training) == (8, False)


def test_old_folders_are_flat_and_have_other_names_and_no_safetensors():
    unet, _ = save_pipeline(DDPMScheduler)
    expected = answer(read_public_denoiser("public"), randn(2, 1, 8, 8), 0.5)
    new = {new: old for old, new in OLD_NAMES.items()}
    weights = {}
    for name, tensor in unet.state_dict().items():
        for layer in new if ".attentions." in name else ():
            name = name.replace(f".{layer}.", f".{new[layer]}.")
        weights[name] = tensor
    assert weights.keys() != unet.state_dict().keys()
    Path("old").mkdir()
    for path in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        Path("public", path).rename(Path("old", Path(path).name))
    torch.save(weights, "old/diffusion_pytorch_model.bin")
    assert torch.equal(answer(read_public_denoiser("old"), randn(2, 1, 8, 8), 0.5), expected)
    restored = UNet2DModel.from_pretrained("old", use_safetensors=False)  # the library knows these names, too
    assert torch.equal(restored.mid_block.attentions[0].to_q.weight, unet.mid_block.attentions[0].to_q.weight)


def test_a_model_on_the_hub_is_downloaded_without_other_files(monkeypatch):
    save_pipeline(DDPMScheduler)
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return "public"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = answer(read_public_denoiser("public"), randn(2, 1, 8, 8), 0.5)
    assert torch.equal(answer(read_public_denoiser("hf-hub:a/b@v1"), randn(2, 1, 8, 8), 0.5), expected)
    weights = "diffusion_pytorch_model.safetensors"
    assert asked == [("a/b", "v1", ["*.json", weights, f"unet/{weights}"])]
    Path("public/unet", weights).rename(Path("public/unet/else"))
    torch.save(load_file("public/unet/else"), "public/unet/diffusion_pytorch_model.bin")
    assert torch.equal(answer(read_public_denoiser("hf-hub:a/b"), randn(2, 1, 8, 8), 0.5), expected)
    assert [patterns[1] for _, _, patterns in asked] == [weights, weights, "diffusion_pytorch_model.bin"]


def test_a_failed_download_is_one_line(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(r"^hf-hub:a/b: cannot be downloaded \(no route to the hub\)", read_public_denoiser, "hf-hub:a/b")
    refused(r"must be hf-hub:owner/name or", read_public_denoiser, "hf-hub:a")


def test_a_size_that_the_model_does_not_tell_is_given():
    save_pipeline(DDPMScheduler, sample_size=None)
    refused(r"^public: .*sample_size None .*give image_size", read_public_denoiser, "public")
    assert read_public_denoiser("public", image_size=16).image_size == 16


WRONG = {
    "other class": ({"unet/config.json": {"_class_name": "UNet2DConditionModel"}}, r"must be an unconditional UNet2DM"),
    "our folder": ({"unet/config.json": {"_class_name": None}}, r"its network is not of diffusers"),
    "classes": ({"unet/config.json": {"num_class_embeds": 10}}, r"conditional on classes \(num_class_embeds\)"),
    "class vectors": ({"unet/config.json": {"class_embed_type": "timestep"}}, r"conditional on classes"),
    "latent": ({"model_index.json": {"vqvae": ["diffusers", "VQModel"]}}, r"latent images of a vqvae"),
    "scheduler": (
        {"scheduler/scheduler_config.json": {"_class_name": "ScoreSdeVeScheduler"}},
        r"must be DDPMScheduler",
    ),
    "prediction": ({"scheduler/scheduler_config.json": {"prediction_type": "flow"}}, r"'flow' must be epsilon, v_pred"),
    "schedule": (
        {"scheduler/scheduler_config.json": {"beta_schedule": "no"}},
        r"describes no DDPMScheduler \(no is not",
    ),
    "channels": ({"unet/config.json": {"out_channels": 3}}, r"maps 1 channels to 3, so it is not for images"),
    "many channels": ({"unet/config.json": {"in_channels": 4, "out_channels": 4}}, r"maps 4 channels to 4"),
    "not square": ({"unet/config.json": {"sample_size": [8, 16]}}, r"sample_size \[8, 16\] is not the side of square"),
    "wrong blocks": ({"unet/config.json": {"down_block_types": ["No", "No"]}}, r"cannot be loaded \(.*No"),
    "other sizes": ({"unet/config.json": {"block_out_channels": [8, 32]}}, r"\.safetensors: .* has shape "),
}


@pytest.mark.parametrize("kind", WRONG)
def test_folders_that_are_no_denoiser_are_refused(kind):
    save_pipeline(DDPMScheduler)
    changes, message = WRONG[kind]
    for path, change in changes.items():
        edit(f"public/{path}", **change)
    refused(message, read_public_denoiser, "public")


def test_a_conditional_network_of_the_library_is_refused():
    save_pipeline(DDPMScheduler)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 8}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    UNet2DConditionModel(8, 1, 1, **sizes, **blocks).save_pretrained("public/unet")
    refused(r"^public: its network is UNet2DConditionModel, must be", read_public_denoiser, "public")


class Payload:
    """Makes the folder `owned` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("unet/config.json", b"{", r"config\.json: cannot be read as JSON"),
        ("unet/config.json", b"[]", r"^public: its network is not of diffusers"),
        ("unet/config.json", None, r"config\.json: no such file"),
        ("scheduler/scheduler_config.json", b"[]", r"^public: its scheduler is None"),
        ("scheduler/scheduler_config.json", None, r"scheduler_config\.json: no such file"),
        ("unet/diffusion_pytorch_model.safetensors", b"\x08", r"truncated or not a safetensors file"),
        ("unet/diffusion_pytorch_model.safetensors", None, r"model\.safetensors: no such file"),
        ("unet/diffusion_pytorch_model.safetensors", pickle.dumps(Payload()), r"no code in it was run"),
    ],
)
def test_damaged_folders_are_refused(path, content, message):
    save_pipeline(DDPMScheduler)
    Path("public", path).unlink()
    if content is not None:
        Path("public", path).write_bytes(content)
    refused(message, read_public_denoiser, "public")
    assert not Path("owned").exists()


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    save_pipeline(DDPMScheduler)
    save_denoiser(Path("ours"), read_public_denoiser("public"))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    missing = r"^this denoiser needs the package diffusers; run `pip install 'rrcm\[diffusers\]'`$"
    refused(missing, small_unet)
    refused(missing, read_public_denoiser, "public")
    refused(missing, load_denoiser, "ours")


def test_other_sources_are_refused():
    Path("weights.pt").touch()
    refused(r"^weights\.pt: is a file; give a folder that diffusers has saved, or", read_public_denoiser, "weights.pt")
    refused(
        r"^nothing: no such file or folder; a model on the hub is called hf-hub:owner/name$",
        read_public_denoiser,
        "nothing",
    )


# What the files do not say: a trial on a few images


def flat_images(count: int, seed: int = 5) -> torch.Tensor:
    """Images (count, 1, 8, 8) in [0, 1], each of one grey with a slight gradient."""
    grey, slope = torch.rand(2, count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (grey + (slope - 0.5) * torch.linspace(-0.5, 0.5, 8)).clamp(0, 1).expand(-1, -1, 8, -1)


class MeanNetwork(BestNetwork):
    """The best network's prediction for images of one unknown grey."""

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        abar = by_image(self.abar[step])
        clean = (x.mean((1, 2, 3), keepdim=True) / abar.sqrt()).expand_as(x)
        noise = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
        return {"epsilon": noise, "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * clean, "sample": clean}[
            self.prediction_type
        ]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("stated", ["epsilon", "v_prediction", "sample"])
def test_a_denoiser_of_another_prediction_is_refused(monkeypatch, prediction_type, stated):
    abar = alphas_cumprod().float()
    denoiser = DiscreteDenoiser(MeanNetwork(abar, prediction_type), abar, stated)
    monkeypatch.setattr("rrcm.models.public_denoisers.read_public_denoiser", lambda *_, **__: denoiser)
    if stated == prediction_type:
        assert load_public_denoiser("it", flat_images(8), [0.25, 0.5]).prediction_type == stated
    else:  # at low noise the two may be close, and both better than the linear denoiser
        refused(
            f"^it: predicts {prediction_type}, not {stated}", load_public_denoiser, "it", flat_images(8), [0.25, 0.5]
        )


def test_the_best_linear_denoiser_has_the_error_that_is_compared_with():
    """It is the error for images of independent pixels, for which no denoiser is better."""
    images = 0.5 + 0.25 * randn(400, 1, 8, 8, seed=3)
    abar = alphas_cumprod()
    denoiser = DiscreteDenoiser(BestNetwork(abar, "sample"), abar, "sample")
    for sigma, (error, linear) in zip((0.25, 0.5), denoising_errors(denoiser, images, [0.25, 0.5]), strict=True):
        assert linear == pytest.approx(0.25 * 4 * sigma**2 / (0.25 + 4 * sigma**2), rel=0.02)
        assert error == pytest.approx(linear, rel=0.02)


def test_what_does_not_denoise_is_refused():
    load = partial(load_public_denoiser, sigmas=[0.5])
    save_pipeline(DDPMScheduler)
    refused(r"^public: does not denoise: at sigma 0\.5 its mean squared error is", load, "public", flat_images(8))
    refused(r"^public: needs 8 images \(N, C, H, W\) to be tried on", load, "public", flat_images(7))
    refused(r"is for images of 1 x 8 pixels, not of 3 x 8", load, "public", flat_images(8).expand(-1, 3, -1, -1))
    refused(r"is for images of 1 x 8 pixels, not of 1 x 16", load, "public", torch.rand(8, 1, 16, 16))
    grey = torch.full((8, 1, 8, 8), 0.5)  # all the same, so nothing is better than their mean
    refused(r"^public: does not denoise", load, "public", grey)


# Public denoisers as our model folders


@pytest.fixture
def public() -> DiscreteDenoiser:
    save_pipeline(DDPMScheduler, "v_prediction", "squaredcos_cap_v2", out_channels=2)
    return read_public_denoiser("public")


def test_a_public_denoiser_comes_back_from_our_folder(public):
    save_denoiser(Path("ours"), public, sigmas=[0.25, 1.0], source="somewhere")
    loaded = load_denoiser("ours")
    x = randn(5, 1, 8, 8)
    for t in (0.5, torch.tensor([0.003, 0.1, 0.7, 2.0, 500.0])):
        assert torch.equal(answer(loaded, x, t), answer(public, x, t))
    assert torch.equal(loaded.alphas_cumprod, public.alphas_cumprod)
    assert (loaded.image_size, loaded.channels, loaded.training) == (8, 1, False)
    config = json.loads(Path("ours/config.json").read_text())
    assert (config["kind"], config["source"], config["prediction_type"]) == (
        "denoiser",
        "somewhere",
        public.prediction_type,
    )
    assert config["learned_variance"] == (public.network.out_channels == 2)
    for entry, sigma in zip(config["discrete_steps"], (0.25, 1.0), strict=True):
        others = (public.levels / (2 * sigma)).log().abs()
        assert entry == {
            "sigma": sigma,
            "step": int(others.argmin()),
            "sigma_of_step": float(public.levels[others.argmin()]) / 2,
        }
        assert entry["sigma_of_step"] == pytest.approx(sigma, rel=0.01)


def test_a_public_denoiser_in_bfloat16_keeps_its_noise_levels(public):
    x, t = randn(4, 1, 8, 8), 0.5
    expected = answer(public, x, t)
    levels = public.levels.clone()
    rounded = answer(public.bfloat16(), x, t)
    assert torch.equal(public.levels, levels)
    assert rounded.dtype == torch.float32 and 0 < (rounded - expected).abs().max() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "score"}, r"is no denoiser \(prediction_type 'score'"),
        ({"architecture": {"network": "else"}}, r"config\.json: architecture.network = 'else': should be 'vit'"),
        ({"architecture": {"network": "diffusers"}}, r"config\.json: config: missing"),
        ({"architecture": 3}, r"config\.json: architecture = 3"),
    ],
)
def test_damaged_folders_of_ours_are_refused(changes, message):
    save_pipeline(DDPMScheduler)
    save_denoiser(Path("ours"), read_public_denoiser("public"))
    change_model(Path("ours"), **changes)
    refused(message, load_denoiser, "ours")
