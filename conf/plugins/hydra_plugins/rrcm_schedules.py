"""Resolvers for settings that follow from the length of a training, so that an override of the length suffices.

`share` and `whole_share` are for all profiles. Warm-ups and the like are written as shares of the length.

The others are for profiles with a short pre-training. The paper chose its settings for 300,000 steps (CIFAR-10). If
only the number of steps is reduced, the grid of noise levels is too fine to be learned in time, and the moving averages
remember more steps than there are. At 300,000 steps these functions give the paper's values. At fewer steps they come
close to the best values in trials on Fashion-MNIST and the digits (docs/experiments.md, "Short pre-training"). The
paper's own profiles have fixed numbers instead.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

from omegaconf import DictConfig, OmegaConf

PAPER_LEVELS = 80  # also the highest noise level, in model space
LEAST_LEVELS = 4  # beyond noise level 4 a small image is pure noise


def share(part: str | float | Mapping, length: int | Mapping, objective: str = "") -> float | DictConfig:
    """A share of the length of a training, such as ${share:1/30,${finetune.epochs}}.

    Both arguments may be mappings by key: the result is then a mapping as well, unless all its values are equal. With
    an `objective`, whose block the setting stands in, lengths of other objectives are left out.
    """
    parts = part if isinstance(part, Mapping) else {"default": part}
    lengths = length if isinstance(length, Mapping) else {"default": length}
    keys = {**lengths, **parts}
    if objective:
        keys = [key for key in keys if key in (objective, "default", "scratch") or key.startswith("sigma_")]
    shares = {}
    for key in keys:
        its_part, its_length = (values.get(key, values.get("default")) for values in (parts, lengths))
        if its_part is not None and its_length is not None:
            shares[key] = _multiply(its_part, its_length)
    values = list(shares.values())
    return values[0] if "default" in shares and len(set(values)) == 1 else OmegaConf.create(shares)


def _multiply(part: str | float, length: object) -> float:
    """Their product, which is exact for a part such as 1/30. It is an int where it is whole."""
    try:
        product = Fraction(str(part)) * Fraction(str(length))
    except (ValueError, ZeroDivisionError):
        return 0  # the length is no positive number; validation will say so
    return int(product) if product.denominator == 1 else float(product)


def whole_share(part: str | float, length: int) -> int:
    """A share of the length of a training, rounded to a whole number and at least 1."""
    return max(1, round(_multiply(part, length)))


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


def layer_decay(epochs: float) -> float:
    """Layer-wise decay of the learning rate in fine-tuning: 0.75 at the paper's 100 epochs or more.

    With fewer epochs it is closer to 1, which is no decay.
    """
    return 1 - 0.25 * min(1.0, epochs / 100)


for function in (share, whole_share, max_levels, min_levels, t_max, decay, layer_decay):
    OmegaConf.register_new_resolver(function.__name__, function, replace=True)
