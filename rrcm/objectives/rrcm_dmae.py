"""rRCM and DMAE together on one encoder."""

from dataclasses import dataclass

import torch

from rrcm.models.encoders import Encoder
from rrcm.models.heads import ProjectedAutoencoder
from rrcm.objectives.base import Batch, StepRandomness
from rrcm.objectives.dmae import DMAE
from rrcm.objectives.rrcm import RRCM


@dataclass(frozen=True, kw_only=True)
class RRCMDMAE(RRCM, DMAE):
    """The rRCM loss plus `dmae_weight` times the DMAE loss. Each draws its own noise."""

    dmae_weight: float

    @property
    def terms(self) -> tuple[str, ...]:
        return (*super().terms, *DMAE.terms)

    @property
    def forwards_per_image(self) -> float:
        return super().forwards_per_image + DMAE.forwards_per_image.fget(self)

    def build_student_and_teacher(self, encoder: Encoder) -> tuple[torch.nn.Module, torch.nn.Module | None]:
        student, teacher = super().build_student_and_teacher(encoder)
        return ProjectedAutoencoder(student, self.build_decoder(encoder)), teacher

    def __call__(self, networks: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        rrcm, dmae = (objective.__call__(self, networks, batch, random) for objective in (RRCM, DMAE))
        return rrcm | dmae | {"loss": rrcm["loss"] + self.dmae_weight * dmae["loss"]}
