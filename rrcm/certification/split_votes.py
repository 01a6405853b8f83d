"""A fixed number of votes for each image of a split, at one sigma or at several.

Soft labels, the targets of "pass" and the thresholds of cascades follow from such votes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rrcm.certification.driver import finish_states
from rrcm.certification.journal import is_duration
from rrcm.certification.noise import SOFT_LABEL
from rrcm.certification.states import Votes
from rrcm.certification.stopping import ALL_SAMPLES
from rrcm.utils.resume import RunState

if TYPE_CHECKING:
    from rrcm.certification.certify import SplitVoter  # imports torch, which reading votes does without
    from rrcm.certification.smoothing import SmoothedClassifier
    from rrcm.data.shards import ShardedDataset


@dataclass
class VotesState:
    """The votes for one image, as the journal keeps them."""

    index: int  # in the split; selects the noise
    votes: list[Votes] = field(default_factory=list)  # by class, for each sigma
    samples: int = 0  # of all sigmas
    stop_reason: str = ""
    seconds: float = 0.0  # share of the computing time; not part of the result


S = TypeVar("S", bound=VotesState)


def count_split_votes(voter: "SplitVoter", name: str, n: int, decides: object) -> tuple[list[VotesState], RunState]:
    """n votes for each image of the voter's split at each of its sigmas. The first process has all of them.

    The images are not augmented. All processes share them, and a killed run continues from the images it has counted.
    `name` names the work and its journals, which depend on the settings `decides`.
    """
    images, num_classes = voter.images, voter.smoothed.num_classes
    states = [VotesState(index) for index in range(len(images))]
    run = voter.run_state(name.replace(" ", "-"), [decides, n], __name__)
    stream = partial(vote_stream, voter.scales, images, SOFT_LABEL, n, voter.config.data.image_size)
    is_possible = partial(is_possible_votes, n=n, outputs=[num_classes] * len(voter.scales))
    finish_states(states, stream, run, is_possible, voter.queue, name)
    return states, run


def vote_stream(
    scales: Sequence["SmoothedClassifier"],
    images: "ShardedDataset",
    purpose: int,  # a constant of noise.py
    n: int,
    size: int,  # of the images, pixels
    states: Iterator[S],
    *,
    at_once: int | None,
) -> Iterator[list[S]]:
    """Count n votes at each sigma, for groups of images that fill some batches. Yields each group."""
    from rrcm.data.shards import read_pixels  # imports torch
    from rrcm.utils.pixels import to_unit_range

    device, together = scales[0].device, None
    while group := list(islice(states, 1 if together is None else min(together, at_once or together))):
        indices = [state.index for state in group]
        start, pixels = time.monotonic(), to_unit_range(read_pixels(images, size, indices).to(device))
        together = min(scale.images_per_round(pixels[0], n) for scale in scales)
        counts = [scale.count_samples(pixels, indices, purpose, n) for scale in scales]
        for state, *votes in zip(group, *counts, strict=True):
            state.votes = [{str(c): int(each[c]) for c in np.flatnonzero(each)} for each in votes]
            state.samples, state.stop_reason = n * len(counts), ALL_SAMPLES
            state.seconds = (time.monotonic() - start) / len(group)
        yield group


def is_possible_votes(saved: dict, n: int, outputs: Sequence[int]) -> bool:
    """Whether a journal can have these values of a `VotesState`: n votes at each sigma.

    `outputs` has the number of answers that the classifier of each sigma may give.
    """
    votes, samples = saved["votes"], saved["samples"]
    if type(samples) is not int or saved["stop_reason"] != ALL_SAMPLES or not is_duration(saved["seconds"]):
        return False
    whole = isinstance(votes, list) and len(votes) == len(outputs) and samples == n * len(outputs)
    return whole and all(
        isinstance(counts, dict)
        and counts.keys() <= {str(c) for c in range(answers)}
        and all(type(count) is int and count > 0 for count in counts.values())
        and sum(counts.values()) == n
        for answers, counts in zip(outputs, votes, strict=True)
    )


def votes_array(states: Sequence[VotesState], num_classes: int) -> np.ndarray:
    """The votes for the classes, without those for "pass": (N, S, K) int64 for N images at S sigmas."""
    votes = [[[each.get(str(c), 0) for c in range(num_classes)] for each in state.votes] for state in states]
    return np.array(votes, dtype=np.int64)
