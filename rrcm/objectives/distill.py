"""Distillation: a student learns what its teacher predicts for the same noisy copies (Hinton et al. 2015).

Certified Robustness Transfer (Vaishnavi et al. 2022) brought the idea to randomized smoothing: a student that agrees
with a robust teacher under noise is robust as well. Their loss is the Euclidean distance of the outputs. Ours is the
Kullback-Leibler divergence, as in Hinton et al. at temperature 1. It uses no labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from rrcm.objectives.base import Batch, Classifier, PerImage, StepRandomness, draw_noise, noisy_logits

Teacher = Callable[..., torch.Tensor]  # noisy (B, C, H, W), and t (B,) if it is joint -> logits (B, K), no gradients


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of the student's prediction p and the teacher's prediction q: logits (m, B, K) both -> (m, B).

    It is the cross-entropy minus the entropy of q, which does not depend on the student. So it has the gradient of the
    cross-entropy, and it is 0 where the two agree.
    """
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Distill:
    """mean_i KL(q(x + e_i) || p(x + e_i)) over m noisy copies, with q of the teacher and p of the student."""

    sigma: PerImage  # pixel units
    num_noise: int  # m
    teacher: Teacher | None = None  # `rrcm.training.teacher.with_teacher` sets it; the cost is known without it
    terms: ClassVar[tuple[str, ...]] = ()

    @property
    def forwards_per_image(self) -> float:
        return 3 * self.num_noise  # of the student; `rrcm.training.budget` adds the m passes of the teacher

    def __call__(self, classifier: Classifier, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        noise = draw_noise(batch["image"], random, self.sigma, self.num_noise)
        levels = {"t": (2 * self.sigma).repeat(self.num_noise)} if isinstance(self.sigma, torch.Tensor) else {}
        with torch.no_grad():
            taught = noisy_logits(lambda noisy: self.teacher(noisy, **levels), batch["image"], noise)
        return {"loss": distillation_loss(noisy_logits(classifier, batch["image"], noise), taught).mean()}
