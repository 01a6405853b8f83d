"""The objective, the length and the compute of each training. This is where "equal compute" is defined."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rrcm.config import Config, Finetune, FinetuneSettings, Pretrain
from rrcm.data.loader import steps_per_epoch
from rrcm.derived import training_noise
from rrcm.methods import (
    BLOCKS,
    JOINT,
    MATCHED_PRETRAINING,
    METHODS,
    PASS_OBJECTIVE,
    REFERENCE,
    continued_method,
    expert_of,
)
from rrcm.models.joint import JointSigmas
from rrcm.models.multiply_adds import network_multiply_adds
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.objectives.base import Objective, PretrainingObjective, build_objective
from rrcm.objectives.joint import JointObjective, join_objectives
from rrcm.objectives.passing import PassingObjective
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

COUNTED_IN_STEPS = ("log_every", "evaluate_every", "checkpoint_every")
BEFORE = (JOINT, "teacher")  # passes of other networks, before the training of a few methods
DECAY_RATES = ("teacher_decay_start", "teacher_decay_end", "ema_decay")


def build_pretraining_objective(config: Config, name: str) -> PretrainingObjective:
    """The objective of a pre-training, built from the common settings and the objective's own block."""
    return _build(config, name, plan_pretraining(config, name))


def _build(config: Config, name: str, settings: Pretrain) -> PretrainingObjective:
    values = config.data.model_dump() | config.model.model_dump() | settings.model_dump()
    for block in BLOCKS.get(name, [name]):
        values |= values.get(block, {})
    return build_objective(PRETRAINING, name, values)


def plan_pretraining(config: Config, name: str) -> Pretrain:
    """The settings of one pre-training. With `pretrain.equal_passes` its steps cost as much as rRCM's steps."""
    settings = config.pretrain.settings(name)
    if name == MATCHED_PRETRAINING or not settings.equal_passes:
        return settings
    cost, matched = (_build(config, each, settings).forwards_per_image for each in (name, MATCHED_PRETRAINING))
    return scale_steps(settings, matched / cost)


def scale_steps(settings: Pretrain, factor: float) -> Pretrain:
    """A pre-training of `factor` times as many steps.

    All intervals that are counted in steps grow by the same factor. So do the horizons of the averages: with decay rate
    d an average remembers 1 / (1 - d) steps.
    """
    steps = max(1, round(factor * settings.steps))
    counts = {name: max(1, round(factor * getattr(settings, name))) for name in COUNTED_IN_STEPS}
    rates = {name: max(0.0, 1 - (1 - getattr(settings, name)) / factor) for name in DECAY_RATES}
    warmup = min(round(factor * settings.warmup_steps), steps - 1)
    return settings.model_copy(update={"steps": steps, "warmup_steps": warmup, **counts, **rates})


def build_finetuning_objective(settings: FinetuneSettings, method: str, sigma: float) -> Objective:
    """The objective of a fine-tuning, built from the common settings and the objective's own block.

    Raises `RRCMError` for a setting that is missing, and for an objective whose soft labels the method table omits.
    """
    name = METHODS[method].objective
    objective = build_objective(FINETUNING, name, settings.of_objective(name) | {"sigma": sigma})
    if getattr(objective, "needs_soft_labels", False) and not METHODS[method].needs_soft_labels:
        raise RRCMError(f"rrcm/methods.py: objective {name} needs soft labels; add it to SOFT_LABEL_OBJECTIVES")
    return objective


def joint_sigmas(config: Config) -> JointSigmas:
    """The noise levels that the joint trainings of a run cover."""
    interval = config.finetune.joint_interval
    return JointSigmas(tuple(sorted(config.sigmas)), interval and tuple(interval))


def build_joint_objective(finetune: Finetune, method: str, noise: JointSigmas) -> JointObjective | PassingObjective:
    """The objective of a joint fine-tuning. Raises `RRCMError` for settings that do not fit together.

    An output for pass is trained with the cross-entropy of noisy copies, whatever objective has trained the encoder.
    """
    if METHODS[method].can_pass:
        common = finetune.settings(method, noise.sigmas[0]).model_dump()
        each = [build_objective(FINETUNING, PASS_OBJECTIVE, common | {"sigma": sigma}) for sigma in noise.sigmas]
        return PassingObjective(join_objectives(PASS_OBJECTIVE, each, noise), finetune.pass_bias)
    each = [build_finetuning_objective(finetune.settings(method, sigma), method, sigma) for sigma in noise.sigmas]
    return join_objectives(METHODS[method].objective, each, noise)


def images_per_step(settings: FinetuneSettings, objective: str) -> int:
    """The number of images of one optimizer step: a batch, or one of its m parts."""
    parts = settings.of_objective(objective)["num_noise"] if settings.steps_per_batch == "num_noise" else 1
    return settings.batch_size // parts


