"""The CNN that is conditioned on the noise level: shapes, conditioning, cost, model folders, settings, trainings."""

import math

import pytest
import torch
from conftest import assert_close, compose
from torch import nn

from rrcm.config import load_config
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import architecture, load_encoder, save_model
from rrcm.models.cnn import NoiseConditionedCNN, activate, cnn_multiply_adds
from rrcm.models.kinds import load_model_folder
from rrcm.models.vit import NoiseConditionedViT, block_multiply_adds
from rrcm.objectives.base import StepRandomness
from rrcm.training.budget import build_pretraining_objective
from rrcm.training.optim import layerwise_lr_scales
from rrcm.training.pretrain import start_networks
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

CNN = ["model.architecture=cnn", "model.embed_dim=32"]


def network(image_size: int = 28, patch_size: int = 7, channels: int = 1, embed_dim: int = 64) -> NoiseConditionedCNN:
    torch.manual_seed(0)
    cnn = NoiseConditionedCNN(image_size, channels, patch_size, embed_dim)
    nn.init.normal_(cnn.noise.weight, std=0.1)
    return cnn


@pytest.mark.parametrize("patch_size, image_size", [(7, 28), (4, 28), (2, 28), (4, 8), (4, 32), (8, 64)])
def test_a_cnn_has_the_cost_that_is_counted(patch_size, image_size):
    cnn, counted = network(image_size, patch_size), []

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        counted.append(layer.weight.numel() * output[0].numel() // layer.weight.shape[0])

    for layer in cnn.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    assert cnn(torch.randn(2, 1, image_size, image_size), 1.0).shape == (2, 64)
    assert sum(counted) == cnn_multiply_adds(image_size, 1, patch_size, 64)


@torch.no_grad()
def test_one_level_is_the_same_as_that_level_for_each_image():
    cnn, images = network(), torch.randn(3, 1, 28, 28)
    assert_close(cnn(images, 0.5), cnn(images, torch.full((3,), 0.5)))
    mixed = cnn(images, torch.tensor([0.5, 1.0, 2.0]))
    for row, t in enumerate((0.5, 1.0, 2.0)):
        assert_close(mixed[row], cnn(images[row : row + 1], t)[0])
    assert (mixed[1] - cnn(images, 0.5)[1]).abs().max() > 0.01


def test_the_input_is_scaled_by_the_noise_level():
    cnn, images, seen = network(), torch.randn(2, 1, 28, 28), []
    cnn.convolutions[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    cnn(images, 2.0)
    torch.testing.assert_close(seen[0], images / math.sqrt(4 + 0.25))


def test_a_layer_is_normalized_then_scaled_and_shifted_per_channel():
    torch.manual_seed(0)
    x, scale, shift = torch.randn(2, 3, 5, 5), torch.randn(2, 3), torch.randn(2, 3)
    each = [(image - image.mean()) / torch.sqrt(image.var(correction=0) + 1e-5) for image in x]
    scaled = (1 + scale)[..., None, None] * torch.stack(each) + shift[..., None, None]
    expected = scaled * (1 + torch.erf(scaled / math.sqrt(2))) / 2
    assert_close(activate(x, torch.cat([scale, shift], dim=1)[..., None, None]), expected)


def test_every_weight_has_a_gradient_and_the_condition_starts_at_zero():
    cnn = NoiseConditionedCNN(28, 1, 7, 64)
    images = torch.randn(4, 1, 28, 28)
    assert_close(cnn.noise(torch.randn(2, 128)), torch.zeros(2, 2 * (4 + 8 + 16 + 64)))
    (cnn(images, 1.0) * torch.randn(4, 64)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in cnn.parameters())


def test_the_representation_does_not_depend_on_the_pixels_of_hidden_patches():
    cnn, visible = network(), torch.tensor([[0, 6, 15]])
    images = torch.randn(1, 1, 28, 28)
    hidden, seen = images.clone(), images.clone()
    hidden[0, 0, 8, 1] += 1  # in patch 4
    seen[0, 0, 8, 15] += 1  # in patch 6
    assert cnn(images, 1.0, visible).shape == (1, 1, 64)
    assert torch.equal(cnn(images, 1.0, visible), cnn(hidden, 1.0, visible))
    assert not torch.equal(cnn(images, 1.0, visible), cnn(seen, 1.0, visible))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(27, 28\) pixels"):
        network()(torch.randn(1, 1, 27, 28), 1.0)


@torch.no_grad()
def test_a_model_folder_records_the_network(tmp_path):
    cnn, images = network(), torch.rand(2, 1, 28, 28)
    save_model(tmp_path / "encoder", cnn)
    assert torch.equal(load_encoder(tmp_path / "encoder")(images, 1.0), cnn(images, 1.0))
    sizes = {"network": "cnn", "image_size": 28, "channels": 1, "patch_size": 7, "embed_dim": 64}
    assert read_json(tmp_path / "encoder/config.json")["architecture"] == sizes == architecture(cnn)
    load_encoder(tmp_path / "encoder", sizes)
    vit = NoiseConditionedViT(28, 1, 7, 64, depth=1, num_heads=2)
    save_model(tmp_path / "vit", vit)
    with pytest.raises(RRCMError, match="network is cnn, the settings want vit"):
        load_encoder(tmp_path / "encoder", architecture(vit))
    with pytest.raises(RRCMError, match="network is vit, the settings want cnn"):
        load_encoder(tmp_path / "vit", sizes)
    with pytest.raises(RRCMError, match="embed_dim is 64, the settings want 32"):
        load_encoder(tmp_path / "encoder", sizes | {"embed_dim": 32})
    classifier = NoiseConditionedClassifier(cnn, 10, 1.0).eval()
    save_model(tmp_path / "classifier", classifier)
    loaded = load_model_folder(tmp_path / "classifier")
    assert torch.equal(loaded.classifier(images), classifier(images))
    assert (loaded.image_size, loaded.channels) == (28, 1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.image_size=12", "model.patch_size=3"], "model.patch_size 3 must be 2, 4 or 6 for a cnn"),
        (
            ["model.patch_size=4", "model.embed_dim=36", "model.num_heads=2"],
            "embed_dim 36 must be a multiple of 8 for a cnn",
        ),
        (["model.stem=convolutions"], "stem convolutions is for a ViT; a cnn needs patches"),
        (["model.grad_checkpointing=true"], "grad_checkpointing True is for a ViT; a cnn needs False"),
        (["methods=[timm]", "finetune.timm.model=vit_tiny_patch16_224"], "timm needs a ViT with model.stem patches"),
    ],
)
def test_settings_that_do_not_fit_a_cnn_are_refused(tmp_path, overrides, message):
    with pytest.raises(RRCMError, match=message):
        load_config(compose(tmp_path / "params.yaml", *CNN, *overrides))


@pytest.mark.parametrize("objective", ["rrcm", "dmae", "rrcm_dmae"])
def test_pretrainings_train_the_whole_cnn(tmp_path, objective):
    """For DMAE the decoder sees the representation alone, and its cost is counted so."""
    config = load_config(compose(tmp_path / "params.yaml", *CNN))
    built = build_pretraining_objective(config, objective)
    networks = start_networks(built, config.model, config.data, 0, torch.device("cpu"))
    batch = {name: 2 * torch.rand(8, 1, 8, 8) - 1 for name in ("image", "view1", "view2")}
    built(networks, batch, StepRandomness(0, 0, range(8), 8, torch.device("cpu")))["loss"].backward()
    gradients = {name: p.grad for name, p in networks.student.encoder.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    if objective == "dmae":
        encoder, width = cnn_multiply_adds(8, 1, config.model.patch_size, 32), built.decoder_embed_dim
        patches = (8 // config.model.patch_size) ** 2
        decoder = width * (32 + patches * config.model.patch_size**2)
        decoder += built.decoder_depth * block_multiply_adds(1 + patches, width)
        assert built.forwards_per_image == pytest.approx(3 * (encoder + decoder) / encoder)


def test_layers_of_a_cnn_have_rates_from_first_to_last():
    rates = layerwise_lr_scales(NoiseConditionedClassifier(network(), 10, 1.0), 0.5)
    layers = ["encoder.convolutions.0.weight", "encoder.convolutions.2.weight", "encoder.linear.weight", "head.weight"]
    assert [rates[name] for name in layers] == [0.0625, 0.25, 0.5, 1.0]
    assert rates["encoder.noise.weight"] == 1.0
