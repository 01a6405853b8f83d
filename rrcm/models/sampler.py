"""Samplers: from a noisy image back to a clean one, with a denoiser D(x; t) (Karras et al. 2022).

Images (B, C, H, W) float32 are in model space, and so are the noise levels `levels`: t_0 > t_1 > ... > t_b = 0. The
noise of x has level t_0.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from rrcm.models.noise_levels import karras_levels

Denoise = Callable[[torch.Tensor, float], torch.Tensor]  # D(x; t)


def reverse_levels(t: float, steps: int) -> list[float]:
    """The levels of `steps` steps from t to 0: Karras's grid from t to 0.002, whose last level is replaced by 0."""
    return [*karras_levels(steps + 1, t_min=0.002, t_max=t, rho=7.0).tolist()[:-1], 0.0]


def reverse_sde(
    denoise: Denoise, x: torch.Tensor, levels: Sequence[float], noise: Callable[[int], torch.Tensor]
) -> torch.Tensor:
    """Ancestral sampling (Ho et al. 2020): each step draws from q(x_s | x_t, x_0 = D(x_t; t)), for s below t.

    The mean is D + (s/t)^2 (x - D), the variance s^2 (1 - (s/t)^2). `noise(i)` is the standard normal noise of step i,
    (B, C, H, W). A step to 0 draws nothing and returns the denoiser's estimate.
    """
    for step, (t, s) in enumerate(pairwise(levels)):
        clean = denoise(x, t)
        share = (s / t) ** 2
        x = clean + share * (x - clean) + s * (1 - share) ** 0.5 * noise(step) if s > 0 else clean
    return x
