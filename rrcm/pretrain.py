"""Pre-training: one loop, from shards to the student's moving average (Lei et al. 2025, section 3)."""

import copy
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from rrcm import augment, distributed, loader, losses, model, rng, schedules, shards
from rrcm.checkpoint import save_model
from rrcm.config import Config
from rrcm.distributed import Process, all_sum, autocast, barrier, processes
from rrcm.environment import environment
from rrcm.errors import RRCMError
from rrcm.files import atomic_directory, write_csv, write_json
from rrcm.losses import pretraining_loss
from rrcm.model import ProjectedViT, build_encoder
from rrcm.progress import Progress
from rrcm.rng import derive_seed, normal_per_sample, numpy_rng
from rrcm.runs import Run, fingerprint, pack_state, unpack_state
from rrcm.schedules import karras_levels, num_levels, teacher_ema, warmup_cosine
from rrcm.shards import ShardedImages

# Encoder forward passes an image and step: three student views with backward (3 each), the quieter target, two teacher
# views.
FORWARDS_PER_IMAGE = 3 * 3 + 1 + 2

CODE = (augment, distributed, loader, losses, model, rng, schedules, shards)  # what decides the result, with this file


def pretrain(config: Config, shard_folder: Path | str, output: Path, timing: Path) -> None:
    """Train on the `train` split and write `output` (model.safetensors, config.json, history.csv) and `timing` (JSON).

    Runs in this process or as one of torchrun's. Killed and started again it continues from its last checkpoint and
    ends with the same bytes. Raises `RRCMError` when the loss is no longer finite.
    """
    with processes(config.device) as process:
        images = ShardedImages(shard_folder, "train")
        if process.is_main:
            images.verify()
        _train(config, images, process, output, timing)


