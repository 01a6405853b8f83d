"""Fine-tuning: the training of one classifier for one method and one smoothing sigma (Lei et al. 2025, section 3.3).

A joint fine-tuning trains one classifier for several sigmas.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from rrcm.config import FinetuneSettings
from rrcm.data.loader import describe_step, explain_lost_workers
from rrcm.data.shards import ShardedDataset
from rrcm.data.soft_labels import read_soft_labels
from rrcm.data.training_votes import read_training_votes
from rrcm.methods import METHODS, PASS_OBJECTIVE
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.folders import read_model_config
from rrcm.models.vit import parameter_count
from rrcm.objectives.base import Objective, StepRandomness
from rrcm.objectives.passing import pass_targets
from rrcm.training.batches import Targets, batch_seed, open_splits, train_batches
from rrcm.training.budget import build_finetuning_objective, build_joint_objective
from rrcm.training.optim import build_optimizer, layerwise_groups, warmup_cosine, warmup_step
from rrcm.training.plan import Training
from rrcm.training.start import Classifier, Start, linear_probe, load_start
from rrcm.training.teacher import with_teacher
from rrcm.training.trainer import Trainer
from rrcm.training.validation import BestWeights, build_validation, warn_if_collapsed
from rrcm.utils.distributed import DistEnv, explain_out_of_memory, init_distributed, set_threads
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.tensors import sha256_tensors

ADVICE = "raise finetune.num_chunks, set model.grad_checkpointing, or lower finetune.batch_size"


def finetune(training: Training) -> None:
    """Train one classifier. Writes the model folder (model.safetensors, config.json, history.csv) and the timing.

    The weights with the best accuracy on noisy images of the `val` split are kept, or the last weights if there are few
    labels. A training that was killed and is started again continues from its last checkpoint and ends with the same
    bytes.
    Raises `RRCMError` when the loss is no longer finite and for inputs that are missing or do not fit, `Interrupted`
    after SIGTERM.
    """
    set_threads(training.threads)
    with init_distributed(training.device) as env, explain_lost_workers(), explain_out_of_memory(ADVICE):
        images, validation = open_splits(training.files.shards, env, training.data.labels_per_class)
        trainer, best = _train(training, images, validation, read_targets(training, images), env)
        save = partial(_save, training, best.classifier, images.classes, trainer.extra_state["selected"])
        seen = training.budget.total_steps * training.budget.step_images
        trainer.publish(training.files.output, training.files.timing, save, seen)


def _train(
    training: Training,
    images: ShardedDataset,
    validation: ShardedDataset,
    by_image: Mapping[str, torch.Tensor],
    env: DistEnv,
) -> tuple[Trainer, BestWeights]:
    settings, budget, seed = training.settings, training.budget, training.seed
    if training.joint is None:
        objective = build_finetuning_objective(settings, training.method, training.sigma)
    else:
        objective = build_joint_objective(training.common, training.method, training.joint)
    targets = Targets(settings, len(images.classes), seed, env.device, by_image)
    start = load_start(training, len(images.classes), env.device)
    classifier = start.classifier
    if start.teacher is not None:
        objective = with_teacher(objective, start.teacher)
    dtype = torch.bfloat16 if training.common.weights_dtype == "bf16" else torch.float32
    best = BestWeights(classifier, build_validation(training, validation, env, start.denoise), dtype)
    start.inputs.update({name: sha256_tensors({name: rows}) for name, rows in by_image.items()})
    trainer = build_trainer(training, objective, start, best, images, env)
    pretrained = METHODS[training.method].initial_weights is not None and training.continued is None
    if not trainer.resume() and settings.linear_probe_epochs and pretrained:
        linear_probe(training, classifier, images, env)
    if training.common.compile:
        classifier.compile()
    classify = WrappedClassifier(classifier, trainer, training.common.num_chunks, start.denoise)
    peak_lr = settings.lr * settings.batch_size / 256
    for step, batch in trainer.steps(train_batches(training, images, env, trainer.step)):
        # schedule
        epoch = budget.schedule_epoch(step)
        lr = peak_lr * lr_factor(settings, epoch, budget.schedule_epochs)
        # loss
        random = StepRandomness(seed, step, batch["position"].tolist(), budget.step_images, env.device, epoch)
        losses = objective(classify, targets(batch, step), random)
        # optimizer
        trainer.optimizer_step(losses["loss"], lr)
        # validation and logging
        trainer.accumulate_metrics(losses["loss"], *(losses[term] for term in objective.terms))
        done = step + 1
        if done % budget.epoch_steps == 0 or done == budget.total_steps:
            _log(training, trainer, best, classifier, done, lr)
    return trainer, best


def read_targets(training: Training, images: ShardedDataset) -> dict[str, torch.Tensor]:
    """Further targets of a training in addition to the labels: by the name that objectives use, a row for each image.

    Raises `RRCMError` for a file that is missing, damaged or about other images.
    """
    targets = {}
    if METHODS[training.method].can_pass:
        votes = read_training_votes(training.votes_file, images, training.joint.sigmas)
        targets["passes"] = torch.from_numpy(pass_targets(votes.numpy(), images.labels))
    elif METHODS[training.method].needs_soft_labels:
        targets["soft_label"] = read_soft_labels(training.files.soft_labels, images)
    return targets


def lr_factor(settings: FinetuneSettings, epoch: float, epochs: float) -> float:
    """Learning rate after `epoch` of `epochs` epochs, as a share of its peak."""
    if settings.lr_schedule == "step":
        return warmup_step(epoch, settings.warmup_epochs, settings.lr_step_epochs)
    return warmup_cosine(epoch, settings.warmup_epochs, epochs)


def _log(training: Training, trainer: Trainer, best: BestWeights, classifier: Classifier, done: int, lr: float) -> None:
    """Add a row to the history after `done` steps, with the validation accuracy if it is due."""
    budget = training.budget
    epoch, accuracy, shown = budget.epochs_after(done), None, {}
    means = trainer.mean_metrics(done % budget.epoch_steps or budget.epoch_steps)
    if epoch % budget.evaluate_every == 0 or done == budget.total_steps:
        accuracy = best.update(classifier, epoch, trainer)
        warmup = training.settings.warmup_epochs * budget.epochs / budget.schedule_epochs
        objective = METHODS[training.method].objective
        warn_if_collapsed(accuracy, best.validation.chance, epoch, warmup, objective, trainer)
        shown = {"loss": f"{means['loss']:.3f}", "val_accuracy": f"{100 * accuracy:.1f} %"}
    trainer.log({"epoch": epoch, **means, "val_accuracy": accuracy, "lr": lr}, **shown)


class WrappedClassifier:
    """The classifier as objectives see it: on all processes, in the precision and the chunks of the training."""

    def __init__(
        self,
        classifier: Classifier,
        trainer: Trainer,
        num_chunks: int,
        denoise: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.classifier, self.forward = classifier, trainer.wrap_ddp(classifier)
        self.denoise = denoise or torch.nn.Identity()
        self.autocast, self.chunks = trainer.autocast, {"num_chunks": num_chunks} if num_chunks > 1 else {}

    def __call__(self, noisy: torch.Tensor, *, frozen: bool = False, t: torch.Tensor | None = None) -> torch.Tensor:
        """noisy (B, C, H, W) -> logits (B, K) float32. `frozen`: in eval mode, without exchanging gradients.

        A joint training gives `t` (B,), which a network that takes no noise level does not see.
        """
        network = self.classifier.eval() if frozen else self.forward
        conditioned = t is not None and isinstance(self.classifier, NoiseConditionedClassifier)
        level = {"t": t} if conditioned else {}
        try:
            with self.autocast():
                return network(self.denoise(noisy), **level, **self.chunks).float()
        finally:
            self.classifier.train()


def build_trainer(
    training: Training, objective: Objective, start: Start, best: BestWeights, images: ShardedDataset, env: DistEnv
) -> Trainer:
    """The loop around the classifier, with the identity of this run."""
    settings, budget, classifier = training.settings, training.budget, start.classifier
    order_seed = batch_seed(training)
    inputs = {"shards": images.fingerprint, "initial_weights": sha256_tensors(classifier.state_dict()), **start.inputs}
    identity = fingerprint(training.identity, inputs, __name__, objective, classifier)
    return Trainer(
        RunState(f"finetune-{training.name}", identity),
        env,
        label=training.label,
        total_steps=budget.total_steps,
        modules={"classifier": classifier, "best": best.classifier},
        optimizer=build_optimizer(
            layerwise_groups(classifier, settings.layer_decay),
            lr=settings.lr * settings.batch_size / 256,
            weight_decay=settings.weight_decay,
            name=settings.optimizer,
        ),
        precision=training.common.precision,
        metrics=["loss", *objective.terms],
        checkpoint_every=training.common.checkpoint_every * budget.epoch_steps,
        describe_step=lambda step: describe_step(images, budget.step_images, order_seed, step),
        extra_state={"selected": {"epoch": 0, "val_accuracy": -1.0}},
    )


def _recorded_settings(training: Training) -> dict[str, object]:
    """The settings of the training. A joint one has a list for each setting that differs between the sigmas."""
    row, noise = METHODS[training.method], training.joint
    objective = PASS_OBJECTIVE if row.can_pass else row.objective
    if noise is None:
        return training.settings.of_objective(objective)
    each = [training.common.settings(training.method, sigma).of_objective(objective) for sigma in noise.sigmas]
    values = {name: [one[name] for one in each] for name in each[0]}
    return {name: every if any(value != every[0] for value in every) else every[0] for name, every in values.items()}


def _save(training: Training, classifier: Classifier, classes: list[str], selected: dict, folder: Path) -> None:
    """Write the model folder of the best weights."""
    row, teacher = METHODS[training.method], {}
    if training.teacher is not None:
        read = read_model_config(training.teacher)
        teacher = {"teacher": {name: read[name] for name in ("method", "sha256")}}
    save_model(
        folder,
        classifier,
        class_names=classes,
        kind=row.trained,
        sigma=classifier.sigma if row.denoises else training.joint or training.sigma,  # the first training's, if inside
        can_pass=row.can_pass,
        dtype=training.common.weights_dtype,
        method=training.method,
        seed=training.seed,
        parameters=parameter_count(classifier),
        initial_weights=training.initial_weights,
        **teacher,
        training={
            "profile": training.profile,
            **_recorded_settings(training),
            "epochs": training.budget.epochs,
        },
        selected=selected,
        compute=training.budget.account,
    )
