"""Joint training of a classifier that may answer "pass" at all sigmas but the smallest, in a cascade."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import ndtri

from rrcm.objectives.base import Batch, StepRandomness
from rrcm.objectives.joint import JointObjective


def pass_targets(votes: np.ndarray, labels: np.ndarray, sigmas: Sequence[float], gain: float) -> np.ndarray:
    """Where a cascade should pass each image on: (N, S) bool.

    `votes` (N, S, K) count the votes for N images at increasing `sigmas`, and `labels` (N,) are their classes. With
    M_k = sigma_k / 2 (Phi^-1(p of the label) - Phi^-1(largest p of another class)), scale k passes an image if some
    smaller sigma has a positive M that exceeds M_k by more than `gain`, in pixel units. The smallest never passes.
    """
    share = (votes + 0.5) / (votes.sum(-1, keepdims=True) + 1)  # no class has probability 0 or 1
    is_label = np.arange(share.shape[-1]) == np.asarray(labels)[:, None, None]
    top, other = np.where(is_label, share, 0).max(-1), np.where(is_label, 0, share).max(-1)
    radii = np.asarray(sigmas) / 2 * (ndtri(top) - ndtri(other))
    below = np.maximum.accumulate(np.concatenate([np.zeros((len(radii), 1)), radii[:, :-1]], 1), 1)
    return (below > 0) & (below > radii + gain)


@dataclass(frozen=True)
class PassingObjective:
    """A joint objective for a classifier with one output more than classes, the last: "pass".

    An image at sigma gets the pass target of the closest of `joint.noise.sigmas`. If this is the smallest, the output
    "pass" is ignored. At any other, pass is one more class, and it is the target of the images that should pass.
    """

    joint: JointObjective

    @property
    def terms(self) -> tuple[str, ...]:
        return self.joint.terms

    @property
    def forwards_per_image(self) -> float:
        return self.joint.forwards_per_image

    def __call__(self, classifier: Callable, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        """As a `JointObjective`. `batch` also has `passes`, (B, S) float32: the share of pass in the target at each of
        the sigmas.
        """
        sigmas = self.joint.draw(random)
        scales, total = self.joint.noise.nearest(sigmas), dict.fromkeys(("loss", *self.terms), 0.0)
        for can_pass in (False, True):
            rows = [row for row, scale in enumerate(scales) if (scale > 0) == can_pass]
            if not rows:
                continue
            part = pass_as_class(batch, rows, [scales[row] for row in rows]) if can_pass else select_rows(batch, rows)
            outputs = Outputs(classifier, part["target"].shape[1])
            chosen = replace(random, positions=[random.positions[row] for row in rows])
            losses = self.joint.at([sigmas[row] for row in rows], outputs, part, chosen)
            total = {name: value + len(rows) / len(sigmas) * losses[name] for name, value in total.items()}
        return total


@dataclass(frozen=True)
class Outputs:
    """The first outputs of a classifier."""

    classifier: Callable
    count: int

    def __call__(self, noisy: torch.Tensor, **options: object) -> torch.Tensor:
        """noisy (B, C, H, W) -> logits (B, count)."""
        return self.classifier(noisy, **options)[:, : self.count]


def select_rows(batch: Batch, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """These rows of the images and targets of a batch."""
    return {name: batch[name][rows] for name in ("image", "target")}


def pass_as_class(batch: Batch, rows: Sequence[int], scales: Sequence[int]) -> dict[str, torch.Tensor]:
    """These rows of a batch, at these indices of the sigmas, with pass as a class: targets (B, K + 1)."""
    part, share = select_rows(batch, rows), batch["passes"][rows, scales][:, None]
    return part | {"target": torch.cat([(1 - share) * part["target"], share], 1)}
