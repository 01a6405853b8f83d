"""Requirements for all objectives, whatever their formulas. Every entry of both tables is tested."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_gradients
from torch.utils.flop_counter import FlopCounterMode

from rrcm.config import Config, load_config
from rrcm.methods import METHODS, SOFT_LABEL_OBJECTIVES
from rrcm.models import TRAINED_CLASSIFIERS, vit
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives import FINETUNING, PRETRAINING, cat_rs
from rrcm.objectives.adversarial import ascend
from rrcm.objectives.base import (
    Objective,
    StepRandomness,
    build_objective,
    draw_noise,
    noisy_logits,
    smoothed_cross_entropy,
    soft_cross_entropy,
)
from rrcm.objectives.cat_rs import cat_rs_loss
from rrcm.objectives.smoothadv import smoothadv_attack
from rrcm.training.budget import build_finetuning_objective, build_pretraining_objective
from rrcm.training.teacher import with_teacher
from rrcm.utils.distributed import autocast
from rrcm.utils.errors import RRCMError

B, K = 12, 5
CPU = torch.device("cpu")


@pytest.fixture
def config(project: Path) -> Config:
    return load_config(project / "params.yaml")


def encoder() -> NoiseConditionedViT:
    torch.manual_seed(0)
    return NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=2, num_heads=2)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def labelled() -> dict[str, torch.Tensor]:
    """A batch for fine-tuning, with soft labels that are 0 for one class."""
    soft_label = images(B, K)
    soft_label[:, -1] = 0
    target = torch.eye(K)[torch.arange(B) % K]
    return {"image": images(B, 1, 8, 8), "target": target, "soft_label": soft_label / soft_label.sum(1, keepdim=True)}


def pretraining_gradients(
    config: Config, name: str, num_chunks: int = 1, step: int = 3, precision: str = "fp32"
) -> dict:
    """Loss, terms and gradients of the student."""
    pretrain = config.pretrain.model_copy(update={"num_chunks": num_chunks})
    objective = build_pretraining_objective(config.model_copy(update={"pretrain": pretrain}), name)
    student, teacher = objective.build_student_and_teacher(encoder())
    batch = {key: 2 * images(B, 1, 8, 8) - 1 for key in ("image", "view1", "view2")}
    random = StepRandomness(0, step, list(range(B)), B, CPU)
    with autocast(CPU, precision):
        losses = objective(SimpleNamespace(student=student, teacher=teacher), batch, random)
    assert set(losses) == {"loss", *objective.terms}
    losses["loss"].backward()
    return losses | {key: p.grad for key, p in student.named_parameters()}


def finetuning_gradients(config: Config, method: str, step: int = 3) -> dict:
    """Loss, terms and gradients of the classifier."""
    classifier = TRAINED_CLASSIFIERS[METHODS[method].classifier](encoder(), K, 1.0).train()
    torch.nn.init.normal_(classifier.head.weight)
    objective = taught(build_finetuning_objective(config.finetune.settings(method, 0.5), method, 0.5))
    batch = labelled()
    losses = objective(
        lambda noisy, frozen=False: classifier(noisy), batch, StepRandomness(0, step, range(B), B, CPU, 1.0)
    )
    assert set(losses) == {"loss", *objective.terms}
    losses["loss"].backward()
    return losses | {key: p.grad for key, p in classifier.named_parameters()}


def taught(objective: Objective) -> Objective:
    """The objective, with a teacher if it is that of a student."""
    return with_teacher(objective, linear_classifier) if hasattr(objective, "teacher") else objective


def check(first: dict, again: dict, other_step: dict) -> None:
    for name, value in first.items():
        assert value is not None and value.isfinite().all(), name
        assert torch.equal(value, again[name]), f"{name}: another result for the same seed"
    assert any(not torch.equal(value, other_step[name]) for name, value in first.items()), "the step changes nothing"
    assert all(value.abs().sum() > 0 for name, value in first.items() if name.endswith("weight"))


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_reaches_every_parameter_and_draws_by_seed_and_step(config, name):
    check(*(pretraining_gradients(config, name, step=step) for step in (3, 3, 4)))


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_in_chunks_is_the_whole(config, name):
    whole, divided = pretraining_gradients(config, name), pretraining_gradients(config, name, num_chunks=4)
    assert_same_gradients(divided, whole)


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_in_bfloat16_gives_every_parameter_its_gradient(config, name):
    exact, mixed = pretraining_gradients(config, name), pretraining_gradients(config, name, precision="bf16")
    for key, value in exact.items():
        assert (mixed[key] - value).norm() <= 0.3 * value.norm() + 1e-2, key  # some are 0 except for rounding


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_teacher_is_a_copy_of_a_part_of_the_student(config, name):
    """The average therefore knows whose parameters it follows, and all objectives start from the same encoder."""
    student, teacher = build_pretraining_objective(config, name).build_student_and_teacher(encoder())
    parameters = dict(student.named_parameters())
    assert all(torch.equal(p, parameters[f"encoder.{key}"]) for key, p in encoder().named_parameters())
    for key, parameter in teacher.named_parameters() if teacher else ():
        assert torch.equal(parameter, parameters[key]) and parameter is not parameters[key]


EXPERTS = {name: row for name, row in METHODS.items() if row.joint is None}  # a joint method has the same objective


@pytest.mark.parametrize("method", [name for name, row in EXPERTS.items() if not row.is_ensemble and not row.denoises])
def test_finetuning_reaches_every_parameter_and_draws_by_seed_and_step(config, method):
    check(*(finetuning_gradients(config, method, step=step) for step in (3, 3, 4)))


@pytest.mark.parametrize("name", PRETRAINING)
def test_cost_of_pretraining_counts_multiply_adds_in_passes_through_the_encoder(config, name, monkeypatch):
    """torch counts the operations of the encoders and the decoder. A backward pass counts twice."""
    monkeypatch.setattr(
        vit, "attention", lambda q, k, v: (q @ k.mT).softmax(-1) @ v
    )  # torch cannot count the fused kernel
    objective = build_pretraining_objective(config, name)
    student, teacher = objective.build_student_and_teacher(encoder())
    spent = 0.0

    def before(*_) -> None:
        nonlocal spent
        spent -= counter.get_total_flops() * (3 if torch.is_grad_enabled() else 1)

    def after(*_) -> None:
        nonlocal spent
        spent += counter.get_total_flops() * (3 if torch.is_grad_enabled() else 1)

    for network in (student, teacher):
        for module in (getattr(network, part, None) for part in ("encoder", "decoder")):
            if module is not None:
                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)
    batch = {key: images(B, 1, 8, 8) for key in ("image", "view1", "view2")}
    with FlopCounterMode(display=False) as counter:
        objective(SimpleNamespace(student=student, teacher=teacher), batch, StepRandomness(0, 3, range(B), B, CPU))
    with FlopCounterMode(display=False) as counter:
        encoder()(batch["image"], 1.0)
    assert spent / counter.get_total_flops() == pytest.approx(objective.forwards_per_image, rel=1e-6)


@pytest.mark.parametrize("name", FINETUNING)
def test_cost_counts_the_passes_through_the_encoder(config, name):
    """A forward pass of an image counts once, and a backward pass twice, or once if only pixels get gradients."""
    passes, for_pixels_alone, module = 0.0, False, encoder()

    def count(_, inputs, output):
        nonlocal passes
        passes += len(inputs[0]) * (2 if for_pixels_alone else 3 if output.requires_grad else 1)

    module.register_forward_hook(count)
    classifier = TRAINED_CLASSIFIERS["classifier"](module, K, 1.0).train()
    settings = config.finetune.settings("gaussian", 0.5).model_dump()
    own = {key: value for key, value in settings["objectives"].get(name, {}).items() if value is not None}
    settings |= {"sigma": 0.5, **own}
    objective = taught(build_objective(FINETUNING, name, settings))
    batch = labelled()

    def classify(noisy, *, frozen=False):
        nonlocal for_pixels_alone
        for_pixels_alone = frozen
        return classifier(noisy)

    objective(classify, batch, StepRandomness(0, 3, range(B), B, CPU))
    assert passes == objective.forwards_per_image * B


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("consistency", {"consistency_weight": 0.0, "entropy_weight": 0.0}),
        ("smoothadv", {"attack_radius": 0.0, "attack_steps": 2, "attack_warmup_epochs": 0.0}),
        (
            "smoothmix",
            {"mix_weight": 0.0, "attack_step": 0.5, "attack_steps": 2, "one_step_clean_end": False}
            | {"mix_warmup_epochs": 0.0},
        ),
        ("cat_rs", {"worst_case_weight": 0.0, "attack_radius": 0.5, "attack_steps": 2, "confidence": "predictions"}),
    ],
)
def test_without_its_own_part_an_objective_is_gaussian(name, settings):
    """With lambda = eta = epsilon = 0, the cross-entropy of the m copies with the same noise remains.

    CAT-RS keeps all m copies of an image only if all are classified correctly.
    """
    classifier = always_right if name == "cat_rs" else linear_classifier
    settings |= {"sigma": 0.5, "num_noise": 4}
    batch = labelled()
    one, other = (
        build_objective(FINETUNING, each, settings)(classifier, batch, StepRandomness(0, 0, range(B), B, CPU))["loss"]
        for each in (name, "gaussian")
    )
    torch.testing.assert_close(one, other)


def always_right(noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
    """Logits with class i % K on top for image i of each copy, depending on the pixels."""
    return 40 * torch.eye(K)[torch.arange(len(noisy)) % B % K] + linear_classifier(noisy).tanh()


def linear_classifier(noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
    """Logits of a fixed linear classifier."""
    weight = torch.randn(K, 64, generator=torch.Generator().manual_seed(2))
    return noisy.flatten(1) @ weight.T


@pytest.mark.parametrize(("steps", "same"), [(1, True), (2, False)])
def test_smoothmix_with_one_step_mixes_from_the_clean_image(steps, same):
    """The adversary after one step is then the other end, and the authors' code keeps the image as the clean end."""
    settings = {"sigma": 0.5, "num_noise": 2, "mix_weight": 1.0, "attack_step": 0.5, "attack_steps": steps}
    batch, losses = labelled(), []
    for one_step in (False, True):
        own = settings | {"one_step_clean_end": one_step, "mix_warmup_epochs": 0.0}
        objective = build_objective(FINETUNING, "smoothmix", own)
        losses.append(objective(linear_classifier, batch, StepRandomness(0, 0, range(B), B, CPU)))
    assert torch.equal(losses[0]["loss"], losses[1]["loss"]) == same
    assert all(each["mix_loss"] > 0 for each in losses)


