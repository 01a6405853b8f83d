"""Fine-tuning: a classifier for one method and one smoothing sigma (Lei et al. 2025, section 3.3)."""

import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import Mixup

from rrcm.config import METHODS, Config, FinetuneSettings
from rrcm.data import augment, loader, shards
from rrcm.data.augment import mixup_pairs
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models import noise_levels as schedules
from rrcm.models import timm_vit as convert_timm_vit
from rrcm.models import vit as model
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import ARCHITECTURE, architecture, load_encoder, save_model
from rrcm.models.noise_levels import karras_levels, nearest_level
from rrcm.models.timm_vit import load_timm
from rrcm.models.vit import NoiseConditionedViT, build_encoder, parameter_count
from rrcm.objectives import rrcm as losses
from rrcm.objectives.consistency import consistency_regularizer
from rrcm.training import trainer
from rrcm.training.optim import layerwise_lr_scales, warmup_cosine
from rrcm.training.trainer import Trainer
from rrcm.training.validation import noisy_accuracy
from rrcm.utils import distributed, rng
from rrcm.utils.distributed import DistEnv, all_reduce_sum, barrier, init_distributed
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, read_json, sha256_file, write_csv, write_json
from rrcm.utils.provenance import environment
from rrcm.utils.resume import Run, fingerprint
from rrcm.utils.rng import derive_seed, normal_per_sample
from rrcm.utils.tensors import sha256_tensors

# What decides the result, with this file.
CODE = (augment, distributed, loader, losses, model, rng, schedules, shards, trainer, convert_timm_vit)


def finetune(
    config: Config, method: str, sigma: float, shard_folder: Path | str, pretrained: Path, output: Path, timing: Path
) -> None:
    """Train one classifier and write `output` (model.safetensors, config.json, history.csv) and `timing` (JSON).

    `pretrained` is what pre-training wrote: the start of some methods, and the compute of the *_matched ones. The
    weights kept are those with the best accuracy on noisy images of the `val` split. Killed and started again it
    continues from its last checkpoint and ends with the same bytes.
    """
    with init_distributed(config.device) as env:
        images, validation = ShardedDataset(shard_folder, "train"), ShardedDataset(shard_folder, "val")
        if env.is_main:
            images.verify()
            validation.verify()
        _train(config, method, sigma, images, validation, pretrained, env, output, timing)


def matched_epochs(epochs: int, pretrain_compute: float, shared_by: int, epoch_compute: float) -> int:
    """Epochs that give a scratch method rRCM's total compute: its fine-tuning plus its share of the pre-training."""
    return epochs + round(pretrain_compute / shared_by / epoch_compute)


def time_condition(config: Config, method: str, sigma: float) -> float:
    """The t that a classifier for pixel `sigma` is told: 2 sigma, or the nearest level of the grid of pre-training."""
    if config.finetune.time_condition == "exact" or METHODS[method].start != "pretrain":
        return 2 * sigma
    grid = config.pretrain
    levels = karras_levels(grid.max_levels + 1, t_min=grid.t_min, t_max=grid.t_max, rho=grid.rho)
    return nearest_level(levels, 2 * sigma)


def load_initial_encoder(config: Config, method: str, t: float, pretrained: Path) -> NoiseConditionedViT:
    """What a method's fine-tuning for noise level t starts from; random weights are of torch's global generator.

    Raises `RRCMError` for weights that are missing, damaged, or of another network than the settings describe.
    """
    kind, settings, sizes = METHODS[method], config.finetune, config.data.model_dump() | config.model.model_dump()
    encoder = build_encoder(config.model, config.data)
    if kind.start == "timm":
        network = load_timm(settings.timm.model, settings.timm.weights)
        place = {name: sizes[name] for name in ("image_size", "channels", "patch_size")}
        encoder = convert_timm_vit.convert_timm_vit(network, settings.timm.model, **place, t=t)
    elif kind.start == "pretrain":
        if settings.initial_checkpoint is not None and not Path(settings.initial_checkpoint).exists():
            raise RRCMError(f"finetune.initial_checkpoint = {settings.initial_checkpoint!r}: no such folder or file")
        encoder = load_encoder(settings.initial_checkpoint or pretrained, {name: sizes[name] for name in ARCHITECTURE})
    encoder.patch_embed.requires_grad_(not config.model.freeze_patch_embed)
    encoder.grad_checkpointing = config.model.grad_checkpointing
    return encoder


