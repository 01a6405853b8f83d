"""MoCo-v3 (Chen et al. 2021) with noisy views."""

import copy
from dataclasses import dataclass

import torch

from rrcm.models.encoders import Encoder
from rrcm.models.heads import EncoderWithPredictor
from rrcm.models.vit import EncoderWithProjector
from rrcm.objectives.base import Batch, StepRandomness
from rrcm.objectives.contrastive import Contrastive


@dataclass(frozen=True)
class MoCoV3(Contrastive):
    """The contrastive loss times 2 tau, with a predictor on the student and a final BatchNorm in both heads.

    The views are as noisy as in `Contrastive`. The teacher averages the encoder and the projector, not the predictor.
    """

    def build_student_and_teacher(self, encoder: Encoder) -> tuple[torch.nn.Module, torch.nn.Module]:
        hidden, out = self.projector_hidden_dim, self.projection_dim
        network = EncoderWithProjector(encoder, hidden, out, last_norm=True)
        return EncoderWithPredictor(network, hidden, out), copy.deepcopy(network)

    def __call__(self, networks: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        loss = 2 * self.temperature * super().__call__(networks, batch, random)["loss"]
        return {"loss": loss, "contrastive": loss}
