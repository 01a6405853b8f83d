"""Pre-training of an encoder on one objective (Lei et al. 2025, section 3)."""

import copy
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rrcm.config import Config, Data, Model, Pretrain
from rrcm.data.augment import PretrainTransform, color_blur
from rrcm.data.loader import batch_loader, describe_step, explain_lost_workers
from rrcm.data.shards import ShardedDataset
from rrcm.evaluation.representations import COLLAPSED, Evaluation, load_eval_images
from rrcm.models.checkpoints import save_model
from rrcm.models.encoders import Encoder, build_encoder
from rrcm.objectives import PRETRAINING
from rrcm.objectives.base import Batch, PretrainingObjective, StepRandomness
from rrcm.training.batches import open_splits
from rrcm.training.budget import build_pretraining_objective, plan_pretraining, pretraining_compute
from rrcm.training.optim import build_optimizer, teacher_decay, update_average, warmup_cosine
from rrcm.training.trainer import Trainer
from rrcm.utils.distributed import DistEnv, explain_out_of_memory, init_distributed, set_threads
from rrcm.utils.files import write_csv
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.rng import derive_seed

EVALUATED_IMAGES = 10_000  # at most, of the validation split, and of the training split (as neighbours)
ADVICE = "raise pretrain.num_chunks, or set model.grad_checkpointing"


@dataclass(frozen=True)
class Pretraining:
    """One pre-training: an objective and everything that decides its result."""

    name: str  # of the objective, a key of `PRETRAINING`
    objective: PretrainingObjective
    profile: str
    seed: int
    settings: Pretrain  # of this objective
    data: Data
    model: Model
    compute: float  # encoder passes


def pretrain(config: Config, objective: str, shard_folder: Path | str, output: Path, timing: Path) -> None:
    """Train on the `train` split and write `output` (model.safetensors, config.json, history.csv, representation.csv)
    and `timing` (JSON).

    `objective` is a key of `PRETRAINING`. Runs in this process, or as one of the processes of torchrun. A run that was
    killed and is started again continues from its last checkpoint and ends with the same bytes. Raises `RRCMError` when
    the loss is no longer finite, `Interrupted` after SIGTERM.
    """
    pretraining = Pretraining(
        name=objective,
        objective=build_pretraining_objective(config, objective),
        profile=config.profile,
        seed=config.seed,
        settings=plan_pretraining(config, objective),
        data=config.data,
        model=config.model,
        compute=pretraining_compute(config, objective),
    )
    set_threads(config.threads)
    with init_distributed(config.device) as env, explain_lost_workers(), explain_out_of_memory(ADVICE):
        images, validation = open_splits(shard_folder, env)
        trainer, encoder = _train(pretraining, images, validation, env)
        save = partial(_save, pretraining, encoder, trainer.extra_state["representation"])
        seen = pretraining.settings.steps * pretraining.settings.batch_size
        trainer.publish(output, timing, save, seen, throughput=trainer.extra_state["throughput"])


@dataclass
class Networks:
    """The networks of a pre-training. With several processes only `student` is wrapped."""

    student: torch.nn.Module
    teacher: torch.nn.Module | None  # some objectives have none
    ema_encoder: Encoder  # the average of the student's encoder, from which fine-tuning starts

    def update_teacher(self, decay: float) -> None:
        """Move the teacher, if there is one, towards the student."""
        if self.teacher is not None:
            update_average(self.teacher, self._student, decay)

    def update_ema(self, decay: float) -> None:
        """Move the average towards the student's encoder."""
        update_average(self.ema_encoder, self._student.encoder, decay)

    @property
    def _student(self) -> torch.nn.Module:
        return getattr(self.student, "module", self.student)


def start_networks(
    objective: PretrainingObjective, model: Model, data: Data, seed: int, device: torch.device
) -> Networks:
    """The networks of an objective. With the same seed, all objectives start from the same encoder."""
    torch.manual_seed(derive_seed(seed, "pretrain"))
    student, teacher = objective.build_student_and_teacher(build_encoder(model, data))
    student.to(device).train()
    if teacher is not None:
        teacher.to(device).train().requires_grad_(False)
    return Networks(student, teacher, copy.deepcopy(student.encoder).requires_grad_(False))