def _train(config: Config, images: ShardedImages, process: Process, output: Path, timing: Path) -> None:
    settings, seed, device = config.pretrain, config.seed, process.device
    torch.manual_seed(derive_seed(seed, "pretrain"))  # initial weights
    student = ProjectedViT(
        build_encoder(config.model, config.data), config.model.projector_hidden, config.model.projection
    )
    student.to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    average = copy.deepcopy(student.encoder).requires_grad_(False)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # of the metrics since the last log line
    bad_step = torch.tensor(-1, device=device)  # first step whose loss was not finite
    history, rates, seconds, first = [], [], 0.0, 0

    mark = fingerprint(
        config.model_dump(mode="json", include={"seed", "data", "model", "pretrain"}),
        {"shards": images.fingerprint},
        [*CODE, sys.modules[__name__]],
    )
    run = Run("pretrain", mark)
    if process.is_main:
        run.lock()
    modules = {"student": student, "teacher": teacher, "average": average}
    if (state := run.load()) is not None:
        first, tensors, notes = state
        unpack_state(tensors, modules, optimizer)
        sums.copy_(tensors["sums"])
        scaler.load_state_dict(notes["scaler"])
        history, rates, seconds = notes["history"], notes["rates"], notes["seconds"]
    forward = student
    if process.world > 1:
        forward = DistributedDataParallel(student, broadcast_buffers=False)

    batches = loader.batches(
        images,
        augment.PretrainTransform(settings.views, config.data.image_size),
        batch_size=settings.batch_size,
        seed=seed,
        first_step=first,
        last_step=settings.steps,
        rank=process.rank,
        world=process.world,
        workers=config.data.workers,
    )
    start = tick = time.monotonic()
    with Progress(settings.steps, "pretrain", "steps", done=first, quiet=not process.is_main) as progress:
        for step, batch in enumerate(batches, start=first):
            image, view1, view2 = _model_space(batch, device)
            noise = normal_per_sample(
                image.shape[1:], seed, "noise", step, positions=batch["position"].tolist(), device=device
            )
            levels = karras_levels(
                num_levels(step, settings.steps, start=settings.start_levels, end=settings.end_levels),
                t_min=settings.t_min,
                t_max=settings.t_max,
                rho=settings.rho,
            ).tolist()
            n = int(numpy_rng(seed, "level", step).integers(len(levels) - 1))  # one for the whole global batch
            rate = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate

            with autocast(device, settings.precision):
                terms = pretraining_loss(
                    forward,
                    teacher,
                    image,
                    view1,
                    view2,
                    noise,
                    t=levels[n],
                    t_next=levels[n + 1],
                    t_min=levels[-1],
                    temperature=settings.temperature,
                )
            loss = terms.total.mean()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            bound = settings.clip_norm if step >= settings.warmup_steps else float("inf")
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
            scaler.step(optimizer)
            scaler.update()

            mu = teacher_ema(
                step,
                settings.steps,
                start=settings.teacher_ema_start,
                end=settings.teacher_ema_end,
                steepness=settings.teacher_ema_steepness,
            )
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - mu)
                torch._foreach_lerp_(
                    list(average.parameters()), list(student.encoder.parameters()), 1 - settings.student_ema
                )
                metrics = torch.stack([loss, terms.contrastive.mean(), terms.consistency.mean(), grad_norm]).double()
                sums += metrics
                bad_step = torch.where((bad_step < 0) & ~loss.isfinite(), step, bad_step)

            done = step + 1
            if done % settings.log_every == 0 or done == settings.steps:
                _stop_if_not_finite(bad_step, run)
                count = done % settings.log_every or settings.log_every
                mean = (all_sum(sums) / (process.world * count)).tolist()
                sums.zero_()
                row = dict(zip(["loss", "contrastive", "consistency", "grad_norm"], mean, strict=True))
                history.append({"step": done, **row, "levels": len(levels), "teacher_ema": mu, "lr": rate})
                rates.append([done, count * settings.batch_size / (time.monotonic() - tick)])
                tick = time.monotonic()
                progress.update(0, loss=f"{row['loss']:.3f}", N=f"{len(levels)}", images_per_s=f"{rates[-1][1]:.0f}")
            progress.update(1)
            if done % settings.checkpoint_every == 0 and done < settings.steps:
                _stop_if_not_finite(bad_step, run)
                if process.is_main:
                    notes = {
                        "scaler": scaler.state_dict(),
                        "history": history,
                        "rates": rates,
                        "seconds": seconds + time.monotonic() - start,
                    }
                    run.save(done, pack_state(modules, optimizer) | {"sums": sums}, notes)
                    write_csv(run.folder / "history.csv", history)
                barrier()

    if process.is_main:
        seconds += time.monotonic() - start
        seen = settings.steps * settings.batch_size
        with atomic_directory(output) as folder:
            save_model(
                folder,
                average,
                training={"profile": config.profile, "seed": seed, "steps": settings.steps},
                compute={"pretrain": FORWARDS_PER_IMAGE * seen},
            )
            write_csv(folder / "history.csv", history)
        write_json(
            timing,
            {
                "seconds": seconds,
                "images_per_second": seen / seconds,
                "processes": process.world,
                "throughput": rates,
                "environment": environment(device),
            },
        )
        run.finish()
    barrier()


def _model_space(batch: loader.Batch, device: torch.device) -> list[torch.Tensor]:
    """The image itself and its two views, each (B, C, H, W) float32 in [-1, 1]."""
    image = batch["image"].to(device).float() / 255
    views = [augment.photometric(batch[f"view{i}"].to(device), batch[f"photometric{i}"]) for i in (1, 2)]
    return [2 * pixels - 1 for pixels in (image, *views)]


def _stop_if_not_finite(bad_step: torch.Tensor, run: Run) -> None:
    if (step := int(bad_step)) >= 0:
        raise RRCMError(
            f"the loss is not finite at step {step}; lower the learning rate or use fp32. "
            f"The last good state is kept in {run.folder}"
        )
