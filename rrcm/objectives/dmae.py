"""Denoising masked autoencoders (Wu et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from rrcm.models.cnn import cnn_multiply_adds
from rrcm.models.encoders import Encoder
from rrcm.models.heads import Decoder, MaskedAutoencoder
from rrcm.models.stems import stem_multiply_adds
from rrcm.models.vit import block_multiply_adds, encoder_multiply_adds
from rrcm.objectives.base import Batch, StepRandomness


def normalized_patches(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The patches of (B, C, H, W), row by row, each with mean 0 and variance 1: (B, P, C * patch_size^2)."""
    patches = F.unfold(images, patch_size, stride=patch_size).mT
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def visible_patches(scores: torch.Tensor, num_visible: int) -> torch.Tensor:
    """The indices of the `num_visible` patches with the smallest scores (B, P), ascending: (B, num_visible) int64."""
    return scores.argsort(dim=1, stable=True)[:, :num_visible].sort(dim=1).values


def reconstruction_loss(reconstruction: torch.Tensor, image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Mean squared error over all patches of the clean image, visible or not: (B,) float32.

    reconstruction (B, P, C * patch_size^2), image (B, C, H, W) without noise.
    """
    return (reconstruction.float() - normalized_patches(image, patch_size)).square().mean((1, 2))


@dataclass(frozen=True, kw_only=True)
class DMAE:
    """The encoder sees some patches of a noisy image, and a light decoder reconstructs all patches without noise.

    Two things differ from the published method: the encoder keeps its class and time tokens, and the decoder sees them.
    For a stem of convolutions and for a CNN, the hidden patches are set to zero, so that no token depends on them. The
    decoder of a CNN sees only the representation.
    """

    image_size: int
    channels: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    t_min: float  # noise level with which an image without noise is encoded, model space
    mask_ratio: float  # share of the patches that the encoder does not see
    sigma: float  # pixel noise
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int
    architecture: str = "vit"  # of the encoder: vit or cnn
    stem: str = "patches"  # of a ViT, a key of STEMS
    num_chunks: int = 1
    masked: bool = True  # False, an ablation: the encoder sees all patches
    terms: ClassVar[tuple[str, ...]] = ("reconstruction",)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visible(self) -> int:
        """At least 1."""
        if not self.masked:
            return self.num_patches
        return max(1, round((1 - self.mask_ratio) * self.num_patches))

    @property
    def forwards_per_image(self) -> float:
        """Counted in multiply-adds, since a pass with few patches is cheaper and the decoder is another network."""
        patch_dim = self.channels * self.patch_size**2
        image = self.image_size, self.channels, self.patch_size, self.embed_dim
        if self.architecture == "cnn":
            summary, seen = 1, 0
            masked = whole = cnn_multiply_adds(*image)
        else:
            summary, seen = 2, self.num_visible
            sizes = stem_multiply_adds(self.stem, *image), self.num_patches, self.embed_dim, self.depth, self.num_heads
            masked, whole = encoder_multiply_adds(*sizes, self.num_visible), encoder_multiply_adds(*sizes)
        decoder = (summary + seen) * self.embed_dim + self.num_patches * patch_dim  # first and last layer
        decoder = decoder * self.decoder_embed_dim
        decoder += self.decoder_depth * block_multiply_adds(summary + self.num_patches, self.decoder_embed_dim)
        return 3 * (masked + decoder) / whole

    def build_decoder(self, encoder: Encoder) -> Decoder:
        return Decoder(encoder, self.decoder_embed_dim, self.decoder_depth, self.decoder_num_heads)

    def build_student_and_teacher(self, encoder: Encoder) -> tuple[torch.nn.Module, None]:
        return MaskedAutoencoder(encoder, self.build_decoder(encoder)), None

    def __call__(self, networks: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        image = batch["image"]
        noisy = image + 2 * self.sigma * random.normal("masked image's noise", image.shape[1:])
        t = torch.full((len(image),), max(2 * self.sigma, self.t_min), device=image.device)
        visible = visible_patches(random.uniform("mask", (self.num_patches,)), self.num_visible)
        reconstruction = networks.student(noisy, t, visible=visible, num_chunks=self.num_chunks)
        loss = reconstruction_loss(reconstruction, image, self.patch_size).mean()
        return {"loss": loss, "reconstruction": loss}
