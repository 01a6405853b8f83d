"""Denoisers D(x; t): the clean image that a noisy one most likely comes from (Karras et al. 2022).

The model folder has `kind` "denoiser". Images are in model space, pixels scaled to [-1, 1], and t is the standard
deviation of their noise there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from rrcm.models.checkpoints import FORMAT, architecture, check_kind, read_model_config
from rrcm.models.vit import SIGMA_DATA, NoiseConditionedViT, forward_in_chunks
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import write_json
from rrcm.utils.tensors import load_tensors, load_weights, save_tensors


class Preconditioning(NamedTuple):
    """The factors of D(x; t) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, table 1)."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


def preconditioning(t: torch.Tensor) -> Preconditioning:
    """The factors at noise levels t > 0, each of the shape of t."""
    variance = t.square() + SIGMA_DATA**2
    return Preconditioning(SIGMA_DATA**2 / variance, t * SIGMA_DATA * variance.rsqrt(), variance.rsqrt(), t.log() / 4)


def loss_weight(t: torch.Tensor) -> torch.Tensor:
    """lambda(t) = (t^2 + sd^2) / (t sd)^2: then F's squared error counts alike at all levels (table 1)."""
    return (t.square() + SIGMA_DATA**2) / (t * SIGMA_DATA).square()


class Denoiser(nn.Module):
    """Estimates clean images from noisy ones, all at once."""

    image_size: int
    channels: int

    def forward(self, noisy: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """noisy (B, C, H, W) float32: images in [-1, 1] plus noise of standard deviation t, one number or (B,).

        Returns (B, C, H, W) float32, not clipped.
        """
        raise NotImplementedError


class PixelViT(nn.Module):
    """F: the noise-conditioned trunk with a linear head that turns each patch token into pixels.

    The trunk scales its input with c_in and has its noise level as a token. With `condition_dim` it also takes a vector
    per image, in the place of the class token.
    """

    def __init__(self, encoder: NoiseConditionedViT, condition_dim: int | None = None):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, encoder.in_chans * encoder.patch_embed.patch_size[0] ** 2)
        nn.init.zeros_(self.head.weight)  # as in EDM: D is c_skip x at first
        nn.init.zeros_(self.head.bias)
        encoder.cls_token.requires_grad_(condition_dim is None)
        self.condition = None if condition_dim is None else nn.Linear(condition_dim, encoder.embed_dim)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """noisy (B, C, H, W), t (B,), condition (B, condition_dim) -> (B, C, H, W)."""
        first = None if condition is None else self.condition(condition)
        patches = self.head(self.encoder.patch_tokens(noisy, t, first))
        size, side = self.encoder.patch_embed.img_size, self.encoder.patch_embed.patch_size
        return F.fold(patches.mT, size, side, stride=side)


class EDMDenoiser(Denoiser):
    """D(x; t) = c_skip x + c_out F(c_in x; c_noise) with the network F."""

    def __init__(self, network: PixelViT):
        super().__init__()
        self.network = network
        self.image_size, self.channels = network.encoder.patch_embed.img_size[0], network.encoder.in_chans

    def forward(
        self,
        noisy: torch.Tensor,
        t: torch.Tensor | float,
        condition: torch.Tensor | None = None,
        *,
        num_chunks: int = 1,
    ) -> torch.Tensor:
        """As `Denoiser.forward`, with the condition of each image (B, condition_dim) if the network takes one.

        With `num_chunks` above 1 the network sees the batch in chunks, which saves memory in training.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=noisy.device).expand(len(noisy))
        inputs = (noisy, t) if condition is None else (noisy, t, condition)
        output = forward_in_chunks(self.network, num_chunks, *inputs).float()
        factors = preconditioning(t[:, None, None, None])
        return factors.c_skip * noisy + factors.c_out * output


def save_denoiser(folder: Path, denoiser: EDMDenoiser, **metadata: object) -> None:
    """Write the model folder of a denoiser; `metadata` (JSON-able) goes into config.json too."""
    network = denoiser.network
    condition_dim = None if network.condition is None else network.condition.in_features
    config = {"kind": "denoiser", "format": FORMAT, "architecture": architecture(network.encoder)}
    save_tensors(folder / "model.safetensors", denoiser.state_dict())
    write_json(folder / "config.json", config | {"condition_dim": condition_dim} | metadata)


def load_denoiser(folder: Path | str) -> Denoiser:
    """The denoiser in a model folder, in eval mode. Raises `RRCMError` for a damaged folder or one of another kind."""
    folder = Path(folder)
    config = read_model_config(folder)
    check_kind(folder, config, ("denoiser",))
    denoiser = _build(folder, config)
    return load_weights(denoiser, load_tensors(folder / "model.safetensors"), folder).eval()


def _build(folder: Path, config: Mapping) -> EDMDenoiser:
    try:
        encoder = NoiseConditionedViT(**config["architecture"])
        return EDMDenoiser(PixelViT(encoder, config["condition_dim"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RRCMError(f"{folder}/config.json: describes no denoiser ({one_line(error)}); train it again") from None
