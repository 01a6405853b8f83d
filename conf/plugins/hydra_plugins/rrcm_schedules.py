"""Resolvers for profiles with a short pre-training: settings as functions of the number of steps.

The paper chose its settings for 300,000 steps (CIFAR-10). If only the number of steps is reduced, the grid of noise
levels is too fine to be learned in time, and the moving averages remember more steps than there are. At 300,000 steps
these functions give the paper's values. At fewer steps they come close to the best values in trials on Fashion-MNIST
and the digits (docs/experiments.md, "Short pre-training"). The paper's own profiles have fixed numbers instead.
"""

import math

from omegaconf import OmegaConf

PAPER_LEVELS = 80  # also the highest noise level, in model space
LEAST_LEVELS = 4  # beyond noise level 4 a small image is pure noise


def max_levels(steps: int) -> int:
    """Intervals of the finest grid of noise levels, s1: proportional to the square root of the steps, 80 at 300,000."""
    return min(PAPER_LEVELS, max(LEAST_LEVELS, round(4 * math.sqrt(steps / 750))))


def min_levels(steps: int) -> int:
    """Intervals of the coarsest grid of noise levels, s0: a quarter of s1, at least 2."""
    return max(2, max_levels(steps) // 4)


def t_max(steps: int) -> float:
    """The highest noise level, in model space: equal to s1, so 80 at 300,000 steps."""
    return float(max_levels(steps))


def decay(steps: int, part: int, least: int) -> float:
    """Decay rate of a moving average over 1/`part` of the training, and over at least `least` steps."""
    return 1 - 1 / max(least, steps / part)


def one_of(steps: int, part: int) -> int:
    """1/`part` of the steps, rounded, at least 1."""
    return max(1, round(steps / part))


def layer_decay(epochs: float) -> float:
    """Layer-wise decay of the learning rate in fine-tuning: 0.75 at the paper's 100 epochs or more.

    With fewer epochs it is closer to 1, which is no decay.
    """
    return 1 - 0.25 * min(1.0, epochs / 100)


for function in (max_levels, min_levels, t_max, decay, one_of, layer_decay):
    OmegaConf.register_new_resolver(function.__name__, function, replace=True)