def pretraining_compute(config: Config, objective: str) -> float:
    """Encoder forward passes of the whole pre-training; a backward pass counts as two."""
    settings = plan_pretraining(config, objective)
    return _build(config, objective, settings).forwards_per_image * settings.steps * settings.batch_size


def planned_passes(config: Config, method: str, sigma: float, num_images: int) -> float:
    """Encoder forward passes of the epochs that the settings give a method, on `num_images` training images."""
    settings = config.finetune.settings(method, sigma)
    objective = build_finetuning_objective(settings, method, sigma)
    step_images = images_per_step(settings, METHODS[method].objective)
    passes = passes_per_image(objective, config, method, sigma)
    return passes * settings.epochs * steps_per_epoch(num_images, step_images) * step_images


def passes_per_image(objective: Objective, config: Config, method: str, sigma: float) -> float:
    """Encoder passes of a method's `objective` per image and step.

    The encoder is the network of `config.model`. A student is another one, whose passes count by their multiply-adds.
    Each noisy copy also goes through its teacher.
    """
    if not METHODS[method].is_student:
        return objective.forwards_per_image
    own, teacher = (network_multiply_adds(each, config.data) for each in (config.model_of(method), config.model))
    copies = config.finetune.settings(method, sigma).of_objective(METHODS[method].objective)["num_noise"]
    return objective.forwards_per_image * own / teacher + copies


def teacher_compute(config: Config, method: str, sigma: float | str, num_images: int, encoders: Path) -> float:
    """All encoder passes that the teacher of a student has cost. For a joint teacher, the share of one sigma."""
    teacher = config.student.teacher
    noise = training_noise(teacher, sigma)
    spent = sum(plan_budget(config, teacher, noise, num_images, encoders).account.values())
    return spent / (len(config.sigmas) if noise == JOINT != sigma else 1)


def soft_label_compute(config: Config, num_images: int) -> float:
    """Encoder forward passes of the soft labels of `num_images` images: the votes, and the training of the voter."""
    voter = config.soft_labels
    return voter.n * num_images + planned_passes(config, voter.method, voter.sigma, num_images)


@dataclass(frozen=True)
class Budget:
    """The length of a fine-tuning, and the compute of everything it needs, in encoder forward passes."""

    total_steps: int
    epoch_steps: int
    step_images: int  # over all processes
    step_compute: float
    pretrain_share: float  # the model's share of the pre-training that it starts from
    soft_label_share: float  # the model's share of the soft labels that it learns from
    evaluate_every: int  # epochs
    planned_epochs: int  # the epochs of the settings, for which the schedules are made
    joint: float = 0.0  # of a model with an output for pass: the joint fine-tuning before, and its votes
    teacher: float = 0.0  # of a student: all passes of its teacher

    @property
    def compute(self) -> float:
        """The encoder passes of the whole fine-tuning."""
        return self.total_steps * self.step_compute

    @property
    def account(self) -> dict[str, float]:
        """All encoder passes that the model has cost, as its model folder records them."""
        shares = {"pretrain_share": self.pretrain_share, "soft_label_share": self.soft_label_share}
        before = {name: getattr(self, name) for name in BEFORE if getattr(self, name)}
        return {"finetune": self.compute, **shares, **before}

    @property
    def identity(self) -> dict[str, float]:
        """The fields. There is an entry `joint` only for an output for pass, and `teacher` only for a student."""
        return {name: value for name, value in asdict(self).items() if name not in BEFORE or value}

    @property
    def epochs(self) -> float:
        """The length of the training."""
        return self.epochs_after(self.total_steps)

    def epochs_after(self, steps: int) -> float:
        """The number of epochs after `steps` steps: an int if it is whole."""
        epochs, rest = divmod(steps, self.epoch_steps)
        return steps / self.epoch_steps if rest else epochs

    def schedule_epoch(self, steps: int) -> float:
        """The epoch that warm-ups and other schedules have reached after `steps` steps.

        A training that is shorter than planned runs through its schedules faster, so that they end with it.
        """
        return steps / self.epoch_steps * max(1.0, self.planned_epochs / self.epochs)

    @property
    def schedule_epochs(self) -> float:
        """The epoch that the schedules reach at the end."""
        return max(self.planned_epochs, self.epochs)


