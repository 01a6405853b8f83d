"""Stems, which turn an image into the tokens of a ViT: patches, or convolutions that halve the image."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from rrcm.sections import count_halvings


class PatchEmbed(nn.Module):
    """Split an image into square patches and project each to a token."""

    mixes_patches = False  # whether a token depends on patches other than its own

    def __init__(self, img_size: int, patch_size: int, channels: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.proj = nn.Conv2d(channels, embed_dim, patch_size, patch_size)

    def forward(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, patches, D), row by row. `noise` is for other stems. Raises `ValueError` for images of
        another size.
        """
        check_size(images, self.img_size)
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvolutionStem(nn.Module):
    """Convolutions of stride 2 until there is one position for each patch (Xiao et al. 2021), conditioned on the noise.

    The first convolution has few channels, and each further one doubles them. Each is normalized over all channels and
    positions of an image, and then scaled and shifted per channel by a linear function of the embedded noise level,
    which starts at zero.
    """

    mixes_patches = True

    def __init__(self, img_size: int, patch_size: int, channels: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        halvings = count_halvings(img_size, patch_size)
        widths = [channels, *(embed_dim // 2**k for k in range(halvings, 0, -1))]
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, 2, 1, bias=False) for before, after in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(1, width, affine=False) for width in widths[1:])
        self.noise = nn.Linear(embed_dim, 2 * sum(widths[1:]))
        self.proj = nn.Conv2d(widths[-1], embed_dim, 1)
        nn.init.zeros_(self.noise.weight)
        nn.init.zeros_(self.noise.bias)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) and embedded noise levels (B, D) -> (B, patches, D), row by row. Raises `ValueError` for
        images of another size.
        """
        check_size(images, self.img_size)
        x, conditions = images, self.noise(noise)[:, :, None, None]
        conditions = conditions.split([2 * layer.out_channels for layer in self.layers], dim=1)
        for layer, norm, condition in zip(self.layers, self.norms, conditions, strict=True):
            scale, shift = condition.chunk(2, dim=1)
            x = F.gelu(norm(layer(x)) * (1 + scale) + shift)
        return self.proj(x).flatten(2).transpose(1, 2)


STEMS = {"patches": PatchEmbed, "convolutions": ConvolutionStem}


def check_size(images: torch.Tensor, size: tuple[int, int]) -> None:
    """Raise `ValueError` for images (B, C, H, W) of another size."""
    if images.shape[-2:] != size:
        raise ValueError(f"images are {tuple(images.shape[-2:])} pixels, the network needs {size}")


def hide_patches(images: torch.Tensor, visible: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The images (B, C, H, W) with zeros in all patches but `visible` (B, V) int64."""
    batch, _, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    kept = torch.zeros(batch, rows * columns, dtype=torch.bool, device=images.device).scatter_(1, visible, True)
    kept = kept.view(batch, 1, rows, columns).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return torch.where(kept, images, 0)


def stem_multiply_adds(stem: str, image_size: int, channels: int, patch_size: int, embed_dim: int) -> int:
    """Multiply-adds of one image in a stem."""
    patches = (image_size // patch_size) ** 2
    if stem == "patches":
        return patches * channels * patch_size**2 * embed_dim
    halvings, side, before, total = count_halvings(image_size, patch_size), image_size, channels, 0
    for k in range(halvings, 0, -1):
        side, after = (side + 1) // 2, embed_dim // 2**k
        total += side**2 * 9 * before * after + 2 * embed_dim * after
        before = after
    return total + patches * before * embed_dim
