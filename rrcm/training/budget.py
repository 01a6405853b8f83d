"""What each training minimizes, how long, and what it costs: the accounts behind "equal compute"."""

import math
from dataclasses import dataclass
from pathlib import Path

from rrcm.config import Config, FinetuneSettings
from rrcm.data.loader import steps_per_epoch
from rrcm.methods import MATCHED_PRETRAINING, METHODS
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


@dataclass(frozen=True)
class Budget:
    """How long a method trains, and the compute that it has had before, in encoder forward passes."""

    epochs: int
    epoch_steps: int
    epoch_compute: float
    pretrain_share: float  # of the compute of the pre-training that it starts from
    evaluate_every: int  # epochs

    @property
    def total_steps(self) -> int:
        return self.epochs * self.epoch_steps


def matched_epochs(epochs: int, pretrain_compute: float, shared_by: int, epoch_compute: float) -> int:
    """Epochs that give a scratch method rRCM's total compute: its fine-tuning plus its share of the pre-training."""
    return epochs + round(pretrain_compute / shared_by / epoch_compute)


def plan_budget(
    config: Config, method: str, settings: FinetuneSettings, objective: Objective, num_images: int, pretrained: Path
) -> Budget:
    """The budget of a method on `num_images` training images. A matched method is evaluated as often as its base."""
    epoch_steps = steps_per_epoch(num_images, settings.batch_size)
    epoch_compute = objective.forwards_per_image * epoch_steps * settings.batch_size
    epochs, evaluate_every, share = settings.epochs, config.finetune.evaluate_every, 0.0
    shared_by = config.finetune.pretrain_cost_shared_by
    if METHODS[method].budget == "total":
        compute = pretraining_compute(config, MATCHED_PRETRAINING)
        epochs = matched_epochs(settings.epochs, compute, shared_by, epoch_compute)
        evaluate_every = math.ceil(evaluate_every * epochs / settings.epochs)
    elif config.finetune.uses_pretraining(method):
        folder = pretrained / METHODS[method].initial_weights
        share = read_json(folder / "config.json")["compute"]["pretrain"] / shared_by
    return Budget(epochs, epoch_steps, epoch_compute, share, evaluate_every)