def plan_budget(config: Config, method: str, sigma: float | str, num_images: int, encoders: Path) -> Budget:
    """The budget of a method at noise `sigma`, or "joint", on `num_images` training images.

    With `finetune.equal_passes: true` a training ends after the step at which it comes closest to the encoder passes of
    rRCM's fine-tuning. A matched method also gets rRCM's share of the pre-training, minus its own share of the soft
    labels. The members of an ensemble share these passes. A joint training gets the passes of its experts at all sigmas
    together, or a part of them, and it takes their shares of the pre-training and of the soft labels. A longer training
    is evaluated less often, so that all trainings have about the same number of evaluations. An output for pass is
    trained in `finetune.pass_share` of the steps of the joint training, on top of that training. A student trains as
    long as other methods, on top of its teacher. With few labels (`data.labels_per_class`) the lengths are those with
    all labels, and only the last weights are evaluated. `encoders` holds the pre-trained encoders by objective, whose
    model folders record their compute. Raises `RRCMError` when soft labels leave no passes for the training.
    """
    if METHODS[method].can_pass:
        continued = plan_budget(config, continued_method(method), sigma, num_images, encoders)
        objective = build_joint_objective(config.finetune, method, joint_sigmas(config))
        return pass_budget(continued, objective, config, num_images)
    row, joint = METHODS[method], joint_sigmas(config) if sigma == JOINT else None
    sigmas = joint.sigmas if joint else (sigma,)
    settings = config.finetune.settings(method, sigmas[0])
    build = build_joint_objective if joint else build_finetuning_objective
    objective = build(config.finetune if joint else settings, method, joint or sigma)
    step_images = images_per_step(settings, row.objective)
    epoch_steps = steps_per_epoch(num_images, step_images)
    step_compute = passes_per_image(objective, config, method, sigmas[0]) * step_images
    if row.denoises:
        step_compute += objective.num_noise * step_images  # passes of the denoiser
    planned_steps = total_steps = settings.epochs * epoch_steps
    shared_by, by_passes = config.finetune.pretrain_cost_shared_by / len(sigmas), config.finetune.equal_passes
    pretrain_share = soft_label_share = 0.0
    if row.needs_soft_labels:
        soft_label_share = soft_label_compute(config, num_images) / shared_by
    if row.matched or by_passes or joint:
        passes = _finetuning_passes(config, method, sigmas, num_images)
        if row.matched:
            passes += pretraining_compute(config, MATCHED_PRETRAINING) / shared_by - soft_label_share
            if passes < step_compute:
                raise RRCMError(
                    f"soft_labels.n = {config.soft_labels.n}: {method} spends all of rRCM's compute on its share of "
                    "them; lower it, or leave the method out"
                )
        unit = 1 if by_passes else epoch_steps
        total_steps = unit * max(1, round(passes / (unit * step_compute)))
    if config.finetune.uses_pretraining(method):
        record = read_json(encoders / row.initial_weights / "config.json")
        pretrain_share = record["compute"]["pretrain"] / shared_by
    evaluate_every = math.ceil(config.finetune.evaluate_every * total_steps / planned_steps)
    if config.data.labels_per_class is not None:  # no weights are selected, which would need more labels
        evaluate_every = math.ceil(total_steps / epoch_steps)
    return Budget(
        total_steps=total_steps,
        epoch_steps=epoch_steps,
        step_images=step_images,
        step_compute=step_compute,
        pretrain_share=pretrain_share,
        soft_label_share=soft_label_share,
        evaluate_every=evaluate_every,
        planned_epochs=settings.epochs,
        teacher=teacher_compute(config, method, sigma, num_images, encoders) if row.is_student else 0.0,
    )


def pass_budget(joint: Budget, objective: PassingObjective, config: Config, num_images: int) -> Budget:
    """The budget of the training that adds an output for pass to a joint model, on `num_images` training images."""
    settings = config.finetune
    unit = 1 if settings.equal_passes else joint.epoch_steps
    votes = settings.pass_votes * len(config.sigmas) * num_images
    return replace(
        joint,
        step_compute=objective.forwards_per_image * joint.step_images,
        total_steps=unit * max(1, round(settings.pass_share * joint.total_steps / unit)),
        evaluate_every=math.ceil(settings.pass_share * joint.evaluate_every),
        joint=joint.compute + votes,
    )


def _finetuning_passes(config: Config, method: str, sigmas: Sequence[float], num_images: int) -> float:
    """The encoder passes that the fine-tuning of a method may take for all `sigmas` together.

    With equal passes, they are the passes of rRCM's fine-tuning. Otherwise the settings of the method's experts give
    them.
    """
    row, by_passes = METHODS[method], config.finetune.equal_passes
    model = REFERENCE if row.matched or by_passes else expert_of(method)
    passes = sum(planned_passes(config, model, sigma, num_images) for sigma in sigmas) * (row.joint or 1)
    return passes / config.finetune.ensemble_members if row.is_ensemble and by_passes else passes