def test_macer_without_its_radius_loss_is_the_soft_cross_entropy(config):
    settings = config.finetune.settings("macer", 0.5).objectives.macer.model_dump() | {"sigma": 0.5}
    batch = {"image": images(B, 1, 8, 8), "target": torch.eye(K)[torch.arange(B) % K]}
    random = StepRandomness(0, 0, range(B), B, CPU)
    deferred, without = (
        build_objective(FINETUNING, "macer", settings | each)(linear_classifier, batch, random)
        for each in ({"deferred_epochs": 1.0}, {"radius_weight": 0.0})
    )
    assert torch.equal(deferred["loss"], without["loss"]) and without["radius_loss"] == 0
    logits = noisy_logits(
        linear_classifier, batch["image"], draw_noise(batch["image"], random, 0.5, settings["num_noise"])
    )
    mean = logits.softmax(-1).mean(0)
    torch.testing.assert_close(without["loss"], -(batch["target"] * mean.log()).sum(1).mean())


def cat_rs_by_definition(logits, worst_logits, target, soft_label, count) -> tuple[float, float]:
    """Bottom-K and worst case, image by image and copy by copy."""
    bottom = worst = 0.0
    for b in range(B):
        losses = sorted(float(-(target[b] * z.log_softmax(0)).sum()) for z in logits[:, b])
        bottom += sum(losses[: count[b]]) / len(losses) / B
        divergences = [
            float(torch.nn.functional.kl_div(z.log_softmax(0), soft_label[b], reduction="sum"))
            for z in worst_logits[:, b]
        ]
        worst += (count[b] == len(losses)) * max(divergences) / B
    return float(bottom), float(worst)


