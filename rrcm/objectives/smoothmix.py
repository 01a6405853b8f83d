"""SmoothMix (Jeong et al. 2021): mix images with their adversaries, and labels with uncertainty."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

from rrcm.objectives.adversarial import ascend, project_to_ball
from rrcm.objectives.base import (
    Batch,
    Classifier,
    PerImage,
    StepRandomness,
    draw_noise,
    linear_warmup,
    noisy_logits,
    smoothed_cross_entropy,
    soft_cross_entropy,
    weighted_mean,
)


def smoothmix_attack(
    classifier: Classifier,
    images: torch.Tensor,
    target: torch.Tensor,
    noise: torch.Tensor,
    *,
    length: PerImage,
    steps: int,
) -> torch.Tensor:
    """Take `steps` steps of `length` up the loss of the smoothed classifier, clipped to [0, 1] but not to a ball.

    images (B, C, H, W) in [0, 1], target (B, K), noise (m, B, C, H, W) in pixel units. `classifier` is frozen.
    """

    def loss(attacked: torch.Tensor) -> torch.Tensor:
        return smoothed_cross_entropy(noisy_logits(classifier, attacked, noise), target).sum()

    return ascend(loss, images, steps=steps, length=length, project=lambda moved: moved.clamp(0, 1))


def mixed_target(mean: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """(1 - u) pbar + u / K: mean prediction (B, K) and the adversary's share u (B,) -> (B, K)."""
    return torch.lerp(mean, torch.full_like(mean, 1 / mean.shape[-1]), share[:, None])


def smoothmix_loss(
    logits: torch.Tensor,
    mixed_logits: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor,
    weight: PerImage = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean_i CE(z_i, y), and `weight` times mean_i KL(`mixed_target` || softmax z'_i) where the mean prediction is
    correct: two scalars.

    logits and mixed_logits (m, B, K), target (B, K) class probabilities, share (B,). The mean prediction is not
    detached (Jeong et al. 2021).
    """
    mean = logits.softmax(-1).mean(0)
    right = mean.argmax(-1) == target.argmax(-1)
    wanted = mixed_target(mean, share)
    log_wanted = wanted.clamp_min(torch.finfo(wanted.dtype).tiny).log()
    divergence = (wanted * (log_wanted - F.log_softmax(mixed_logits, dim=-1))).sum(-1)
    return soft_cross_entropy(logits, target), weighted_mean(weight, right * divergence)


@dataclass(frozen=True)
class SmoothMix:
    """Cross-entropy of noisy copies + eta times the mixing loss of `smoothmix_loss`.

    With `one_step_clean_end` the adversary after one step, at most `attack_step` away, replaces the clean image. This
    bound and eta grow linearly over the warm-up. If `attack_steps` is 1, that adversary is already the other end of the
    mix, so the clean image stays, as in the authors' code.
    """

    sigma: PerImage  # pixel units
    num_noise: int  # m
    mix_weight: PerImage  # eta
    attack_step: PerImage  # alpha, L2, pixel units
    attack_steps: int  # T
    one_step_clean_end: bool
    mix_warmup_epochs: float
    terms: ClassVar[tuple[str, ...]] = ("cross_entropy", "mix_loss")
    per_image: ClassVar[tuple[str, ...]] = ("mix_weight", "attack_step")

    @property
    def forwards_per_image(self) -> float:
        return (3 + 3 + 2 * self.attack_steps) * self.num_noise  # a backward pass to the pixels alone counts as one

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        images, target = batch["image"], batch["target"]
        noise = draw_noise(images, random, self.sigma, self.num_noise)
        grown, share = linear_warmup(random.epoch, self.mix_warmup_epochs), random.uniform("mix share") / 2
        attack = partial(smoothmix_attack, partial(classifier, frozen=True), length=self.attack_step)
        moved = attack(images, target, noise, steps=1)
        adversary = attack(moved, target, noise, steps=self.attack_steps - 1)
        clean = images
        if self.one_step_clean_end and self.attack_steps > 1:
            clean = project_to_ball(moved, images, grown * self.attack_step)
        mixed = torch.lerp(clean, adversary, share[:, None, None, None])

        logits, mixed_logits = (noisy_logits(classifier, each, noise) for each in (clean, mixed))
        weight = grown * self.mix_weight
        cross_entropy, mix_loss = smoothmix_loss(logits, mixed_logits, target, share, weight)
        return {"loss": cross_entropy + mix_loss, "cross_entropy": cross_entropy, "mix_loss": mix_loss}
