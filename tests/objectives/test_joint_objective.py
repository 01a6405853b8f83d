"""The joint objective: each image has the loss of the expert for its own sigma."""

from dataclasses import replace

import pytest
import torch
from conftest import assert_close

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.joint import JointSigmas
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives import FINETUNING
from rrcm.objectives.base import StepRandomness, build_objective
from rrcm.objectives.joint import JointObjective, differing_fields, join_objectives, mixed_objective
from rrcm.training.teacher import with_teacher
from rrcm.utils.errors import RRCMError

B, K = 9, 5
CPU = torch.device("cpu")
SIGMAS = (0.25, 0.5, 1.0)
COMMON = {"num_noise": 3, "attack_steps": 2, "attack_warmup_epochs": 4, "mix_warmup_epochs": 4, "deferred_epochs": 0}
COMMON |= {"one_step_clean_end": True, "confidence": "predictions"}
OWN = {
    "stability_weight": (2.0, 2.5, 1.0),
    "consistency_weight": (10.0, 15.0, 20.0),
    "entropy_weight": (0.5, 0.25, 0.125),
    "radius_weight": (12.0, 6.0, 3.0),
    "beta": (16.0, 8.0, 4.0),
    "gamma": (8.0, 6.0, 2.0),
    "attack_radius": (0.0, 0.5, 1.0),  # no attack at the smallest sigma
    "mix_weight": (5.0, 4.0, 1.0),
    "attack_step": (0.25, 0.5, 1.0),
    "worst_case_weight": (0.5, 1.0, 2.0),
}


def experts(name: str, noise: JointSigmas) -> list:
    at = [{"sigma": sigma, **COMMON} | {key: each[k] for key, each in OWN.items()} for k, sigma in enumerate(SIGMAS)]
    objectives = [build_objective(FINETUNING, name, settings) for settings in at][: len(noise.sigmas)]
    return [with_teacher(each, teacher) for each in objectives] if name == "distill" else objectives


