"""A small CNN that is conditioned on the noise level: an encoder for small images that costs less than a ViT."""

import math
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from rrcm.models.stems import check_size, hide_patches
from rrcm.models.vit import SIGMA_DATA, time_embedding
from rrcm.sections import count_halvings

NOISE_DIM = 128  # width of the embedded noise level


class NoiseConditionedCNN(nn.Module):
    """Convolutions of stride 2, then a linear layer of all positions, each conditioned on the noise level.

    The convolutions halve the image until there is one position for each patch. The last one has a quarter of
    `embed_dim` channels, and each earlier one has half as many as the next. Kernels are 5 pixels wide if the side is
    above 8, and 3 pixels otherwise. Each layer is normalized over an image, and then scaled and shifted per channel by
    a linear function of the embedded noise level, which starts at zero (FiLM, Perez et al. 2018).

    >>> encoder = rrcm.NoiseConditionedCNN(image_size=8, channels=1, patch_size=4, embed_dim=32)
    >>> encoder(torch.randn(5, 1, 8, 8), t=1.0).shape
    torch.Size([5, 32])
    """

    summary_tokens: ClassVar[int] = 1  # tokens that `forward` returns for `visible` in addition to those of patches

    def __init__(self, image_size: int, channels: int, patch_size: int, embed_dim: int):
        super().__init__()
        self.image_size, self.in_chans, self.patch_size, self.embed_dim = image_size, channels, patch_size, embed_dim
        self.num_patches = (image_size // patch_size) ** 2
        kernels = cnn_kernels(image_size, patch_size)
        self.widths = cnn_widths(len(kernels), embed_dim)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, 2, kernel // 2, bias=False)
            for (before, after), kernel in zip(pairwise([channels, *self.widths]), kernels, strict=True)
        )
        self.linear = nn.Linear(self.widths[-1] * self.num_patches, embed_dim, bias=False)
        self.noise = nn.Linear(NOISE_DIM, 2 * (sum(self.widths) + embed_dim))
        nn.init.zeros_(self.noise.weight)
        nn.init.zeros_(self.noise.bias)
        self.to(memory_format=torch.channels_last)  # a step takes less time on a CPU

    def forward(
        self, images: torch.Tensor, t: torch.Tensor | float, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The representation of noisy images: (B, C, H, W) -> (B, embed_dim).

        images: float, model space (pixels scaled to [-1, 1], plus noise of standard deviation t).
        t: one noise level, or one per image (B,), in model space (2 * pixel sigma), > 0.
        visible: (B, V) int64, the patches of each image that the network sees. All other patches are zero. The result
        is then (B, 1, embed_dim): the representation as the only token. Raises `ValueError` for images of another size.
        """
        check_size(images, (self.image_size, self.image_size))
        if visible is not None:
            return self(hide_patches(images, visible, self.patch_size), t)[:, None]
        t = torch.as_tensor(t, dtype=torch.float32, device=images.device)
        t = t.expand(len(images)) if t.ndim else t[None]  # one level is embedded once
        dtype, c_in = self.linear.weight.dtype, (t.square() + SIGMA_DATA**2).rsqrt()
        x = (c_in[:, None, None, None] * images).to(dtype).contiguous(memory_format=torch.channels_last)
        conditions = self.noise(time_embedding(t, NOISE_DIM).to(dtype))
        *of_convolutions, of_linear = conditions.split([2 * width for width in (*self.widths, self.embed_dim)], dim=1)
        for convolution, condition in zip(self.convolutions, of_convolutions, strict=True):
            x = activate(convolution(x), condition[:, :, None, None])
        return activate(self.linear(x.flatten(1)), of_linear)


def activate(x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Normalize each image of (B, C, ...), scale and shift its channels by the halves of `condition`, apply GELU."""
    scale, shift = condition.chunk(2, dim=1)
    return F.gelu(torch.addcmul(shift, F.group_norm(x, 1), 1 + scale))


def cnn_kernels(image_size: int, patch_size: int) -> list[int]:
    """The kernel of each convolution of stride 2, in pixels."""
    sides = [math.ceil(image_size / 2**k) for k in range(count_halvings(image_size, patch_size))]
    return [5 if side > 8 else 3 for side in sides]


def cnn_widths(convolutions: int, embed_dim: int) -> list[int]:
    """The channels of each convolution. `embed_dim` must be a multiple of 2^(convolutions + 1)."""
    return [embed_dim // 2 ** (k + 1) for k in range(convolutions, 0, -1)]


def cnn_multiply_adds(image_size: int, channels: int, patch_size: int, embed_dim: int) -> int:
    """Multiply-adds of one image in a `NoiseConditionedCNN`, when each image has its own noise level."""
    kernels, side, total = cnn_kernels(image_size, patch_size), image_size, 0
    widths = cnn_widths(len(kernels), embed_dim)
    for (before, after), kernel in zip(pairwise([channels, *widths]), kernels, strict=True):
        side = (side + 1) // 2
        total += side**2 * kernel**2 * before * after
    return total + side**2 * widths[-1] * embed_dim + NOISE_DIM * 2 * (sum(widths) + embed_dim)
