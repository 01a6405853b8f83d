"""Estimate from a few timed steps how long a training and its certificates will take."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from rrcm.certification.certify import make_smoothed_classifier
from rrcm.config import Config
from rrcm.data.images import read_image
from rrcm.data.shards import DECODED_BYTES
from rrcm.derived import CONDITIONED
from rrcm.evaluation.latency import seconds_to_vote
from rrcm.methods import METHODS
from rrcm.models import TRAINED_CLASSIFIERS
from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.timm_models import load_timm
from rrcm.models.timm_network import input_of
from rrcm.models.timm_vit import unsupported_feature
from rrcm.objectives.base import StepRandomness
from rrcm.own_images.facts import Folder
from rrcm.own_images.rules import DRAWN, STARTED_SHARES, VALIDATION_NOISES, Network, Speed, Trunk, split_off
from rrcm.training.budget import build_joint_objective, joint_sigmas
from rrcm.training.plan import time_condition
from rrcm.training.start import Classifier, load_initial_encoder, network_settings, with_initial_weights
from rrcm.utils.distributed import autocast, pick_device, resolve_precision, set_threads

TIMED = 1.0  # seconds for which steps, and votes, are timed
STEP = {"cpu": 16, "cuda": 64}  # images of a timed step: more are no faster on a CPU
STRIDE = 32  # pixels of a side that most networks reduce to one: their sides are multiples
READ = 8  # images that are read to time reading
VOTES = 64  # at a time


def timm_trunks(model: str, weights: str | None, channels: int) -> list[Trunk | Network]:
    """The network `model` of timm at several image sizes, from its own downwards, for images of `channels` channels.

    A plain ViT becomes ours, which is conditioned on the noise level. Any other network stays timm's. A network for
    images of a fixed size has only one candidate. Raises `RRCMError` as `load_timm` and `input_of` do.
    """
    network = load_timm(model, weights)
    if unsupported_feature(network, 3) is None:
        patch, grid = network.patch_embed.patch_size[0], network.patch_embed.grid_size[0]
        sizes = (patch, network.embed_dim, len(network.blocks), network.blocks[0].attn.num_heads)
        return [Trunk(each * patch, *sizes) for each in dict.fromkeys(max(2, round(s * grid)) for s in STARTED_SHARES)]
    own = input_of(network, f"--start {model}")
    channels = min(channels, own.channels)
    mean, std = own.for_channels(channels)
    rounded = [STRIDE * max(1, round(share * own.side / STRIDE)) for share in STARTED_SHARES[1:]]
    sides = [own.side, *(side for side in rounded if side < own.side)] if own.any_side else [own.side]
    return [Network(own.architecture, side, channels, tuple(mean), tuple(std)) for side in dict.fromkeys(sides)]


def measure_speed(config: Config, folder: Folder) -> Speed:
    """The speed of the joint training that `config` describes, on random images, which need no reading."""
    set_threads(config.threads)
    device, noise, method = pick_device(config.device), joint_sigmas(config), config.methods[0]
    classifier = build_untrained(config, len(folder.classes)).to(device).train()
    conditioned = isinstance(classifier, NoiseConditionedClassifier)
    objective = build_joint_objective(config.finetune, method, noise)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-6)
    precision = resolve_precision(device, config.finetune.precision)
    size = STEP[device.type]
    images = torch.rand(size, config.data.channels, config.data.image_size, config.data.image_size, device=device)
    target = torch.eye(len(folder.classes), device=device)[torch.arange(size) % len(folder.classes)]

    def classify(noisy: torch.Tensor, *, frozen: bool = False, t: torch.Tensor | None = None) -> torch.Tensor:
        with autocast(device, precision):
            return (classifier(noisy, t=t) if conditioned else classifier(noisy)).float()

    def train() -> None:
        random = StepRandomness(config.seed, 0, list(range(size)), size, device)
        optimizer.zero_grad()
        objective(classify, {"image": images, "target": target}, random)["loss"].backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = seconds_of(train) / size
    smoothed = make_smoothed_classifier(classifier.eval(), noise.sigmas[-1], config)
    smoothed.batch_size = VOTES
    return Speed(seconds, seconds_of(lambda: seconds_to_vote(smoothed, images[:1], VOTES)) / VOTES)


def build_untrained(config: Config, num_classes: int) -> Classifier:
    """The classifier before its training. Raises `RRCMError` for initial weights that do not fit."""
    method, middle = config.methods[0], joint_sigmas(config).middle
    if config.model.architecture not in CONDITIONED:
        classifier = network_classifier(network_settings(config.model, config.data), num_classes, middle)
        return with_initial_weights(classifier, method, config.finetune)
    t = time_condition(method, middle, config.finetune, config.pretrain)
    encoder = load_initial_encoder(method, t, Path(), config.finetune, config.model, config.data)
    return TRAINED_CLASSIFIERS[METHODS[method].trained](encoder, num_classes, t)


def seconds_of(work: Callable[[], object]) -> float:
    """The seconds that `work` takes: one run if that takes long, and otherwise the mean of the runs within TIMED."""
    start = time.perf_counter()
    work()
    if (passed := time.perf_counter() - start) > TIMED:
        return passed
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < TIMED:
        work()
        count += 1
    return passed / count


def reading_seconds(root: Path, folder: Folder) -> float:
    """The seconds to read an image in each pass over the images. 0 if all stay in memory, decoded."""
    if folder.images * folder.pixels * folder.channels <= DECODED_BYTES:
        return 0.0
    files = [root / file for file in folder.held_out[:READ]]
    start = time.perf_counter()
    for file in files:
        read_image(file, folder.channels)
    return (time.perf_counter() - start) / len(files)


def estimate(config: Config, folder: Folder, speed: Speed) -> dict[str, float]:
    """The seconds of each part of the work that `config` describes, by its name."""
    method, sigmas = config.methods[0], len(config.sigmas)
    settings = config.finetune.settings(method, config.sigmas[0])
    validation = sum(split_off(count, config.data.val_fraction) for count in folder.counts)
    steps = settings.epochs * sigmas * METHODS[method].joint * ((folder.images - validation) // settings.batch_size)
    evaluations = settings.epochs / config.finetune.evaluate_every
    chosen = config.cascade.choose_n if config.cascade.thresholds == "chosen" else 0
    images = min(len(folder.held_out), config.certify.max_images or len(folder.held_out))
    return {
        "training": steps * settings.batch_size * (speed.image + speed.reading)
        + evaluations * VALIDATION_NOISES * sigmas * validation * speed.vote,
        "thresholds": chosen * sigmas * validation * speed.vote,
        "certificates": images * DRAWN * config.certify.n * speed.vote,
    }
