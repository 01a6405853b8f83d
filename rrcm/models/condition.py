"""What a conditional denoiser is told about an image: the representation of the clean one by a frozen encoder."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rrcm.config import Config
from rrcm.models.checkpoints import ARCHITECTURE, load_encoder
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.files import sha256_folder


@dataclass(frozen=True)
class Condition:
    """A frozen encoder, and how it is asked."""

    encoder: NoiseConditionedViT
    t: float  # the noise level that it takes clean images for, in model space
    sha256: str  # of its model folder

    @property
    def identity(self) -> dict[str, float | str]:
        """What decides the condition, JSON-able."""
        return {"t": self.t, "sha256": self.sha256}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Clean images (B, C, H, W) in [-1, 1] -> (B, embed_dim) float32."""
        return self.encoder(images, self.t).float()


def load_condition(config: Config, folder: Path, device: torch.device) -> Condition:
    """The condition by the encoder in a model folder. Raises `RRCMError` if that does not fit the settings."""
    sizes = config.data.model_dump() | config.model.model_dump()
    encoder = load_encoder(folder, {name: sizes[name] for name in ARCHITECTURE})
    return Condition(encoder.to(device).eval().requires_grad_(False), config.pretrain.t_min, sha256_folder(folder))