def _train(
    config: Config,
    method: str,
    sigma: float,
    images: ShardedDataset,
    validation: ShardedDataset,
    pretrained: Path,
    env: DistEnv,
    output: Path,
    timing: Path,
) -> None:
    kind, settings, seed, device = METHODS[method], config.finetune.settings(method, sigma), config.seed, env.device
    t, uses_pretraining = time_condition(config, method, sigma), config.finetune.uses_pretraining(method)
    if settings.mixup > 0 or settings.cutmix > 0:
        if settings.batch_size // env.world_size % 2:
            raise RRCMError(f"finetune.batch_size = {settings.batch_size}: mixup needs an even batch on every process")
        mix = Mixup(
            settings.mixup,
            settings.cutmix,
            switch_prob=settings.mixup_switch_prob,
            label_smoothing=settings.label_smoothing,
            num_classes=len(images.classes),
        )
    else:
        mix = None
    epoch_steps = loader.steps_per_epoch(len(images), settings.batch_size)
    epoch_compute = (
        3 * settings.num_noise * epoch_steps * settings.batch_size
    )  # encoder forwards; a backward counts two
    epochs, looks_every, share = settings.epochs, config.finetune.evaluate_every, 0.0
    if kind.matched or uses_pretraining:
        share = read_json(pretrained / "config.json")["compute"]["pretrain"] / config.finetune.pretrain_cost_shared_by
    if kind.matched:
        epochs = matched_epochs(settings.epochs, share, 1, epoch_compute)
        looks_every = math.ceil(looks_every * epochs / settings.epochs)  # as many looks at the validation split
        share = 0.0
    total_steps = epochs * epoch_steps
    batch_seed = derive_seed(seed, "finetune batches")

    torch.manual_seed(derive_seed(seed, "finetune"))  # initial weights: the same for every scratch method and sigma
    encoder = load_initial_encoder(config, method, t, pretrained)
    classifier = NoiseConditionedClassifier(encoder, len(images.classes), t).to(device).train()
    rates = layerwise_lr_scales(classifier, settings.layer_decay)
    groups: dict[float, list[torch.Tensor]] = {}
    for name, parameter in classifier.named_parameters():
        if name in rates:
            groups.setdefault(rates[name], []).append(parameter)
    peak = settings.lr * settings.batch_size / 256
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "factor": factor} for factor, parameters in groups.items()],
        lr=peak,
        betas=(0.9, 0.999),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    best = copy.deepcopy(classifier).requires_grad_(False)
    inputs = {"shards": images.fingerprint, "start": sha256_tensors(encoder.state_dict())}
    if kind.matched or uses_pretraining:
        inputs["pretrained"] = sha256_file(pretrained / "config.json")
    described = config.model_dump(mode="json", include={"seed", "data", "model", "finetune"})
    described |= {"method": method, "sigma": sigma, "t": t, "architecture": architecture(encoder)}
    mark = fingerprint(described, inputs, [*CODE, sys.modules[__name__]])
    training = Trainer(
        Run(f"finetune-{method}-{sigma}", mark),
        env,
        label=f"finetune {method} sigma {sigma:g}",
        steps=total_steps,
        modules={"classifier": classifier, "best": best},
        optimizer=optimizer,
        precision=config.finetune.precision,
        metrics=["loss", "cross_entropy", "regularizer"],
        checkpoint_every=config.finetune.checkpoint_every * epoch_steps,
        suspects=lambda step: loader.describe_step(images, settings.batch_size, batch_seed, step),
    )
    training.notes = {"selected": {"epoch": 0, "val_accuracy": -1.0}}
    if not training.resume() and settings.linear_probe_epochs and kind.start is not None:
        quietest = config.pretrain.t_min if kind.start == "pretrain" else t  # timm's weights are put in place for one t
        linear_probe(classifier, images, config, settings, env, quietest)
    if config.finetune.compile:
        classifier.compile()
    forward = training.parallel(classifier)
    pixels, labels, _ = read_split(validation, config.data.image_size)

    batches = loader.batches(
        images,
        augment.FinetuneTransform(settings.augmentation, config.data.image_size),
        batch_size=settings.batch_size,
        seed=batch_seed,
        first_step=training.done,
        last_step=total_steps,
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )
    for step, batch in training.steps(batches):
        rate = peak * warmup_cosine(step / epoch_steps, settings.warmup_epochs, epochs)
        clean, target = batch["image"].to(device, non_blocking=True), batch["label"].to(device, non_blocking=True)
        if mix is not None:
            clean, soft = mixup_pairs(mix, clean, target, derive_seed(seed, "mixup", step))
        else:
            soft = F.one_hot(target, len(images.classes)).float()
            soft = soft * (1 - settings.label_smoothing) + settings.label_smoothing / len(images.classes)
        copies = (clean.float() / 255).repeat(settings.num_noise, 1, 1, 1)
        positions = [f"{copy} {p}" for copy in range(settings.num_noise) for p in batch["position"].tolist()]
        noise = normal_per_sample(copies.shape[1:], seed, "finetune noise", step, positions=positions, device=device)
        with training.autocast():
            logits = forward(copies + sigma * noise, num_chunks=config.finetune.num_chunks)
        logits = logits.float().unflatten(0, (settings.num_noise, -1))
        cross_entropy = -(soft * F.log_softmax(logits, dim=-1)).sum(-1).mean()
        regularizer = torch.zeros((), device=device)
        if kind.regularized:
            regularizer = consistency_regularizer(logits, settings.consistency_weight, settings.entropy_weight).mean()
        loss = cross_entropy + regularizer
        training.descend(loss, rate)
        training.count(loss, cross_entropy, regularizer)

        epoch, into_epoch = divmod(step + 1, epoch_steps)
        if into_epoch:
            continue
        means, accuracy, shown = training.averages(epoch_steps), None, {}
        if epoch % looks_every == 0 or epoch == epochs:
            accuracy = noisy_accuracy(classifier, pixels, labels, sigma, seed, training.precision, env)
            if accuracy > training.notes["selected"]["val_accuracy"]:
                training.notes["selected"] = {"epoch": epoch, "val_accuracy": accuracy}
                best.load_state_dict(classifier.state_dict())
            shown = {"loss": f"{means['loss']:.3f}", "val_accuracy": f"{100 * accuracy:.1f} %"}
        training.log({"epoch": epoch, **means, "val_accuracy": accuracy, "lr": rate}, **shown)

    if env.is_main:
        with atomic_directory(output) as folder:
            save_model(
                folder,
                best,
                class_names=images.classes,
                method=method,
                sigma=sigma,
                seed=seed,
                parameters=parameter_count(best),
                start=config.finetune.origin(method),
                training={"profile": config.profile, "epochs": epochs, **settings.model_dump(exclude={"epochs"})},
                selected=training.notes["selected"],
                compute={"finetune": epochs * epoch_compute, "pretrain_share": share},
            )
            write_csv(folder / "history.csv", training.history)
        write_json(
            timing,
            {
                "seconds": training.seconds,
                "images_per_second": total_steps * settings.batch_size / training.seconds,
                "processes": env.world_size,
                "environment": environment(device),
            },
        )
        training.run.finish()
    barrier()


def linear_probe(
    classifier: NoiseConditionedClassifier,
    images: ShardedDataset,
    config: Config,
    settings: FinetuneSettings,
    env: DistEnv,
    t: float,
) -> None:
    """Linear-probe start: fit the head alone on clean training images at noise level t."""
    optimizer = torch.optim.AdamW(classifier.head.parameters(), lr=1e-2, weight_decay=0.0)
    steps = settings.linear_probe_epochs * loader.steps_per_epoch(len(images), settings.batch_size)
    batches = loader.batches(
        images,
        augment.FinetuneTransform("none", config.data.image_size),
        batch_size=settings.batch_size,
        seed=derive_seed(config.seed, "probe batches"),
        first_step=0,
        last_step=steps,
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )
    for batch in batches:
        with torch.no_grad():
            clean = 2 * (batch["image"].to(env.device).float() / 255) - 1
            representation = classifier.encoder(clean, t)
        loss = F.cross_entropy(classifier.head(representation), batch["label"].to(env.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in classifier.head.parameters():
            parameter.grad = all_reduce_sum(parameter.grad) / env.world_size
        optimizer.step()
