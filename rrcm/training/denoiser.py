"""Training of a denoiser on clean images (Karras et al. 2022). A public denoiser is copied instead."""

import copy
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rrcm.config import Config, Data, DenoiserSettings
from rrcm.data.augment import FinetuneTransform
from rrcm.data.loader import batch_loader, describe_step, explain_lost_workers
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.checkpoints import ARCHITECTURE
from rrcm.models.denoiser import EDMDenoiser, PixelViT, UNet, save_denoiser
from rrcm.models.public_denoisers import MIN_IMAGES, load_public_denoiser
from rrcm.models.vit import NoiseConditionedViT, parameter_count
from rrcm.objectives.base import Batch, StepRandomness
from rrcm.objectives.denoising import Denoising
from rrcm.training.batches import open_splits
from rrcm.training.optim import build_optimizer, update_average, warmup_cosine
from rrcm.training.trainer import Trainer
from rrcm.utils.distributed import (
    DistEnv,
    all_reduce_sum,
    autocast,
    explain_out_of_memory,
    init_distributed,
    set_threads,
)
from rrcm.utils.files import atomic_directory, write_csv, write_json
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.rng import derive_seed, normal_per_sample

BATCH_SIZE = 256  # of the validation
GRAD_CLIP_NORM = 2.0  # as in pre-training


@dataclass(frozen=True)
class DenoiserTraining:
    """The training of one denoiser: everything that decides its result."""

    profile: str
    seed: int
    sigmas: list[float]  # pixel units, of the validation
    settings: DenoiserSettings
    data: Data

    @property
    def batch_seed(self) -> int:
        """The seed of the order and the augmentation of the images."""
        return derive_seed(self.seed, "denoiser batches")

    @property
    def objective(self) -> Denoising:
        """The loss."""
        settings = self.settings
        return Denoising(noise_mean=settings.noise_mean, noise_std=settings.noise_std, num_chunks=settings.num_chunks)


def train_denoiser(config: Config, shard_folder: Path | str, output: Path, timing: Path) -> None:
    """Train on the `train` split and write `output` (model.safetensors, config.json, history.csv, denoising.csv) and
    `timing` (JSON).

    Runs in this process, or as one of the processes of torchrun. A run that was killed and is started again continues
    from its last checkpoint and ends with the same bytes. If the settings name a public denoiser, it is written to
    `output` instead. Raises `RRCMError` when the loss is no longer finite or the public denoiser does not fit,
    `Interrupted` after SIGTERM.
    """
    set_threads(config.threads)
    if config.denoiser.public is not None:
        with init_distributed(config.device) as env:
            if env.is_main:
                copy_public_denoiser(config, ShardedDataset(shard_folder, "train"), output, timing, env.device)
        return
    advice = "raise denoiser.num_chunks"
    with init_distributed(config.device) as env, explain_lost_workers(), explain_out_of_memory(advice):
        images, validation = open_splits(shard_folder, env)
        training = DenoiserTraining(config.profile, config.seed, config.sigmas, config.denoiser, config.data)
        trainer, ema = _train(training, images, validation, env)
        save = partial(_save, training, ema, trainer.extra_state["denoising"])
        trainer.publish(output, timing, save, training.settings.steps * training.settings.batch_size)


def copy_public_denoiser(
    config: Config, images: ShardedDataset, output: Path, timing: Path, device: torch.device
) -> None:
    """Write the model folder of the public denoiser that the settings name, after a test on a few images.

    Raises `RRCMError` if it does not denoise them, cannot be loaded, or takes images of another size.
    """
    source, start = config.denoiser.public, time.monotonic()
    pixels, _, _ = read_split(images, config.data.image_size, limit=MIN_IMAGES)
    denoiser = load_public_denoiser(source, to_unit_range(pixels.to(device)), config.sigmas)
    record = {"source": source, "parameters": parameter_count(denoiser), "compute": 0.0}
    with atomic_directory(output) as folder:
        save_denoiser(folder, denoiser, sigmas=config.sigmas, **record)
    write_json(timing, {"seconds": time.monotonic() - start, "environment": describe_environment(device)})


def build_denoiser(settings: DenoiserSettings, data: Data) -> EDMDenoiser:
    """The denoiser that the settings describe, with random weights from torch's global generator."""
    if settings.network == "unet":
        return EDMDenoiser(UNet(data.image_size, data.channels, **settings.unet.model_dump()))
    sizes = data.model_dump() | settings.model_dump()
    encoder = NoiseConditionedViT(**{name: sizes[name] for name in (*ARCHITECTURE, "stem")})
    return EDMDenoiser(PixelViT(encoder))


