"""Pre-training: one loop, from shards to the student's moving average (Lei et al. 2025, section 3)."""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rrcm.config import Config
from rrcm.data import augment, loader, shards
from rrcm.data.shards import ShardedDataset
from rrcm.evaluation import representations as representation
from rrcm.evaluation.representations import COLLAPSED, evaluate, load_eval_images
from rrcm.models import noise_levels as schedules
from rrcm.models import vit as model
from rrcm.models.checkpoints import save_model
from rrcm.models.noise_levels import karras_levels
from rrcm.models.vit import EncoderWithProjector, build_encoder
from rrcm.objectives import rrcm as losses
from rrcm.objectives.moco import moco_noise_loss
from rrcm.objectives.rrcm import RRCMLoss, num_levels, rrcm_loss
from rrcm.training import trainer
from rrcm.training.optim import teacher_decay, warmup_cosine
from rrcm.training.trainer import Trainer
from rrcm.utils import distributed, rng
from rrcm.utils.distributed import DistEnv, barrier, init_distributed
from rrcm.utils.files import atomic_directory, write_csv, write_json
from rrcm.utils.provenance import environment
from rrcm.utils.resume import Run, fingerprint
from rrcm.utils.rng import derive_seed, normal_per_sample, numpy_rng

# Encoder forward passes an image and step; a backward counts two. rrcm: three student views, the quieter target, two
# teacher views. moco_noise: two student views, two teacher views.
FORWARDS_PER_IMAGE = {"rrcm": 3 * 3 + 1 + 2, "moco_noise": 2 * 3 + 2}

# What decides the result, with this file.
CODE = (augment, distributed, loader, losses, model, representation, rng, schedules, shards, trainer)


def pretrain(config: Config, shard_folder: Path | str, output: Path, timing: Path) -> None:
    """Train on the `train` split and write `output` (model.safetensors, config.json, history.csv, representation.csv)
    and `timing` (JSON).

    Runs in this process or as one of torchrun's. Killed and started again it continues from its last checkpoint and
    ends with the same bytes. Raises `RRCMError` when the loss is no longer finite, `Interrupted` after SIGTERM.
    """
    with init_distributed(config.device) as env:
        images, validation = ShardedDataset(shard_folder, "train"), ShardedDataset(shard_folder, "val")
        if env.is_main:
            images.verify()
            validation.verify()
        _train(config, images, validation, env, output, timing)


