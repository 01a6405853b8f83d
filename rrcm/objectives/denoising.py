"""Denoising as in EDM (Karras et al. 2022, section 5): the loss of a denoiser."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from rrcm.models.denoiser import loss_weight
from rrcm.objectives.base import Batch, StepRandomness


def denoising_loss(estimate: torch.Tensor, image: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """lambda(t) (D(x; t) - image)^2, averaged over pixels. estimate and image (B, C, H, W), t (B,) -> (B,) float32."""
    return loss_weight(t) * (estimate - image).square().mean((1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """E lambda(t) |D(image + t e; t) - image|^2 with ln t ~ N(P_mean, P_std^2), in model space.

    `model` is the denoiser. The batch has `image`, (B, C, H, W) float32 in [-1, 1].
    """

    noise_mean: float  # P_mean
    noise_std: float  # P_std
    num_chunks: int = 1
    terms: ClassVar[tuple[str, ...]] = ()
    forwards_per_image: ClassVar[float] = 3.0

    def __call__(self, model: Callable, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        image = batch["image"]
        t = (self.noise_mean + self.noise_std * random.normal("noise level", ())).exp()
        noisy = image + t[:, None, None, None] * random.normal("noise", image.shape[1:])
        estimate = model(noisy, t, num_chunks=self.num_chunks)
        return {"loss": denoising_loss(estimate, image, t).mean()}
