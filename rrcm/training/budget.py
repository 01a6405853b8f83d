"""What each training minimizes, how long, and what it costs: the accounts behind "equal compute"."""

import math
from dataclasses import dataclass
from pathlib import Path

from rrcm.config import Config, FinetuneSettings
from rrcm.data.loader import steps_per_epoch
from rrcm.methods import MATCHED_PRETRAINING, METHODS, REFERENCE
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.objectives.base import Objective, build_objective
from rrcm.utils.files import read_json


def build_pretraining_objective(config: Config, name: str) -> Objective:
    """The objective with the settings of the section `pretrain`."""
    return build_objective(PRETRAINING, name, config.pretrain.model_dump())


def build_finetuning_objective(settings: FinetuneSettings, method: str, sigma: float) -> Objective:
    """The objective of a method, with the common settings and those of its own block."""
    name, values = METHODS[method].objective, settings.model_dump()
    own = {key: value for key, value in values["objectives"].get(name, {}).items() if value is not None}
    return build_objective(FINETUNING, name, values | own | {"sigma": sigma})


def pretraining_compute(config: Config, objective: str) -> float:
    """Encoder forward passes of the whole pre-training; a backward pass counts as two."""
    cost = build_pretraining_objective(config, objective).forwards_per_image
    return cost * config.pretrain.steps * config.pretrain.batch_size


def reference_passes(config: Config, sigma: float, num_images: int) -> float:
    """Encoder forward passes of rRCM's own fine-tuning at noise `sigma`, on `num_images` training images."""
    settings = config.finetune.settings(REFERENCE, sigma)
    objective = build_finetuning_objective(settings, REFERENCE, sigma)
    steps = settings.epochs * steps_per_epoch(num_images, settings.batch_size)
    return objective.forwards_per_image * steps * settings.batch_size


@dataclass(frozen=True)
class Budget:
    """How long a method trains, and the compute of it and of its pre-training, in encoder forward passes."""

    total_steps: int
    epoch_steps: int
    step_compute: float
    pretrain_share: float  # of the compute of the pre-training that it starts from
    evaluate_every: int  # epochs
    planned_epochs: int  # for which the settings are made; the training itself may be shorter or longer

    @property
    def compute(self) -> float:
        """Of the whole fine-tuning."""
        return self.total_steps * self.step_compute

    @property
    def epochs(self) -> float:
        """Length of the training."""
        return self.epochs_after(self.total_steps)

    def epochs_after(self, steps: int) -> float:
        """The epochs that so many steps make: an int if they are whole."""
        epochs, rest = divmod(steps, self.epoch_steps)
        return steps / self.epoch_steps if rest else epochs

    def schedule_epoch(self, steps: int) -> float:
        """Where warm-ups and other schedules are after so many steps.

        A training that is shorter than planned runs through its schedules faster, so that they end with it.
        """
        return steps / self.epoch_steps * max(1.0, self.planned_epochs / self.epochs)

    @property
    def schedule_epochs(self) -> float:
        """Where the schedules are at the end."""
        return max(self.planned_epochs, self.epochs)


def plan_budget(
    config: Config, method: str, sigma: float, objective: Objective, num_images: int, pretrained: Path
) -> Budget:
    """The budget of a method at noise `sigma`, on `num_images` training images.

    With `finetune.budget: passes` a training ends after the step at which it comes closest to the encoder passes of
    rRCM's fine-tuning. A method with budget "total" also gets rRCM's share of the pre-training. A longer training is
    evaluated less often, so that each has about the same number of evaluations.
    """
    settings = config.finetune.settings(method, sigma)
    epoch_steps = steps_per_epoch(num_images, settings.batch_size)
    step_compute = objective.forwards_per_image * settings.batch_size
    planned_steps = total_steps = settings.epochs * epoch_steps
    matched, by_passes = METHODS[method].budget == "total", config.finetune.budget == "passes"
    shared_by, share = config.finetune.pretrain_cost_shared_by, 0.0
    if matched or by_passes:
        passes = reference_passes(config, sigma, num_images)
        if matched:
            passes += pretraining_compute(config, MATCHED_PRETRAINING) / shared_by
        unit = 1 if by_passes else epoch_steps
        total_steps = unit * max(1, round(passes / (unit * step_compute)))
    if config.finetune.uses_pretraining(method):
        folder = pretrained / METHODS[method].initial_weights
        share = read_json(folder / "config.json")["compute"]["pretrain"] / shared_by
    evaluate_every = math.ceil(config.finetune.evaluate_every * total_steps / planned_steps)
    return Budget(total_steps, epoch_steps, step_compute, share, evaluate_every, settings.epochs)
