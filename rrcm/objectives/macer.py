"""MACER (Zhai et al. 2020): maximize the certified radius of a soft smoothed classifier."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.special import ndtri

from rrcm.objectives.base import (
    Batch,
    Classifier,
    PerImage,
    StepRandomness,
    draw_noise,
    noisy_logits,
    per_row,
    smoothed_cross_entropy,
)


def macer_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    sigma: PerImage,
    radius_weight: PerImage,
    beta: PerImage,
    gamma: PerImage,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The classification loss and the radius loss of MACER (Zhai et al. 2020): two scalars.

    logits (k, B, K) of k noisy copies, target (B, K) class probabilities, the largest of which is the label. With phat
    the mean of softmax(beta logits) and xi = Phi^-1(phat_1) - Phi^-1(phat_2), the soft radius is sigma xi / 2. A hinge
    at gamma increases it for each image that phat classifies correctly, unless its xi is infinite.
    """
    classification = smoothed_cross_entropy(logits, target).mean()
    phat = (per_row(beta, target) * logits).softmax(-1).mean(0)
    top, classes = phat.topk(2)
    correct = classes[:, 0] == target.argmax(-1)
    finite = (top > 0).all(-1) & (top < 1).all(-1)
    top = torch.where(finite[:, None], top, 0.5)  # before ndtri, because the gradient of an infinite Phi^-1 is NaN
    margin = ndtri(top[:, 0]) - ndtri(top[:, 1])
    counted = correct & finite & margin.isfinite() & (margin.abs() <= gamma)
    hinge, scale = torch.where(counted, gamma - margin, 0.0), radius_weight * sigma / 2
    if isinstance(scale, torch.Tensor):
        return classification, (scale * hinge).sum() / len(margin)
    return classification, scale * (hinge.sum() / len(margin))


@dataclass(frozen=True)
class MACER:
    """`macer_loss` over k noisy copies. To avoid divergence, the radius loss may begin some epochs later."""

    sigma: PerImage  # pixel units
    num_noise: int  # k
    radius_weight: PerImage  # lambda
    beta: PerImage
    gamma: PerImage
    deferred_epochs: float  # epochs before the radius loss begins
    terms: ClassVar[tuple[str, ...]] = ("cross_entropy", "radius_loss")
    per_image: ClassVar[tuple[str, ...]] = ("radius_weight", "beta", "gamma")

    @property
    def forwards_per_image(self) -> float:
        return 3 * self.num_noise

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        noise = draw_noise(batch["image"], random, self.sigma, self.num_noise)
        logits = noisy_logits(classifier, batch["image"], noise)
        weight = self.radius_weight if random.epoch >= self.deferred_epochs else 0.0
        classification, radius = macer_loss(
            logits, batch["target"], sigma=self.sigma, radius_weight=weight, beta=self.beta, gamma=self.gamma
        )
        return {"loss": classification + radius, "cross_entropy": classification, "radius_loss": radius}
