"""The noise levels that a joint training covers: one network for several sigmas, in place of an expert for each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from rrcm.config import Positive
from rrcm.models.folders import Entries, parse_entries
from rrcm.utils.errors import RRCMError


@dataclass(frozen=True)
class JointSigmas:
    """The noise levels of a joint training, in pixel units.

    Without `interval`, each image of each step gets one of the `sigmas`, all with the same probability. With
    `interval`, the logarithm of an image's sigma is uniform between its ends. A setting has one value at each of the
    `sigmas`. It is linear in log sigma between two of them, and constant beyond the smallest and the largest.
    """

    sigmas: tuple[float, ...]  # ascending
    interval: tuple[float, float] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest sigma."""
        return self.interval or (self.sigmas[0], self.sigmas[-1])

    @property
    def middle(self) -> float:
        """The geometric mean of the bounds."""
        return math.sqrt(math.prod(self.bounds))

    def draw(self, uniform: Sequence[float]) -> list[float]:
        """A sigma for each of the numbers in [0, 1)."""
        if self.interval is None:
            return [self.sigmas[int(u * len(self.sigmas))] for u in uniform]
        low, high = self.interval
        return [min(high, low * (high / low) ** u) for u in uniform]

    def nearest(self, sigmas: Sequence[float]) -> list[int]:
        """The index in `self.sigmas` of the closest one, in log sigma, to each of the `sigmas`."""
        own = np.log(self.sigmas)
        return np.abs(np.log(sigmas)[:, None] - own).argmin(1).tolist()

    def interpolate(self, values: Sequence[float], sigmas: Sequence[float]) -> np.ndarray:
        """A setting with these `values` at `self.sigmas`, for each of the `sigmas`: float64."""
        return np.interp([math.log(s) for s in sigmas], [math.log(s) for s in self.sigmas], values)

    @property
    def description(self) -> str:
        """Such as `sigma 0.25 to 1`."""
        return "sigma " + " to ".join(f"{bound:g}" for bound in dict.fromkeys(self.bounds))

    @property
    def entries(self) -> dict[str, list[float] | None]:
        """The entry `joint` of a config.json."""
        return {"sigmas": list(self.sigmas), "interval": self.interval and list(self.interval)}


class JointEntries(Entries):
    """The entry `joint` of a config.json."""

    sigmas: Annotated[list[Positive], Field(min_length=1, max_length=1000)]
    interval: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None

    @model_validator(mode="after")
    def ascending(self) -> Self:
        low, *_, high = self.interval or [0.0, math.inf]
        if sorted(set(self.sigmas)) != self.sigmas or not low <= self.sigmas[0] <= self.sigmas[-1] <= high:
            raise ValueError(f"sigmas {self.sigmas} must increase, within the interval {self.interval}")
        return self


class ConfigEntries(Entries):
    """The entry of a config.json that says whether a training was joint. If so, there is neither `sigma` nor `t`."""

    model_config = ConfigDict(extra="ignore")

    joint: JointEntries | None = None


def read_joint(folder: Path, config: Mapping) -> JointSigmas | None:
    """The noise levels of the model in `folder`. None if it was trained for a single sigma."""
    if (entries := parse_entries(folder, config, ConfigEntries).joint) is None:
        return None
    return JointSigmas(tuple(entries.sigmas), entries.interval and tuple(entries.interval))


def config_at(folder: Path, config: Mapping, sigma: float | None, outside: bool = False) -> Mapping:
    """The config.json that a joint model would have if it had been trained for `sigma` alone.

    The config.json of any other model is returned unchanged.

    Raises `RRCMError` without a sigma, and for a sigma that the training did not cover, unless `outside` is true.
    """
    if (joint := read_joint(folder, config)) is None:
        return config
    if sigma is None:
        raise RRCMError(f"{folder}: was trained for {joint.description}; give sigma, in pixel units")
    low, high = joint.bounds
    if not (outside or low <= sigma <= high):
        raise RRCMError(
            f"{folder}: was trained for {joint.description}, which {sigma:g} is outside of; choose another sigma, or "
            "allow it with outside_range"
        )
    return {**config, "sigma": float(sigma), "t": 2 * float(sigma)}
