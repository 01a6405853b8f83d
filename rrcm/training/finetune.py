"""Fine-tuning: one classifier for one method and one smoothing sigma (Lei et al. 2025, section 3.3)."""

import copy
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rrcm.config import Config, FinetuneSettings, ObjectiveSettings
from rrcm.data.augment import FinetuneTransform, mixup_pairs
from rrcm.data.loader import batch_loader, describe_step, explain_lost_workers, steps_per_epoch
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.soft_labels import read_soft_labels
from rrcm.data.verification import verify_shards
from rrcm.methods import METHODS, SOFT_LABELS, denoising_classifier
from rrcm.models import ENCODERS, TRAINED_CLASSIFIERS
from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NetworkClassifier, NoiseConditionedClassifier
from rrcm.models.checkpoints import ARCHITECTURE, architecture, load_encoder, save_model
from rrcm.models.kinds import load_model_folder
from rrcm.models.noise_levels import karras_levels, nearest_level
from rrcm.models.vit import NoiseConditionedViT, build_encoder, parameter_count
from rrcm.objectives.base import Batch, Objective, StepRandomness
from rrcm.training.budget import Budget, build_finetuning_objective, plan_budget
from rrcm.training.optim import build_optimizer, layerwise_lr_scales, warmup_cosine, warmup_step
from rrcm.training.trainer import Trainer
from rrcm.training.validation import NoisyValidation
from rrcm.utils.distributed import (
    DistEnv,
    all_reduce_sum,
    explain_out_of_memory,
    init_distributed,
    resolve_precision,
    set_threads,
)
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import expand_user
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.rng import derive_seed
from rrcm.utils.tensors import sha256_tensors

Classifier = NoiseConditionedClassifier | NetworkClassifier


class Denoising(NamedTuple):
    """What the training of a method that denoises starts from."""

    classifier: Path  # model folder that is trained further
    denoise: Callable[[torch.Tensor], torch.Tensor]  # (B, C, H, W), pixels in [0, 1] plus noise -> in [0, 1]
    sha256: str  # of the denoiser


def finetune(
    config: Config,
    method: str,
    sigma: float,
    shard_folder: Path | str,
    pretrained: Path,
    output: Path,
    timing: Path,
    soft_labels: Path = Path(SOFT_LABELS),
    label: str | None = None,
    denoising: Callable[[DistEnv], Denoising] | None = None,
) -> None:
    """Train one classifier and write `output` (model.safetensors, config.json, history.csv) and `timing` (JSON).

    `pretrained` holds the encoders by objective, for methods that start from one. The weights with the best accuracy
    on noisy images of the `val` split are kept. Killed and started again it continues from its last checkpoint and
    ends with the same bytes. The file `soft_labels` is read for methods that need it. `label` is what progress and live
    metrics call this training, if not by its method and sigma. With `denoising`, called once the processes are
    connected, its classifier is trained on what its denoiser makes of noisy images.
    """
    set_threads(config.threads)
    advice = "raise finetune.num_chunks, set model.grad_checkpointing, or lower finetune.batch_size"
    with init_distributed(config.device) as env, explain_lost_workers(), explain_out_of_memory(advice):
        images, validation = ShardedDataset(shard_folder, "train"), ShardedDataset(shard_folder, "val")
        verify_shards([images, validation], env)
        labels = read_soft_labels(soft_labels, images) if METHODS[method].needs_soft_labels else None
        label = label or f"finetune {method} sigma {sigma:g}"
        start = None if denoising is None else denoising(env)
        _train(config, method, sigma, images, validation, labels, pretrained, env, output, timing, label, start)


def time_condition(config: Config, method: str, sigma: float) -> float:
    """The noise level t that a classifier for pixel `sigma` is given: 2 sigma, or the nearest level of pre-training."""
    if not METHODS[method].pretrained_here or config.finetune.time_condition == "exact":
        return 2 * sigma
    grid = config.pretrain
    levels = karras_levels(grid.max_levels + 1, t_min=grid.t_min, t_max=grid.t_max, rho=grid.rho)
    return nearest_level(levels, 2 * sigma)


