"""SmoothAdv (Salman et al. 2019): adversarial training of the smoothed classifier."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from rrcm.objectives.adversarial import ascend, project_to_ball
from rrcm.objectives.base import (
    Batch,
    Classifier,
    PerImage,
    StepRandomness,
    draw_noise,
    is_zero,
    linear_warmup,
    noisy_logits,
    smoothed_cross_entropy,
    soft_cross_entropy,
)


def smoothadv_attack(
    classifier: Classifier,
    images: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    *,
    radius: PerImage,
    steps: int,
) -> torch.Tensor:
    """SmoothAdv_PGD (Salman et al. 2019, section 3): adversaries of the smoothed classifier within L2 `radius`.

    images (B, C, H, W) in [0, 1], target (B, K), noise (m, B, C, H, W) in pixel units, the same in every step. Each
    step has length 2 radius / steps and is projected into the ball and into [0, 1]. `classifier` is frozen.
    """

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(noisy_logits(classifier, attacked, noise), target).sum()

    def project(moved: torch.Tensor) -> torch.Tensor:
        return project_to_ball(moved.clamp(0, 1), images, radius)  # `images` lie in [0, 1], so this stays in [0, 1]

    if is_zero(radius):
        return images
    return ascend(loss, images, steps=steps, length=2 * radius / steps, project=project)


@dataclass(frozen=True)
class SmoothAdv:
    """mean_i CE(f(x' + e_i), y) at the adversary x' of the smoothed classifier. Attack and loss share the noise."""

    sigma: PerImage  # pixel units
    num_noise: int  # m
    attack_radius: PerImage  # epsilon, L2, pixel units
    attack_steps: int  # T
    attack_warmup_epochs: float  # epsilon grows linearly over these epochs
    terms: ClassVar[tuple[str, ...]] = ()
    per_image: ClassVar[tuple[str, ...]] = ("attack_radius",)

    @property
    def forwards_per_image(self) -> float:
        attack = (
            0 if is_zero(self.attack_radius) else 2 * self.attack_steps
        )  # a backward pass to the pixels alone counts as one
        return (attack + 3) * self.num_noise

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        images, target = batch["image"], batch["target"]
        noise = draw_noise(images, random, self.sigma, self.num_noise)
        radius = self.attack_radius * linear_warmup(random.epoch, self.attack_warmup_epochs)
        frozen = partial(classifier, frozen=True)
        attacked = smoothadv_attack(frozen, images, target, noise, radius=radius, steps=self.attack_steps)
        return {"loss": soft_cross_entropy(noisy_logits(classifier, attacked, noise), target)}
