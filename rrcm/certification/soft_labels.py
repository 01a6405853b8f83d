"""Soft labels: how often a smoothed classifier votes for each class, for each training image (Jeong et al. 2023).

The votes are those of certification: noise from a counter, batches of one shape. So any number of processes, in any
order, killed and restarted, writes the same bytes. Each process appends the votes of its images to a journal.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rrcm.certification.certify import make_smoothed_classifier
from rrcm.certification.journal import append_states, open_journal, restore_states
from rrcm.certification.noise import SOFT_LABEL
from rrcm.certification.smoothing import BATCHES_PER_SYNC, SampleRequest, SmoothedClassifier
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_pixels
from rrcm.data.soft_labels import write_votes
from rrcm.data.verification import verify_shards
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import WorkQueue, connect, explain_lost_processes, set_threads
from rrcm.utils.files import claimed, sha256_folder, write_json
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint


@dataclass
class Votes:
    """The votes for one training image, as the journal keeps them."""

    index: int  # in the split; selects the noise
    votes: list[int] = field(default_factory=list)  # by class
    samples: int = 0  # 0: not voted yet


@explain_lost_processes()
def count_soft_labels(config: Config, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path) -> None:
    """Let a smoothed classifier vote `soft_labels.n` times on each training image, and write the votes to `output`.

    The images are those of the split, without augmentation. Precision and batch size are those of the settings
    `certify`. Under torchrun all processes share the images. A killed run continues from the images it has counted.
    Raises `RRCMError` for missing or damaged inputs.
    """
    set_threads(config.threads)
    settings, env = config.soft_labels, connect(config.device)
    queue, images = WorkQueue(env, "soft labels"), ShardedDataset(shard_folder, "train")
    verify_shards([images], env)
    classifier = load_model_folder(model_folder).classifier
    smoothed = make_smoothed_classifier(classifier.to(env.device), settings.sigma, config)
    batch_size = _batch_size(smoothed, images, config)
    description = [settings.model_dump(mode="json"), config.seed, config.data.image_size, config.threads]
    description += [env.device.type, batch_size, smoothed.precision]
    inputs = {"shards": images.fingerprint, "model": sha256_folder(model_folder)}
    run_state = RunState("soft-labels", fingerprint(description, inputs, __name__, smoothed.model))
    if queue.rank == 0:
        run_state.lock()
    queue.start()
    start, everyone = time.monotonic(), [Votes(index) for index in range(len(images))]
    _count_share(smoothed, images, everyone, config, queue, run_state.folder)
    if queue.rank > 0:
        return

    _restore(everyone, run_state.folder, settings.n, smoothed.num_classes)  # the other processes' journals
    record = {"seconds": time.monotonic() - start, "samples": settings.n * len(images), "batch_size": batch_size}
    record |= {"dtype": smoothed.precision, "processes": queue.world_size}
    record |= {"environment": describe_environment(env.device)}
    with claimed(output, timing, wait=True):  # by another run of this stage, they are not mixed with its own
        write_votes(output, torch.tensor([each.votes for each in everyone]), images)
        write_json(timing, record)
    run_state.finish()


def _count_share(
    smoothed: SmoothedClassifier,
    images: ShardedDataset,
    everyone: list[Votes],
    config: Config,
    queue: WorkQueue,
    folder: Path,
) -> None:
    """Count this process's share of the images, a group at a time, without those that the journals in `folder` have."""
    n = config.soft_labels.n
    _restore(everyone, folder, n, smoothed.num_classes)
    done = sum(each.samples > 0 for each in everyone)
    room = BATCHES_PER_SYNC * _batch_size(smoothed, images, config)
    size = max(1, room // n)
    groups = [everyone[first : first + size] for first in range(0, len(everyone), size)]
    with (
        Progress(len(everyone), "soft labels", "images", done=done, quiet=queue.rank > 0) as progress,
        open_journal(folder, queue.rank) as journal,
    ):
        while (number := queue.next_index()) < len(groups):
            group = [each for each in groups[number] if not each.samples]
            if not group:
                continue
            pixels = to_unit_range(read_pixels(images, config.data.image_size, [each.index for each in group]))
            for each, votes in zip(group, _count(smoothed, pixels, group, n, room), strict=True):
                each.votes, each.samples = votes.tolist(), n
            append_states(journal, group)
            progress.update(done + queue.report_done(len(group)) - progress.done)
        journal.close()  # before reporting: on a network file system the others see a file's content when it is closed
        for _ in queue.close():
            progress.update(done + queue.report_done() - progress.done)
        progress.update(done + queue.report_done() - progress.done)


def _restore(everyone: list[Votes], folder: Path, n: int, num_classes: int) -> None:
    """`restore_states`, of lines with n votes for the classes there are."""

    def is_possible(saved: dict) -> bool:
        votes, samples = saved["votes"], saved["samples"]
        whole = isinstance(votes, list) and all(type(count) is int and count >= 0 for count in (*votes, samples))
        return whole and len(votes) == num_classes and sum(votes) == samples == n

    restore_states(everyone, folder, is_possible)


def _batch_size(smoothed: SmoothedClassifier, images: ShardedDataset, config: Config) -> int:
    return smoothed.find_batch_size(torch.zeros(images.channels, config.data.image_size, config.data.image_size))


def _count(smoothed: SmoothedClassifier, pixels: torch.Tensor, group: list[Votes], n: int, room: int) -> np.ndarray:
    """The votes of n noisy copies of each image of a group, at most `room` of them at once: int64 (images, K)."""
    return sum(
        smoothed.count_votes(
            [
                SampleRequest(image, each.index, SOFT_LABEL, start, min(n, start + room))
                for image, each in zip(pixels, group, strict=True)
            ]
        )
        for start in range(0, n, room)
    )
