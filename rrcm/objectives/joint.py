"""Joint training: one network for several sigmas. Each image has its own sigma in each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rrcm.models.joint import JointSigmas
from rrcm.objectives.base import Batch, Objective, StepRandomness
from rrcm.utils.errors import RRCMError


@dataclass(frozen=True)
class JointObjective:
    """The mean over images of the loss that an expert for the image's sigma would have.

    All experts have the same objective. The fields that its `per_image` names may differ between them. Each image gets
    the value for its own sigma.
    """

    experts: tuple[Objective, ...]  # at each of `noise.sigmas`
    noise: JointSigmas

    @property
    def terms(self) -> tuple[str, ...]:
        return self.experts[0].terms

    @property
    def forwards_per_image(self) -> float:
        return max(expert.forwards_per_image for expert in self.experts)  # an attack runs if any image is attacked

    def __call__(self, classifier: Callable, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        """As an `Objective`. `classifier` also takes `t`, the noise level of each row in model space."""
        return self.at(self.draw(random), classifier, batch, random)

    def draw(self, random: StepRandomness) -> list[float]:
        """The sigma of each image of the step."""
        return self.noise.draw(replace(random, device=torch.device("cpu")).uniform("joint sigma").tolist())

    def at(
        self, sigmas: Sequence[float], classifier: Callable, batch: Batch, random: StepRandomness
    ) -> dict[str, torch.Tensor]:
        """The terms of the loss for given sigmas of the images."""
        objective = mixed_objective(self.experts, self.noise, sigmas, random.device)
        return objective(AtLevels(classifier, 2 * objective.sigma), batch, random)


@dataclass(frozen=True)
class AtLevels:
    """A classifier that sees each image at the image's own noise level."""

    classifier: Callable
    t: torch.Tensor  # (B,), model space

    def __call__(self, noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        """noisy (m B, C, H, W), copy by copy -> logits (m B, K)."""
        return self.classifier(noisy, frozen=frozen, t=self.t.repeat(len(noisy) // len(self.t)))


def mixed_objective(
    experts: Sequence[Objective], noise: JointSigmas, sigmas: Sequence[float], device: torch.device
) -> Any:
    """The experts' objective with a sigma for each image, and with each image's own value of the other settings."""

    def rows(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(noise.interpolate(values, sigmas), dtype=torch.float32, device=device)

    differing = {name: rows([getattr(expert, name) for expert in experts]) for name in differing_fields(experts)}
    return replace(experts[0], sigma=torch.tensor(sigmas, device=device), **differing)


def differing_fields(experts: Sequence[Objective]) -> list[str]:
    """The fields besides `sigma` in which the experts' objectives differ."""
    names = [field.name for field in fields(experts[0]) if field.name != "sigma"]
    return [name for name in names if len({getattr(expert, name) for expert in experts}) > 1]


def join_objectives(name: str, experts: Sequence[Objective], noise: JointSigmas) -> JointObjective:
    """The joint objective of experts with objective `name`.

    Raises `RRCMError` for a setting that differs between the experts but cannot differ between images.
    """
    for setting in differing_fields(experts):
        if setting not in getattr(experts[0], "per_image", ()):
            values = ", ".join(f"{getattr(expert, setting)} at sigma {expert.sigma:g}" for expert in experts)
            raise RRCMError(
                f"finetune.objectives.{name}.{setting}: is {values}; a joint training needs one value: give it the "
                "key joint"
            )
    return JointObjective(tuple(experts), noise)
