"""Consistency regularization of noisy copies (Jeong & Shin 2020)."""

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
)


def consistency_regularizer(
    logits: torch.Tensor, consistency_weight: PerImage = 10.0, entropy_weight: PerImage = 0.5
) -> torch.Tensor:
    """lambda * mean_i KL(pbar || p_i) + eta * H(pbar) over noisy copies (Jeong & Shin 2020, eqs. 6 and 8).

    logits (m, B, K), m noisy copies of B images -> (B,) float32. pbar is the mean of the m softmax outputs.

    >>> rrcm.consistency_regularizer(torch.zeros(2, 3, 10))  # all copies agree, so only the entropy log(10) / 2 is left
    tensor([1.1513, 1.1513, 1.1513])
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    mean = log_p.exp().mean(0)
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    entropy = -(mean * log_mean).sum(-1)
    divergence = -entropy - (mean * log_p).sum(-1).mean(0)  # mean_i KL(pbar || p_i)
    return consistency_weight * divergence + entropy_weight * entropy


@dataclass(frozen=True)
class Consistency:
    """mean_i CE(f(x + e_i), y) + `consistency_regularizer` over m noisy copies (Jeong & Shin 2020, eq. 9)."""

    sigma: PerImage  # pixel units
    num_noise: int  # m
    consistency_weight: PerImage  # lambda
    entropy_weight: PerImage  # eta
    terms: ClassVar[tuple[str, ...]] = ("cross_entropy", "regularizer")
    per_image: ClassVar[tuple[str, ...]] = ("consistency_weight", "entropy_weight")

    @property
    def forwards_per_image(self) -> float:
        return 3 * self.num_noise

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        noise = draw_noise(batch["image"], random, self.sigma, self.num_noise)
        logits = noisy_logits(classifier, batch["image"], noise)
        cross_entropy = soft_cross_entropy(logits, batch["target"])
        regularizer = consistency_regularizer(logits, self.consistency_weight, self.entropy_weight).mean()
        return {"loss": cross_entropy + regularizer, "cross_entropy": cross_entropy, "regularizer": regularizer}