def teacher(noisy: torch.Tensor, *, t: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a fixed linear classifier. What it makes of `t` is for test_distill.py."""
    return noisy.flatten(1) @ torch.randn(64, K, generator=torch.Generator().manual_seed(2))


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    soft_label = torch.rand(B, K, generator=generator).softmax(1)
    target = torch.eye(K)[torch.arange(B) % K]
    return {"image": torch.rand(B, 1, 8, 8, generator=generator), "target": target, "soft_label": soft_label}


def network() -> NoiseConditionedClassifier:
    torch.manual_seed(0)
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=2, num_heads=2), K, 1.0)
    torch.nn.init.normal_(classifier.head.weight)
    return classifier


def gradients(objective, classify, classifier, batch, positions) -> dict[str, torch.Tensor]:
    classifier.zero_grad()
    losses = objective(classify, batch, StepRandomness(0, 3, positions, B, CPU, 1.0))
    losses["loss"].backward()
    terms = {name: each.detach() for name, each in losses.items()}
    return terms | {name: p.grad.clone() for name, p in classifier.named_parameters()}


def expert_at(noise: JointSigmas, each: list, sigma: float):
    """The objective of an expert for `sigma`, built from numbers."""
    own = {
        name: float(noise.interpolate([getattr(e, name) for e in each], [sigma])[0]) for name in differing_fields(each)
    }
    return replace(each[0], sigma=sigma, **own)


@pytest.mark.parametrize("noise", [JointSigmas(SIGMAS), JointSigmas(SIGMAS, (0.2, 1.1)), JointSigmas(SIGMAS[:1])])
@pytest.mark.parametrize("name", FINETUNING)
def test_each_image_has_the_loss_of_the_expert_for_its_sigma(name, noise):
    """Loss, terms and gradients of a batch of mixed sigmas are the means over its images, one by one."""
    each, classifier, whole = experts(name, noise), network(), batch()
    joint = join_objectives(name, each, noise)
    mixed = gradients(joint, lambda noisy, frozen, t: classifier(noisy, t=t), classifier, whole, range(B))
    sigmas = noise.draw(StepRandomness(0, 3, range(B), B, CPU).uniform("joint sigma").tolist())
    assert len(set(sigmas)) == (B if noise.interval else len(noise.sigmas))
    single = []
    for b, sigma in enumerate(sigmas):
        classifier.t = 2 * sigma
        rows = {key: value[b : b + 1] for key, value in whole.items()}
        objective = expert_at(noise, each, sigma)
        single.append(gradients(objective, lambda noisy, frozen=False: classifier(noisy), classifier, rows, [b]))
    scale = max(float(value.abs().max()) for value in mixed.values())
    for key, value in mixed.items():
        torch.testing.assert_close(value, sum(one[key] for one in single) / B, atol=2e-5 * scale, rtol=2e-4, msg=key)


@pytest.mark.parametrize("name", FINETUNING)
def test_a_list_of_one_sigma_is_the_expert(name):
    noise, classifier = JointSigmas(SIGMAS[:1]), network()
    (expert,) = experts(name, noise)
    classifier.t = 2 * SIGMAS[0]
    joint = join_objectives(name, [expert], noise)
    assert (joint.terms, joint.forwards_per_image) == (expert.terms, expert.forwards_per_image)
    one = gradients(joint, lambda noisy, frozen, t: classifier(noisy, t=t), classifier, batch(), range(B))
    other = gradients(expert, lambda noisy, frozen=False: classifier(noisy), classifier, batch(), range(B))
    for key, value in other.items():  # MACER's weights are inside the mean, so that it rounds differently
        assert_close(one[key], value, 1e-5 if name == "macer" else 0.0)


def test_sigmas_do_not_depend_on_the_company_of_an_image():
    noise = JointSigmas(SIGMAS, (0.2, 1.1))
    whole, part = (StepRandomness(0, 3, each, B, CPU).uniform("joint sigma").tolist() for each in (range(B), [7, 2]))
    assert noise.draw(part) == [noise.draw(whole)[p] for p in (7, 2)]


def test_the_draws_are_uniform_over_the_list_or_in_log_sigma():
    numbers = torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist()
    listed = JointSigmas(SIGMAS).draw(numbers)
    assert all(abs(listed.count(sigma) / 4000 - 1 / 3) < 0.03 for sigma in SIGMAS)
    spread = JointSigmas((0.5,), (0.25, 1.0)).draw([*numbers, 1 - 2**-24, 0.0])
    assert min(spread) >= 0.25 and max(spread) <= 1.0 and abs(sum(s < 0.5 for s in spread) / 4000 - 0.5) < 0.03


def test_a_setting_is_linear_in_log_sigma_between_the_sigmas():
    noise = JointSigmas((0.25, 1.0), (0.1, 2.0))
    assert noise.interpolate([1.0, 3.0], [0.1, 0.25, 0.5, 1.0, 2.0]).tolist() == pytest.approx([1, 1, 2, 3, 3])


@pytest.mark.parametrize(("name", "setting"), [("smoothadv", "num_noise"), ("macer", "deferred_epochs")])
def test_a_setting_that_no_image_can_have_for_itself_is_refused(name, setting):
    noise = JointSigmas(SIGMAS[:2])
    one, other = experts(name, noise)
    with pytest.raises(
        RRCMError, match=rf"^finetune\.objectives\.{name}\.{setting}: is \d at sigma 0\.25, 7 at sigma 0\.5; a"
    ):
        join_objectives(name, [one, replace(other, **{setting: 7})], noise)


def test_the_cost_is_that_of_the_dearest_expert():
    noise = JointSigmas(SIGMAS)
    joint = join_objectives("smoothadv", experts("smoothadv", noise), noise)
    assert isinstance(joint, JointObjective) and joint.forwards_per_image == (2 * 2 + 3) * 3
    assert mixed_objective(joint.experts, noise, [1.0, 0.25], CPU).attack_radius.tolist() == [1.0, 0.0]
