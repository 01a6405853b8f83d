"""The three ranges of pixels: bytes as files store them, [0, 1] as users see them, and [-1, 1], the model space."""

import torch


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels of any shape as float32 in [0, 1], the range in which sigma and radii are measured."""
    return pixels.float() / 255


def to_model_space(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1], of any shape, in [-1, 1]: the scale on which pixel noise sigma is t = 2 * sigma."""
    return 2 * pixels - 1