def load_initial_encoder(config: Config, method: str, t: float, pretrained: Path) -> NoiseConditionedViT:
    """The encoder that fine-tuning for noise level t starts from. Random weights use torch's global generator.

    Raises `RRCMError` for weights that are missing, damaged, or of another network than the settings describe.
    """
    kind, settings, sizes = METHODS[method], config.finetune, config.data.model_dump() | config.model.model_dump()
    encoder = build_encoder(config.model, config.data)
    if kind.initial_weights == "timm":
        shape = {name: sizes[name] for name in ("image_size", "channels", "patch_size")}
        encoder = ENCODERS["timm"](settings.timm.model, settings.timm.weights, **shape, t=t)
    elif kind.initial_weights is not None:
        path = expand_user(settings.initial_weights or pretrained / kind.initial_weights)
        if settings.initial_weights is not None and not path.exists():
            raise RRCMError(f"finetune.initial_weights = {settings.initial_weights!r}: no such folder or file")
        encoder = load_encoder(path, {name: sizes[name] for name in ARCHITECTURE})
    encoder.patch_embed.requires_grad_(not config.model.freeze_patch_embed)
    encoder.grad_checkpointing = config.model.grad_checkpointing
    return encoder


class Targets:
    """Images and labels of a batch as an objective wants them: mixed, with soft labels."""

    def __init__(
        self,
        settings: FinetuneSettings,
        num_classes: int,
        seed: int,
        env: DistEnv,
        soft_labels: torch.Tensor | None = None,  # (N, K), those of all training images
    ):
        self.settings, self.num_classes, self.seed, self.device = settings, num_classes, seed, env.device
        self.soft_labels = soft_labels
        self.mixup_fn = None
        if settings.mixup > 0 or settings.cutmix > 0:
            from timm.data import Mixup  # seconds of import

            mixup = partial(Mixup, settings.mixup, settings.cutmix, switch_prob=settings.mixup_switch_prob)
            self.mixup_fn = mixup(label_smoothing=settings.label_smoothing, num_classes=num_classes)
            self.pair_mixup_fn = mixup(label_smoothing=0.0, num_classes=2)

    def __call__(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """`image` (B, C, H, W) float32 in [0, 1] and `target` (B, K) float32 class probabilities.

        With soft labels also `soft_label`, (B, K) float32: those of the images before augmentation, mixed like these.
        """
        settings, seed = self.settings, derive_seed(self.seed, "mixup", step)
        images = batch["image"].to(self.device, non_blocking=True)
        labels = batch["label"].to(self.device, non_blocking=True)
        if self.mixup_fn is not None:
            pixels = images
            images, target = mixup_pairs(self.mixup_fn, pixels, labels, seed)
        else:
            target = F.one_hot(labels, self.num_classes).float()
            target = target * (1 - settings.label_smoothing) + settings.label_smoothing / self.num_classes
        found = {"image": to_unit_range(images), "target": target}
        if self.soft_labels is not None:
            found["soft_label"] = self.soft_labels[batch["index"]].to(self.device)
            if self.mixup_fn is not None:
                place = torch.arange(len(pixels), device=self.device) % 2  # in its pair
                _, shares = mixup_pairs(self.pair_mixup_fn, pixels, place, seed)
                found["soft_label"] = mix_in_pairs(found["soft_label"], shares)
        return found


def mix_in_pairs(rows: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mix rows 0 and 1, rows 2 and 3, and so on: rows (B, K), shares (B, 2) of both rows of its pair -> (B, K)."""
    pairs = rows.unflatten(0, (-1, 2)).repeat_interleave(2, 0)
    return torch.einsum("bp,bpk->bk", shares, pairs)


def _train(
    config: Config,
    method: str,
    sigma: float,
    images: ShardedDataset,
    validation: ShardedDataset,
    soft_labels: torch.Tensor | None,
    pretrained: Path,
    env: DistEnv,
    output: Path,
    timing: Path,
    label: str,
    denoising: Denoising | None,
) -> None:
    settings, num_classes = config.finetune.settings(method, sigma), len(images.classes)
    objective = build_finetuning_objective(settings, method, sigma)
    budget = plan_budget(config, method, sigma, objective, len(images), pretrained)
    targets = Targets(settings, num_classes, config.seed, env, soft_labels)
    classifier = build_classifier(config, method, sigma, num_classes, pretrained, denoising).to(env.device).train()
    denoise = None if denoising is None else denoising.denoise
    best = BestWeights(classifier, config, sigma, validation, env, denoise)
    inputs = {} if soft_labels is None else {"soft_labels": sha256_tensors({"soft_labels": soft_labels})}
    inputs |= {} if denoising is None else {"denoiser": denoising.sha256}
    training = build_trainer(config, method, sigma, objective, budget, classifier, best, images, env, label, inputs)
    if not training.resume() and settings.linear_probe_epochs and METHODS[method].initial_weights is not None:
        linear_probe(classifier, images, config, settings, env, probe_level(config, method, classifier))
    if config.finetune.compile:
        classifier.compile()
    classify = WrappedClassifier(classifier, training, config.finetune.num_chunks, denoise)
    peak_lr = settings.lr * settings.batch_size / 256
    batches = train_batches(config, settings.augmentation, budget, images, env, training.step)
    for step, batch in training.steps(batches):
        # schedule
        passed = budget.schedule_epoch(step)
        lr = peak_lr * lr_factor(settings, passed, budget.schedule_epochs)
        # loss
        random = StepRandomness(config.seed, step, batch["position"].tolist(), budget.step_images, env.device, passed)
        losses = objective(classify, targets(batch, step), random)
        # optimizer
        training.optimizer_step(losses["loss"], lr)
        training.accumulate_metrics(losses["loss"], *(losses[term] for term in objective.terms))
        # validation and logging
        epoch, into_epoch = budget.epochs_after(step + 1), (step + 1) % budget.epoch_steps
        last = step + 1 == budget.total_steps
        if into_epoch and not last:
            continue
        means, accuracy, shown = training.mean_metrics(into_epoch or budget.epoch_steps), None, {}
        if epoch % budget.evaluate_every == 0 or last:
            accuracy = best.update(classifier, epoch, training)
            warm_up = settings.warmup_epochs * budget.epochs / budget.schedule_epochs
            warn_if_collapsed(accuracy, best.chance, epoch, warm_up, METHODS[method].objective, training)
            shown = {"loss": f"{means['loss']:.3f}", "val_accuracy": f"{100 * accuracy:.1f} %"}
        training.log({"epoch": epoch, **means, "val_accuracy": accuracy, "lr": lr}, **shown)

    def save(folder: Path) -> None:
        save_model(
            folder,
            best.classifier,
            class_names=images.classes,
            kind=METHODS[method].trained,
            sigma=sigma if denoising is None else classifier.sigma,
            dtype=config.finetune.weights_dtype,
            method=method,
            seed=config.seed,
            parameters=parameter_count(best.classifier),
            initial_weights=initial_weights_of(config, method),
            training={
                "profile": config.profile,
                **settings.of_objective(METHODS[method].objective),
                "epochs": budget.epochs,
            },
            selected=training.extra_state["selected"],
            compute={
                "finetune": budget.compute,
                "pretrain_share": budget.pretrain_share,
                "soft_label_share": budget.soft_label_share,
            },
        )

    training.publish(output, timing, save, budget.total_steps * budget.step_images)


def initial_weights_of(config: Config, method: str) -> str:
    """Where a method's weights come from: `scratch`, a folder, a file, or the name of a timm model."""
    if not METHODS[method].denoises:
        return config.finetune.origin_of_weights(method)
    return config.denoised.model or "models/{}/sigma_{}".format(
        *denoising_classifier(method, config.denoised.model_dump())
    )


def lr_factor(settings: FinetuneSettings, passed: float, epochs: float) -> float:
    """Learning rate after `passed` of `epochs` epochs, as a share of its peak."""
    if settings.lr_schedule == "step":
        return warmup_step(passed, settings.warmup_epochs, settings.lr_step_epochs)
    return warmup_cosine(passed, settings.warmup_epochs, epochs)


def build_classifier(
    config: Config, method: str, sigma: float, num_classes: int, pretrained: Path, denoising: Denoising | None = None
) -> Classifier:
    """The classifier before the first step. All methods that start from scratch start from the same weights."""
    if denoising is not None:
        return load_model_folder(denoising.classifier).classifier
    torch.manual_seed(derive_seed(config.seed, "finetune"))
    if config.model.architecture != "vit":
        return network_classifier(trunk(config), num_classes, sigma)
    t = time_condition(config, method, sigma)
    encoder = load_initial_encoder(config, method, t, pretrained)
    return TRAINED_CLASSIFIERS[METHODS[method].trained](encoder, num_classes, t)


def trunk(config: Config) -> dict[str, object]:
    """The network that takes the place of the ViT, as `network_classifier` takes it and a model folder records it."""
    sizes = {"image_size": config.data.image_size, "channels": config.data.channels}
    normalization = {"pixel_mean": config.model.pixel_mean, "pixel_std": config.model.pixel_std}
    return {"name": config.model.architecture, **sizes, **normalization}


class WrappedClassifier:
    """The classifier as objectives see it: on all processes, in the precision and the chunks of training."""

    def __init__(self, classifier: Classifier, training: Trainer, num_chunks: int, denoise: Callable | None = None):
        self.classifier, self.forward = classifier, training.wrap_ddp(classifier)
        self.denoise = denoise or torch.nn.Identity()
        self.autocast, self.chunks = training.autocast, {"num_chunks": num_chunks} if num_chunks > 1 else {}

    def __call__(self, noisy: torch.Tensor, *, frozen: bool = False) -> torch.Tensor:
        """noisy (B, C, H, W) -> logits (B, K) float32. `frozen`: in eval mode, and no gradient is exchanged."""
        network = self.classifier.eval() if frozen else self.forward
        try:
            with self.autocast():
                return network(self.denoise(noisy), **self.chunks).float()
        finally:
            self.classifier.train()


class BestWeights:
    """The weights with the best accuracy on noisy validation images, as they will be saved: rounded."""

    def __init__(
        self,
        classifier: Classifier,
        config: Config,
        sigma: float,
        split: ShardedDataset,
        env: DistEnv,
        denoise: Callable | None = None,
    ):
        self.classifier = copy.deepcopy(classifier).requires_grad_(False)
        self.candidate = copy.deepcopy(self.classifier)
        self.dtype = torch.bfloat16 if config.finetune.weights_dtype == "bf16" else torch.float32
        pixels, labels, _ = read_split(split, config.data.image_size)
        self.chance = float(labels.bincount().max()) / len(labels)  # accuracy of a classifier that knows one class
        precision = resolve_precision(env.device, config.finetune.precision)
        self.accuracy = NoisyValidation(pixels, labels, sigma, config.seed, precision, env, denoise)

    def update(self, classifier: Classifier, epoch: int, training: Trainer) -> float:
        """The accuracy of `classifier` now. If it is the best so far, its weights are kept."""
        rounded = {name: value.to(self.dtype) for name, value in classifier.state_dict().items()}
        self.candidate.load_state_dict(rounded)
        accuracy = self.accuracy(self.candidate)
        if accuracy > training.extra_state["selected"]["val_accuracy"]:
            training.extra_state["selected"] = {"epoch": epoch, "val_accuracy": accuracy}
            self.classifier.load_state_dict(rounded)
        return accuracy


def warn_if_collapsed(
    accuracy: float, chance: float, epoch: float, warmup_epochs: float, objective: str, training: Trainer
) -> None:
    """Say, once, that a classifier knows no more than one class. Adversarial and margin losses can have this effect.

    While the learning rate grows no classifier has learnt much, so nothing is said then.
    """
    after_warmup = [row for row in training.history if row["epoch"] > warmup_epochs]
    known = [row["val_accuracy"] for row in after_warmup if row["val_accuracy"] is not None]
    if epoch <= warmup_epochs or (known and known[-1] <= chance):
        return
    if accuracy <= chance and training.env.is_main:
        own = f", or weaken finetune.objectives.{objective}" if objective in ObjectiveSettings.model_fields else ""
        print(
            f"{training.label}: has collapsed at epoch {epoch:g}: validation accuracy is {100 * accuracy:.1f} %, and "
            f"{100 * chance:.1f} % for the largest class alone; lower finetune.lr{own}",
            file=sys.stderr,
        )


def build_trainer(
    config: Config,
    method: str,
    sigma: float,
    objective: Objective,
    budget: Budget,
    classifier: Classifier,
    best: BestWeights,
    images: ShardedDataset,
    env: DistEnv,
    label: str,
    inputs: Mapping[str, str],
) -> Trainer:
    """The loop around the classifier, with the identity of this run. `inputs` are hashes of further training data."""
    settings = config.finetune.settings(method, sigma)
    batch_seed = derive_seed(config.seed, "finetune batches")
    scales = layerwise_lr_scales(classifier, settings.layer_decay)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if name in scales:
            groups.setdefault(scales[name], []).append(parameter)
    identity = fingerprint(
        {
            "method": METHODS[method].identity,
            "sigma": sigma,
            "budget": asdict(budget),
            "architecture": architecture_of(classifier),
            **config.model_dump(mode="json", include={"seed", "data", "model", "finetune"}),
        },
        {"shards": images.fingerprint, "initial_weights": sha256_tensors(classifier.state_dict()), **inputs},
        __name__,
        objective,
        classifier,
    )
    training = Trainer(
        RunState(f"finetune-{method}-{sigma}", identity),
        env,
        label=label,
        total_steps=budget.total_steps,
        modules={"classifier": classifier, "best": best.classifier},
        optimizer=build_optimizer(
            groups.items(),
            lr=settings.lr * settings.batch_size / 256,
            weight_decay=settings.weight_decay,
            name=settings.optimizer,
        ),
        precision=config.finetune.precision,
        metrics=["loss", *objective.terms],
        checkpoint_every=config.finetune.checkpoint_every * budget.epoch_steps,
        describe_step=lambda step: describe_step(images, budget.step_images, batch_seed, step),
    )
    training.extra_state = {"selected": {"epoch": 0, "val_accuracy": -1.0}}
    return training


def architecture_of(classifier: Classifier) -> dict[str, object]:
    """What builds the same network."""
    if isinstance(classifier, NetworkClassifier):
        return classifier.architecture
    return {**architecture(classifier.encoder), "t": classifier.t}


def train_batches(
    config: Config,
    augmentation: str,
    budget: Budget,
    images: ShardedDataset,
    env: DistEnv,
    first_step: int,
) -> Generator[Batch]:
    """This process's share of the augmented images of each step from the first on."""
    return batch_loader(
        images,
        FinetuneTransform(augmentation, config.data.image_size),
        batch_size=budget.step_images,
        seed=derive_seed(config.seed, "finetune batches"),
        first_step=first_step,
        last_step=budget.total_steps,
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )


def probe_level(config: Config, method: str, classifier: NoiseConditionedClassifier) -> float:
    """The noise level of the clean images of a linear probe. Weights from timm are converted for one level only."""
    return config.pretrain.t_min if METHODS[method].pretrained_here else classifier.t


def linear_probe(
    classifier: NoiseConditionedClassifier,
    images: ShardedDataset,
    config: Config,
    settings: FinetuneSettings,
    env: DistEnv,
    t: float,
) -> None:
    """Fit the head alone on clean training images at noise level t."""
    optimizer = torch.optim.AdamW(classifier.head.parameters(), lr=1e-2, weight_decay=0.0)
    batches = batch_loader(
        images,
        FinetuneTransform("none", config.data.image_size),
        batch_size=settings.batch_size,
        seed=derive_seed(config.seed, "probe batches"),
        first_step=0,
        last_step=settings.linear_probe_epochs * steps_per_epoch(len(images), settings.batch_size),
        rank=env.rank,
        world_size=env.world_size,
        workers=config.data.workers,
    )
    for batch in batches:
        with torch.no_grad():
            clean = to_model_space(to_unit_range(batch["image"].to(env.device)))
            representation = classifier.encoder(clean, t)
        loss = F.cross_entropy(classifier.head(representation), batch["label"].to(env.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in classifier.head.parameters():
            parameter.grad = all_reduce_sum(parameter.grad) / env.world_size
        optimizer.step()
