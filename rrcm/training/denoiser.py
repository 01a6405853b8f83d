"""Training of a denoiser on clean images (Karras et al. 2022). A public one is copied instead.

A conditional denoiser D(x; t, r) is also told the representation r of the clean image, by a frozen encoder.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rrcm.config import Config, DenoiserSettings
from rrcm.data.augment import FinetuneTransform
from rrcm.data.loader import batch_loader, describe_step, explain_lost_workers
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.verification import verify_shards
from rrcm.models.checkpoints import ARCHITECTURE
from rrcm.models.condition import Condition, load_condition
from rrcm.models.denoiser import EDMDenoiser, PixelViT, UNet, save_denoiser
from rrcm.models.public_denoisers import MIN_IMAGES, load_public_denoiser
from rrcm.models.vit import NoiseConditionedViT, parameter_count
from rrcm.objectives.base import StepRandomness
from rrcm.objectives.denoising import Denoising
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


def train_denoiser(
    config: Config, shard_folder: Path | str, output: Path, timing: Path, encoder: Path | None = None
) -> None:
    """Train on the `train` split and write `output` (model.safetensors, config.json, history.csv, denoising.csv) and
    `timing` (JSON).

    Runs in this process or as one of torchrun's. Killed and started again it continues from its last checkpoint and
    ends with the same bytes. If the settings name a public denoiser, it is written to `output` instead. With the model
    folder of an `encoder`, the denoiser is conditional on its representations, and always trained. Raises `RRCMError`
    when the loss is no longer finite or what is loaded does not fit, `Interrupted` after SIGTERM.
    """
    set_threads(config.threads)
    if config.denoiser.public.source is not None and encoder is None:
        with init_distributed(config.device) as env:
            if env.is_main:
                copy_public_denoiser(config, ShardedDataset(shard_folder, "train"), output, timing, env.device)
        return
    advice = "raise denoiser.num_chunks"
    with init_distributed(config.device) as env, explain_lost_workers(), explain_out_of_memory(advice):
        images, validation = ShardedDataset(shard_folder, "train"), ShardedDataset(shard_folder, "val")
        verify_shards([images, validation], env)
        condition = None if encoder is None else load_condition(config, encoder, env.device)
        _train(config, images, validation, condition, env, output, timing)


def copy_public_denoiser(
    config: Config, images: ShardedDataset, output: Path, timing: Path, device: torch.device
) -> None:
    """Write the model folder of the public denoiser that the settings name, if it denoises a few of the images.

    Raises `RRCMError` if it does not, if it cannot be loaded, or if it is for other images than those of the settings.
    """
    settings, start = config.denoiser.public, time.monotonic()
    options = settings.model_dump(exclude={"source"})
    pixels, _, _ = read_split(images, config.data.image_size, limit=MIN_IMAGES)
    denoiser = load_public_denoiser(settings.source, to_unit_range(pixels.to(device)), config.sigmas, **options)
    record = {"source": settings.source, "parameters": parameter_count(denoiser), "compute": 0.0}
    with atomic_directory(output) as folder:
        save_denoiser(folder, denoiser, sigmas=config.sigmas, **record)
    write_json(timing, {"seconds": time.monotonic() - start, "environment": describe_environment(device)})


def build_denoiser(config: Config, condition_dim: int | None = None) -> EDMDenoiser:
    """The denoiser that the settings describe, with random weights from torch's global generator."""
    settings, data = config.denoiser, config.data
    if settings.network == "unet":
        return EDMDenoiser(UNet(data.image_size, data.channels, **settings.unet.model_dump()))
    sizes = data.model_dump() | settings.model_dump()
    encoder = NoiseConditionedViT(**{name: sizes[name] for name in ARCHITECTURE})
    return EDMDenoiser(PixelViT(encoder, condition_dim))


@dataclass
class DenoisingError:
    """Mean squared error per pixel on the validation split, with the same noise at every call. The processes share it.

    In model space; an image of zeros has about the variance of the data.
    """

    pixels: torch.Tensor  # (N, C, H, W) uint8
    sigmas: list[float]  # pixel units
    seed: int
    precision: str
    env: DistEnv
    condition: Condition | None = None

    @torch.no_grad()
    def __call__(self, denoiser: EDMDenoiser) -> dict[float, float]:
        """The error by sigma."""
        device = self.env.device
        sums = torch.zeros(len(self.sigmas), dtype=torch.float64, device=device)
        for rows in torch.arange(self.env.rank, len(self.pixels), self.env.world_size).split(BATCH_SIZE):
            image = to_model_space(to_unit_range(self.pixels[rows].to(device)))
            noise = normal_per_sample(image.shape[1:], self.seed, "validation", positions=rows.tolist(), device=device)
            with autocast(device, self.precision):
                told = () if self.condition is None else (self.condition(image),)
            for number, sigma in enumerate(self.sigmas):
                with autocast(device, self.precision):
                    estimate = denoiser(image + 2 * sigma * noise, 2 * sigma, *told)
                sums[number] += (estimate - image).double().square().mean((1, 2, 3)).sum()
        means = all_reduce_sum(sums) / len(self.pixels)
        return dict(zip(self.sigmas, means.tolist(), strict=True))


