"""SmoothAdv (Salman et al. 2019): adversarial training of the smoothed classifier."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from rrcm.objectives.adversarial import ascend, project_to_ball
from rrcm.objectives.base import Batch, Classifier, Draw, linear_warmup, soft_cross_entropy


def smoothed_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log mean_i softmax(z_i)_y: the cross-entropy of the soft smoothed classifier (Salman et al. 2019, eq. 6).

    logits (m, B, K), target (B, K) class probabilities -> (B,). The logarithm is outside the mean.
    """
    mean = logits.softmax(-1).mean(0)
    return -(target * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(-1)


def smoothadv_attack(
    classifier: Classifier,
    images: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    *,
    radius: float,
    steps: int,
) -> torch.Tensor:
    """SmoothAdv_PGD (Salman et al. 2019, section 3): images within L2 `radius` that the smoothed classifier gets wrong.

    images (B, C, H, W) in [0, 1], target (B, K), noise (m, B, C, H, W) in pixel units, the same in every step. Each
    step has length 2 radius / steps and is projected into the ball and into [0, 1]. `classifier` is frozen.
    """

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        logits = classifier((attacked + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])
        return smoothed_cross_entropy(logits, target).sum()

    def project(moved: torch.Tensor) -> torch.Tensor:
        return project_to_ball(moved.clamp(0, 1), images, radius)  # stays in [0, 1], where `images` are

    return ascend(loss, images, steps=steps, length=2 * radius / steps, project=project) if radius else images


@dataclass(frozen=True)
class SmoothAdv:
    """mean_i CE(f(x' + e_i), y) at the adversary x' of the smoothed classifier, with the noise of the attack."""

    sigma: float  # pixel units
    num_noise: int  # m
    attack_radius: float  # epsilon, L2, pixel units
    attack_steps: int  # T
    attack_warmup_epochs: float  # over which epsilon grows linearly from 0
    terms: ClassVar[tuple[str, ...]] = ()

    @property
    def forwards_per_image(self) -> float:
        attack = 2 * self.attack_steps if self.attack_radius else 0  # gradients of pixels alone cost one pass
        return (attack + 3) * self.num_noise

    def __call__(self, classifier: Classifier, batch: Batch, draw: Draw) -> dict[str, torch.Tensor]:
        images, target = batch["image"], batch["target"]
        noise = self.sigma * draw.normal("finetune noise", images.shape[1:], copies=self.num_noise)
        noise = noise.unflatten(0, (self.num_noise, -1))
        radius = self.attack_radius * linear_warmup(draw.epoch, self.attack_warmup_epochs)
        frozen = partial(classifier, frozen=True)
        attacked = smoothadv_attack(frozen, images, target, noise, radius=radius, steps=self.attack_steps)
        logits = classifier((attacked + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])
        return {"loss": soft_cross_entropy(logits, target)}
