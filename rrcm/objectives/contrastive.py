"""InfoNCE over the global batch, and contrastive pre-training with noisy views."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT
from rrcm.objectives.base import Batch, StepRandomness
from rrcm.utils.distributed import all_gather_cat

Network = Callable[..., list[torch.Tensor]]  # an `EncoderWithProjector`, or a wrapper of one


def info_nce(
    anchors: torch.Tensor, targets: torch.Tensor, temperature: float = 0.2, first_positive: int = 0
) -> torch.Tensor:
    """InfoNCE of each anchor against all targets, cosine similarities: -log softmax(a . T / tau)[positive].

    anchors (B, D), targets (M, D) with M >= B; anchor i's positive is target first_positive + i -> (B,) float32.

    >>> rrcm.info_nce(torch.eye(2), torch.eye(2), temperature=1.0)  # -log(e / (e + 1))
    tensor([0.3133, 0.3133])
    """
    similarity = F.normalize(anchors.float(), dim=1) @ F.normalize(targets.float(), dim=1).T
    positives = torch.arange(len(anchors), device=anchors.device) + first_positive
    return F.cross_entropy(similarity / temperature, positives, reduction="none")


def global_info_nce(anchors: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """`info_nce` of this process's anchors (B, D) against the targets of all processes -> (B,)."""
    targets, first_positive = all_gather_cat(targets)
    return info_nce(anchors, targets, temperature, first_positive)


def contrastive_loss(
    student: Network,
    teacher: Network,
    view1: torch.Tensor,
    view2: torch.Tensor,
    noise1: torch.Tensor,
    noise2: torch.Tensor,
    *,
    t1: torch.Tensor,
    t2: torch.Tensor,
    temperature: float = 0.2,
    num_chunks: int = 1,
) -> torch.Tensor:
    """InfoNCE of noisy views, student against teacher, both directions summed: (B,) float32.

    Views and noises are (B, C, H, W) float32 in model space. Each view has noise levels of its own, t1 and t2 (B,).
    """
    views = [view1 + t1.view(-1, 1, 1, 1) * noise1, view2 + t2.view(-1, 1, 1, 1) * noise2]
    with torch.no_grad():
        y1, y2 = teacher(views, [t1, t2], num_projected=2, num_chunks=num_chunks)
    z1, z2 = student(views, [t1, t2], num_projected=2, num_chunks=num_chunks)
    return global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature)


@dataclass(frozen=True)
class Contrastive:
    """rRCM without its consistency term: noise is only one more augmentation of the views.

    Each view gets its own noise, with pixel sigma uniform from 0 to the loudest of `evaluate_sigmas`.
    """

    projector_hidden_dim: int
    projection_dim: int
    temperature: float
    t_min: float
    evaluate_sigmas: list[float]  # pixel units
    num_chunks: int = 1
    terms: ClassVar[tuple[str, ...]] = ("contrastive",)
    forwards_per_image: ClassVar[float] = 2 * 3 + 2  # two student views, two teacher views

    def build_student_and_teacher(self, encoder: NoiseConditionedViT) -> tuple[torch.nn.Module, torch.nn.Module]:
        student = EncoderWithProjector(encoder, self.projector_hidden_dim, self.projection_dim)
        return student, copy.deepcopy(student)

    def __call__(self, networks: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        view1, view2 = batch["view1"], batch["view2"]
        noise1, noise2 = (random.normal(f"noise {i}", view1.shape[1:]) for i in (1, 2))
        loudest = 2 * max(self.evaluate_sigmas)
        levels = random.generator("view levels").uniform(self.t_min, loudest, (2, random.batch_size))
        t1, t2 = torch.from_numpy(levels[:, list(random.positions)]).to(random.device, torch.float32)
        loss = contrastive_loss(
            networks.student,
            networks.teacher,
            view1,
            view2,
            noise1,
            noise2,
            t1=t1,
            t2=t2,
            temperature=self.temperature,
            num_chunks=self.num_chunks,
        ).mean()
        return {"loss": loss, "contrastive": loss}
