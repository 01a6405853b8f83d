"""Denoisers, samplers, and the base classifiers that denoise first."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import assert_close, change_model
from torch import nn

from rrcm.certification.noise import ESTIMATE, CounterDraw
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.denoised import DDS, DensePure, DiffSmooth, denoise_pixels, majority_vote, write_denoised
from rrcm.models.denoiser import (
    Denoiser,
    EDMDenoiser,
    PixelViT,
    load_denoiser,
    loss_weight,
    preconditioning,
    save_denoiser,
)
from rrcm.models.folders import part_of
from rrcm.models.load import load_base_classifier, load_model_folder
from rrcm.models.sampler import reverse_levels, reverse_sde
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError

K, SIGMA = 5, 0.5
DATA_STD = 0.3  # of the Gaussian data whose best denoiser is known


class Identity(Denoiser):
    image_size, channels = 8, 1

    def forward(self, noisy, t):
        return noisy


class Shrinking(Denoiser):
    """The best denoiser of Gaussian data with mean 0: D(x; t) = x s^2 / (s^2 + t^2)."""

    image_size, channels = 8, 1

    def forward(self, noisy, t):
        return noisy * DATA_STD**2 / (DATA_STD**2 + t**2)


def vit(**sizes: int) -> NoiseConditionedViT:
    return NoiseConditionedViT(8, 1, **({"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2} | sizes))


def trained_denoiser(seed: int = 0) -> EDMDenoiser:
    """A denoiser whose head is not zero."""
    torch.manual_seed(seed)
    denoiser = EDMDenoiser(PixelViT(vit()))
    nn.init.normal_(denoiser.network.head.weight, std=0.1)
    return denoiser.eval()


def classifier(seed: int = 1) -> NoiseConditionedClassifier:
    torch.manual_seed(seed)
    found = NoiseConditionedClassifier(vit(), K, t=0.002)
    nn.init.normal_(found.head.weight)
    return found.eval()


def rows(count: int = 32) -> tuple[torch.Tensor, CounterDraw]:
    """Noisy images and their draws."""
    generator = torch.Generator().manual_seed(3)
    noisy = torch.rand(count, 1, 8, 8, generator=generator) + SIGMA * torch.randn(count, 1, 8, 8, generator=generator)
    number = torch.arange(count)
    return noisy, CounterDraw(0, torch.full_like(number, ESTIMATE), torch.zeros_like(number), number)


@torch.no_grad()
def test_the_denoiser_follows_edm():
    """Each factor against the formulas of the paper's table 1, written out once more."""
    denoiser, (noisy, _) = trained_denoiser(), rows(4)
    t = torch.tensor([0.01, 0.5, 1.0, 40.0])
    sd = 0.5
    skip, out, scale = sd**2 / (t**2 + sd**2), t * sd / (sd**2 + t**2) ** 0.5, 1 / (sd**2 + t**2) ** 0.5
    factors = preconditioning(t)
    for found, expected in zip(factors, (skip, out, scale, t.log() / 4), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss_weight(t), 1 / out**2, rtol=1e-5, atol=0)
    network = denoiser.network
    tokens = network.encoder.patch_tokens(noisy, t)
    patches = network.head(tokens).unflatten(1, (2, 2)).unflatten(-1, (4, 4))  # (B, rows, columns, 4, 4)
    output = patches.permute(0, 1, 3, 2, 4).reshape(4, 1, 8, 8)
    expected = skip[:, None, None, None] * noisy + out[:, None, None, None] * output
    assert_close(denoiser(noisy, t), expected)
    each = torch.cat([denoiser(image[None], float(level)) for image, level in zip(noisy, t, strict=True)])
    assert_close(denoiser(noisy, t), each)


def test_before_training_a_denoiser_scales_its_input():
    noisy, _ = rows(4)
    assert torch.equal(EDMDenoiser(PixelViT(vit()))(noisy, 1.0), noisy * preconditioning(torch.tensor(1.0)).c_skip)