def schedule(settings: Pretrain, step: int) -> dict[str, float]:
    """The learning rate, the bound on the gradient norm, and the decay rate of the teacher at a step."""
    return {
        "lr": settings.lr * warmup_cosine(step, settings.warmup_steps, settings.steps),
        "max_norm": settings.grad_clip_norm if step >= settings.warmup_steps else float("inf"),
        "teacher_decay": teacher_decay(
            step,
            settings.steps,
            start=settings.teacher_decay_start,
            end=settings.teacher_decay_end,
            steepness=settings.teacher_decay_steepness,
        ),
    }


class RepresentationMonitor:
    """Evaluates the averaged encoder on the validation split, and warns when representations have collapsed."""

    def __init__(self, pretraining: Pretraining, images: ShardedDataset, validation: ShardedDataset, trainer: Trainer):
        self.trainer, settings = trainer, pretraining.settings
        bank, held_out = (
            load_eval_images(split, pretraining.data.image_size, EVALUATED_IMAGES, trainer.env)
            for split in (images, validation)
        )
        self.evaluate = Evaluation(
            bank=bank,
            held_out=held_out,
            sigmas=settings.evaluate_sigmas,
            t_min=settings.t_min,
            seed=pretraining.seed,
            precision=trainer.precision,
            env=trainer.env,
        )

    def __call__(self, encoder: Encoder, step: int) -> None:
        """Add the rows of this step to the state of the trainer."""
        rows = self.evaluate(encoder)
        self.trainer.extra_state["representation"] += [{"step": step, **row} for row in rows]
        if self.trainer.env.is_main and rows[0]["cross_image_cosine"] > COLLAPSED:
            print(
                f"{self.trainer.label}: the representations have collapsed at step {step}: different images have a "
                f"mean cosine of {rows[0]['cross_image_cosine']:.4f}; lower the learning rate, or the temperature",
                file=sys.stderr,
            )


def _train(
    pretraining: Pretraining, images: ShardedDataset, validation: ShardedDataset, env: DistEnv
) -> tuple[Trainer, Encoder]:
    objective, settings, seed = pretraining.objective, pretraining.settings, pretraining.seed
    networks = start_networks(objective, pretraining.model, pretraining.data, seed, env.device)
    trainer = build_trainer(pretraining, networks, images, env)
    trainer.resume()
    if settings.compile:
        for network in filter(None, (networks.student, networks.teacher)):
            network.encoder.compile()
    networks.student = trainer.wrap_ddp(networks.student)
    monitor = RepresentationMonitor(pretraining, images, validation, trainer)
    if trainer.step == 0:
        monitor(networks.ema_encoder, 0)
    last_log_time = time.monotonic()
    for step, batch in trainer.steps(train_batches(pretraining, images, env, trainer.step)):
        # schedules
        now = schedule(settings, step)
        # loss
        random = StepRandomness(seed, step, batch["position"].tolist(), settings.batch_size, env.device)
        images_of_step = images_in_model_space(batch, env.device)
        with trainer.autocast():
            losses = objective(networks, images_of_step, random)
        # optimizer
        grad_norm = trainer.optimizer_step(losses["loss"], now["lr"], now["max_norm"])
        # teacher and EMA
        networks.update_teacher(now["teacher_decay"])
        networks.update_ema(settings.ema_decay)
        # logging
        trainer.accumulate_metrics(losses["loss"], *(losses[term] for term in objective.terms), grad_norm)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            _log(pretraining, trainer, done, now, time.monotonic() - last_log_time)
            last_log_time = time.monotonic()
        # evaluation
        if done % settings.evaluate_every == 0 or done == settings.steps:
            monitor(networks.ema_encoder, done)
            last_log_time = time.monotonic()
    return trainer, networks.ema_encoder


