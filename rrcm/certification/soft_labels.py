"""Soft labels: how often a smoothed classifier votes for each class, for each training image (Jeong et al. 2023)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from rrcm.certification.certify import SplitVoter, open_split
from rrcm.certification.driver import finish_states
from rrcm.certification.noise import SOFT_LABEL
from rrcm.certification.stopping import ALL_SAMPLES
from rrcm.config import Config
from rrcm.data.shards import read_pixels
from rrcm.data.soft_labels import write_votes
from rrcm.utils.distributed import explain_lost_processes
from rrcm.utils.files import claimed, write_json
from rrcm.utils.pixels import to_unit_range


@dataclass
class SoftLabelState:
    """The votes for one training image, as the journal keeps them."""

    index: int  # in the split; selects the noise
    votes: list[int] = field(default_factory=list)  # by class
    samples: int = 0
    stop_reason: str = ""


@explain_lost_processes()
def count_soft_labels(config: Config, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path) -> None:
    """Let a smoothed classifier vote `soft_labels.n` times on each training image, and write the votes to `output`.

    The images of the split are not augmented. Precision and batch size follow the settings `certify`. Under torchrun
    all processes share the images. A killed run continues from the images it has counted. Raises `RRCMError` for
    missing or damaged inputs.
    """
    settings = config.soft_labels
    voter = open_split(config, settings.sigma, shard_folder, "train", model_folder)
    states = [SoftLabelState(index) for index in range(len(voter.images))]
    run = voter.run_state("soft-labels", settings.model_dump(mode="json"), __name__)
    is_possible = partial(is_possible_label, n=settings.n, num_classes=voter.smoothed.num_classes)
    start = time.monotonic()
    finish_states(states, partial(_vote_stream, voter), run, is_possible, voter.queue, "soft labels")
    if voter.queue.rank == 0:
        timed = voter.describe_time(time.monotonic() - start, settings.n * len(states))
        with claimed(output, timing, wait=True):  # another run of this stage must not mix its files with these
            write_votes(output, torch.tensor([state.votes for state in states]), voter.images)
            write_json(timing, timed)
        run.finish()


def _vote_stream(
    voter: SplitVoter, states: Iterator[SoftLabelState], *, at_once: int | None
) -> Iterator[list[SoftLabelState]]:
    """Vote on the images in groups that fill some batches, and yield each group when it is counted."""
    n, size = voter.config.soft_labels.n, voter.config.data.image_size
    together = voter.smoothed.images_per_round(torch.zeros(voter.images.channels, size, size), n)
    while group := list(islice(states, together if at_once is None else min(together, at_once))):
        indices = [state.index for state in group]
        pixels = to_unit_range(read_pixels(voter.images, size, indices))
        for state, votes in zip(group, voter.smoothed.count_samples(pixels, indices, SOFT_LABEL, n), strict=True):
            state.votes, state.samples, state.stop_reason = votes.tolist(), n, ALL_SAMPLES
        yield group


def is_possible_label(saved: dict, n: int, num_classes: int) -> bool:
    """Whether a journal can have these values of a `SoftLabelState`: n votes for the classes that exist."""
    votes, samples = saved["votes"], saved["samples"]
    whole = isinstance(votes, list) and all(type(count) is int and count >= 0 for count in (*votes, samples))
    finished = saved["stop_reason"] == ALL_SAMPLES
    return whole and finished and len(votes) == num_classes and sum(votes) == samples == n
