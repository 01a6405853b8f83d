"""Resolvers for profiles whose pre-training is short: settings as functions of the number of steps.

The paper's settings are made for 300,000 steps (CIFAR-10). Scaled down in steps alone, they learn a trajectory in more
strides than there is time for, and their moving averages remember more steps than there are. These functions pass
through the paper's values at 300,000 steps, and close to what trials on Fashion-MNIST and the digits preferred below
(docs/experiments.md, "Short pre-training"). The paper's own profiles keep their numbers and use none of them.
"""

import math

from omegaconf import OmegaConf

PAPER_LEVELS = 80  # also its loudest noise level, in model space
LEAST_LEVELS = 4  # and beyond noise level 4 a small image is pure noise


def max_levels(steps: int) -> int:
    """Strides of the finest grid, s1: as the square root of the steps, 80 at 300,000."""
    return min(PAPER_LEVELS, max(LEAST_LEVELS, round(4 * math.sqrt(steps / 750))))


def min_levels(steps: int) -> int:
    """Strides of the first grid, s0: a quarter of the last, at least 2."""
    return max(2, max_levels(steps) // 4)


def t_max(steps: int) -> float:
    """The loudest noise level, model space: as many as there are strides, 80 at 300,000 steps."""
    return float(max_levels(steps))


def decay(steps: int, part: int, least: int) -> float:
    """Decay rate of a moving average that remembers one `part`-th of the training, and at least `least` steps."""
    return 1 - 1 / max(least, steps / part)


def one_of(steps: int, part: int) -> int:
    """One `part`-th of the steps, at least 1."""
    return max(1, round(steps / part))


def layer_decay(epochs: float) -> float:
    """Layer-wise decay of the learning rate in fine-tuning: 0.75 at the paper's 100 epochs, none in a short one."""
    return 1 - 0.25 * min(1.0, epochs / 100)


for function in (max_levels, min_levels, t_max, decay, one_of, layer_decay):
    OmegaConf.register_new_resolver(function.__name__, function, replace=True)
