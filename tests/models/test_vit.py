"""The network agrees with timm's, its parts with closed forms; model folders and schedules."""

import math
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close, assert_same_gradients
from timm.models.vision_transformer import VisionTransformer

from rrcm.models import vit
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import architecture, load_encoder, save_model
from rrcm.models.encoders import build_encoder
from rrcm.models.kinds import load_model_folder
from rrcm.models.vit import Block, BlockOptions, NoiseConditionedViT, attention, time_embedding
from rrcm.training.optim import layerwise_lr_scales, warmup_cosine
from rrcm.utils.errors import RRCMError


def small(**changes) -> NoiseConditionedViT:
    torch.manual_seed(0)
    return NoiseConditionedViT(
        **{"image_size": 8, "channels": 1, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, **changes}
    )


def timm_vit(network: NoiseConditionedViT, t: float) -> VisionTransformer:
    """timm's own network with the weights of `network`; a register token stands for the time token of level t."""
    block = network.blocks[0]
    twin = VisionTransformer(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=0,
        embed_dim=32,
        depth=2,
        num_heads=2,
        qkv_bias=block.attn.qkv.bias is not None,
        reg_tokens=1,
        norm_layer=partial(torch.nn.LayerNorm, eps=block.norm1.eps),
    )
    twin.load_state_dict(network.state_dict() | {"reg_token": time_embedding(torch.tensor([t]), 32)[:, None]})
    return twin


