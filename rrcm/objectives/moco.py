"""TODO docstring."""

from collections.abc import Callable

import torch

from rrcm.objectives.contrastive import global_info_nce
from rrcm.objectives.rrcm import RRCMLoss


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
    num_chunks: int = 1,
) -> RRCMLoss:
    """MoCo-v3 (Chen et al. 2021) with Gaussian noise as one more augmentation: what rRCM is compared with.

    As `rrcm_loss`, but each view has a noise of its own, (B, C, H, W), at levels of its own, t1 and t2 (B,) in
    model space, and there is no consistency term.
    """
    views = [view1 + t1.view(-1, 1, 1, 1) * noise1, view2 + t2.view(-1, 1, 1, 1) * noise2]
    with torch.no_grad():
        y1, y2 = teacher(views, [t1, t2], num_projected=2, num_chunks=num_chunks)
    z1, z2 = student(views, [t1, t2], num_projected=2, num_chunks=num_chunks)
    contrastive = global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature)
    return RRCMLoss(contrastive=contrastive, consistency=torch.zeros_like(contrastive))