@torch.no_grad()
def test_patch_tokens_are_those_that_the_class_token_attends_to():
    encoder, (noisy, _) = vit(), rows(3)
    all_tokens = encoder(noisy, 1.0, visible=torch.arange(4).expand(3, -1))
    torch.testing.assert_close(encoder.patch_tokens(noisy, 1.0), all_tokens[:, 2:])


def test_levels_of_the_reverse_process():
    assert reverse_levels(1.0, 1) == [1.0, 0.0]
    levels = reverse_levels(2.0, 6)
    assert levels[0] == pytest.approx(2.0) and levels[-1] == 0 and sorted(levels, reverse=True) == levels
    assert len(levels) == 7 and levels[-2] > 0.002


@torch.no_grad()
def test_ancestral_steps_have_the_moments_of_the_posterior():
    """From data to noise and one step back: variances and covariances must be those at the lower level.

    The best denoiser of Gaussian data does not return x_0, so the variance is the variance of D plus the variance of
    the step.
    """
    generator = torch.Generator().manual_seed(1)
    count, t, s = 200_000, 1.0, 0.4
    noisy = (DATA_STD**2 + t**2) ** 0.5 * torch.randn(count, 1, 1, 1, generator=generator)
    noise = torch.randn(count, 1, 1, 1, generator=generator)
    stop = reverse_sde(Shrinking(), noisy, [t, s], lambda step: noise)
    shrink, share = DATA_STD**2 / (DATA_STD**2 + t**2), (s / t) ** 2
    slope = shrink + share * (1 - shrink)
    expected = slope**2 * (DATA_STD**2 + t**2) + s**2 * (1 - share)
    assert float(stop.var()) == pytest.approx(expected, rel=4 * (2 / count) ** 0.5)
    assert float((stop * noisy).mean()) == pytest.approx(slope * (DATA_STD**2 + t**2), rel=0.02)


@torch.no_grad()
def test_many_ancestral_steps_give_the_distribution_of_the_data():
    generator = torch.Generator().manual_seed(2)
    count = 50_000
    noisy = (DATA_STD**2 + 4.0) ** 0.5 * torch.randn(count, 1, 1, 1, generator=generator)
    levels = reverse_levels(2.0, 200)
    found = reverse_sde(Shrinking(), noisy, levels, lambda step: torch.randn(noisy.shape, generator=generator))
    assert float(found.std()) == pytest.approx(DATA_STD, rel=0.02)


@torch.no_grad()
def test_dds_with_the_identity_is_the_classifier_of_clipped_pixels():
    part, (noisy, _) = classifier(), rows()
    assert_close(DDS(Identity(), part, sigma=SIGMA, classifier_size=8)(noisy), part(noisy.clamp(0, 1)))
    assert torch.equal(denoise_pixels(Identity(), noisy, sigma=SIGMA), (2 * noisy - 1).clamp(-1, 1) / 2 + 0.5)


@torch.no_grad()
def test_simplest_cases_are_dds():
    denoiser, part, (noisy, draw) = trained_denoiser(), classifier(), rows()
    dds = DDS(denoiser, part, sigma=SIGMA, classifier_size=8)(noisy)
    smooth = DiffSmooth(denoiser, part, sigma=SIGMA, classifier_size=8, num_noise=3, local_sigma=0.0)(noisy, draw)
    assert_close(smooth, dds.log_softmax(1))
    pure = DensePure(denoiser, part, sigma=SIGMA, classifier_size=8, runs=1, steps=1)(noisy, draw)
    assert torch.equal(pure.argmax(1), dds.argmax(1)) and dds.argmax(1).unique().numel() > 1


@torch.no_grad()
def test_diffsmooth_averages_probabilities_over_local_noises():
    denoiser, part, (noisy, draw) = trained_denoiser(), classifier(), rows()
    found = DiffSmooth(denoiser, part, sigma=SIGMA, classifier_size=8, num_noise=4, local_sigma=0.25)(noisy, draw)
    clean = denoise_pixels(denoiser, noisy, sigma=SIGMA)
    copies = [part(clean + 0.25 * draw.normal(f"local noise {copy}", (1, 8, 8))).softmax(1) for copy in range(4)]
    assert_close(found.exp(), sum(copies) / 4)


