"""Pre-training of an encoder on one objective (Lei et al. 2025, section 3)."""

import copy
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rrcm.config import Config, Pretrain
from rrcm.data.augment import PretrainTransform, color_blur
from rrcm.data.loader import batch_loader, describe_step, explain_lost_workers
from rrcm.data.shards import ShardedDataset
from rrcm.data.verification import verify_shards
from rrcm.evaluation.representations import COLLAPSED, evaluate, load_eval_images
from rrcm.models.checkpoints import save_model
from rrcm.models.vit import NoiseConditionedViT, build_encoder
from rrcm.objectives import PRETRAINING
from rrcm.objectives.base import Batch, PretrainingObjective, StepRandomness
from rrcm.training.budget import build_pretraining_objective, plan_pretraining, pretraining_compute
from rrcm.training.optim import build_optimizer, teacher_decay, update_average, warmup_cosine
from rrcm.training.trainer import Trainer
from rrcm.utils.distributed import DistEnv, explain_out_of_memory, init_distributed, set_threads
from rrcm.utils.files import write_csv
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.rng import derive_seed

EVALUATED_IMAGES = 10_000  # at most, of the validation split, and of the training split (as neighbours)


def pretrain(config: Config, objective: str, shard_folder: Path | str, output: Path, timing: Path) -> None:
    """Train on the `train` split and write `output` (model.safetensors, config.json, history.csv, representation.csv)
    and `timing` (JSON).

    `objective` is a key of `PRETRAINING`. Runs in this process or as one of torchrun's. Killed and started again it
    continues from its last checkpoint and ends with the same bytes. Raises `RRCMError` when the loss is no longer
    finite, `Interrupted` after SIGTERM.
    """
    loss = build_pretraining_objective(config, objective)
    set_threads(config.threads)
    advice = "raise pretrain.num_chunks, or set model.grad_checkpointing"
    with init_distributed(config.device) as env, explain_lost_workers(), explain_out_of_memory(advice):
        images, validation = ShardedDataset(shard_folder, "train"), ShardedDataset(shard_folder, "val")
        verify_shards([images, validation], env)
        _train(config, objective, loss, images, validation, env, output, timing)


@dataclass
class Networks:
    """The networks of pre-training. `student` may be wrapped for several processes, the others never are."""

    student: torch.nn.Module
    teacher: torch.nn.Module | None  # some objectives have none
    ema_encoder: NoiseConditionedViT  # the average of the student's encoder: fine-tuning starts from it

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


def start_networks(config: Config, objective: PretrainingObjective, device: torch.device) -> Networks:
    """The networks of an objective. With one seed all objectives start from the same encoder."""
    torch.manual_seed(derive_seed(config.seed, "pretrain"))
    student, teacher = objective.build_student_and_teacher(build_encoder(config.model, config.data))
    student.to(device).train()
    if teacher is not None:
        teacher.to(device).train().requires_grad_(False)
    return Networks(student, teacher, copy.deepcopy(student.encoder).requires_grad_(False))


def schedule(settings: Pretrain, step: int) -> dict[str, float]:
    """Learning rate, bound of the gradient norm and decay rate of the teacher at a step."""
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

    def __init__(
        self,
        config: Config,
        settings: Pretrain,
        images: ShardedDataset,
        validation: ShardedDataset,
        training: Trainer,
    ):
        self.training = training
        bank, held_out = (
            load_eval_images(split, config.data.image_size, EVALUATED_IMAGES, training.env)
            for split in (images, validation)
        )
        self.evaluate = partial(
            evaluate,
            bank=bank,
            held_out=held_out,
            sigmas=settings.evaluate_sigmas,
            t_min=settings.t_min,
            seed=config.seed,
            precision=training.precision,
            env=training.env,
        )

    def __call__(self, encoder: NoiseConditionedViT, step: int) -> None:
        """Add the rows of this step to the training's state."""
        rows = self.evaluate(encoder)
        self.training.extra_state["representation"] += [{"step": step, **row} for row in rows]
        if self.training.env.is_main and rows[0]["cross_image_cosine"] > COLLAPSED:
            print(
                f"{self.training.label}: the representations have collapsed at step {step}: different images have a "
                f"mean cosine of {rows[0]['cross_image_cosine']:.4f}; lower the learning rate, or the temperature",
                file=sys.stderr,
            )


