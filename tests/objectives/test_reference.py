"""Agreement with numbers from the methods' public code on a tiny network (tests/fixtures), in float32 on a CPU."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rrcm.objectives.adversarial import project_to_ball
from rrcm.objectives.base import soft_cross_entropy
from rrcm.objectives.cat_rs import cat_rs_loss, share_right, worst_case_noise
from rrcm.objectives.macer import macer_loss
from rrcm.objectives.smoothadv import smoothadv_attack
from rrcm.objectives.smoothmix import smoothmix_attack, smoothmix_loss

REFERENCE = load_file(Path(__file__).parent.parent / "fixtures/objectives_parity.safetensors")
X, NOISE = REFERENCE["x"], REFERENCE["noise"]
TARGET = F.one_hot(REFERENCE["y"], 5).float()
M = len(NOISE)


class Network:
    """f(x) = W2 tanh(W1 flatten(x) + b1) + b2."""

    def __init__(self):
        self.weights = [REFERENCE[name].clone().requires_grad_() for name in ("weight1", "bias1", "weight2", "bias2")]

    def __call__(self, images: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        weight1, bias1, weight2, bias2 = (w.detach() if frozen else w for w in self.weights)
        return torch.tanh(images.flatten(1) @ weight1.T + bias1) @ weight2.T + bias2

    def copies(self, images: torch.Tensor) -> torch.Tensor:
        """(m, B, C, H, W) -> (m, B, K)."""
        return self(images.flatten(0, 1)).unflatten(0, (M, -1))


def check(name: str, loss: torch.Tensor, network: Network) -> None:
    torch.testing.assert_close(loss.detach(), REFERENCE[f"{name}_loss"][0], rtol=1e-5, atol=0)
    loss.backward()
    for weight, suffix in zip(network.weights[::2], ("weight1", "weight2"), strict=True):
        close(weight.grad, REFERENCE[f"{name}_grad_{suffix}"])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_smoothadv():
    network, (steps, radius) = Network(), REFERENCE["smoothadv_steps_eps"].tolist()
    attacked = smoothadv_attack(network, X, TARGET, NOISE, radius=radius, steps=int(steps))
    close(attacked - X, REFERENCE["smoothadv_adversary"] - X)
    check("smoothadv", soft_cross_entropy(network.copies(attacked + NOISE), TARGET), network)


def test_macer():
    network, (weight, beta, gamma) = Network(), REFERENCE["macer_lambda_beta_gamma"].tolist()
    sigma = float(REFERENCE["sigma"])
    losses = macer_loss(network.copies(X + NOISE), TARGET, sigma=sigma, radius_weight=weight, beta=beta, gamma=gamma)
    check("macer", sum(losses), network)


@pytest.mark.parametrize("name", ["smoothmix", "smoothmix_step"])
def test_smoothmix(name):
    network, share = Network(), REFERENCE[f"{name}_u"]
    steps, length, weight, one_step, grown = REFERENCE[f"{name}_steps_alpha_eta_mixstep_warmup"].tolist()
    first = smoothmix_attack(network, X, TARGET, NOISE, length=length, steps=1)
    adversary = smoothmix_attack(network, first, TARGET, NOISE, length=length, steps=int(steps) - 1)
    clean = project_to_ball(first, X, grown * length) if one_step else X
    close(adversary - X, REFERENCE[f"{name}_adversary"] - X)
    close(clean, REFERENCE[f"{name}_clean_end"])
    mixed = torch.lerp(clean, adversary, share[:, None, None, None])
    cross_entropy, mix = smoothmix_loss(network.copies(clean + NOISE), network.copies(mixed + NOISE), TARGET, share)
    check(name, cross_entropy + weight * grown * mix, network)


def test_cat_rs():
    network, soft_label = Network(), REFERENCE["soft_label"]
    steps, radius, weight = REFERENCE["catrs_steps_eps_lambda"].tolist()
    worst = worst_case_noise(partial(network, frozen=True), X, soft_label, NOISE, radius=radius, steps=int(steps))
    close(worst - NOISE, REFERENCE["catrs_noise"] - NOISE)
    logits = network.copies(X + NOISE)
    torch.testing.assert_close(share_right(logits, TARGET), REFERENCE["catrs_share_right"])
    count = REFERENCE["catrs_k"].long().clamp_min(1)
    bottom, worst_case = cat_rs_loss(logits, network.copies(X + worst), TARGET, soft_label, count)
    check("catrs", bottom + weight * worst_case, network)
