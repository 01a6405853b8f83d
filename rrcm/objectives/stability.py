"""Stability training (Li et al. 2019): a noisy copy should be classified like its clean image."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from rrcm.objectives.base import (
    Batch,
    Classifier,
    PerImage,
    StepRandomness,
    draw_noise,
    noisy_logits,
    soft_cross_entropy,
    weighted_mean,
)


def stability_regularizer(clean_logits: torch.Tensor, noisy_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy H(softmax f(x), softmax f(x + e)), averaged over noisy copies (Li et al. 2019).

    clean_logits (B, K), noisy_logits (m, B, K) -> (B,). Neither side is detached.
    """
    return -(clean_logits.softmax(-1) * F.log_softmax(noisy_logits, dim=-1)).sum(-1).mean(0)


@dataclass(frozen=True)
class Stability:
    """CE(f(x), y) + lambda H(f(x), f(x + e)) (Li et al. 2019)."""

    sigma: PerImage  # pixel units
    num_noise: int  # m; 1 in the paper
    stability_weight: PerImage  # lambda
    terms: ClassVar[tuple[str, ...]] = ("cross_entropy", "regularizer")
    per_image: ClassVar[tuple[str, ...]] = ("stability_weight",)

    @property
    def forwards_per_image(self) -> float:
        return 3 * (1 + self.num_noise)

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        clean = classifier(batch["image"])
        noise = draw_noise(batch["image"], random, self.sigma, self.num_noise)
        noisy = noisy_logits(classifier, batch["image"], noise)
        cross_entropy = soft_cross_entropy(clean[None], batch["target"])
        regularizer = weighted_mean(self.stability_weight, stability_regularizer(clean, noisy))
        return {"loss": cross_entropy + regularizer, "cross_entropy": cross_entropy, "regularizer": regularizer}