def test_cat_rs_keeps_the_smallest_losses_and_the_worst_divergence():
    logits, worst_logits, batch = 4 * images(4, B, K), 3 * images(4, B, K), labelled()
    count = torch.arange(B) % 4 + 1
    found = cat_rs_loss(logits, worst_logits, batch["target"], batch["soft_label"], count)
    expected = cat_rs_by_definition(logits, worst_logits, batch["target"], batch["soft_label"], count)
    assert [float(each) for each in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("confidence", "p"), [("predictions", 0.5), ("soft_label", 0.6)])
def test_cat_rs_draws_the_count_from_the_binomial_distribution_of_the_confidence(monkeypatch, confidence, p):
    """A network that classifies two of four copies correctly, with soft labels of 0.6. A count of 0 becomes 1."""
    counts = []
    monkeypatch.setattr(cat_rs, "cat_rs_loss", lambda *args: (counts.append(args[4]), 2 * [torch.zeros(())])[1])
    size = 4000
    batch = {"image": torch.zeros(size, 1, 1, 1), "target": torch.eye(K)[:1].expand(size, K)}
    batch |= {"soft_label": 0.5 * batch["target"] + 0.1}
    classify = lambda noisy, frozen=False: torch.eye(K)[(torch.arange(len(noisy)) >= 2 * size).long()]  # noqa: E731
    cat_rs.CATRS(0.5, 4, 1.0, 0.0, 1, confidence)(classify, batch, StepRandomness(0, 0, range(size), size, CPU))
    share = counts[0].bincount(minlength=5) / size
    weights = [math.comb(4, k) * p**k * (1 - p) ** (4 - k) for k in range(5)]
    expected = torch.tensor([0.0, weights[0] + weights[1], *weights[2:]])
    assert (share - expected).abs().max() < 5 * (0.25 / size) ** 0.5