@dataclass
class DenoisingError:
    """Mean squared error per pixel on the validation split, in model space, with the same noise at every call.

    The processes share the images. For comparison, an image of zeros has about the variance of the data as its error.
    """

    pixels: torch.Tensor  # (N, C, H, W) uint8
    sigmas: list[float]  # pixel units
    seed: int
    precision: str
    env: DistEnv

    @torch.no_grad()
    def __call__(self, denoiser: EDMDenoiser) -> dict[float, float]:
        """The error by sigma."""
        device = self.env.device
        sums = torch.zeros(len(self.sigmas), dtype=torch.float64, device=device)
        for rows in torch.arange(self.env.rank, len(self.pixels), self.env.world_size).split(BATCH_SIZE):
            image = to_model_space(to_unit_range(self.pixels[rows].to(device)))
            noise = normal_per_sample(image.shape[1:], self.seed, "validation", positions=rows.tolist(), device=device)
            for number, sigma in enumerate(self.sigmas):
                with autocast(device, self.precision):
                    estimate = denoiser(image + 2 * sigma * noise, 2 * sigma)
                sums[number] += (estimate - image).double().square().mean((1, 2, 3)).sum()
        means = all_reduce_sum(sums) / len(self.pixels)
        return dict(zip(self.sigmas, means.tolist(), strict=True))


def _train(
    training: DenoiserTraining, images: ShardedDataset, validation: ShardedDataset, env: DistEnv
) -> tuple[Trainer, EDMDenoiser]:
    settings, objective = training.settings, training.objective
    torch.manual_seed(derive_seed(training.seed, "denoiser"))
    denoiser = build_denoiser(settings, training.data).to(env.device).train()
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    trainer = build_trainer(training, denoiser, ema, images, env)
    trainer.resume()
    if settings.compile:
        denoiser.network.compile()
    model = trainer.wrap_ddp(denoiser)
    pixels, _, _ = read_split(validation, training.data.image_size)
    error = DenoisingError(pixels, training.sigmas, training.seed, trainer.precision, env)
    for step, batch in trainer.steps(train_batches(training, images, env, trainer.step)):
        # schedule
        lr = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.steps)
        # loss
        random = StepRandomness(training.seed, step, batch["position"].tolist(), settings.batch_size, env.device)
        clean = {"image": to_model_space(to_unit_range(batch["image"].to(env.device, non_blocking=True)))}
        with trainer.autocast():
            loss = objective(model, clean, random)["loss"]
        # optimizer and EMA
        grad_norm = trainer.optimizer_step(loss, lr, GRAD_CLIP_NORM)
        update_average(ema, denoiser, settings.ema_decay)
        # logging and validation
        trainer.accumulate_metrics(loss, grad_norm)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            row = {"step": done, **trainer.mean_metrics(done % settings.log_every or settings.log_every), "lr": lr}
            trainer.log(row, loss=f"{row['loss']:.4f}")
        if done % settings.evaluate_every == 0 or done == settings.steps:
            trainer.extra_state["denoising"] += [
                {"step": done, "sigma": sigma, "mean_squared_error": value} for sigma, value in error(ema).items()
            ]
    return trainer, ema


def train_batches(
    training: DenoiserTraining, images: ShardedDataset, env: DistEnv, first_step: int
) -> Generator[Batch]:
    """This process's share of the images of each step, from `first_step` on."""
    return batch_loader(
        images,
        FinetuneTransform(training.settings.augmentation, training.data.image_size),
        batch_size=training.settings.batch_size,
        seed=training.batch_seed,
        steps=range(first_step, training.settings.steps),
        env=env,
        workers=training.data.workers,
    )


def build_trainer(
    training: DenoiserTraining, denoiser: EDMDenoiser, ema: EDMDenoiser, images: ShardedDataset, env: DistEnv
) -> Trainer:
    """The loop around the denoiser, with the identity of this run."""
    settings = training.settings
    identity = fingerprint(
        {
            "seed": training.seed,
            "sigmas": training.sigmas,
            "data": training.data.model_dump(mode="json"),
            "denoiser": settings.model_dump(mode="json"),
        },
        {"shards": images.fingerprint},
        __name__,
        training.objective,
        denoiser,
    )
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    return Trainer(
        RunState("denoiser", identity),
        env,
        label="denoiser",
        total_steps=settings.steps,
        modules={"denoiser": denoiser, "ema": ema},
        optimizer=build_optimizer([(1.0, parameters)], lr=settings.lr, weight_decay=0.0),
        precision=settings.precision,
        metrics=["loss", "grad_norm"],
        checkpoint_every=settings.checkpoint_every,
        describe_step=lambda step: describe_step(images, settings.batch_size, training.batch_seed, step),
        extra_state={"denoising": []},
    )


def _save(training: DenoiserTraining, ema: EDMDenoiser, errors: list[dict], folder: Path) -> None:
    """Write the model folder of the averaged denoiser."""
    settings = training.settings
    write_csv(folder / "denoising.csv", errors)
    save_denoiser(
        folder,
        ema,
        seed=training.seed,
        parameters=parameter_count(ema),
        training={"profile": training.profile, **settings.model_dump(mode="json")},
        compute=training.objective.forwards_per_image * settings.steps * settings.batch_size,
    )
