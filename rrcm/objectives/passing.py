"""Training of an output for "pass", with which the larger sigmas of a cascade leave an image to a smaller sigma."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from rrcm.objectives.base import Batch, StepRandomness
from rrcm.objectives.joint import JointObjective


def pass_targets(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of pass in the target of each image at each sigma: (N, S) float32 in [0, 1].

    `votes` (N, S, K) count the votes for N images at increasing sigmas, and `labels` (N,) are their classes. It is the
    share of wrong votes if most votes at some smaller sigma are right. Otherwise it is 0.
    """
    share = votes / votes.sum(-1, keepdims=True)
    is_label = np.arange(share.shape[-1]) == np.asarray(labels)[:, None, None]
    right, other = np.where(is_label, share, 0).max(-1), np.where(is_label, 0, share).max(-1)
    right_below = np.zeros(right.shape, bool)
    right_below[:, 1:] = np.logical_or.accumulate(right > other, 1)[:, :-1]
    return ((1 - right) * right_below).astype(np.float32)


@dataclass(frozen=True)
class PassingObjective:
    """A joint objective for a classifier whose last output is "pass". Only its last layer is trained.

    An image at sigma gets the pass target of the closest of `joint.noise.sigmas`. If that is the smallest one, the
    output "pass" is ignored. Otherwise "pass" is one more class. `bias` is subtracted from its logit during training,
    so that the trained classifier gives a logit that is higher by `bias`.
    """

    joint: JointObjective
    bias: float

    @property
    def terms(self) -> tuple[str, ...]:
        return self.joint.terms

    @property
    def forwards_per_image(self) -> float:
        return self.joint.experts[0].num_noise  # the backward pass does not reach the encoder

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
            part = {name: batch[name][rows] for name in ("image", "target")}
            if can_pass:
                part["target"] = add_pass(part["target"], batch["passes"][rows, [scales[row] for row in rows]])
            outputs = Outputs(classifier, batch["target"].shape[1], self.bias if can_pass else None)
            chosen = replace(random, positions=[random.positions[row] for row in rows])
            losses = self.joint.at([sigmas[row] for row in rows], outputs, part, chosen)
            total = {name: value + len(rows) / len(sigmas) * losses[name] for name, value in total.items()}
        return total


@dataclass(frozen=True)
class Outputs:
    """The logits of the classes, without the last output, "pass". With `bias`, also the logit of pass minus `bias`."""

    classifier: Callable
    num_classes: int
    bias: float | None

    def __call__(self, noisy: torch.Tensor, **options: object) -> torch.Tensor:
        """noisy (B, C, H, W) -> logits (B, K), or (B, K + 1) with `bias`."""
        logits = self.classifier(noisy, **options)
        classes, rest = logits[:, : self.num_classes], logits[:, self.num_classes :]
        return classes if self.bias is None else torch.cat([classes, rest - self.bias], 1)


def add_pass(target: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Targets with pass as a class: target (B, K) and the share of pass (B,) -> (B, K + 1)."""
    share = share[:, None]
    return torch.cat([(1 - share) * target, share], 1)
