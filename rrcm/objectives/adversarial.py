"""Projected gradient ascent in the L2 norm, which adversarial objectives and `rrcm.evaluation.attack` share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from rrcm.objectives.base import per_row


def ascend(
    loss: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    *,
    steps: int,
    length: float | torch.Tensor,
    project: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Take `steps` steps of L2 `length` up the gradient of `loss`, each followed by `project`: (B, ...) like `start`.

    `loss` maps (B, ...) to a scalar, the sum of one loss per row. `length` is one number, or (B,) with one per row. A
    row whose gradient is 0 does not move. No gradient flows back through the result.
    """
    x = start.detach()
    for _ in range(steps):
        x = x.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(x), x)
        x = project(x.detach() + per_row(length, start) * direction(gradient))
    return x.detach()


def direction(gradient: torch.Tensor) -> torch.Tensor:
    """Each row of (B, ...) scaled to L2 norm 1; rows of 0 stay 0."""
    tiny = torch.finfo(gradient.dtype).tiny
    return F.normalize(gradient.flatten(1), dim=1, eps=tiny).view_as(gradient)


def project_to_ball(moved: torch.Tensor, centre: torch.Tensor, radius: float | torch.Tensor) -> torch.Tensor:
    """Project each row of `moved` onto the L2 ball of `radius` around the same row of `centre`.

    `radius` is one number, or (B,) with one per row.
    """
    offset = moved - centre
    norm = offset.flatten(1).norm(dim=1).clamp_min(torch.finfo(moved.dtype).tiny)
    return centre + offset * per_row((radius / norm).clamp_max(1), offset)
