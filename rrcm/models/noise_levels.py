"""Noise levels t in model space, where pixels lie in [-1, 1]. The pixel noise is sigma = t / 2."""

import torch


def karras_levels(
    count: int, *, t_min: float = 0.002, t_max: float = 80.0, rho: float = 7.0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Noise levels t_0 > ... > t_{count-1} in model space, float64, shape (count,) (Karras et al. 2022, eq. 5).

    t_i = (t_max^(1/rho) + i / (count - 1) * (t_min^(1/rho) - t_max^(1/rho)))^rho

    >>> [round(t, 3) for t in rrcm.karras_levels(3).tolist()]
    [80.0, 2.515, 0.002]
    """
    ramp = torch.linspace(0, 1, count, dtype=torch.float64, device=device)
    return (t_max ** (1 / rho) + ramp * (t_min ** (1 / rho) - t_max ** (1 / rho))) ** rho


def nearest_level(levels: torch.Tensor, t: float) -> float:
    """The entry of `levels` (N,) that is nearest to t. The authors' fine-tuning uses it in place of t."""
    return float(levels[(levels - t).abs().argmin()])
