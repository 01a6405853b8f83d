"""The contract between an objective and the training loop that minimizes it."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rrcm.models.encoders import Encoder
from rrcm.utils.errors import RRCMError
from rrcm.utils.rng import normal_per_sample, numpy_rng

Batch = Mapping[str, torch.Tensor]
PerImage = float | torch.Tensor  # one number for all images, or (B,) with one for each


class Classifier(Protocol):
    """The classifier in training, as a fine-tuning objective calls it."""

    def __call__(self, noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        """noisy (B, C, H, W): images in [0, 1] plus noise -> logits (B, K) float32.

        `frozen` is for attacks: the network is in eval mode, and only the pixels get gradients.
        """
        ...


@dataclass(frozen=True)
class StepRandomness:
    """The random numbers of one step: a pure function of (seed, step, name, position in the global batch).

    They therefore do not depend on the number of processes, on chunks, or on where a run was resumed.
    """

    seed: int
    step: int
    positions: Sequence[int]  # positions of this process's images in the global batch
    batch_size: int  # number of images in the global batch
    device: torch.device
    epoch: float = 0.0  # epochs of fine-tuning before this step; schedules depend on it

    def normal(self, name: str, shape: tuple[int, ...], copies: int | None = None) -> torch.Tensor:
        """Standard normal float32 noise, (B, *shape). With `copies`: (copies * B, *shape), copy by copy."""
        positions = self.positions
        if copies is not None:
            positions = [f"{copy} {position}" for copy in range(copies) for position in self.positions]
        return normal_per_sample(shape, self.seed, name, self.step, positions=positions, device=self.device)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> torch.Tensor:
        """Uniform float32 numbers in [0, 1), (B, *shape)."""
        rows = [
            numpy_rng(self.seed, name, self.step, position).random(shape, np.float32) for position in self.positions
        ]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def generator(self, name: str) -> np.random.Generator:
        """A generator with the same numbers in every process."""
        return numpy_rng(self.seed, name, self.step)


class Objective(Protocol):
    """A loss, with the random numbers that it draws, the terms that it logs and its cost.

    In pre-training, `model` has the networks `student` and `teacher` of `build_student_and_teacher`. The batch has
    `image`, `view1` and `view2`, (B, C, H, W) float32 in model space. In fine-tuning, `model` is a `Classifier`, and
    the batch has `image`, (B, C, H, W) float32 in [0, 1], and `target`, (B, K) float32 class probabilities. With
    `needs_soft_labels` it also has `soft_label`, (B, K) float32: each class's share in the votes of another smoothed
    classifier.
    """

    terms: tuple[str, ...]  # names of the scalars that are logged beside "loss"
    forwards_per_image: float  # encoder passes per image and step; a backward pass counts as two

    def __call__(self, model: object, batch: Batch, random: StepRandomness) -> dict[str, torch.Tensor]:
        """{"loss": scalar with gradient, **terms: scalars}."""
        ...

    # Optional: needs_soft_labels = True, for fine-tuning; SOFT_LABEL_OBJECTIVES in rrcm/methods.py has its name too.
    # Optional: per_image, for fine-tuning: the names of the fields besides `sigma` that may be a `PerImage`.
    # Optional: teacher = None, for fine-tuning: the frozen network of a student, which `with_teacher` sets.
    # Optional: schedule(step) -> dict[str, float], values that depend on the step alone and are logged as well.


class PretrainingObjective(Objective, Protocol):
    """An objective that also builds what it trains."""

    def build_student_and_teacher(self, encoder: Encoder) -> tuple[nn.Module, nn.Module | None]:
        """Student and teacher around one randomly initialized encoder, which the student has as `encoder`.

        The teacher, if there is one, is a copy of the student or of a part of it, under the same parameter names: it
        becomes the average of that part. New weights are drawn from torch's global generator.
        """
        ...


ObjectiveType = TypeVar("ObjectiveType", bound=Objective)


def build_objective(kinds: Mapping[str, Callable[..., ObjectiveType]], name: str, settings: Mapping) -> ObjectiveType:
    """The objective `name` of `kinds`. Each argument of its constructor comes from `settings`, or keeps its default.

    Raises `RRCMError` for an unknown name and for a missing setting that has no default.
    """
    if name not in kinds:
        raise RRCMError(f"{name}: no such objective; rrcm/objectives/__init__.py has {', '.join(kinds)}")
    parameters = inspect.signature(kinds[name]).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in settings]
    if missing:
        raise RRCMError(f"objective {name}: needs the setting {missing[0]}")
    return kinds[name](**{p.name: settings[p.name] for p in parameters if p.name in settings})


def per_row(values: PerImage, like: torch.Tensor) -> PerImage:
    """Reshape values (B,) so that each multiplies one row of `like`. A number is returned unchanged."""
    return values.view(-1, *[1] * (like.ndim - 1)) if isinstance(values, torch.Tensor) else values


def draw_noise(images: torch.Tensor, random: StepRandomness, sigma: PerImage, num_noise: int) -> torch.Tensor:
    """Gaussian noise of pixel `sigma` for m = `num_noise` copies of each image: (B, C, H, W) -> (m, B, C, H, W)."""
    noise = random.normal("finetune noise", images.shape[1:], copies=num_noise)
    return per_row(sigma, images) * noise.unflatten(0, (num_noise, -1))


def weighted_mean(weight: PerImage, losses: torch.Tensor) -> torch.Tensor:
    """The mean of weight times loss: losses (B,), or (m, B) of m copies, -> a scalar."""
    if isinstance(weight, torch.Tensor):
        return (weight * losses).mean()
    return weight * losses.mean()


def is_zero(value: PerImage) -> bool:
    """Whether `value` is 0 for all images."""
    return not (value.any() if isinstance(value, torch.Tensor) else value)


def noisy_logits(classifier: Callable, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Logits of the images (B, C, H, W) under m noises (m, B, C, H, W) each: (m, B, K)."""
    return classifier((images + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])


def linear_warmup(epoch: float, warmup_epochs: float) -> float:
    """The factor of a setting that grows linearly from epoch to epoch and reaches 1 in the last warm-up epoch."""
    return min(1.0, (math.floor(epoch) + 1) / warmup_epochs) if warmup_epochs else 1.0


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of logits (m, B, K) against class probabilities (B, K): a scalar."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def smoothed_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log mean_i softmax(z_i)_y: the cross-entropy of the soft smoothed classifier (Salman et al. 2019, eq. 6).

    logits (m, B, K), target (B, K) class probabilities -> (B,). The logarithm is outside the mean.
    """
    mean = logits.softmax(-1).mean(0)
    return -(target * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(-1)
