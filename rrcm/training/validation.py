"""Accuracy under noise on the validation split, and the best weights that it selects."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from rrcm.config import ObjectiveSettings
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.training.plan import Training
from rrcm.training.trainer import Trainer
from rrcm.utils.distributed import DistEnv, all_reduce_sum, autocast, resolve_precision
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.rng import normal_per_sample

VALIDATION_NOISES = 4  # noisy copies of each validation image
BATCH_SIZE = 256


@dataclass(frozen=True)
class NoisyValidation:
    """Accuracy on images with Gaussian noise, which is the same at every call. The processes share the images."""

    pixels: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,)
    sigma: float  # pixel units
    seed: int
    precision: str
    env: DistEnv
    denoise: Callable[[torch.Tensor], torch.Tensor] = field(default_factory=nn.Identity)  # applied to noisy images
    num_classes: int | None = None  # outputs that are classes; None: all

    @property
    def chance(self) -> float:
        """The accuracy of a classifier that always names the largest class."""
        return float(self.labels.bincount().max()) / len(self.labels)

    @torch.no_grad()
    def __call__(self, classifier: nn.Module) -> float:
        """The share of correct predictions, over all processes."""
        training, device = classifier.training, self.env.device
        classifier.eval()
        correct = torch.zeros((), dtype=torch.float64, device=device)
        for rows in torch.arange(self.env.rank, len(self.pixels), self.env.world_size).split(BATCH_SIZE):
            clean, target = to_unit_range(self.pixels[rows].to(device)), self.labels[rows].to(device)
            for copy_number in range(VALIDATION_NOISES):
                noise = normal_per_sample(
                    clean.shape[1:], self.seed, "validation", copy_number, positions=rows.tolist(), device=device
                )
                with autocast(device, self.precision):
                    noisy = self.denoise(clean + self.sigma * noise)
                    correct += (classifier(noisy)[:, : self.num_classes].argmax(1) == target).sum()
        classifier.train(training)
        return float(all_reduce_sum(correct)) / (VALIDATION_NOISES * len(self.pixels))


@dataclass(frozen=True)
class JointValidation:
    """The mean accuracy over several noise levels, each with the classifier that is conditioned on it."""

    each: Sequence[NoisyValidation]

    @property
    def chance(self) -> float:
        """See `NoisyValidation`."""
        return self.each[0].chance

    def __call__(self, classifier: BaseClassifier) -> float:
        """The mean over the noise levels of the share of correct predictions."""
        return sum(validation(classifier.at(validation.sigma)) for validation in self.each) / len(self.each)


def build_validation(
    training: Training, split: ShardedDataset, env: DistEnv, denoise: Callable[[torch.Tensor], torch.Tensor]
) -> NoisyValidation | JointValidation:
    """The validation of a training on the images of `split`. A joint training is validated at its `sigmas`.

    The output "pass" of a classifier that can pass is ignored.
    """
    pixels, labels, _ = read_split(split, training.data.image_size)
    precision = resolve_precision(env.device, training.common.precision)
    sigmas = (training.sigma,) if training.joint is None else training.joint.sigmas
    num_classes = len(split.classes) if training.continued is not None else None
    each = [
        NoisyValidation(pixels, labels, sigma, training.seed, precision, env, denoise, num_classes) for sigma in sigmas
    ]
    return each[0] if training.joint is None else JointValidation(each)


class BestWeights:
    """The weights with the best accuracy so far, in the precision in which they will be saved."""

    def __init__(
        self,
        classifier: nn.Module,
        validation: NoisyValidation | JointValidation,
        dtype: torch.dtype = torch.float32,
    ):
        self.classifier = copy.deepcopy(classifier).requires_grad_(False)
        self.candidate = copy.deepcopy(self.classifier)
        self.validation, self.dtype = validation, dtype

    def update(self, classifier: nn.Module, epoch: float, trainer: Trainer) -> float:
        """The accuracy of `classifier` now. Its weights are kept if it is the best so far."""
        rounded = {name: value.to(self.dtype) for name, value in classifier.state_dict().items()}
        self.candidate.load_state_dict(rounded)
        accuracy = self.validation(self.candidate)
        if accuracy > trainer.extra_state["selected"]["val_accuracy"]:
            trainer.extra_state["selected"] = {"epoch": epoch, "val_accuracy": accuracy}
            self.classifier.load_state_dict(rounded)
        return accuracy


def warn_if_collapsed(
    accuracy: float, chance: float, epoch: float, warmup_epochs: float, objective: str, trainer: Trainer
) -> None:
    """Warn, once, about a classifier that is no better than always naming the largest class.

    Adversarial losses and margin losses can cause this. Nothing is said during the warm-up, in which no classifier has
    learnt much.
    """
    after_warmup = [row for row in trainer.history if row["epoch"] > warmup_epochs]
    known = [row["val_accuracy"] for row in after_warmup if row["val_accuracy"] is not None]
    if epoch <= warmup_epochs or (known and known[-1] <= chance):
        return
    if accuracy <= chance and trainer.env.is_main:
        own = f", or weaken finetune.objectives.{objective}" if objective in ObjectiveSettings.model_fields else ""
        print(
            f"{trainer.label}: has collapsed at epoch {epoch:g}: validation accuracy is {100 * accuracy:.1f} %, and "
            f"{100 * chance:.1f} % for the largest class alone; lower finetune.lr{own}",
            file=sys.stderr,
        )
