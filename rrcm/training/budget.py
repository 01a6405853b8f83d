"""What each training minimizes, how long, and what it costs: the accounts behind "equal compute"."""

import math
from dataclasses import dataclass
from pathlib import Path

from rrcm.config import Config, FinetuneSettings, Pretrain
from rrcm.data.loader import steps_per_epoch
from rrcm.methods import BLOCKS, MATCHED_PRETRAINING, METHODS, REFERENCE
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.objectives.base import Objective, PretrainingObjective, build_objective
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

COUNTED_IN_STEPS = ("log_every", "evaluate_every", "checkpoint_every")
DECAY_RATES = ("teacher_decay_start", "teacher_decay_end", "ema_decay")


def build_pretraining_objective(config: Config, name: str) -> PretrainingObjective:
    """The objective with the common settings and those of its own block."""
    return _build(config, name, plan_pretraining(config, name))


def _build(config: Config, name: str, settings: Pretrain) -> PretrainingObjective:
    values = config.data.model_dump() | config.model.model_dump() | settings.model_dump()
    for block in BLOCKS.get(name, [name]):
        values |= values.get(block, {})
    return build_objective(PRETRAINING, name, values)


def plan_pretraining(config: Config, name: str) -> Pretrain:
    """The settings of one pre-training. With budget `passes` its steps cost what rRCM's steps cost."""
    settings = config.pretrain.settings(name)
    if name == MATCHED_PRETRAINING or not settings.equal_passes:
        return settings
    cost, matched = (_build(config, each, settings).forwards_per_image for each in (name, MATCHED_PRETRAINING))
    return scale_steps(settings, matched / cost)


def scale_steps(settings: Pretrain, factor: float) -> Pretrain:
    """A pre-training of `factor` times as many steps. What is counted in steps grows with it.

    An average with decay rate d remembers 1 / (1 - d) steps.
    """
    steps = max(1, round(factor * settings.steps))
    counts = {name: max(1, round(factor * getattr(settings, name))) for name in COUNTED_IN_STEPS}
    rates = {name: max(0.0, 1 - (1 - getattr(settings, name)) / factor) for name in DECAY_RATES}
    warmup = min(round(factor * settings.warmup_steps), steps - 1)
    return settings.model_copy(update={"steps": steps, "warmup_steps": warmup, **counts, **rates})


def build_finetuning_objective(settings: FinetuneSettings, method: str, sigma: float) -> Objective:
    """The objective of a method, with the common settings and those of its own block."""
    name = METHODS[method].objective
    return build_objective(FINETUNING, name, settings.of_objective(name) | {"sigma": sigma})


def images_per_step(settings: FinetuneSettings, objective: str) -> int:
    """Images that one optimizer step sees: a batch, or one of its parts."""
    parts = settings.of_objective(objective)["num_noise"] if settings.steps_per_batch == "num_noise" else 1
    return settings.batch_size // parts


def pretraining_compute(config: Config, objective: str) -> float:
    """Encoder forward passes of the whole pre-training; a backward pass counts as two."""
    settings = plan_pretraining(config, objective)
    return _build(config, objective, settings).forwards_per_image * settings.steps * settings.batch_size


def planned_passes(config: Config, method: str, sigma: float, num_images: int) -> float:
    """Encoder forward passes of all epochs of a method's settings, on `num_images` training images."""
    settings = config.finetune.settings(method, sigma)
    objective = build_finetuning_objective(settings, method, sigma)
    step_images = images_per_step(settings, METHODS[method].objective)
    return objective.forwards_per_image * settings.epochs * steps_per_epoch(num_images, step_images) * step_images


def soft_label_compute(config: Config, num_images: int) -> float:
    """Encoder forward passes of the soft labels of `num_images` images: the votes and the training of the voter."""
    voter = config.soft_labels
    return voter.n * num_images + planned_passes(config, voter.method, voter.sigma, num_images)


@dataclass(frozen=True)
class Budget:
    """How long a method trains, and the compute of it and of what it starts from, in encoder forward passes."""

    total_steps: int
    epoch_steps: int
    step_images: int  # over all processes
    step_compute: float
    pretrain_share: float  # of the compute of the pre-training that it starts from
    soft_label_share: float  # of the compute of the soft labels that it learns from
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

    With `finetune.equal_passes: true` a training ends after the step at which it comes closest to the encoder passes of
    rRCM's fine-tuning. A method with budget "total" also gets rRCM's share of the pre-training, less its own share of
    soft labels. The members of an ensemble share these passes. A longer training is evaluated less often, so that each
    has about the same number of evaluations. Raises `RRCMError` when soft labels leave nothing for the training.
    """
    settings = config.finetune.settings(method, sigma)
    step_images = images_per_step(settings, METHODS[method].objective)
    epoch_steps = steps_per_epoch(num_images, step_images)
    step_compute = objective.forwards_per_image * step_images
    if METHODS[method].denoises:
        step_compute += objective.num_noise * step_images  # passes of the denoiser
    planned_steps = total_steps = settings.epochs * epoch_steps
    matched, by_passes = METHODS[method].matched, config.finetune.equal_passes
    shared_by, share, soft_label_share = config.finetune.pretrain_cost_shared_by, 0.0, 0.0
    if METHODS[method].needs_soft_labels:
        soft_label_share = soft_label_compute(config, num_images) / shared_by
    if matched or by_passes:
        passes = planned_passes(config, REFERENCE, sigma, num_images)
        if matched:
            passes += pretraining_compute(config, MATCHED_PRETRAINING) / shared_by - soft_label_share
            if passes < step_compute:
                raise RRCMError(
                    f"soft_labels.n = {config.soft_labels.n}: {method} spends all of rRCM's compute on its share of "
                    "them; lower it, or leave the method out"
                )
        if METHODS[method].is_ensemble:
            passes /= config.finetune.ensemble_members
        unit = 1 if by_passes else epoch_steps
        total_steps = unit * max(1, round(passes / (unit * step_compute)))
    if config.finetune.uses_pretraining(method):
        folder = pretrained / METHODS[method].initial_weights
        share = read_json(folder / "config.json")["compute"]["pretrain"] / shared_by
    evaluate_every = math.ceil(config.finetune.evaluate_every * total_steps / planned_steps)
    return Budget(
        total_steps, epoch_steps, step_images, step_compute, share, soft_label_share, evaluate_every, settings.epochs
    )
