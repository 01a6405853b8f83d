"""Gaussian augmentation (Cohen et al. 2019): cross-entropy of noisy copies."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rrcm.objectives.base import (
    Batch,
    Classifier,
    PerImage,
    StepRandomness,
    draw_noise,
    noisy_logits,
    soft_cross_entropy,
)


@dataclass(frozen=True)
class Gaussian:
    """mean_i CE(f(x + e_i), y) over m noisy copies (Cohen et al. 2019, section 3.1; m = 1 there)."""

    sigma: PerImage  # pixel units
    num_noise: int  # m
    terms: ClassVar[tuple[str, ...]] = ()

    @property
    def forwards_per_image(self) -> float:
        return 3 * self.num_noise

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        noise = draw_noise(batch["image"], random, self.sigma, self.num_noise)
        logits = noisy_logits(classifier, batch["image"], noise)
        return {"loss": soft_cross_entropy(logits, batch["target"])}