def _train(
    config: Config,
    name: str,
    objective: PretrainingObjective,
    images: ShardedDataset,
    validation: ShardedDataset,
    env: DistEnv,
    output: Path,
    timing: Path,
) -> None:
    settings, seed = plan_pretraining(config, name), config.seed
    networks = start_networks(config, objective, env.device)
    training = build_trainer(config, name, settings, objective, networks, images, env)
    training.resume()
    if settings.compile:
        for network in filter(None, (networks.student, networks.teacher)):
            network.encoder.compile()
    networks.student = training.wrap_ddp(networks.student)
    monitor = RepresentationMonitor(config, settings, images, validation, training)
    if training.step == 0:
        monitor(networks.ema_encoder, 0)
    batches = batch_loader(
        images,
        PretrainTransform(settings.views, config.data.image_size),
        batch_size=settings.batch_size,
        seed=seed,
        first_step=training.step,
        last_step=settings.steps,
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )
    last_log_time = time.monotonic()
    for step, batch in training.steps(batches):
        # schedules
        now = schedule(settings, step)
        # loss
        random = StepRandomness(seed, step, batch["position"].tolist(), settings.batch_size, env.device)
        images_of_step = images_in_model_space(batch, env.device)
        with training.autocast():
            losses = objective(networks, images_of_step, random)
        # optimizer
        grad_norm = training.optimizer_step(losses["loss"], now["lr"], now["max_norm"])
        # teacher and EMA
        networks.update_teacher(now["teacher_decay"])
        networks.update_ema(settings.ema_decay)
        # logging
        training.accumulate_metrics(losses["loss"], *(losses[term] for term in objective.terms), grad_norm)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            _log(settings, training, objective, done, now, time.monotonic() - last_log_time)
            last_log_time = time.monotonic()
        # evaluation
        if done % settings.evaluate_every == 0 or done == settings.steps:
            monitor(networks.ema_encoder, done)
            last_log_time = time.monotonic()

    seen = settings.steps * settings.batch_size

    def save(folder: Path) -> None:
        write_csv(folder / "representation.csv", training.extra_state["representation"])
        save_model(
            folder,
            networks.ema_encoder,
            objective=name,
            training={"profile": config.profile, "seed": seed, "steps": settings.steps},
            compute={"pretrain": pretraining_compute(config, name)},
        )

    training.publish(output, timing, save, seen, throughput=training.extra_state["throughput"])


def build_trainer(
    config: Config,
    name: str,
    settings: Pretrain,
    objective: PretrainingObjective,
    networks: Networks,
    images: ShardedDataset,
    env: DistEnv,
) -> Trainer:
    """The loop around the networks, with the identity of this run."""
    parameters = [p for p in networks.student.parameters() if p.requires_grad]
    modules = {"student": networks.student, "teacher": networks.teacher, "ema_encoder": networks.ema_encoder}
    others = {"objectives"} | PRETRAINING.keys() - {name}  # what other objectives have changes nothing here
    identity = fingerprint(
        {
            "objective": name,
            "pretrain": settings.model_dump(mode="json", exclude=others),
            **config.model_dump(mode="json", include={"seed", "data", "model"}),
        },
        {"shards": images.fingerprint},
        __name__,
        objective,
    )
    training = Trainer(
        RunState(f"pretrain-{name}", identity),
        env,
        label=f"pretrain {name}",
        total_steps=settings.steps,
        modules={key: module for key, module in modules.items() if module is not None},
        optimizer=build_optimizer([(1.0, parameters)], lr=settings.lr, weight_decay=settings.weight_decay),
        precision=settings.precision,
        metrics=["loss", *objective.terms, "grad_norm"],
        checkpoint_every=settings.checkpoint_every,
        describe_step=lambda step: describe_step(images, settings.batch_size, config.seed, step),
    )
    training.extra_state = {"throughput": [], "representation": []}
    return training


def images_in_model_space(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """`image`, `view1` and `view2` of a batch of the loader, each (B, C, H, W) float32 in [-1, 1]."""
    pixels = {"image": to_unit_range(batch["image"].to(device, non_blocking=True))}
    for view in (1, 2):
        cropped = batch[f"view{view}"].to(device, non_blocking=True)
        pixels[f"view{view}"] = color_blur(cropped, batch[f"color_blur{view}"])
    return {name: to_model_space(image) for name, image in pixels.items()}


def _log(
    settings: Pretrain,
    training: Trainer,
    objective: PretrainingObjective,
    done: int,
    now: dict[str, float],
    seconds: float,
) -> None:
    """A row of the history after `done` steps, and the progress line."""
    count = done % settings.log_every or settings.log_every
    extra = objective.schedule(done - 1) if hasattr(objective, "schedule") else {}
    row = {"step": done, **training.mean_metrics(count), **extra}
    row |= {"teacher_decay": now["teacher_decay"], "lr": now["lr"]}
    images_per_second = count * settings.batch_size / seconds
    training.extra_state["throughput"].append([done, images_per_second])
    shown = {name: f"{row[name]:.3f}" for name in ("loss", *objective.terms)}
    shown |= {name: f"{value:g}" for name, value in extra.items()}
    training.log(row, **shown, **{"images/s": f"{images_per_second:.0f}"})