def _train(
    config: Config, images: ShardedDataset, validation: ShardedDataset, env: DistEnv, output: Path, timing: Path
) -> None:
    settings, seed, device = config.pretrain, config.seed, env.device
    torch.manual_seed(derive_seed(seed, "pretrain"))  # initial weights
    student = EncoderWithProjector(
        build_encoder(config.model, config.data), config.model.projector_hidden_dim, config.model.projection_dim
    )
    student.to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    average = copy.deepcopy(student.encoder).requires_grad_(False)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "factor": 1.0}], lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )
    mark = fingerprint(
        config.model_dump(mode="json", include={"seed", "data", "model", "pretrain"}),
        {"shards": images.fingerprint},
        [*CODE, sys.modules[__name__]],
    )
    training = Trainer(
        Run("pretrain", mark),
        env,
        label="pretrain",
        steps=settings.steps,
        modules={"student": student, "teacher": teacher, "average": average},
        optimizer=optimizer,
        precision=settings.precision,
        metrics=["loss", "contrastive", "consistency", "grad_norm"],
        checkpoint_every=settings.checkpoint_every,
        suspects=lambda step: loader.describe_step(images, settings.batch_size, seed, step),
    )
    training.notes = {"rates": [], "representation": []}
    training.resume()
    if settings.compile:
        student.encoder.compile()
        teacher.encoder.compile()
    forward = training.parallel(student)
    sizes = config.data.image_size, settings.evaluate_images
    bank, held_out = (load_eval_images(split, *sizes, env) for split in (images, validation))

    def look(step: int) -> None:
        """How good the average's representations are now."""
        options = {"sigmas": settings.evaluate_sigmas, "t_min": settings.t_min, "seed": seed}
        rows = evaluate(average, bank, held_out, **options, precision=training.precision, env=env)
        training.notes["representation"] += [{"step": step, **row} for row in rows]
        if env.is_main and rows[0]["cross_image_cosine"] > COLLAPSED:
            print(
                f"pretrain: the representations have collapsed at step {step}: different images have a mean cosine of "
                f"{rows[0]['cross_image_cosine']:.4f}; lower the learning rate, or the temperature",
                file=sys.stderr,
            )

    if training.done == 0:
        look(0)
    batches = loader.batches(
        images,
        augment.PretrainTransform(settings.views, config.data.image_size),
        batch_size=settings.batch_size,
        seed=seed,
        first_step=training.done,
        last_step=settings.steps,
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )
    tick = time.monotonic()
    for step, batch in training.steps(batches):
        levels = karras_levels(
            num_levels(step, settings.steps, start=settings.min_levels, end=settings.max_levels),
            t_min=settings.t_min,
            t_max=settings.t_max,
            rho=settings.rho,
        ).tolist()
        rate = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.steps)
        terms = _objective(config, training, forward, teacher, batch, step, levels)
        loss = terms.total.mean()
        bound = settings.grad_clip_norm if step >= settings.warmup_steps else float("inf")
        grad_norm = training.descend(loss, rate, bound)
        mu = teacher_decay(
            step,
            settings.steps,
            start=settings.teacher_decay_start,
            end=settings.teacher_decay_end,
            steepness=settings.teacher_decay_steepness,
        )
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - mu)
            torch._foreach_lerp_(list(average.parameters()), list(student.encoder.parameters()), 1 - settings.ema_decay)
        training.count(loss, terms.contrastive.mean(), terms.consistency.mean(), grad_norm)

        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            count = done % settings.log_every or settings.log_every
            row = {"step": done, **training.averages(count), "levels": len(levels), "teacher_decay": mu, "lr": rate}
            images_per_second = count * settings.batch_size / (time.monotonic() - tick)
            training.notes["rates"].append([done, images_per_second])
            shown = {name: f"{row[name]:.3f}" for name in ("loss", "contrastive", "consistency")}
            shown |= {"N": f"{len(levels)}", "EMA": f"{mu:.4f}", "images/s": f"{images_per_second:.0f}"}
            training.log(row, **shown)
            tick = time.monotonic()
        if done % settings.evaluate_every == 0 or done == settings.steps:
            look(done)
            tick = time.monotonic()

    if env.is_main:
        seen = settings.steps * settings.batch_size
        with atomic_directory(output) as folder:
            save_model(
                folder,
                average,
                training={"profile": config.profile, "seed": seed, "steps": settings.steps},
                compute={"pretrain": FORWARDS_PER_IMAGE[settings.objective] * seen},
            )
            write_csv(folder / "history.csv", training.history)
            write_csv(folder / "representation.csv", training.notes["representation"])
        write_json(
            timing,
            {
                "seconds": training.seconds,
                "images_per_second": seen / training.seconds,
                "processes": env.world_size,
                "throughput": training.notes["rates"],
                "environment": environment(device),
            },
        )
        training.run.finish()
    barrier()


def _objective(
    config: Config,
    training: Trainer,
    student: Callable,
    teacher: Callable,
    batch: loader.Batch,
    step: int,
    levels: list[float],
) -> RRCMLoss:
    """The loss of a batch.

    rrcm: the image along its noise trajectory, the views at the quietest level; one noise an image, one pair of
    neighbouring levels a step. moco_noise: each view with a noise of its own, pixel sigma uniform from 0 to the loudest
    that is evaluated.
    """
    settings, seed = config.pretrain, config.seed
    image, view1, view2 = _model_space(batch, training.env.device)
    common = {"temperature": settings.temperature, "num_chunks": settings.num_chunks}
    if settings.objective == "rrcm":
        noise = _noise(image, seed, "noise", step, batch)
        n = int(numpy_rng(seed, "level", step).integers(len(levels) - 1))  # one for the whole global batch
        pair = {"t": levels[n], "t_next": levels[n + 1], "t_min": levels[-1]}
        with training.autocast():
            return rrcm_loss(student, teacher, image, view1, view2, noise, **pair, **common)
    noise1, noise2 = (_noise(view1, seed, f"noise {i}", step, batch) for i in (1, 2))
    loudest = 2 * max(settings.evaluate_sigmas)
    drawn = numpy_rng(seed, "view levels", step).uniform(settings.t_min, loudest, (2, settings.batch_size))
    t1, t2 = torch.from_numpy(drawn[:, batch["position"].numpy()]).to(view1.device, torch.float32)
    with training.autocast():
        return moco_noise_loss(student, teacher, view1, view2, noise1, noise2, t1=t1, t2=t2, **common)


def _noise(images: torch.Tensor, seed: int, name: str, step: int, batch: loader.Batch) -> torch.Tensor:
    positions = batch["position"].tolist()
    return normal_per_sample(images.shape[1:], seed, name, step, positions=positions, device=images.device)


def _model_space(batch: loader.Batch, device: torch.device) -> list[torch.Tensor]:
    """The image itself and its two views, each (B, C, H, W) float32 in [-1, 1]."""
    image = batch["image"].to(device, non_blocking=True).float() / 255
    views = [
        augment.color_blur(batch[f"view{i}"].to(device, non_blocking=True), batch[f"color_blur{i}"]) for i in (1, 2)
    ]
    return [2 * pixels - 1 for pixels in (image, *views)]