def test_worst_case_noise_keeps_mean_and_rms_and_raises_the_divergence():
    batch, noise = labelled(), torch.randn(4, B, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    attack = {"radius": 0.5, "steps": 4}
    worst = cat_rs.worst_case_noise(linear_classifier, batch["image"], batch["soft_label"], noise, **attack)
    for moment in (1, 2):
        torch.testing.assert_close(
            worst.pow(moment).mean((2, 3, 4)), noise.pow(moment).mean((2, 3, 4)), atol=2e-2, rtol=0
        )
    before, after = (
        cat_rs.divergence(batch["soft_label"], noisy_logits(linear_classifier, batch["image"], each))
        for each in (noise, worst)
    )
    assert (after > before).float().mean() > 0.9
    assert (worst - noise).flatten(2).norm(dim=2).max() < 0.6


def test_the_table_of_methods_knows_which_objectives_need_soft_labels():
    needing = {name for name, kind in FINETUNING.items() if getattr(kind, "needs_soft_labels", False)}
    assert needing == SOFT_LABEL_OBJECTIVES


def test_attacks_stay_in_range_and_raise_the_loss():
    image, target = images(B, 1, 8, 8), torch.eye(K)[torch.arange(B) % K]
    noise = 0.1 * torch.randn(2, B, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(noisy_logits(linear_classifier, attacked, noise), target)

    attacked = smoothadv_attack(linear_classifier, image, target, noise, radius=0.5, steps=4)
    assert (loss(attacked) > loss(image)).all() and attacked.min() >= 0 and attacked.max() <= 1
    assert ((attacked - image).flatten(1).norm(dim=1) <= 0.5 + 1e-6).all()
    flat = torch.full((1, 1, 8, 8), 0.5)
    still = ascend(lambda x: 0 * x.sum(), flat, steps=2, length=1.0, project=lambda x: x)
    assert torch.equal(still, flat)  # a gradient of 0 has no direction


def test_soft_cross_entropy_is_torchs():
    logits, target = images(3, B, K), images(B, K).softmax(1)
    expected = sum(torch.nn.functional.cross_entropy(one, target) for one in logits) / 3
    torch.testing.assert_close(soft_cross_entropy(logits, target), expected)


def test_a_draw_depends_on_position_not_on_company():
    whole = StepRandomness(0, 3, range(6), 6, CPU).normal("noise", (4,), copies=2).unflatten(0, (2, 6))
    part = StepRandomness(0, 3, [4, 2], 6, CPU).normal("noise", (4,), copies=2).unflatten(0, (2, 2))
    assert torch.equal(part, whole[:, [4, 2]])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("macre", {}, f"macre: no such objective; rrcm/objectives/__init__.py has {', '.join(FINETUNING)}"),
        ("gaussian", {"sigma": 0.5}, "objective gaussian: needs the setting num_noise"),
    ],
)
def test_a_bad_objective_is_refused_in_one_line(name, settings, said):
    with pytest.raises(RRCMError, match=f"^{said}$"):
        build_objective(FINETUNING, name, settings)
