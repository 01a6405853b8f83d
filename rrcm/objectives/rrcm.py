"""The two training objectives (Lei et al. 2025, section 3; Jeong & Shin 2020), as the papers write them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from rrcm.objectives.contrastive import global_info_nce


class RRCMLoss(NamedTuple):
    """Per-sample terms, each (B,) float32."""

    contrastive: torch.Tensor  # both directions summed
    consistency: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.contrastive + self.consistency


def rrcm_loss(
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
    num_chunks: int = 1,
) -> RRCMLoss:
    """rRCM's objective (section 3.2): contrastive at the quietest level + consistency along the noise trajectory.

    `student` and `teacher` are `EncoderWithProjector`s (or wrap one). The images and the noise are (B, C, H, W) float32 in
    model space, pixels scaled to [-1, 1]; t > t_next are neighbouring Karras levels, t_min the quietest. Negatives are
    all other targets of the global batch. One noise tensor serves all levels: going from t to t_next along it is a
    step of the probability-flow ODE. The networks see the batch in `num_chunks`; loss and gradient are those of the whole.
    """
    views = [view1 + t_min * noise, view2 + t_min * noise]
    with torch.no_grad():  # targets carry no graph, and come first: what they need for a moment is not on top of one
        y1, y2 = teacher(views, [t_min, t_min], num_projected=2, num_chunks=num_chunks)
        encode = getattr(student, "module", student)  # no gradient, so past DDP's hooks
        (quieter,) = encode([image + t_next * noise], [t_next], num_projected=0, num_chunks=num_chunks)
    z1, z2, representation = student(
        [*views, image + t * noise], [t_min, t_min, t], num_projected=2, num_chunks=num_chunks
    )
    return RRCMLoss(
        contrastive=global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature),
        consistency=global_info_nce(representation, quieter, temperature),
    )


def num_levels(step: int, total_steps: int, *, start: int = 20, end: int = 80) -> int:
    """Grid size N(k) = min(s0 * 2^ceil(k / K'), s1) + 1 with K' = ceil(K / log2(ceil(s1 / s0) + 1))."""
    doubling_steps = math.ceil(total_steps / math.log2(math.ceil(end / start) + 1))
    return min(start * 2 ** math.ceil(step / doubling_steps), end) + 1
