"""The network's pieces against timm's own and against closed forms."""

import math
import weakref

import pytest
import torch
from timm.models import vision_transformer

from rrcm.models import vit as model
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import architecture, load_classifier, load_encoder, save_model
from rrcm.models.vit import NoiseConditionedViT, attention, time_embedding
from rrcm.training.finetune import matched_epochs
from rrcm.training.optim import layerwise_lr_scales, warmup_cosine
from rrcm.utils.errors import RRCMError


def small(**changes) -> NoiseConditionedViT:
    torch.manual_seed(0)
    return NoiseConditionedViT(
        **{"image_size": 8, "channels": 1, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, **changes}
    )


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("tokens_read", [6, 1])
def test_a_block_is_timms(tokens_read, qkv_bias):
    """Values and every gradient equal those of timm's own, for all tokens and for the class token alone."""
    block = small(qkv_bias=qkv_bias).blocks[-1]
    if qkv_bias:
        torch.nn.init.normal_(block.attn.qkv.bias)
    tokens = torch.randn(5, 6, 32)
    one, two = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    ours = block(one) if tokens_read == 6 else block.class_token(one)[:, None]
    theirs = vision_transformer.Block.forward(block, two)[:, :tokens_read]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad((ours * weights).sum(), [one, *block.parameters()])
    expected = torch.autograd.grad((theirs * weights).sum(), [two, *block.parameters()])
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("large", [1, 5 * 6 * 4 * 32 * 4 + 1])
def test_a_block_keeps_its_mlps_hidden_layer_once(monkeypatch, large):
    """What goes into GELU is kept for the backward pass, what comes out only where it is small."""
    monkeypatch.setattr(model, "RECOMPUTE_MIN_BYTES", large)
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


def test_attention_in_half_precision_is_that_of_float32_up_to_rounding():
    """Values and gradients: products one by one against torch's fused kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 2, 6, 8).bfloat16() for _ in range(3))
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    halves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, found = torch.nn.functional.scaled_dot_product_attention(*exact), attention(*halves)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((found.float() * weights).sum(), halves)
    for a, b in zip(gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        torch.testing.assert_close(a.float(), b, atol=3e-2, rtol=3e-2)


def test_time_embedding_is_cosines_then_sines_of_250_log_t():
    embedding = time_embedding(torch.tensor([0.5]), 8)[0]
    for i in range(4):
        angle = 250 * math.log(0.5) * 10000 ** (-i / 4)
        assert embedding[i] == pytest.approx(math.cos(angle), abs=1e-4)
        assert embedding[4 + i] == pytest.approx(math.sin(angle), abs=1e-4)


def test_an_image_is_scaled_by_c_in_and_t_may_differ_by_image():
    network = small().eval()
    x = torch.randn(3, 1, 8, 8)
    levels = torch.tensor([0.1, 1.0, 5.0])
    together = network(x, levels)
    for i, t in enumerate(levels.tolist()):
        torch.testing.assert_close(together[i : i + 1], network(x[i : i + 1], t), atol=1e-5, rtol=1e-4)
    seen = []
    network.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(x, 2.0)
    torch.testing.assert_close(seen[0], x / math.sqrt(4 + 0.25))


def test_moco_initialisation_has_its_bounds():
    """Uniform weights: the largest of many is within 1 % of the bound and never above it; biases are zero."""
    network = small(embed_dim=96, num_heads=3, init="moco_v3", freeze_patch_embed=True)
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
    assert torch.equal(load_classifier(tmp_path / "c")(pixels), classifier(pixels))
    again = load_encoder(tmp_path / "e", architecture(classifier.encoder))
    assert torch.equal(again(pixels, 1.0), classifier.encoder(pixels, 1.0))
    with pytest.raises(RRCMError, match="without a head"):
        load_classifier(tmp_path / "e")


def test_layer_rates():
    rates = layerwise_lr_scales(NoiseConditionedClassifier(small(), 10, 1.0), 0.5)
    assert rates["encoder.patch_embed.proj.weight"] == rates["encoder.cls_token"] == rates["encoder.pos_embed"] == 0.125
    assert rates["encoder.blocks.0.attn.qkv.weight"] == 0.25 and rates["encoder.blocks.1.mlp.fc1.bias"] == 0.5
    assert rates["encoder.norm.weight"] == rates["head.weight"] == 1.0


def test_matched_epochs_spend_the_same_compute():
    assert matched_epochs(10, pretrain_compute=12_000, shared_by=3, epoch_compute=400) == 20


def test_warmup_cosine():
    assert [warmup_cosine(s, 4, 12) for s in (0, 2, 4, 8, 12)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert warmup_cosine(0, 0, 10) == 1
