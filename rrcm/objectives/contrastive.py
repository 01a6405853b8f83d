"""InfoNCE over the global batch, and contrastive pre-training with noisy views."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from rrcm.models.encoders import Encoder
from rrcm.models.vit import EncoderWithProjector
from rrcm.objectives.base import Batch, StepRandomness
from rrcm.utils.distributed import all_gather_cat

Network = Callable[..., list[torch.Tensor]]  # an `EncoderWithProjector`, or a wrapper of one


def info_nce(
    anchors: torch.Tensor, targets: torch.Tensor, temperature: float = 0.2, first_positive: int = 0
) -> torch.Tensor:
    """InfoNCE of each anchor against all targets, by cosine similarity: -log softmax(a . T / tau)[positive].

    anchors (B, D), targets (M, D) with M >= B -> (B,) float32. The positive of anchor i is target first_positive + i.

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


def add_noise(images: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """images + t * noise: (B, C, H, W) each, with a level t (B,) per image, in model space."""
    return images + t.view(-1, 1, 1, 1) * noise


def contrastive_loss(
    student: Network,
    teacher: Network,
    views: Sequence[torch.Tensor],
    levels: Sequence[torch.Tensor],
    *,
    temperature: float = 0.2,
    num_chunks: int = 1,
) -> torch.Tensor:
    """InfoNCE of two noisy views, student against teacher, summed over both directions: (B,) float32.

    The two `views` are (B, C, H, W) float32 in model space, with their noise. `levels` are their noise levels, (B,)
    each.
    """
    with torch.no_grad():
        y1, y2 = teacher(views, levels, num_projected=2, num_chunks=num_chunks)
    z1, z2 = student(views, levels, num_projected=2, num_chunks=num_chunks)
    return global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature)


@dataclass(frozen=True)
class Contrastive:
    """rRCM without its consistency term. Noise is then just another augmentation of the views.

    Each view gets its own noise. Its pixel sigma is uniform between 0 and the largest of `evaluate_sigmas`.
    """

    projector_hidden_dim: int
    projection_dim: int
    temperature: float
    t_min: float
    evaluate_sigmas: list[float]  # pixel units
    num_chunks: int = 1
    terms: ClassVar[tuple[str, ...]] = ("contrastive",)
    forwards_per_image: ClassVar[float] = 2 * 3 + 2  # two student views, two teacher views

    def build_student_and_teacher(self, encoder: Encoder) -> tuple[torch.nn.Module, torch.nn.Module]:
        student = EncoderWithProjector(encoder, self.projector_hidden_dim, self.projection_dim)
        return student, copy.deepcopy(student)

    def __call__(self, networks: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        clean = batch["view1"], batch["view2"]
        noises = [random.normal(f"noise {i}", clean[0].shape[1:]) for i in (1, 2)]
        loudest = 2 * max(self.evaluate_sigmas)
        global_levels = random.generator("view levels").uniform(self.t_min, loudest, (2, random.batch_size))
        levels = torch.from_numpy(global_levels[:, list(random.positions)]).to(random.device, torch.float32).unbind()
        loss = contrastive_loss(
            networks.student,
            networks.teacher,
            [add_noise(*view) for view in zip(clean, levels, noises, strict=True)],
            levels,
            temperature=self.temperature,
            num_chunks=self.num_chunks,
        ).mean()
        return {"loss": loss, "contrastive": loss}
