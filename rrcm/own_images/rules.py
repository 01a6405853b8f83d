"""The rules of `rrcm train`: which network, noise, length and certification suit the folder, the machine and the hours.

`choose` is a pure function of its arguments. README.md explains the rules.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rrcm.own_images.facts import Folder, Machine
from rrcm.utils.errors import RRCMError

TRAINING, VALIDATION, THRESHOLDS, CERTIFICATION = 0.55, 0.05, 0.1, 0.3  # shares of the time
# Lengths of a training from random weights: steps of the optimizer, and passes over the images at all sigmas together.
GOOD_STEPS, GOOD_PASSES = 1500, 20  # a network without time for both is replaced by a smaller one
LEAST_STEPS = 300
MOST_STEPS, MOST_PASSES = 10_000, 300  # a training is no longer than the longer of the two
STARTED = 0.2  # from pre-trained weights, this share of the steps and passes suffices
STARTED_SHARES = (1.0, 0.75, 0.5, 0.25)  # candidates for the image size, relative to the size of pre-trained weights
BATCHES = (16, 128)  # smallest and largest, if there are that many images
LEARNING_RATE = 1e-3  # peak of AdamW from random weights, whatever the batch
STARTED_RATE = 1e-4  # peak from pre-trained weights of a ViT
NETWORK_RATE = 5e-4  # peak from pre-trained weights of any other network
SMALL_SIDE = 16  # pixels; images up to this size tolerate little noise
SIGMAS = {True: (0.12, 0.25, 0.5), False: (0.25, 0.5, 1.0)}  # for small images, and for others; pixel units
MOST_VALIDATION = 500  # images
VALIDATION_NOISES = 4  # noisy copies of each image at each sigma in an evaluation, as in training/validation.py
EVALUATIONS = (2, 20)  # fewest and most
CHOICES = (20, 1000)  # fewest and most votes for each validation image and sigma, from which thresholds are chosen
SAMPLES = (10_000, 1000, 200)  # candidates for n; the first that leaves time for ENOUGH images is taken
DRAWN = 1.0  # samples of a certificate relative to n: a cascade asks several sigmas, but most of them stop early
ENOUGH, MOST_CERTIFIED = 50, 500  # held-out images to certify
MEMORY = 4  # GiB; with less, the most expensive trunk is left out


@dataclass(frozen=True)
class Task:
    """The task for which the rules choose."""

    folder: Folder
    machine: Machine
    hours: float  # at most, for the whole command
    started: bool = False  # whether training starts from pre-trained weights


@dataclass(frozen=True)
class Trunk:
    """A ViT and the images that it sees."""

    image_size: int  # side, pixels
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int

    @property
    def description(self) -> str:
        """The trunk in a few words."""
        sizes = f"{self.image_size} x {self.image_size} pixels, patches of {self.patch_size}"
        return f"ViT for {sizes}, width {self.embed_dim}, depth {self.depth}"


TRUNKS = (  # from the most expensive to the cheapest
    Trunk(224, 16, 384, 12, 6),  # for GPUs
    Trunk(128, 16, 256, 6, 4),
    Trunk(64, 8, 192, 4, 4),
    Trunk(64, 16, 192, 4, 4),
    Trunk(32, 8, 128, 4, 4),
    Trunk(16, 4, 96, 3, 4),
)


@dataclass(frozen=True)
class Network:
    """A network of timm that is no plain ViT, and the images that it sees. It is not conditioned on the noise level."""

    architecture: str  # timm's name
    image_size: int  # side, pixels
    channels: int
    pixel_mean: tuple[float, ...]  # per channel
    pixel_std: tuple[float, ...]

    @property
    def description(self) -> str:
        """The network in a few words."""
        return f"{self.architecture} for {self.image_size} x {self.image_size} pixels"


@dataclass(frozen=True)
class Speed:
    """The cost of a network on this machine, in seconds."""

    image: float  # to train on an image once
    vote: float  # to vote on a noisy image
    reading: float = 0.0  # to read an image in each pass over the images; 0 if they stay in memory


@dataclass(frozen=True)
class Choice:
    """The choice of the rules."""

    trunk: Trunk | Network
    sigmas: tuple[float, ...]  # pixel units, ascending
    val_fraction: float
    workers: int  # processes that read images
    batch_size: int
    lr: float  # peak of AdamW
    epochs: int  # of an expert; the joint training has len(sigmas) times as many
    epoch_steps: int  # steps of the joint training for one epoch of every expert
    allowed_steps: float  # the steps that the time allows
    evaluate_every: int  # epochs of an expert between two evaluations
    choose_n: int  # votes for each validation image and sigma, from which thresholds are chosen
    n: int  # most samples of a certificate at each sigma
    certified: int  # held-out images

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return self.epochs * self.epoch_steps


def choose(task: Task, trunks: Sequence[Trunk | Network], measure: Callable[[Trunk | Network], Speed]) -> Choice:
    """The plan for the first of the `trunks` that has time to learn well, or else for the last one.

    `trunks` go from the most expensive to the cheapest. `measure` gives the cost of a trunk. Raises `RRCMError` if even
    the last one has no time for LEAST_STEPS.
    """
    scale = STARTED if task.started else 1.0
    for trunk in possible_trunks(task, trunks):
        choice = plan(task, trunk, measure(trunk))
        passes = choice.epochs * len(choice.sigmas)
        if choice.steps >= scale * GOOD_STEPS and passes >= scale * GOOD_PASSES:
            return choice
    least = math.ceil(scale * LEAST_STEPS / choice.epoch_steps) * choice.epoch_steps  # in whole epochs
    if choice.steps < least:
        needed = math.ceil(102 * task.hours * least / choice.allowed_steps) / 100
        raise RRCMError(
            f"--hours {task.hours:g}: leaves time for {choice.allowed_steps:.0f} training steps of the smallest "
            f"network, which needs {least}; give --hours {needed:g} or more{', or leave out --start' * task.started}"
        )
    return choice


def suits(folder: Folder, side: int) -> bool:
    """Whether the images are large enough for weights that were made for images of this side."""
    return folder.side >= STARTED_SHARES[-1] * side


def possible_trunks(task: Task, trunks: Sequence[Trunk | Network]) -> list[Trunk | Network]:
    """The `trunks` that suit the machine and the size of the images. The last one suits any."""
    *others, last = trunks
    if not task.started and not task.machine.gpus:
        others = others[1:] if task.machine.memory_gib >= MEMORY else others[2:]
    return [trunk for trunk in others if trunk.image_size <= task.folder.side] + [last]


def plan(task: Task, trunk: Trunk | Network, speed: Speed) -> Choice:
    """The lengths of all parts of the work, if this trunk is taken."""
    folder, seconds, scale = task.folder, 3600 * task.hours, STARTED if task.started else 1.0
    sigmas = SIGMAS[trunk.image_size <= SMALL_SIDE]
    fraction = min(0.1, MOST_VALIDATION / folder.images)
    validation = sum(split_off(count, fraction) for count in folder.counts)
    images = folder.images - validation
    batch_size = min(images, max(BATCHES[0], min(BATCHES[1], 2 ** int(math.log2(max(images // 16, 1))))))
    pass_steps = images // batch_size
    allowed = TRAINING * seconds / (batch_size * (speed.image + speed.reading))
    most = scale * max(MOST_STEPS, MOST_PASSES * pass_steps)
    epochs = int(min(most, allowed) / (len(sigmas) * pass_steps))
    evaluation = VALIDATION_NOISES * len(sigmas) * validation * speed.vote
    evaluations = clamp(VALIDATION * seconds / evaluation, *EVALUATIONS)
    evaluate_every = max(1, math.ceil(epochs / evaluations))
    choose_n = clamp(THRESHOLDS * seconds / (len(sigmas) * validation * speed.vote), *CHOICES)
    votes, held_out = CERTIFICATION * seconds / speed.vote, len(folder.held_out)
    n = next((n for n in SAMPLES if votes >= DRAWN * n * min(ENOUGH, held_out)), SAMPLES[-1])
    certified = min(held_out, clamp(votes / (DRAWN * n), ENOUGH // 5, MOST_CERTIFIED))
    return Choice(
        trunk=trunk,
        sigmas=sigmas,
        val_fraction=fraction,
        workers=max(1, task.machine.cores - 1) if speed.reading else 0,
        batch_size=batch_size,
        lr=learning_rate(task, trunk),
        epochs=epochs,
        epoch_steps=len(sigmas) * pass_steps,
        allowed_steps=allowed,
        evaluate_every=evaluate_every,
        choose_n=choose_n,
        n=n,
        certified=certified,
    )


def learning_rate(task: Task, trunk: Trunk | Network) -> float:
    """The peak learning rate of AdamW."""
    if not task.started:
        return LEARNING_RATE
    return STARTED_RATE if isinstance(trunk, Trunk) else NETWORK_RATE


def split_off(count: int, fraction: float) -> int:
    """How many of the images of a class `stratified_split` splits off."""
    return min(max(round(fraction * count), 1), count - 1)


def clamp(value: float, least: int, most: int) -> int:
    """`value` rounded down to a whole number, within the bounds."""
    return int(min(max(value, least), most))
