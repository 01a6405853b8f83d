"""DMAE, MoCo-v3 and the ablations of rRCM: closed forms and limits."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from torch import nn

from rrcm.models.heads import Decoder, EncoderWithPredictor, MaskedAutoencoder
from rrcm.models.vit import BlockOptions, EncoderWithProjector, NoiseConditionedViT, mlp_head
from rrcm.objectives import PRETRAINING
from rrcm.objectives.base import StepRandomness
from rrcm.objectives.contrastive import Contrastive, info_nce
from rrcm.objectives.dmae import DMAE, normalized_patches, visible_patches
from rrcm.objectives.rrcm import RRCMInputs, RRCMLevels, rrcm_loss

B = 6
DRAW = StepRandomness(0, 3, range(B), B, torch.device("cpu"))
PATCHES = {"image_size": 8, "channels": 1, "patch_size": 4}


def images(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(1)) - 1


def dmae(mask_ratio: float, sigma: float) -> DMAE:
    sizes = {"embed_dim": 16, "depth": 1, "num_heads": 2, "t_min": 0.002}
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return DMAE(**PATCHES, **sizes, mask_ratio=mask_ratio, sigma=sigma, **decoder)


def identity_autoencoder() -> MaskedAutoencoder:
    """Its tokens are the pixels of the patches, which its LayerNorms normalize, and its blocks add nothing.

    So it returns the normalized pixels of visible patches, and 0 in place of the others.
    """
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=1, num_heads=2, block=BlockOptions(norm_eps=1e-12))
    network = MaskedAutoencoder(encoder, Decoder(encoder, 16, 1, 2))
    network.decoder.norm.eps = 1e-12
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        encoder.patch_embed.proj.weight.copy_(torch.eye(16).view(16, 1, 4, 4))
        network.decoder.embed.weight.copy_(torch.eye(16))
        network.decoder.head.weight.copy_(torch.eye(16) * (15 / 16) ** 0.5)  # the target's variance is unbiased
        encoder.norm.weight.fill_(1)
        network.decoder.norm.weight.fill_(1)
    return network


def reconstruction(mask_ratio: float, sigma: float) -> float:
    networks = SimpleNamespace(student=identity_autoencoder(), teacher=None)
    return float(dmae(mask_ratio, sigma)(networks, {"image": images(B, 1, 8, 8)}, DRAW)["loss"].detach())


def test_without_mask_and_noise_the_identity_reconstructs_everything():
    assert reconstruction(0.0, 0.0) < 1e-9


@pytest.mark.parametrize("mask_ratio", [0.25, 0.5, 0.75])
def test_visible_and_masked_patches_have_the_same_weight(mask_ratio):
    """Visible patches have no error, and the error of a masked patch is its own variance, 15 / 16."""
    assert reconstruction(mask_ratio, 0.0) == pytest.approx(mask_ratio * 15 / 16, rel=1e-4)


def test_the_target_is_the_image_without_noise():
    """The identity reconstructs the noisy patches, so its loss is their distance to the clean ones."""
    image = images(B, 1, 8, 8)
    noisy = image + 0.5 * DRAW.normal("masked image's noise", (1, 8, 8))
    expected = (normalized_patches(noisy, 4) - normalized_patches(image, 4)).square().mean()
    assert expected > 0.1 and reconstruction(0.0, 0.25) == pytest.approx(float(expected), rel=1e-3)


def test_patches_are_those_of_the_encoder_and_normalized():
    image = images(2, 3, 8, 8)
    patches, corner = normalized_patches(image, 4), image[1, :, 4:, :4].flatten()  # third of four, row by row
    assert_close(patches[1, 2], (corner - corner.mean()) / corner.std(), 1e-4)
    encoder = NoiseConditionedViT(8, 3, 4, embed_dim=48, depth=1, num_heads=2)
    nn.init.zeros_(encoder.patch_embed.proj.bias)
    encoder.patch_embed.proj.weight.data.copy_(torch.eye(48).view(48, 3, 4, 4))
    torch.testing.assert_close(encoder.patch_embed(image)[1, 2], corner)


def test_masks_are_drawn_per_image_and_uniformly():
    visible = visible_patches(torch.rand(4000, 5, generator=torch.Generator().manual_seed(0)), 2)
    assert (visible.diff(dim=1) > 0).all()
    share = nn.functional.one_hot(visible, 5).sum(1).float().mean(0)
    torch.testing.assert_close(share, torch.full((5,), 0.4), atol=0.03, rtol=0)
    assert [dmae(ratio, 0.0).num_visible for ratio in (0.0, 0.5, 0.75, 0.99)] == [4, 2, 1, 1]


def test_an_encoder_that_sees_all_patches_has_the_class_token_of_the_representation():
    torch.manual_seed(0)
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=2, num_heads=2)
    every, image = torch.arange(4).expand(B, -1), images(B, 1, 8, 8)
    assert_close(encoder(image, 0.7, every)[:, 0], encoder(image, 0.7))
    few = torch.tensor([[1, 3]]).expand(B, -1)
    other = image.clone()
    other[:, :, :, :4] += 1  # patches 0 and 2
    assert encoder(image, 0.7, few).shape == (B, 4, 16)
    torch.testing.assert_close(encoder(image, 0.7, few), encoder(other, 0.7, few))


def contrastive_networks(last_norm: bool) -> SimpleNamespace:
    torch.manual_seed(0)
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=1, num_heads=2)
    student = EncoderWithProjector(encoder, 32, 8, last_norm=last_norm)
    teacher = EncoderWithProjector(NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=1, num_heads=2), 32, 8, last_norm)
    return SimpleNamespace(student=student, teacher=teacher)


CONTRASTIVE = {"projector_hidden_dim": 32, "projection_dim": 8, "temperature": 0.3}
CONTRASTIVE |= {"t_min": 0.002, "evaluate_sigmas": [0.5]}


def test_moco_v3_without_predictor_and_last_norm_is_info_nce_times_two_tau():
    networks, views = contrastive_networks(last_norm=False), {"view1": images(B, 1, 8, 8), "view2": -images(B, 1, 8, 8)}
    plain = Contrastive(**CONTRASTIVE)(networks, views, DRAW)["loss"]
    networks.student = EncoderWithPredictor(networks.student, 32, 8)
    networks.student.predictor = nn.Identity()
    moco = PRETRAINING["moco_v3"](**CONTRASTIVE)
    torch.testing.assert_close(moco(networks, views, DRAW)["loss"], 2 * 0.3 * plain)


def test_the_heads_of_moco_v3_are_the_published_ones():
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=1, num_heads=2)
    student, teacher = PRETRAINING["moco_v3"](**CONTRASTIVE).build_student_and_teacher(encoder)
    assert not hasattr(teacher, "predictor")
    kinds = ["Linear", "SyncBatchNorm1d", "ReLU"]
    layers = [[type(layer).__name__ for layer in head] for head in (student.projector, student.predictor)]
    assert layers == [2 * kinds + kinds[:2], kinds + kinds[:2]]
    for head in (student.projector, student.predictor):
        assert head[-1].weight is None and not any(layer.bias is not None for layer in head[:-1:3])
        output = head(torch.randn(32, head[0].in_features))
        assert output.mean(0).abs().max() < 1e-5 and (output.var(0, correction=0) - 1).abs().max() < 1e-3


def test_a_batch_norm_without_weights_is_torchs():
    torch.manual_seed(0)
    head = mlp_head(5, 7, 3, last_norm=True)
    x = torch.randn(9, 5)
    torch.testing.assert_close(head(x), nn.functional.batch_norm(head[:-1](x), None, None, training=True))


def test_the_ablations_are_the_terms_of_rrcm():
    networks, (image, view1, view2, noise, other) = contrastive_networks(False), images(5, B, 1, 8, 8)
    inputs, levels = RRCMInputs(image, view1, view2, noise), RRCMLevels(1.7, 1.1)

    def loss(teacher, inputs):
        return rrcm_loss(networks.student, teacher, inputs, levels, temperature=0.3)

    both, alone = loss(networks.teacher, inputs), loss(None, inputs)
    assert torch.equal(both.total, both.contrastive + both.consistency) and not alone.contrastive.any()
    torch.testing.assert_close(alone.total, both.consistency)
    independent, encoder = loss(networks.teacher, inputs._replace(quieter_noise=other)), networks.student.encoder
    torch.testing.assert_close(independent.contrastive, both.contrastive)
    expected = info_nce(encoder(image + 1.7 * noise, 1.7), encoder(image + 1.1 * other, 1.1), 0.3)
    torch.testing.assert_close(independent.consistency, expected)


def test_constant_levels_are_the_largest_number_from_the_first_step_on():
    settings = {"projector_hidden_dim": 32, "projection_dim": 8, "steps": 100, "min_levels": 2, "max_levels": 8}
    settings |= {"t_min": 0.002, "t_max": 4.0, "rho": 7.0, "temperature": 0.3}
    growing, constant = (PRETRAINING[name](**settings) for name in ("rrcm", "rrcm_constant_levels"))
    assert [growing.schedule(step)["levels"] for step in (0, 99)] == [3, 9]
    assert [constant.schedule(step)["levels"] for step in (0, 99)] == [9, 9]


def test_dmae_without_mask_sees_all_patches_and_has_the_settings_of_dmae():
    """Only the mask is gone: the identity reconstructs everything, whatever `mask_ratio` says."""
    unmasked = dataclasses.replace(dmae(0.75, 0.0), masked=False)
    networks = SimpleNamespace(student=identity_autoencoder(), teacher=None)
    loss = unmasked(networks, {"image": images(B, 1, 8, 8)}, DRAW)["loss"]
    assert float(loss.detach()) < 1e-9 and unmasked.num_visible == unmasked.num_patches
    assert PRETRAINING["dmae_without_mask"].keywords == {"masked": False}
    assert unmasked.forwards_per_image > dmae(0.75, 0.0).forwards_per_image
