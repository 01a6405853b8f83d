"""rRCM's pre-training objective (Lei et al. 2025, section 3)."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rrcm.models.encoders import Encoder
from rrcm.models.noise_levels import karras_levels
from rrcm.models.vit import EncoderWithProjector
from rrcm.objectives.base import Batch, StepRandomness
from rrcm.objectives.contrastive import Network, global_info_nce


class RRCMLoss(NamedTuple):
    """The terms per image, each (B,) float32."""

    contrastive: torch.Tensor  # both directions summed
    consistency: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.contrastive + self.consistency


class RRCMInputs(NamedTuple):
    """Images and noise of one step: (B, C, H, W) float32 in model space, where pixels lie in [-1, 1].

    >>> image, view1, view2, noise = torch.randn(4, 6, 1, 8, 8)
    >>> rrcm.RRCMInputs(image, view1, view2, noise).noise.shape
    torch.Size([6, 1, 8, 8])
    """

    image: torch.Tensor
    view1: torch.Tensor
    view2: torch.Tensor
    noise: torch.Tensor  # standard normal
    quieter_noise: torch.Tensor | None = None  # noise of the image at t_next, in an ablation; None: `noise`


class RRCMLevels(NamedTuple):
    """Noise levels of one step in model space: t > t_next are neighbours in Karras's grid, t_min is the quietest.

    >>> rrcm.RRCMLevels(t=1.2, t_next=1.0).t_min
    0.002
    """

    t: float
    t_next: float
    t_min: float = 0.002


def rrcm_loss(
    student: Network,
    teacher: Network | None,
    inputs: RRCMInputs,
    levels: RRCMLevels,
    *,
    temperature: float = 0.2,
    num_chunks: int = 1,
) -> RRCMLoss:
    """Contrastive loss at the quietest level plus consistency along the noise trajectory (section 3.2).

    `student` and `teacher` are `EncoderWithProjector`s (or wrap one). The negatives are all other targets of the global
    batch. One noise tensor serves all levels: going from t to t_next along it is a step of the probability-flow ODE.
    With `num_chunks` above 1 the networks process the batch in chunks, which gives the same gradient.

    Ablations: without a teacher the contrastive term is 0; `quieter_noise` makes the two noises independent.

    >>> from rrcm.models.vit import EncoderWithProjector
    >>> encoder = rrcm.NoiseConditionedViT(image_size=8, channels=1, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    >>> student = EncoderWithProjector(encoder, hidden=16, out=8)
    >>> teacher = EncoderWithProjector(encoder, hidden=16, out=8)
    >>> image, view1, view2, noise = torch.randn(4, 6, 1, 8, 8)
    >>> terms = rrcm.rrcm_loss(
    ...     student, teacher, rrcm.RRCMInputs(image, view1, view2, noise), rrcm.RRCMLevels(t=1.2, t_next=1.0)
    ... )
    >>> terms.total.mean().backward()
    >>> terms.total.shape
    torch.Size([6])
    """
    image, view1, view2, noise, quieter_noise = inputs
    t, t_next, t_min = levels
    views = [] if teacher is None else [view1 + t_min * noise, view2 + t_min * noise]
    view_levels = [t_min] * len(views)
    with torch.no_grad():  # compute targets first: their temporary memory is freed before the student's graph is built
        y = teacher(views, view_levels, num_projected=2, num_chunks=num_chunks) if views else []
        encode = getattr(student, "module", student)  # without gradients DDP's hooks are not needed
        quieter_image = image + t_next * (noise if quieter_noise is None else quieter_noise)
        (quieter,) = encode([quieter_image], [t_next], num_projected=0, num_chunks=num_chunks)
    *z, representation = student(
        [*views, image + t * noise], [*view_levels, t], num_projected=len(views), num_chunks=num_chunks
    )
    crossed = [global_info_nce(anchor, target, temperature) for anchor, target in zip(z, reversed(y), strict=True)]
    consistency = global_info_nce(representation, quieter, temperature)
    return RRCMLoss(contrastive=sum(crossed, torch.zeros_like(consistency)), consistency=consistency)


def num_levels(step: int, total_steps: int, *, start: int = 20, end: int = 80) -> int:
    """Grid size N(k) = min(s0 * 2^ceil(k / K'), s1) + 1 with K' = ceil(K / log2(ceil(s1 / s0) + 1)).

    >>> [rrcm.num_levels(step, 1000) for step in (0, 400, 1000)]
    [21, 41, 81]
    """
    doubling_steps = math.ceil(total_steps / math.log2(math.ceil(end / start) + 1))
    return min(start * 2 ** math.ceil(step / doubling_steps), end) + 1


@dataclass(frozen=True, kw_only=True)
class RRCM:
    """`rrcm_loss` with its curriculum of noise levels. Each image gets one noise, and each step one pair of levels.

    Each flag is an ablation.
    """

    projector_hidden_dim: int
    projection_dim: int
    steps: int  # number of steps of the whole pre-training
    min_levels: int
    max_levels: int
    t_min: float  # model space
    t_max: float
    rho: float
    temperature: float
    num_chunks: int = 1
    contrastive: bool = True  # False: only the consistency term
    same_noise: bool = True  # False: independent noise on the two sides of the consistency term
    constant_levels: bool = False  # True: `max_levels` from the first step on

    @property
    def terms(self) -> tuple[str, ...]:
        return ("contrastive", "consistency") if self.contrastive else ("consistency",)

    @property
    def forwards_per_image(self) -> float:
        views = 2 if self.contrastive else 0
        return 3 * (views + 1) + 1 + views  # student, the quieter target, teacher

    def build_student_and_teacher(self, encoder: Encoder) -> tuple[torch.nn.Module, torch.nn.Module | None]:
        student = EncoderWithProjector(encoder, self.projector_hidden_dim, self.projection_dim)
        if self.contrastive:
            return student, copy.deepcopy(student)
        student.projector = torch.nn.Identity()  # this term projects nothing
        return student, None

    def num_levels(self, step: int) -> int:
        start = self.max_levels if self.constant_levels else self.min_levels
        return num_levels(step, self.steps, start=start, end=self.max_levels)

    def levels(self, step: int) -> list[float]:
        """Karras's grid at a step, from loud to quiet, in model space."""
        return karras_levels(self.num_levels(step), t_min=self.t_min, t_max=self.t_max, rho=self.rho).tolist()

    def schedule(self, step: int) -> dict[str, float]:
        return {"levels": self.num_levels(step)}

    def __call__(self, networks: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        grid = self.levels(random.step)
        n = int(random.generator("level").integers(len(grid) - 1))  # the same for the whole global batch
        shape = batch["image"].shape[1:]
        inputs = RRCMInputs(
            batch["image"],
            batch["view1"],
            batch["view2"],
            noise=random.normal("noise", shape),
            quieter_noise=None if self.same_noise else random.normal("quieter noise", shape),
        )
        terms = rrcm_loss(
            networks.student,
            networks.teacher,
            inputs,
            RRCMLevels(grid[n], grid[n + 1], t_min=grid[-1]),
            temperature=self.temperature,
            num_chunks=self.num_chunks,
        )
        losses = {"loss": terms.total.mean(), "consistency": terms.consistency.mean()}
        return losses | ({"contrastive": terms.contrastive.mean()} if self.contrastive else {})
