"""An ablation: a classifier that is not conditioned on the noise level of its images."""

from pathlib import Path

import torch

from rrcm.models.base_classifiers import Draw, NoiseConditionedClassifier
from rrcm.models.checkpoints import build_from_folder, describe_classifier
from rrcm.models.kinds import LoadedClassifier

LEVEL = 1.0  # model space: pixel sigma 0.5


class UnconditionedClassifier(NoiseConditionedClassifier):
    """A classifier whose encoder is always conditioned on the same noise level, LEVEL, which also scales its input."""

    def forward(
        self,
        noisy: torch.Tensor,
        draw: Draw | None = None,
        *,
        t: torch.Tensor | None = None,
        num_chunks: int = 1,
    ) -> torch.Tensor:
        """The logits as in `NoiseConditionedClassifier`, but `t` has no effect."""
        level = torch.full((len(noisy),), LEVEL, device=noisy.device)
        return super().forward(noisy, draw, t=level, num_chunks=num_chunks)


def load_unconditioned(folder: Path, config: dict) -> LoadedClassifier:
    """The loader of kind "unconditioned" in `rrcm.models.FOLDER_LOADERS`."""
    return describe_classifier(build_from_folder(folder, config, UnconditionedClassifier), config["class_names"])
