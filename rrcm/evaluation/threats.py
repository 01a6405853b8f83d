"""What an L2 certificate says about other changes of an image, without further samples. Pure functions.

A certificate holds for every image that is closer than its radius R in L2. So it covers every set of perturbations
whose largest L2 norm is below R. Pixels lie in [0, 1], and an image has d values: pixels times channels.

- L1 norm at most r: the L2 norm is at most the L1 norm, and so at most r. A change of one value attains r.
- L-infinity norm at most e: the squared L2 norm is a sum of d squares, each at most e^2, so it is at most d e^2.
- k pixels changed in any way, in C channels: each of the k C values changes by at most 1, because both images lie in
  [0, 1]. So the squared L2 norm is at most k C.
- a patch of k x k pixels anywhere: k^2 pixels.

Each bound is attained, so no smaller radius would do.
"""

import math
from fractions import Fraction
from typing import NamedTuple

GREY_LEVELS = 255  # L-infinity norms are usually given in grey levels, 1 / 255


class Threat(NamedTuple):
    """A set of perturbations, described by the largest L2 norm in it."""

    kind: str  # "l1", "linf" or "pixels"
    size: float  # of the L1 norm; grey levels; pixels
    squared: Fraction  # the square of the largest L2 norm, exactly

    @property
    def radius(self) -> float:
        """The smallest certified radius that covers the threat, pixel units.

        A certificate holds at smaller distances than its radius, so this is above the largest L2 norm.
        """
        return smallest_above(self.squared)


def smallest_above(squared: Fraction) -> float:
    """The smallest float64 R whose exact square is above `squared`."""
    radius = math.sqrt(squared)  # off by a few units in the last place
    while Fraction(radius) ** 2 > squared:
        radius = math.nextafter(radius, 0)
    while Fraction(radius) ** 2 <= squared:
        radius = math.nextafter(radius, math.inf)
    return radius


def l1(norm: float) -> Threat:
    """Every perturbation whose L1 norm is at most `norm`, pixel units."""
    return Threat("l1", norm, Fraction(norm) ** 2)


def linf(levels: int, values: int) -> Threat:
    """Every perturbation that changes each of the `values` of an image by at most `levels` / 255."""
    return Threat("linf", levels, Fraction(levels, GREY_LEVELS) ** 2 * values)


def pixels(count: int, channels: int, change: float = 1.0) -> Threat:
    """Every change of up to `count` pixels by at most `change` in each of their `channels`; 1 is any change.

    With `count` = k^2 this includes every patch of k x k pixels, wherever it lies.
    """
    return Threat("pixels", count, Fraction(change) ** 2 * count * channels)
