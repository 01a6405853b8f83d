"""What `rrcm train` chooses, as a pure function of the folder, the machine, the hours and the speed."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rrcm.config import parse_config
from rrcm.data.sharding import stratified_split
from rrcm.own_images.facts import Folder, Machine
from rrcm.own_images.rules import (
    CERTIFICATION,
    DRAWN,
    GOOD_STEPS,
    LEAST_STEPS,
    THRESHOLDS,
    TRAINING,
    TRUNKS,
    VALIDATION,
    VALIDATION_NOISES,
    Network,
    Speed,
    Task,
    choose,
    possible_trunks,
    split_off,
    suits,
)
from rrcm.own_images.settings import complete, with_network, with_root
from rrcm.utils.errors import RRCMError

MACHINE = Machine(2, "AVX2", (), 16.0)
COSTS = {trunk.image_size * 100 + trunk.patch_size: 2.0**-k for k, trunk in enumerate(TRUNKS)}


def folder(images: int = 320, classes: int = 4, side: int = 300) -> Folder:
    held_out = tuple(f"a/{k}.png" for k in range(images // 4))
    return Folder(tuple("abcdefgh"[:classes]), (images // classes,) * classes, held_out, side, side**2, 3)


def measure(trunk) -> Speed:
    """Each trunk is twice as fast as the one before. The last one trains on 100 images a second."""
    cost = COSTS[trunk.image_size * 100 + trunk.patch_size] / COSTS[16 * 100 + 4]
    return Speed(cost / 100, cost / 1000)


def chosen(hours: float, **changes):
    return choose(replace(Task(folder(), MACHINE, hours), **changes), TRUNKS, measure)


@pytest.mark.parametrize(
    ("hours", "changes", "size", "n"),
    [
        (0.1, {}, 16, 1000),
        (1.0, {}, 64, 1000),
        (24.0, {}, 128, 10_000),
        (24.0, {"folder": folder(side=70)}, 64, 10_000),  # no larger than the images
        (24.0, {"folder": folder(side=8)}, 16, 10_000),  # the smallest suits any
        (24.0, {"machine": replace(MACHINE, gpus=("H100",))}, 224, 10_000),
        (24.0, {"machine": replace(MACHINE, memory_gib=2.0)}, 64, 10_000),
        (1.0, {"folder": folder(20_000)}, 16, 10_000),  # passes count as well as steps
    ],
)
def test_the_largest_network_that_has_time_to_learn_is_chosen(hours, changes, size, n):
    choice = chosen(hours, **changes)
    assert (choice.trunk.image_size, choice.n) == (size, n)


@pytest.mark.parametrize("images", [12, 43, 320, 5000, 20_000])
@pytest.mark.parametrize("hours", [1.0, 10.0])
def test_the_parts_keep_within_their_shares_of_the_time(images, hours):
    task = Task(folder(images), MACHINE, hours)
    choice = choose(task, TRUNKS, measure)
    speed, sigmas, seconds = measure(choice.trunk), len(choice.sigmas), 3600 * hours
    validation = sum(split_off(count, choice.val_fraction) for count in task.folder.counts)
    assert choice.steps * choice.batch_size * speed.image <= TRAINING * seconds
    evaluations = choice.epochs / choice.evaluate_every
    assert (
        evaluations <= 2 or evaluations * VALIDATION_NOISES * sigmas * validation * speed.vote <= VALIDATION * seconds
    )
    votes = choice.choose_n * sigmas * validation * speed.vote
    assert choice.choose_n == 20 or votes <= THRESHOLDS * seconds
    assert choice.certified * DRAWN * choice.n * speed.vote <= CERTIFICATION * seconds or choice.certified <= 10
    assert 2 <= choice.batch_size <= images - validation
    assert choice.certified <= len(task.folder.held_out)


def test_the_number_of_sigmas_and_their_size_follow_the_image_size():
    assert chosen(0.1).sigmas == (0.12, 0.25, 0.5) and chosen(24.0).sigmas == (0.25, 0.5, 1.0)


def test_training_has_an_end():
    assert chosen(1000.0).steps == chosen(2000.0).steps < 12_000


def test_reading_counts_as_training():
    slow = choose(Task(folder(), MACHINE, 1.0), TRUNKS, lambda trunk: replace(measure(trunk), reading=0.1))
    assert slow.trunk.image_size < chosen(1.0).trunk.image_size and slow.workers == 1 and chosen(1.0).workers == 0


def test_pretrained_weights_need_a_fifth_of_the_steps():
    scratch, started = chosen(0.3), chosen(0.3, started=True)
    assert started.trunk.image_size > scratch.trunk.image_size and started.lr < scratch.lr
    assert 0.2 * GOOD_STEPS <= started.steps < GOOD_STEPS


@pytest.mark.parametrize("images", [12, 43, 320, 5000, 20_000])
@pytest.mark.parametrize("hours", [0.0001, 0.005])
def test_too_few_hours_are_refused_with_as_many_as_are_needed(images, hours):
    task = Task(folder(images), MACHINE, hours)
    with pytest.raises(RRCMError) as caught:
        choose(task, TRUNKS, measure)
    said = rf"--hours {hours:g}: leaves time for \d+ training steps of the smallest network, which .* --hours ([\d.]+)"
    needed = float(re.search(said, str(caught.value))[1])
    assert choose(replace(task, hours=needed), TRUNKS, measure).steps >= LEAST_STEPS
    with pytest.raises(RRCMError):
        choose(replace(task, hours=0.9 * needed - 0.01), TRUNKS, measure)


NETWORKS = [Network("resnet18", side, 3, (0.5,) * 3, (0.5,) * 3) for side in (224, 160, 128, 64)]


@pytest.mark.parametrize(
    ("side", "hours", "size"), [(300, 24.0, 224), (300, 0.02, 64), (150, 24.0, 128), (60, 24.0, 64)]
)
def test_a_network_from_weights_is_as_large_as_the_images_and_the_time_allow(side, hours, size):
    task = Task(folder(side=side), MACHINE, hours, started=True)
    choice = choose(task, NETWORKS, lambda network: Speed(network.image_size**2 / 1e6, network.image_size**2 / 1e7))
    assert choice.trunk.image_size == size and choice.lr == 5e-4  # of a ViT 1e-4, from random weights 1e-3


@pytest.mark.parametrize(("side", "fits"), [(300, True), (56, True), (55, False), (8, False)])
def test_small_images_start_from_random_weights(side, fits):
    assert suits(folder(side=side), 224) == fits


@pytest.mark.slow
def test_the_settings_of_a_network_from_weights_are_complete():
    base, start = with_root(Path("pictures")), ("resnet18", "w.safetensors")
    config = parse_config(complete(with_network(base, folder(), NETWORKS[1], start)))
    assert (config.methods, config.data.image_size, config.data.channels) == (["timm_joint"], 160, 3)
    assert (config.model.architecture, config.model.pixel_mean) == ("resnet18", [0.5] * 3)
    assert (config.finetune.timm.model, config.finetune.timm.weights) == start
    grey = replace(NETWORKS[1], channels=1, pixel_mean=(0.5,), pixel_std=(0.5,))
    assert parse_config(complete(with_network(base, folder(), grey, start))).data.channels == 1


@pytest.mark.parametrize(("load", "gpus", "busy"), [(0.4, (), False), (1.5, (), True), (13.0, ("H200",), False)])
def test_a_busy_machine_is_noted(load, gpus, busy):
    notes = replace(MACHINE, load=load, gpus=gpus).notes
    assert len(notes) == busy and all(f"load {load} on 2 cores" in note for note in notes)


def test_a_gpu_alone_gets_the_largest_network():
    assert TRUNKS[0] not in possible_trunks(Task(folder(), MACHINE, 1.0), TRUNKS)


@pytest.mark.parametrize("count", [3, 5, 10, 80])
def test_as_many_images_are_split_off_as_by_the_shards(count):
    kept, split = stratified_split(np.zeros(count, np.int64), np.arange(count), 0.1, np.random.default_rng(0))
    assert split_off(count, 0.1) == len(split) == count - len(kept)
