"""The two training objectives (Lei et al. 2025, section 3; Jeong & Shin 2020), as the papers write them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rrcm.distributed import all_gather_rows


def info_nce(
    anchors: torch.Tensor, targets: torch.Tensor, temperature: float = 0.2, first_positive: int = 0
) -> torch.Tensor:
    """InfoNCE of each anchor against all targets, cosine similarities: -log softmax(a . T / tau)[positive].

    anchors (B, D), targets (M, D) with M >= B; anchor i's positive is target first_positive + i -> (B,) float32.
    """
    similarity = F.normalize(anchors.float(), dim=1) @ F.normalize(targets.float(), dim=1).T
    positives = torch.arange(len(anchors), device=anchors.device) + first_positive
    return F.cross_entropy(similarity / temperature, positives, reduction="none")


class PretrainingLoss(NamedTuple):
    """Per-sample terms, each (B,) float32."""

    contrastive: torch.Tensor  # both directions summed
    consistency: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.contrastive + self.consistency


def pretraining_loss(
    student: Callable[..., list[torch.Tensor]],
    teacher: Callable[..., list[torch.Tensor]],
    image: torch.Tensor,
    view1: torch.Tensor,
    view2: torch.Tensor,
    noise: torch.Tensor,
    *,
    t: float,
    t_next: float,
    t_min: float = 0.002,
    temperature: float = 0.2,
) -> PretrainingLoss:
    """rRCM's objective (section 3.2): contrastive at the quietest level + consistency along the noise trajectory.

    `student` and `teacher` are `ProjectedViT`s (or wrap one). The images and the noise are (B, C, H, W) float32 in
    model space, pixels scaled to [-1, 1]; t > t_next are neighbouring Karras levels, t_min the quietest. Negatives are
    all other targets of the global batch. One noise tensor serves all levels: going from t to t_next along it is a
    step of the probability-flow ODE.
    """
    views = [view1 + t_min * noise, view2 + t_min * noise]
    z1, z2, representation = student([*views, image + t * noise], [t_min, t_min, t], project=2)
    with torch.no_grad():  # targets carry no graph
        y1, y2 = teacher(views, [t_min, t_min], project=2)
        encode = getattr(student, "module", student)  # no gradient, so past DDP's hooks
        (quieter,) = encode([image + t_next * noise], [t_next], project=0)

    def nce(anchors: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        targets, first_positive = all_gather_rows(targets)
        return info_nce(anchors, targets, temperature, first_positive)

    return PretrainingLoss(contrastive=nce(z1, y2) + nce(z2, y1), consistency=nce(representation, quieter))


def consistency_regularizer(
    logits: torch.Tensor, consistency_weight: float = 10.0, entropy_weight: float = 0.5
) -> torch.Tensor:
    """lambda * mean_i KL(pbar || p_i) + eta * H(pbar) over noisy copies (Jeong & Shin 2020, eqs. 6 and 8).

    logits (m, B, K), m noisy copies of B images -> (B,) float32. pbar is the mean of the m softmax outputs.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    mean = log_p.exp().mean(0)
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
    entropy = -(mean * log_mean).sum(-1)
    divergence = -entropy - (mean * log_p).sum(-1).mean(0)  # mean_i KL(pbar || p_i)
    return consistency_weight * divergence + entropy_weight * entropy
