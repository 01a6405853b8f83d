"""The frozen network of another method, from whose predictions a student learns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.kinds import load_model_folder
from rrcm.objectives.base import Objective
from rrcm.objectives.joint import JointObjective
from rrcm.utils.distributed import autocast, resolve_precision


class Teacher:
    """The classifier in a model folder, in eval mode and without gradients. It is in no optimizer and no checkpoint."""

    def __init__(self, folder: Path, sigma: float, precision: str, device: torch.device):
        """For pixel noise `sigma`. Raises `RRCMError` for a folder that is missing or damaged."""
        self.classifier = load_model_folder(folder, sigma=sigma).classifier.requires_grad_(False).to(device)
        self.precision = resolve_precision(device, precision)

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, *, t: torch.Tensor | None = None) -> torch.Tensor:
        """noisy (B, C, H, W) -> logits (B, K) float32.

        A joint training gives `t` (B,), which a network that takes no noise level does not see.
        """
        level = {"t": t} if t is not None and isinstance(self.classifier, NoiseConditionedClassifier) else {}
        with autocast(noisy.device, self.precision):
            return self.classifier(noisy, **level).float()


def with_teacher(objective: Objective, teacher: Callable[..., torch.Tensor]) -> Objective:
    """The objective of a student, joint or not, with the teacher that it learns from."""
    if isinstance(objective, JointObjective):
        return replace(objective, experts=tuple(with_teacher(expert, teacher) for expert in objective.experts))
    return replace(objective, teacher=teacher)
