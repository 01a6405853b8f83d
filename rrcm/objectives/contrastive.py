"""TODO docstring."""

import torch
import torch.nn.functional as F

from rrcm.utils.distributed import all_gather_cat


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
    targets, first_positive = all_gather_cat(targets)
    return info_nce(anchors, targets, temperature, first_positive)