@torch.no_grad()
def test_densepure_votes_over_runs_with_noise_of_their_own():
    denoiser, part, (noisy, draw) = trained_denoiser(), classifier(), rows()
    found = DensePure(denoiser, part, sigma=SIGMA, classifier_size=8, runs=3, steps=2)(noisy, draw)
    t, s = 2 * SIGMA, reverse_levels(2 * SIGMA, 2)[1]
    votes = []
    for run in range(3):
        first = denoiser(2 * noisy - 1, t).clamp(-1, 1)
        share = (s / t) ** 2
        mean = first + share * (2 * noisy - 1 - first)
        moved = mean + s * (1 - share) ** 0.5 * draw.normal(f"reverse run {run} step 0", (1, 8, 8))
        votes.append(part((denoiser(moved, s).clamp(-1, 1) + 1) / 2).argmax(1))
    expected = [
        max(answers, key=lambda c, a=answers: (a.count(c), -a.index(c)))
        for answers in zip(*map(list, map(torch.Tensor.tolist, votes)), strict=True)
    ]
    assert found.argmax(1).tolist() == expected


def test_of_equally_many_votes_those_of_the_earliest_run_win():
    choices = torch.tensor([[2, 1, 1], [2, 1, 0], [3, 3, 3], [1, 0, 0], [4, 1, 4]])
    assert majority_vote(choices, K).argmax(1).tolist() == [1, 2, 3, 0, 4]
    every = torch.cartesian_prod(*[torch.arange(3)] * 5)
    expected = [max(row, key=lambda c, r=row: (r.count(c), -r.index(c))) for row in every.tolist()]
    assert majority_vote(every, 3).argmax(1).tolist() == expected


@pytest.mark.parametrize("kind", ["densepure", "diffsmooth"])
def test_votes_do_not_depend_on_packing_or_order(kind):
    """Two images together, in reverse order, in pieces, and in batches of the same shape with other rows."""
    build = {
        "densepure": (DensePure, {"runs": 2, "steps": 2}),
        "diffsmooth": (DiffSmooth, {"num_noise": 2, "local_sigma": 0.25}),
    }
    make, settings = build[kind]
    smoothed = SmoothedClassifier(
        make(trained_denoiser(), classifier(), sigma=SIGMA, classifier_size=8, **settings), SIGMA, K, batch_size=16
    )
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    one, other = (SampleRequest(image, index, ESTIMATE, 0, 40) for image, index in zip(images, (4, 9), strict=True))
    together = smoothed.count_votes([one, other])
    swapped = smoothed.count_votes([other, one])
    pieces = [smoothed.count_votes([SampleRequest(images[0], 4, ESTIMATE, *span)])[0] for span in ((0, 7), (7, 40))]
    assert (together == swapped[::-1]).all() and (together[0] == sum(pieces)).all()
    assert (together.sum(1) == 40).all() and (together > 0).sum() > 2


def saved(folder: Path, settings: dict | None = None, kind: str = "dds") -> Path:
    """A model folder of kind "denoised" with its parts beside it."""
    save_denoiser(folder / "denoiser", trained_denoiser())
    save_model(folder / "clean", classifier(), class_names=list("abcde"))
    target = folder / "dds/sigma_0.5"
    target.mkdir(parents=True)
    parts = {"denoiser": part_of(target, "../../denoiser"), "classifier": part_of(target, "../../clean")}
    write_denoised(target, kind, parts, list("abcde"), sigma=SIGMA, settings=settings or {}, parameters=1)
    return target


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("dds", {}), ("densepure", {"runs": 2, "steps": 2}), ("diffsmooth", {"num_noise": 2, "local_sigma": 0.1})],
)
def test_a_model_folder_gives_the_same_answers(tmp_path, kind, settings):
    loaded = load_base_classifier(saved(tmp_path, settings, kind))
    made = {"dds": DDS, "densepure": DensePure, "diffsmooth": DiffSmooth}[kind]
    noisy, draw = rows()
    expected = made(trained_denoiser(), classifier(), sigma=SIGMA, classifier_size=8, **settings)(noisy, draw)
    assert torch.equal(loaded.classifier(noisy, draw), expected)
    assert (loaded.image_size, loaded.channels, loaded.class_names, loaded.sigma) == (8, 1, list("abcde"), SIGMA)