def _train(
    config: Config,
    images: ShardedDataset,
    validation: ShardedDataset,
    condition: Condition | None,
    env: DistEnv,
    output: Path,
    timing: Path,
) -> None:
    settings = config.denoiser
    torch.manual_seed(derive_seed(config.seed, "denoiser"))
    condition_dim = None if condition is None else condition.encoder.embed_dim
    denoiser = build_denoiser(config, condition_dim).to(env.device).train()
    ema = copy.deepcopy(denoiser).requires_grad_(False)
    objective = Denoising(noise_mean=settings.noise_mean, noise_std=settings.noise_std, num_chunks=settings.num_chunks)
    training = build_trainer(config, settings, objective, condition, denoiser, ema, images, env)
    training.resume()
    if settings.compile:
        denoiser.network.compile()
    model = training.wrap_ddp(denoiser)
    pixels, _, _ = read_split(validation, config.data.image_size)
    error = DenoisingError(pixels, config.sigmas, config.seed, training.precision, env, condition)
    batches = batch_loader(
        images,
        FinetuneTransform(settings.augmentation, config.data.image_size),
        batch_size=settings.batch_size,
        seed=derive_seed(config.seed, "denoiser batches"),
        first_step=training.step,
        last_step=settings.steps,
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )
    for step, batch in training.steps(batches):
        # schedule
        lr = settings.lr * warmup_cosine(step, settings.warmup_steps, settings.steps)
        # loss
        random = StepRandomness(config.seed, step, batch["position"].tolist(), settings.batch_size, env.device)
        clean = {"image": to_model_space(to_unit_range(batch["image"].to(env.device, non_blocking=True)))}
        with training.autocast():
            if condition is not None:
                clean["condition"] = condition(clean["image"])
            loss = objective(model, clean, random)["loss"]
        # optimizer and EMA
        grad_norm = training.optimizer_step(loss, lr, GRAD_CLIP_NORM)
        update_average(ema, denoiser, settings.ema_decay)
        # logging and validation
        training.accumulate_metrics(loss, grad_norm)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            row = {"step": done, **training.mean_metrics(done % settings.log_every or settings.log_every), "lr": lr}
            training.log(row, loss=f"{row['loss']:.4f}")
        if done % settings.evaluate_every == 0 or done == settings.steps:
            errors = error(ema)
            training.extra_state["denoising"] += [
                {"step": done, "sigma": sigma, "mean_squared_error": value} for sigma, value in errors.items()
            ]

    def save(folder: Path) -> None:
        seen = settings.steps * settings.batch_size
        write_csv(folder / "denoising.csv", training.extra_state["denoising"])
        save_denoiser(
            folder,
            ema,
            seed=config.seed,
            parameters=parameter_count(ema),
            training={"profile": config.profile, **settings.model_dump(mode="json")},
            compute=(objective.forwards_per_image + (condition is not None)) * seen,
            condition=condition and condition.identity,
        )

    training.publish(output, timing, save, settings.steps * settings.batch_size)


def build_trainer(
    config: Config,
    settings: DenoiserSettings,
    objective: Denoising,
    condition: Condition | None,
    denoiser: EDMDenoiser,
    ema: EDMDenoiser,
    images: ShardedDataset,
    env: DistEnv,
) -> Trainer:
    """The loop around the denoiser, with the identity of this run."""
    batch_seed = derive_seed(config.seed, "denoiser batches")
    identity = fingerprint(
        config.model_dump(mode="json", include={"seed", "data", "denoiser", "sigmas"})
        | {"condition": condition and condition.identity},
        {"shards": images.fingerprint},
        __name__,
        objective,
        denoiser,
    )
    name = "denoiser" if condition is None else "conditional denoiser"
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    training = Trainer(
        RunState(name.replace(" ", "-"), identity),
        env,
        label=name,
        total_steps=settings.steps,
        modules={"denoiser": denoiser, "ema": ema},
        optimizer=build_optimizer([(1.0, parameters)], lr=settings.lr, weight_decay=0.0),
        precision=settings.precision,
        metrics=["loss", "grad_norm"],
        checkpoint_every=settings.checkpoint_every,
        describe_step=lambda step: describe_step(images, settings.batch_size, batch_seed, step),
    )
    training.extra_state = {"denoising": []}
    return training
