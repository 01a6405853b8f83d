"""CAT-RS (Jeong et al. 2023): confidence-aware training, which adapts the noise to each image."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from rrcm.objectives.adversarial import ascend, project_to_ball
from rrcm.objectives.base import (
    Batch,
    Classifier,
    PerImage,
    StepRandomness,
    draw_noise,
    is_zero,
    noisy_logits,
    per_row,
    weighted_mean,
)


def divergence(soft_label: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(soft_label || softmax z_i): soft_label (B, K), logits (m, B, K) -> (m, B)."""
    log_label = soft_label.clamp_min(torch.finfo(soft_label.dtype).tiny).log()
    return (soft_label * (log_label - F.log_softmax(logits, dim=-1))).sum(-1)


def worst_case_noise(
    classifier: Classifier,
    images: torch.Tensor,
    soft_label: torch.Tensor,
    noise: torch.Tensor,
    *,
    radius: PerImage,
    steps: int,
) -> torch.Tensor:
    """Noise within L2 `radius` of the given noise that moves predictions away from `soft_label` (section 3.2).

    images (B, C, H, W) in [0, 1], soft_label (B, K), noise (m, B, C, H, W) in pixel units -> (m, B, C, H, W). Each step
    has length 2 radius / steps and is projected into the ball. Then each noise is shifted and scaled to the mean and
    root mean square that it had at first, as in the authors' code. `classifier` is frozen.
    """
    given = noise.flatten(0, 1)
    if isinstance(radius, torch.Tensor):
        radius = radius.repeat(len(noise))  # one for each noise
    mean, rms = _mean(given), _mean(given.square()).sqrt()

    def loss(moved: torch.Tensor) -> torch.Tensor:
        return divergence(soft_label, noisy_logits(classifier, images, moved.view_as(noise))).sum()

    def project(moved: torch.Tensor) -> torch.Tensor:
        moved = project_to_ball(moved, given, radius)
        return (moved - _mean(moved)) / _mean(moved.square()).sqrt() * rms + mean

    worst = ascend(loss, given, steps=steps, length=2 * radius / steps, project=project)
    if isinstance(radius, torch.Tensor):
        worst = torch.where(per_row(radius, given) > 0, worst, given)  # without an attack, nothing is scaled
    return worst.view_as(noise)


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """The mean of each row of (B, C, H, W): (B, 1, 1, 1)."""
    return rows.mean((1, 2, 3), keepdim=True)


def share_right(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The share of the m noisy copies that are classified correctly: logits (m, B, K), target (B, K) -> (B,)."""
    return (logits.argmax(-1) == target.argmax(-1)).float().mean(0)


def cat_rs_loss(
    logits: torch.Tensor,
    worst_logits: torch.Tensor,
    target: torch.Tensor,
    soft_label: torch.Tensor,
    count: torch.Tensor,
    worst_case_weight: PerImage = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bottom-K loss, and lambda times the worst-case loss (Jeong et al. 2023, section 3): two scalars.

    Bottom-K: 1/m times the sum of the K smallest of the m cross-entropies. Worst case: max_i KL(soft_label || f(x +
    e*_i)) if K = m, otherwise 0. logits and worst_logits (m, B, classes), target and soft_label (B, classes). `count`
    (B,) is the K of each image, from 1 to m.
    """
    cross_entropy = -(target * F.log_softmax(logits, dim=-1)).sum(-1)
    rank = torch.arange(len(logits), device=logits.device)[:, None]
    bottom = (cross_entropy.sort(0).values * (rank < count)).mean(0)
    worst = divergence(soft_label, worst_logits).amax(0) * (count == len(logits))
    return bottom.mean(), weighted_mean(worst_case_weight, worst)


@dataclass(frozen=True)
class CATRS:
    """Bottom-K + lambda times the worst case, with K ~ Bin(m, confidence), at least 1.

    The soft label of an image comes from the votes of a Gaussian-trained smoothed classifier. A cropped or flipped
    image keeps the soft label of the whole image. The confidence is either the share of the m predictions that are
    correct, or the soft label of the correct class. With the former, an untrained classifier learns from one copy in m,
    which is slow; for this reason the authors use the latter on ImageNet. If m = 1, the only copy always counts.
    """

    sigma: PerImage  # pixel units
    num_noise: int  # m
    worst_case_weight: PerImage  # lambda
    attack_radius: PerImage  # epsilon, L2 distance of noises, pixel units
    attack_steps: int  # T
    confidence: Literal["predictions", "soft_label"] | None = None  # None if m = 1
    terms: ClassVar[tuple[str, ...]] = ("bottom", "worst_case")
    per_image: ClassVar[tuple[str, ...]] = ("worst_case_weight", "attack_radius")
    needs_soft_labels: ClassVar[bool] = True

    @property
    def forwards_per_image(self) -> float:
        attack = (
            0 if is_zero(self.attack_radius) else 2 * self.attack_steps
        )  # a backward pass to the pixels alone counts as one
        return (3 + 3 + attack) * self.num_noise

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        images, target, soft_label = batch["image"], batch["target"], batch["soft_label"]
        noise = worst = draw_noise(images, random, self.sigma, self.num_noise)
        if not is_zero(self.attack_radius):
            attack = partial(worst_case_noise, radius=self.attack_radius, steps=self.attack_steps)
            worst = attack(partial(classifier, frozen=True), images, soft_label, noise)
        logits, worst_logits = (noisy_logits(classifier, images, each) for each in (noise, worst))

        right = share_right(logits, target)
        if self.confidence == "soft_label":
            right = soft_label.gather(1, target.argmax(1, keepdim=True)).squeeze(1)
        trials = random.uniform("bottom count", (self.num_noise,)).T
        count = (trials < right).sum(0).clamp_min(1)  # binomial
        bottom, worst_case = cat_rs_loss(logits, worst_logits, target, soft_label, count, self.worst_case_weight)
        return {"loss": bottom + worst_case, "bottom": bottom, "worst_case": worst_case}