def train_batches(pretraining: Pretraining, images: ShardedDataset, env: DistEnv, first_step: int) -> Generator[Batch]:
    """This process's share of the images and views of each step, from `first_step` on."""
    settings = pretraining.settings
    return batch_loader(
        images,
        PretrainTransform(settings.views, pretraining.data.image_size),
        batch_size=settings.batch_size,
        seed=pretraining.seed,
        steps=range(first_step, settings.steps),
        env=env,
        workers=pretraining.data.workers,
    )


def build_trainer(pretraining: Pretraining, networks: Networks, images: ShardedDataset, env: DistEnv) -> Trainer:
    """The loop around the networks, with the identity of this run."""
    name, seed = pretraining.name, pretraining.seed
    objective, settings = pretraining.objective, pretraining.settings
    parameters = [p for p in networks.student.parameters() if p.requires_grad]
    modules = {"student": networks.student, "teacher": networks.teacher, "ema_encoder": networks.ema_encoder}
    others = {"objectives"} | PRETRAINING.keys() - {name}  # the settings of other objectives change nothing here
    identity = fingerprint(
        {
            "objective": name,
            "seed": seed,
            "pretrain": settings.model_dump(mode="json", exclude=others),
            "data": pretraining.data.model_dump(mode="json"),
            "model": pretraining.model.model_dump(mode="json"),
        },
        {"shards": images.fingerprint},
        __name__,
        objective,
    )
    return Trainer(
        RunState(f"pretrain-{name}", identity),
        env,
        label=f"pretrain {name}",
        total_steps=settings.steps,
        modules={key: module for key, module in modules.items() if module is not None},
        optimizer=build_optimizer([(1.0, parameters)], lr=settings.lr, weight_decay=settings.weight_decay),
        precision=settings.precision,
        metrics=["loss", *objective.terms, "grad_norm"],
        checkpoint_every=settings.checkpoint_every,
        describe_step=lambda step: describe_step(images, settings.batch_size, seed, step),
        extra_state={"throughput": [], "representation": []},
    )


def images_in_model_space(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """`image`, `view1` and `view2` of a batch of the loader, each (B, C, H, W) float32 in [-1, 1]."""
    pixels = {"image": to_unit_range(batch["image"].to(device, non_blocking=True))}
    for view in (1, 2):
        cropped = batch[f"view{view}"].to(device, non_blocking=True)
        pixels[f"view{view}"] = color_blur(cropped, batch[f"color_blur{view}"])
    return {name: to_model_space(image) for name, image in pixels.items()}


def _log(pretraining: Pretraining, trainer: Trainer, done: int, now: dict[str, float], seconds: float) -> None:
    """Add a row to the history after `done` steps, and update the progress line."""
    objective, settings = pretraining.objective, pretraining.settings
    count = done % settings.log_every or settings.log_every
    extra = objective.schedule(done - 1) if hasattr(objective, "schedule") else {}
    row = {"step": done, **trainer.mean_metrics(count), **extra}
    row |= {"teacher_decay": now["teacher_decay"], "lr": now["lr"]}
    images_per_second = count * settings.batch_size / seconds
    trainer.extra_state["throughput"].append([done, images_per_second])
    shown = {name: f"{row[name]:.3f}" for name in ("loss", *objective.terms)}
    shown |= {name: f"{value:g}" for name, value in extra.items()}
    trainer.log(row, **shown, **{"images/s": f"{images_per_second:.0f}"})


def _save(pretraining: Pretraining, encoder: Encoder, representation: list[dict], folder: Path) -> None:
    """Write the model folder of the averaged encoder."""
    write_csv(folder / "representation.csv", representation)
    save_model(
        folder,
        encoder,
        objective=pretraining.name,
        training={"profile": pretraining.profile, "seed": pretraining.seed, "steps": pretraining.settings.steps},
        compute={"pretrain": pretraining.compute},
    )
