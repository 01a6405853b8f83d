"""Distillation: the formula, what gets gradients, and what the teacher sees."""

import math

import pytest
import torch
from test_joint_objective import CPU, SIGMAS, B, K, batch, network

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.joint import JointSigmas
from rrcm.models.vit import NoiseConditionedViT
from rrcm.objectives.base import StepRandomness, draw_noise
from rrcm.objectives.distill import Distill, distillation_loss
from rrcm.objectives.joint import join_objectives
from rrcm.training.teacher import with_teacher

RANDOM = StepRandomness(0, 3, range(B), B, CPU)


def small_network() -> NoiseConditionedClassifier:
    """A student of the network of the joint tests."""
    torch.manual_seed(5)
    return NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, embed_dim=8, depth=1, num_heads=2), K, 1.0)


def joint_objective(teacher) -> object:
    noise = JointSigmas(SIGMAS)
    return with_teacher(join_objectives("distill", [Distill(sigma, 3) for sigma in SIGMAS], noise), teacher)


def test_the_loss_is_the_divergence_of_the_teachers_prediction():
    """From that of the student, so not the other way round. It is the cross-entropy minus an entropy."""
    q, p = torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[[0.8, 0.1, 0.1]]])
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    found = distillation_loss(p.log() + 7, q.log() - 3)  # logits are known up to a constant
    assert found.shape == (1, 1) and found.item() == pytest.approx(expected, rel=1e-5)
    cross_entropy, entropy = -(q * p.log()).sum(), -(q * q.log()).sum()
    assert found.item() == pytest.approx(float(cross_entropy - entropy), rel=1e-5)


def test_only_the_student_gets_gradients_and_none_where_it_agrees():
    teacher, student = network(), small_network()
    objective = Distill(0.5, 3, lambda noisy: teacher(noisy))
    losses = objective(lambda noisy: student(noisy), batch(), RANDOM)
    losses["loss"].backward()
    assert losses["loss"] > 0.01 and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.head.parameters())
    loss = objective(lambda noisy: teacher(noisy), batch(), RANDOM)["loss"]
    loss.backward()
    assert abs(loss.item()) < 1e-6 and max(p.grad.abs().max() for p in teacher.parameters()) < 1e-6


def test_both_see_the_same_copies_at_the_sigma_of_each_image():
    """The labels have no part in it."""
    seen = {}

    def see(name: str):
        def classify(noisy, *, frozen=False, t=None):
            seen[name] = noisy, t
            return noisy.flatten(1)[:, :K].clone().requires_grad_()

        return classify

    objective = joint_objective(see("teacher"))
    losses = objective(see("student"), batch() | {"target": None}, RANDOM)
    assert losses.keys() == {"loss"} and abs(losses["loss"].item()) < 1e-6
    sigmas = torch.tensor(objective.draw(RANDOM))
    noise = draw_noise(batch()["image"], RANDOM, sigmas, 3)
    for noisy, t in seen.values():
        assert torch.equal(noisy, (batch()["image"] + noise).flatten(0, 1))
        assert torch.equal(t, (2 * sigmas).repeat(3)) and len(set(t.tolist())) == 3
