"""Checks before training: whether every later stage can work with these settings, this data set and these processes.

The border: constraints.py has the rules that need only the settings and the method table, and it runs whenever settings
are read. This file has the checks that need the shards, the number of processes, a file, a network, or an objective or
a stopping rule as a stage builds it.
"""

from pathlib import Path

import torch

from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import check_prediction, check_settings
from rrcm.config import Config
from rrcm.constraints import networks_of
from rrcm.data.labelled import check_label_budget
from rrcm.data.shards import Manifest, read_manifest
from rrcm.derived import CONDITIONED, training_noise
from rrcm.methods import JOINT, METHODS
from rrcm.models.architectures import network_classifier
from rrcm.models.load import load_base_classifier
from rrcm.models.public_denoisers import HUB
from rrcm.training.budget import (
    build_finetuning_objective,
    build_joint_objective,
    build_pretraining_objective,
    images_per_step,
    joint_sigmas,
    plan_budget,
)
from rrcm.training.plan import time_condition
from rrcm.training.start import load_initial_encoder, network_settings, with_initial_weights
from rrcm.utils.distributed import process_count
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, in_repository

ENCODERS = Path("models/pretrain")


def check_before_training(config: Config, shard_folder: Path | str) -> None:
    """Find settings with which a later stage would fail, before hours of training.

    Every pre-training, every fine-tuning and the stages after them are checked against the manifest of the shards and
    the number of processes that torchrun has started. Weights from outside this pipeline are loaded once, as
    fine-tuning loads them; apart from that, no network is built. Raises `RRCMError` with the key, its value and the
    bound.
    """
    manifest, processes = read_manifest(shard_folder), process_count()
    _check_data(config, manifest)
    check_label_budget(config.data.labels_per_class, manifest.splits["train"].counts, manifest.classes)
    images = sum(manifest.splits["train"].counts)
    for objective in config.pretrain.objectives:
        build_pretraining_objective(config, objective)
        _check_batch("pretrain", "", config.pretrain.batch_size, config.pretrain.num_chunks, images, processes)
    runs = [(method, training_noise(method, sigma)) for method in config.methods for sigma in config.sigmas]
    parts = [(each["method"], each["sigma"]) for each in config.derived["finetune"].values()]
    for method, noise in dict.fromkeys(runs + parts):
        _check_finetuning(config, method, noise, images, processes)
    if config.trains_denoiser:
        _check_batch("denoiser", "", config.denoiser.batch_size, config.denoiser.num_chunks, images, processes)
    _check_trunk(config, len(manifest.classes))
    _check_initial_weights(config, len(manifest.classes))
    _check_denoised(config, len(manifest.classes))
    _check_certification(config)
    _check_external_results(config)


def _check_data(config: Config, manifest: Manifest) -> None:
    for name in ("source", "image_size", "channels"):
        wanted, written = getattr(config.data, name), getattr(manifest, name)
        if wanted != written:
            raise RRCMError(
                f"data.{name} = {wanted}: the shards were written with {written}; correct it, or run shard-data again"
            )
    needed = {"train": 2, "val": 2, "test": 1}  # representations are compared between validation images
    for split, least in needed.items():
        images = sum(manifest.splits[split].counts) if split in manifest.splits else 0
        if images < least:
            raise RRCMError(
                f"data.source = {config.data.source}: has {images} {split} images; must have {least} or more"
            )


def _check_batch(section: str, who: str, batch_size: int, num_chunks: int, images: int, processes: int) -> None:
    key = f"{section}.batch_size = {batch_size}{who}"
    if batch_size > images:
        raise RRCMError(f"{key}: must be at most {images}, the number of training images")
    if batch_size % processes:
        raise RRCMError(f"{key}: must be a multiple of {processes}, the number of processes")
    if num_chunks > batch_size // processes:
        raise RRCMError(f"{section}.num_chunks = {num_chunks}: must be at most {batch_size // processes}, as {key}")


