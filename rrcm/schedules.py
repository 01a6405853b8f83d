"""The curricula of pre-training as pure functions of the step (Lei et al. 2025, section 3; Karras et al. 2022)."""

import math

import torch


def karras_levels(
    count: int, *, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Noise levels t_0 > ... > t_{count-1} in model space, float64, shape (count,) (Karras et al. 2022, eq. 5).

    t_i = (t_max^(1/rho) + i / (count - 1) * (t_min^(1/rho) - t_max^(1/rho)))^rho
    """
    ramp = torch.linspace(0, 1, count, dtype=torch.float64, device=device)
    return (t_max ** (1 / rho) + ramp * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho


def nearest_level(levels: torch.Tensor, t: float) -> float:
    """The one of the noise levels (N,) that is nearest to t: what stands in for t in the authors' fine-tuning."""
    return float(levels[(levels - t).abs().argmin()])


def num_levels(step: int, total_steps: int, *, start: int = 20, end: int = 80) -> int:
    """Grid size N(k) = min(s0 * 2^ceil(k / K'), s1) + 1 with K' = ceil(K / log2(ceil(s1 / s0) + 1))."""
    doubling_steps = math.ceil(total_steps / math.log2(math.ceil(end / start) + 1))
    return min(start * 2 ** math.ceil(step / doubling_steps), end) + 1


def teacher_ema(
    step: int, total_steps: int, *, start: float = 0.99, end: float = 0.9999, steepness: float = 10.0
) -> float:
    """Rate mu(k) at which the teacher keeps its own weights.

    e(k) = sqrt(k / K * (m1^2 - m0^2) + m0^2), c = 2 / (1 + exp(-A (e - m0) / (m1 - m0))) - 1, mu = c m1 + (1 - c) m0
    """
    reached = end if step >= total_steps else math.sqrt(step / total_steps * (end**2 - start**2) + start**2)
    share = 2 / (1 + math.exp(-steepness * (reached - start) / (end - start))) - 1
    return share * end + (1 - share) * start


def warmup_cosine(progress: float, warmup: float, total: float) -> float:
    """Learning-rate factor in [0, 1]: linear from 0 at progress 0 to 1 at `warmup`, then half a cosine to 0 at `total`.

    The unit of the three is free: steps in pre-training, epochs in fine-tuning.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (total - warmup)))