def distinct(network: NoiseConditionedViT) -> NoiseConditionedViT:
    """The network with every weight moved, so that no bias is 0 and no scale 1."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_parameters_are_named_and_shaped_as_timms(qkv_bias):
    network = small(block=BlockOptions(qkv_bias=qkv_bias))
    shapes = {name: p.shape for name, p in timm_vit(network, 1.0).named_parameters() if name != "reg_token"}
    assert {name: p.shape for name, p in network.named_parameters()} == shapes
    assert list(dict(network.named_parameters())) == list(shapes)


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.no_grad()
def test_the_network_answers_as_timms_to_the_bit(monkeypatch, qkv_bias):
    """This compares all tokens of the last block. Computing only its class token reorders sums, so rounding differs."""
    network, images, t = distinct(small(block=BlockOptions(qkv_bias=qkv_bias))), torch.randn(5, 1, 8, 8), 0.7
    twin = timm_vit(network, t)
    assert twin.blocks[0].attn.fused_attn
    scale = (torch.tensor(t).square() + 0.25).rsqrt()
    expected = twin.forward_features(scale * images)[:, 0]
    assert_close(network(images, t), expected)
    monkeypatch.setattr(Block, "forward_cls", lambda block, tokens: block(tokens)[:, 0])
    assert torch.equal(network(images, t), expected)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tokens_read", [6, 1])
def test_gradients_of_a_block_are_timms(tokens_read, qkv_bias):
    """For all tokens, and for the class token alone."""
    network = distinct(small(block=BlockOptions(qkv_bias=qkv_bias)))
    block, twin = network.blocks[-1], timm_vit(network, 1.0).blocks[-1]
    tokens = torch.randn(5, 6, 32)
    one, two = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    found = block(one) if tokens_read == 6 else block.forward_cls(one)[:, None]
    expected = twin(two)[:, :tokens_read]
    assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), [one, *block.parameters()])
    references = torch.autograd.grad((expected * weights).sum(), [two, *twin.parameters()])
    names = ["tokens", *dict(block.named_parameters())]
    assert_same_gradients(dict(zip(names, gradients, strict=True)), dict(zip(names, references, strict=True)))


def test_images_of_another_size_are_refused():
    """4 x 16 pixels give as many patches as 8 x 8."""
    with pytest.raises(ValueError, match=r"\(4, 16\) pixels"):
        small()(torch.randn(1, 1, 4, 16), 1.0)


@pytest.mark.parametrize("large", [1, 5 * 6 * 4 * 32 * 4 + 1])
def test_a_large_gelu_output_is_recomputed_in_the_backward_pass(monkeypatch, large):
    """GELU's input is kept, and its output only if it is small."""
    monkeypatch.setattr(vit, "RECOMPUTE_MIN_BYTES", large)
    block, alive = small().blocks[0], {}

    class Watched(torch.nn.GELU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            alive.update({"in": weakref.ref(x), "out": weakref.ref(y)})
            return y

    block.mlp.act = Watched()
    answer = block(torch.randn(5, 6, 32))
    assert alive["in"]() is not None and (alive["out"]() is None) == (large == 1)
    answer.sum().backward()


def test_attention_in_half_precision_agrees_with_float32_up_to_rounding():
    """Values and gradients of plain products agree with torch's fused kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2, 6, 8).bfloat16() for _ in range(3))
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    halves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, found = torch.nn.functional.scaled_dot_product_attention(*exact), attention(*halves)
    assert_close(found.float(), expected, 2e-2)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found.float() * weights).sum(), halves)
    for a, b in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert_close(a.float(), b, 3e-2)


def test_time_embedding_is_cosines_then_sines_of_250_log_t():
    embedding = time_embedding(torch.tensor([0.5]), 8)[0]
    for i in range(4):
        angle = 250 * math.log(0.5) * 10000 ** (-i / 4)
        assert embedding[i] == pytest.approx(math.cos(angle), abs=1e-4)
        assert embedding[4 + i] == pytest.approx(math.sin(angle), abs=1e-4)


def test_images_are_scaled_by_c_in_and_may_differ_in_t():
    network = small().eval()
    x = torch.randn(3, 1, 8, 8)
    levels = torch.tensor([0.1, 1.0, 5.0])
    together = network(x, levels)
    for i, t in enumerate(levels.tolist()):
        assert_close(together[i : i + 1], network(x[i : i + 1], t))
    seen = []
    network.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(x, 2.0)
    torch.testing.assert_close(seen[0], x / math.sqrt(4 + 0.25))


def test_moco_initialisation_has_its_bounds():
    """Uniform weights: the largest of many is within 1 % of the bound and never above it; biases are zero."""
    model = {"patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3, "grad_checkpointing": False}
    model |= {"architecture": "vit", "init": "moco_v3", "freeze_patch_embed": True, "stem": "patches"}
    network = build_encoder(SimpleNamespace(**model), SimpleNamespace(image_size=8, channels=1))
    qkv = network.blocks[0].attn.qkv.weight
    for weight, bound in (
        (qkv, math.sqrt(6 / (96 + 96))),
        (network.blocks[0].mlp.fc1.weight, math.sqrt(6 / (96 + 384))),
        (network.patch_embed.proj.weight, math.sqrt(6 / (3 * 16 + 96))),
    ):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not network.blocks[0].attn.proj.bias.any() and not network.patch_embed.proj.bias.any()
    assert not any(p.requires_grad for p in network.patch_embed.parameters())


def test_models_come_back_from_disk_bit_for_bit(tmp_path):
    classifier = NoiseConditionedClassifier(small(), num_classes=7, t=1.0).eval()
    save_model(tmp_path / "c", classifier, method="rrcm")
    save_model(tmp_path / "e", classifier.encoder)
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_model_folder(tmp_path / "c").classifier(pixels), classifier(pixels))
    again = load_encoder(tmp_path / "e", architecture(classifier.encoder))
    assert torch.equal(again(pixels, 1.0), classifier.encoder(pixels, 1.0))
    with pytest.raises(RRCMError, match="without a head"):
        load_model_folder(tmp_path / "e")


def test_layer_rates():
    rates = layerwise_lr_scales(NoiseConditionedClassifier(small(), 10, 1.0), 0.5)
    assert rates["encoder.patch_embed.proj.weight"] == rates["encoder.cls_token"] == rates["encoder.pos_embed"] == 0.125
    assert rates["encoder.blocks.0.attn.qkv.weight"] == 0.25 and rates["encoder.blocks.1.mlp.fc1.bias"] == 0.5
    assert rates["encoder.norm.weight"] == rates["head.weight"] == 1.0


def test_warmup_cosine():
    assert [warmup_cosine(s, 4, 12) for s in (0, 2, 4, 8, 12)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert warmup_cosine(0, 0, 10) == 1
