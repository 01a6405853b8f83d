"""The stem of convolutions: shapes, conditioning, hidden patches, cost, model folders, settings, and all trainings."""

from functools import partial

import pytest
import torch
from conftest import compose, make_project, stage
from torch import nn

from rrcm.config import load_config
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import architecture, load_encoder, save_model
from rrcm.models.denoiser import EDMDenoiser, PixelViT
from rrcm.models.stems import stem_multiply_adds
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives.base import StepRandomness
from rrcm.training.budget import build_pretraining_objective
from rrcm.training.optim import layerwise_lr_scales
from rrcm.training.pretrain import start_networks
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

SIZES = {"image_size": 28, "channels": 1, "patch_size": 7, "embed_dim": 32, "depth": 1, "num_heads": 2}


def network(stem: str = "convolutions", **changes) -> NoiseConditionedViT:
    torch.manual_seed(0)
    return NoiseConditionedViT(**SIZES | changes, stem=stem)


@pytest.mark.parametrize("patch_size, image_size", [(7, 28), (4, 28), (2, 28), (4, 8), (4, 32)])
def test_a_stem_of_convolutions_has_a_token_for_each_patch_and_the_cost_that_is_counted(patch_size, image_size):
    vit, counted = network(patch_size=patch_size, image_size=image_size), []

    def count(outputs: int, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        counted.append(layer.weight.numel() * output[0].numel() // outputs)

    for layer in vit.patch_embed.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(partial(count, layer.weight.shape[0]))
    vit(torch.randn(2, 1, image_size, image_size), 1.0)
    assert vit.patch_tokens(torch.randn(2, 1, image_size, image_size), 1.0).shape[1] == (image_size // patch_size) ** 2
    assert sum(counted[: len(counted) // 2]) == stem_multiply_adds("convolutions", image_size, 1, patch_size, 32)


def test_a_stem_of_convolutions_learns_to_depend_on_the_noise_level():
    """The scale and shift of each channel start at zero, and have a gradient."""
    stem, images = network().patch_embed, torch.randn(2, 1, 28, 28)
    one, two = (torch.randn(2, 32) for _ in range(2))
    assert torch.equal(stem(images, one), stem(images, two))
    stem(images, one).square().sum().backward()
    assert stem.noise.weight.grad.abs().min(dim=1).values.all()
    nn.init.normal_(stem.noise.weight)
    assert not torch.equal(stem(images, one), stem(images, two))


def test_no_token_depends_on_the_pixels_of_hidden_patches():
    vit, visible = network(), torch.tensor([[0, 6, 15], [1, 2, 5]])
    images = torch.randn(2, 1, 28, 28)
    others = torch.randn(2, 1, 28, 28)
    for image, other, patches in zip(images, others, visible.tolist(), strict=True):
        for patch in patches:
            rows, columns = (slice(7 * k, 7 * k + 7) for k in divmod(patch, 4))
            other[:, rows, columns] = image[:, rows, columns]
    assert torch.equal(vit(images, 1.0, visible), vit(others, 1.0, visible))
    changed = images.clone()
    changed[0, 0, 8, 15] += 1  # in patch 6
    assert not torch.equal(vit(images, 1.0, visible), vit(changed, 1.0, visible))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(27, 28\) pixels"):
        network()(torch.randn(1, 1, 27, 28), 1.0)


def test_the_whole_stem_has_the_learning_rate_of_the_first_layer():
    rates = layerwise_lr_scales(NoiseConditionedClassifier(network(), 10, 1.0), 0.5)
    assert {rate for name, rate in rates.items() if ".patch_embed." in name} == {0.25}


@torch.no_grad()
def test_a_model_folder_records_the_stem(tmp_path):
    """The folder of a network with patches is as before there were stems."""
    vit, images = network(), torch.randn(2, 1, 28, 28)
    save_model(tmp_path / "convolutions", vit)
    save_model(tmp_path / "patches", network("patches"))
    assert torch.equal(load_encoder(tmp_path / "convolutions")(images, 1.0), vit(images, 1.0))
    assert architecture(load_encoder(tmp_path / "convolutions")) == architecture(vit)
    assert "stem" not in read_json(tmp_path / "patches/config.json")["architecture"]
    for found, wanted in (("patches", "convolutions"), ("convolutions", "patches")):
        load_encoder(tmp_path / found, SIZES | {"stem": found})
        with pytest.raises(RRCMError, match=f"stem is {found}, the settings want {wanted}"):
            load_encoder(tmp_path / found, SIZES | {"stem": wanted})


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.image_size=12", "model.patch_size=3"], "12 pixels to 4 tokens a side by halving; choose patch_size 2"),
        (["methods=[gaussian,dds]", "denoiser.embed_dim=34"], "denoiser.embed_dim 34 must be a multiple of 4"),
        (["model.freeze_patch_embed=true"], "stem convolutions needs init torch and freeze_patch_embed false"),
        (["methods=[timm]", "finetune.timm.model=vit_tiny_patch16_224"], "timm needs a ViT with model.stem patches"),
    ],
)
def test_settings_that_do_not_fit_a_stem_are_refused(tmp_path, overrides, message):
    with pytest.raises(RRCMError, match=message):
        load_config(compose(tmp_path / "params.yaml", "model.stem=convolutions", *overrides))


def test_rrcm_and_dmae_train_the_whole_stem(tmp_path):
    """Both on one encoder."""
    config = load_config(compose(tmp_path / "params.yaml", "model.stem=convolutions"))
    objective = build_pretraining_objective(config, "rrcm_dmae")
    networks = start_networks(objective, config.model, config.data, 0, torch.device("cpu"))
    batch = {name: 2 * torch.rand(8, 1, 8, 8) - 1 for name in ("image", "view1", "view2")}
    objective(networks, batch, StepRandomness(0, 0, range(8), 8, torch.device("cpu")))["loss"].backward()
    gradients = {name: p.grad for name, p in networks.student.encoder.patch_embed.named_parameters()}
    assert [name for name in gradients if name.startswith("layers.")] == ["layers.0.weight", "layers.1.weight"]
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_denoiser_has_pixels_for_each_token_of_the_stem():
    denoiser = EDMDenoiser(PixelViT(network()))
    assert denoiser(torch.randn(2, 1, 28, 28), 1.0).shape == (2, 1, 28, 28)
    assert denoiser.network.architecture["stem"] == "convolutions"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "network, entry",
    [("model.stem=convolutions", ("stem", "convolutions")), ("model.architecture=cnn", ("network", "cnn"))],
)
def test_every_training_runs_with_convolutions(tmp_path, tiny_shards, network, entry):
    """rRCM and DMAE on one encoder, a joint fine-tuning from it with layer decay, and a denoiser, which is a ViT."""
    settings = ["pretrain.objectives=[rrcm_dmae]", "methods=[rrcm_dmae_joint,dds]", network]
    short = ["pretrain.steps=3", "pretrain.warmup_steps=1", "finetune.epochs=1", "finetune.warmup_epochs=0"]
    project = make_project(tmp_path, tiny_shards, *settings, *short, "finetune.layer_decay.default=0.7")
    for command in ("pretrain rrcm_dmae", "finetune rrcm_dmae_joint joint", "denoiser"):
        answer = stage(project, *command.split())
        assert answer.returncode == 0, answer.stderr
    name, value = entry
    for folder in ("pretrain/rrcm_dmae", "rrcm_dmae_joint/joint"):
        assert read_json(project / "models" / folder / "config.json")["architecture"][name] == value
    denoiser = read_json(project / "models/denoiser/config.json")["architecture"]
    assert (denoiser["network"], denoiser.get("stem")) == ("vit", "convolutions" if name == "stem" else None)