@torch.no_grad()
def test_bfloat16_rounds_networks_and_no_pixels(tmp_path):
    """The noise and the skip connection stay in float32, so the estimate changes little even at loud noise."""
    loaded, (noisy, _) = load_model_folder(saved(tmp_path)), rows()
    smoothed = SmoothedClassifier(loaded.classifier, SIGMA, K, precision="bf16")
    half = smoothed.network.denoiser
    assert next(half.parameters()).dtype == torch.bfloat16
    estimate, exact = half(noisy, 1.0), loaded.classifier.denoiser(noisy, 1.0)
    assert estimate.dtype == torch.float32 and (estimate - exact).abs().max() < 0.02
    assert (smoothed.network(noisy).argmax(1) == loaded.classifier(noisy).argmax(1)).float().mean() > 0.8


@torch.no_grad()
def test_a_timm_model_may_classify_and_has_its_own_size(tmp_path):
    import timm
    from timm.models import save_for_hf

    network = timm.create_model("test_vit", num_classes=K, in_chans=1)
    save_for_hf(network, tmp_path / "timm", model_config={"num_classes": K}, model_args={"in_chans": 1})
    from rrcm.utils.tensors import sha256_tensors

    name = f"local-dir:{tmp_path / 'timm'}"
    part = load_base_classifier(name)
    target = saved(tmp_path / "models")
    config = json.loads((target / "config.json").read_text())
    config["parts"]["classifier"] = {"model": name, "sha256": sha256_tensors(part.classifier.state_dict())}
    change_model(target, parts=config["parts"])
    loaded, (noisy, _) = load_model_folder(target), rows(4)
    clean = denoise_pixels(trained_denoiser(), noisy, sigma=SIGMA)
    clean = nn.functional.interpolate(clean, 160, mode="bicubic", antialias=True)
    assert loaded.image_size == 8 and part.image_size == 160
    torch.testing.assert_close(loaded.classifier(noisy), part.classifier(clean))
    config["parts"]["classifier"]["sha256"] = "0" * 64
    change_model(target, parts=config["parts"])
    with pytest.raises(RRCMError, match="has other weights than"):
        load_model_folder(target)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda target: change_model(target.parents[1] / "denoiser", seed=7), "denoiser: is not the part that"),
        (lambda target: change_model(target, parts={}), "parts.denoiser: missing"),
        (lambda target: change_model(target, denoised="magic"), "denoised = 'magic': should be 'dds'"),
        (lambda target: change_model(target, settings={"runs": 2}), "runs: unknown key"),
        (lambda target: change_model(target, class_names=["a"]), "do not fit"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, said):
    target = saved(tmp_path)
    damage(target)
    with pytest.raises(RRCMError, match=said) as error:
        load_model_folder(target)
    assert "\n" not in str(error.value)


def test_what_denoises_first_is_no_part_of_another(tmp_path):
    target = saved(tmp_path / "inner", {"runs": 2, "steps": 2}, "densepure")
    outer = saved(tmp_path / "outer")
    parts = {"denoiser": part_of(outer, "../../denoiser"), "classifier": part_of(outer, os.path.relpath(target, outer))}
    change_model(outer, parts=parts)
    with pytest.raises(RRCMError, match="a part of it is itself a DenoisedClassifier"):
        load_model_folder(outer)


def test_denoisers_are_no_classifiers(tmp_path):
    saved(tmp_path)
    with pytest.raises(RRCMError, match="kind 'denoiser' cannot be loaded here"):
        load_model_folder(tmp_path / "denoiser")
    with pytest.raises(RRCMError, match="kind 'classifier' cannot be loaded here"):
        load_denoiser(tmp_path / "clean")