def _check_finetuning(config: Config, method: str, noise: float | str, images: int, processes: int) -> None:
    row, joint = METHODS[method], joint_sigmas(config) if noise == JOINT else None
    who = f" ({method})" if joint else f" ({method} at sigma {noise})"
    settings = config.finetune.settings(method, joint.sigmas[0] if joint else noise)
    if row.objective is None:
        return
    if joint:
        build_joint_objective(config.finetune, method, joint)
    else:
        build_finetuning_objective(settings, method, noise)
    if row.needs_soft_labels and row.matched:  # soft labels may leave it no compute for training
        plan_budget(config, method, noise, images, ENCODERS)
    step_images = images_per_step(settings, row.objective)
    if step_images < settings.batch_size:
        who = f", a part of {settings.batch_size}{who}"
    _check_batch("finetune", who, step_images, config.finetune.num_chunks, images, processes)
    if (settings.mixup or settings.cutmix) and step_images // processes % 2:
        raise RRCMError(
            f"finetune.batch_size = {step_images}{who}: must be a multiple of {2 * processes}, as mixup pairs "
            "the images of each process"
        )


def _check_trunk(config: Config, num_classes: int) -> None:
    size = config.data.image_size
    for section, model in networks_of(config).items():
        if model.architecture in CONDITIONED:
            continue
        try:
            classifier = network_classifier(network_settings(model, config.data), num_classes, config.sigmas[0]).eval()
            with torch.inference_mode():
                classifier(torch.zeros(1, config.data.channels, size, size))
        except RRCMError as error:
            raise RRCMError(str(error).replace("model.", f"{section}.", 1)) from None
        except Exception as error:  # each network raises errors of its own
            problem = f"cannot take images of {size} x {size} pixels ({one_line(error)})"
            raise RRCMError(
                f"{section}.architecture = {model.architecture!r}: {problem}; choose another, or a larger "
                "data.image_size"
            ) from None


def _check_initial_weights(config: Config, num_classes: int) -> None:
    given = config.finetune
    for name, path in {"initial_weights": given.initial_weights, "timm.weights": given.timm.weights}.items():
        if path and not expand_user(path).exists() and in_repository(path).exists():
            raise RRCMError(
                f"finetune.{name} = {path!r}: is not in the copy of the repository that this experiment works in; give "
                f"an absolute path, or `dvc exp run` the option --copy-paths {path}"
            )
    outside = {
        config.initial_weights(method): method
        for method in config.methods
        if METHODS[method].initial_weights is not None
        and not config.finetune.uses_pretraining(method)
        and not METHODS[method].denoises
    }
    for method in outside.values():
        if config.model.architecture in CONDITIONED:
            t = time_condition(method, config.sigmas[0], config.finetune, config.pretrain)
            load_initial_encoder(method, t, ENCODERS, config.finetune, config.model, config.data)
        else:
            sizes = network_settings(config.model, config.data)
            with_initial_weights(network_classifier(sizes, num_classes, config.sigmas[0]), method, config.finetune)


def _check_denoised(config: Config, num_classes: int) -> None:
    source, model = config.denoiser.public, config.denoised.model
    if not any(METHODS[method].denoises for method in config.methods):
        return
    if source is not None and not source.startswith(HUB) and not expand_user(source).exists():
        raise RRCMError(f"denoiser.public = {source!r}: no such file or folder; a model on the hub is {HUB}owner/name")
    if model is not None:
        loaded = load_base_classifier(model)
        for name, given, wanted in (
            ("channels", loaded.channels, config.data.channels),
            ("classes", loaded.num_classes, num_classes),
        ):
            if given != wanted:
                raise RRCMError(
                    f"denoised.model = {model!r}: has {given} {name}, the data set {wanted}; choose another"
                )


def _check_certification(config: Config) -> None:
    settings, attack = config.certify, config.attack
    section = "certify"
    try:
        for sigma in config.sigmas:
            make_stopping_rule(sigma=sigma, **settings.rule)
        section = "latency"
        for n in config.latency.n:
            check_settings(config.sigmas[0], min(n, settings.n0), n, settings.alpha)
        section = "attack"
        check_prediction(attack.n, settings.alpha)
    except RRCMError as error:
        raise RRCMError(f"{section}.{error}") from None


def _check_external_results(config: Config) -> None:
    for number, result in enumerate(config.report.external_results):
        from rrcm.certification.external import read_external_certificates  # imports pandas

        try:
            read_external_certificates(result.path)
        except RRCMError as error:
            raise RRCMError(f"report.external_results.{number}: {error}") from None
