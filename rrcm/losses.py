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


def global_info_nce(anchors: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """`info_nce` of this process's anchors (B, D) against the targets of all processes -> (B,)."""
    targets, first_positive = all_gather_rows(targets)
    return info_nce(anchors, targets, temperature, first_positive)


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
    parts: int = 1,
) -> PretrainingLoss:
    """rRCM's objective (section 3.2): contrastive at the quietest level + consistency along the noise trajectory.

    `student` and `teacher` are `ProjectedViT`s (or wrap one). The images and the noise are (B, C, H, W) float32 in
    model space, pixels scaled to [-1, 1]; t > t_next are neighbouring Karras levels, t_min the quietest. Negatives are
    all other targets of the global batch. One noise tensor serves all levels: going from t to t_next along it is a
    step of the probability-flow ODE. The networks see the batch in `parts`; loss and gradient are those of the whole.
    """
    views = [view1 + t_min * noise, view2 + t_min * noise]
    with torch.no_grad():  # targets carry no graph, and come first: what they need for a moment is not on top of one
        y1, y2 = teacher(views, [t_min, t_min], project=2, parts=parts)
        encode = getattr(student, "module", student)  # no gradient, so past DDP's hooks
        (quieter,) = encode([image + t_next * noise], [t_next], project=0, parts=parts)
    z1, z2, representation = student([*views, image + t * noise], [t_min, t_min, t], project=2, parts=parts)
    return PretrainingLoss(
        contrastive=global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature),
        consistency=global_info_nce(representation, quieter, temperature),
    )


def moco_noise_loss(
    student: Callable[..., list[torch.Tensor]],
    teacher: Callable[..., list[torch.Tensor]],
    view1: torch.Tensor,
    view2: torch.Tensor,
    noise1: torch.Tensor,
    noise2: torch.Tensor,
    *,
    t1: torch.Tensor,
    t2: torch.Tensor,
    temperature: float = 0.2,
    parts: int = 1,
) -> PretrainingLoss:
    """MoCo-v3 (Chen et al. 2021) with Gaussian noise as one more augmentation: what rRCM is compared with.

    As `pretraining_loss`, but each view has a noise of its own, (B, C, H, W), at levels of its own, t1 and t2 (B,) in
    model space, and there is no consistency term.
    """
    views = [view1 + t1.view(-1, 1, 1, 1) * noise1, view2 + t2.view(-1, 1, 1, 1) * noise2]
    with torch.no_grad():
        y1, y2 = teacher(views, [t1, t2], project=2, parts=parts)
    z1, z2 = student(views, [t1, t2], project=2, parts=parts)
    contrastive = global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature)
    return PretrainingLoss(contrastive=contrastive, consistency=torch.zeros_like(contrastive))


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
