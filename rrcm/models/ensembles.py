"""Ensembles: the mean of several classifiers' logits (Horváth et al. 2022).

The model folder has `kind` "ensemble". Its `members` are the folders of the members, by relative path and hash.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field
from torch import nn

from rrcm.config import Positive
from rrcm.models.base_classifiers import BaseClassifier, Draw, part_logits
from rrcm.models.folders import Entries, Part, parse_entries, part_of, write_model_folder
from rrcm.models.kinds import LoadedClassifier, load_model_folder, refuse_within
from rrcm.utils.errors import RRCMError


class Ensemble(BaseClassifier):
    """The mean of the members' logits."""

    def __init__(self, members: Sequence[BaseClassifier]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.num_classes = members[0].num_classes
        sigmas = {member.sigma for member in members}
        self.sigma = sigmas.pop() if len(sigmas) == 1 else None
        self.keeps_float32_input = any(member.keeps_float32_input for member in members)
        self.stochastic = any(member.stochastic for member in members)

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """noisy (B, C, H, W), pixels in [0, 1] plus noise -> logits (B, num_classes) float32."""
        return torch.stack([part_logits(member, noisy, draw) for member in self.members]).mean(0)

    def at(self, sigma: float) -> "Ensemble":
        """The ensemble of the members for pixel noise `sigma`."""
        return Ensemble([member.at(sigma) for member in self.members]).train(self.training)


class EnsembleEntries(Entries):
    """The entries of config.json that describe an ensemble."""

    model_config = ConfigDict(extra="ignore")

    members: Annotated[list[Part], Field(min_length=2, max_length=1000)]
    sigma: Positive | None = None  # pixel units; joint members are loaded for it


def write_ensemble(folder: Path, members: Sequence[str], class_names: Sequence[str], **metadata: object) -> None:
    """Write the config.json of an ensemble in `folder`. `members` are model folders, relative to it.

    `metadata` (JSON-able) is added to config.json.
    """
    parts = [part_of(folder, path) for path in members]
    write_model_folder(folder, {"kind": "ensemble", "members": parts, "class_names": list(class_names)} | metadata)


def load_ensemble(folder: Path, config: dict) -> LoadedClassifier:
    """The loader of kind "ensemble" in `rrcm.models.FOLDER_LOADERS`."""
    members = []
    entries = parse_entries(folder, config, EnsembleEntries)
    for part in entries.members:
        path = folder / part.path
        members.append(load_model_folder(path, part.sha256, sigma=entries.sigma, outside_range=True))
        refuse_within(folder, members[-1].classifier, Ensemble)
        for name in ("class_names", "image_size", "channels"):
            value, first = getattr(members[-1], name), getattr(members[0], name)
            if value != first:
                raise RRCMError(f"{path}: has {name} {value}, the first member {first}; all members must agree")
    return members[0]._replace(classifier=Ensemble([member.classifier for member in members]).eval())
