"""rRCM's pre-training objective (Lei et al. 2025, section 3)."""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from rrcm.models.noise_levels import karras_levels
from rrcm.objectives.base import Batch, Draw
from rrcm.objectives.contrastive import Network, global_info_nce


class RRCMLoss(NamedTuple):
    """The terms per image, each (B,) float32."""

    contrastive: torch.Tensor  # both directions summed
    consistency: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.contrastive + self.consistency


def rrcm_loss(
    student: Network,
    teacher: Network,
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
    """Contrastive loss at the quietest level plus consistency along the noise trajectory (section 3.2).

    `student` and `teacher` are `EncoderWithProjector`s (or wrap one). The images and the noise are (B, C, H, W) float32
    in model space, pixels scaled to [-1, 1]. t > t_next are neighbouring Karras levels, t_min the quietest. Negatives
    are all other targets of the global batch. One noise tensor serves all levels: going from t to t_next along it is a
    step of the probability-flow ODE. With `num_chunks` the networks see the batch in chunks, for the same gradient.
    """
    views = [view1 + t_min * noise, view2 + t_min * noise]
    with torch.no_grad():  # compute targets first: their temporary memory is freed before the student's graph is built
        y1, y2 = teacher(views, [t_min, t_min], project=2, num_chunks=num_chunks)
        encode = getattr(student, "module", student)  # no gradient, so past DDP's hooks
        (quieter,) = encode([image + t_next * noise], [t_next], project=0, num_chunks=num_chunks)
    z1, z2, representation = student([*views, image + t * noise], [t_min, t_min, t], project=2, num_chunks=num_chunks)
    return RRCMLoss(
        contrastive=global_info_nce(z1, y2, temperature) + global_info_nce(z2, y1, temperature),
        consistency=global_info_nce(representation, quieter, temperature),
    )


def num_levels(step: int, total_steps: int, *, start: int = 20, end: int = 80) -> int:
    """Grid size N(k) = min(s0 * 2^ceil(k / K'), s1) + 1 with K' = ceil(K / log2(ceil(s1 / s0) + 1))."""
    doubling_steps = math.ceil(total_steps / math.log2(math.ceil(end / start) + 1))
    return min(start * 2 ** math.ceil(step / doubling_steps), end) + 1


@dataclass(frozen=True)
class RRCM:
    """`rrcm_loss` with the curriculum of noise levels: one noise per image, one pair of levels per step."""

    steps: int  # of the whole pre-training
    min_levels: int
    max_levels: int
    t_min: float  # model space
    t_max: float
    rho: float
    temperature: float
    num_chunks: int = 1
    terms: ClassVar[tuple[str, ...]] = ("contrastive", "consistency")
    forwards_per_image: ClassVar[float] = 3 * 3 + 1 + 2  # three student views, the quieter target, two teacher views

    def levels(self, step: int) -> list[float]:
        """The Karras grid at a step, from loud to quiet, model space."""
        count = num_levels(step, self.steps, start=self.min_levels, end=self.max_levels)
        return karras_levels(count, t_min=self.t_min, t_max=self.t_max, rho=self.rho).tolist()

    def schedule(self, step: int) -> dict[str, float]:
        return {"levels": num_levels(step, self.steps, start=self.min_levels, end=self.max_levels)}

    def __call__(self, networks: object, batch: Batch, draw: Draw) -> dict[str, torch.Tensor]:
        levels = self.levels(draw.step)
        n = int(draw.generator("level").integers(len(levels) - 1))  # one for the whole global batch
        terms = rrcm_loss(
            networks.student,
            networks.teacher,
            batch["image"],
            batch["view1"],
            batch["view2"],
            draw.normal("noise", batch["image"].shape[1:]),
            t=levels[n],
            t_next=levels[n + 1],
            t_min=levels[-1],
            temperature=self.temperature,
            num_chunks=self.num_chunks,
        )
        contrastive, consistency = terms.contrastive.mean(), terms.consistency.mean()
        return {"loss": terms.total.mean(), "contrastive": contrastive, "consistency": consistency}
