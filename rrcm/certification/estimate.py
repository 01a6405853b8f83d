"""Estimate in a few seconds how long a command will take to vote on a folder of images.

A few images get some votes, which measures the speed. How many samples an image needs depends on its vote shares. So
the stopping rule is simulated with votes drawn from the posterior distribution of these shares.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.cascade_rules import CascadeRule
from rrcm.certification.cascade_states import add_votes, new_state, next_samples
from rrcm.certification.certify_images import read_square
from rrcm.certification.noise import PREDICT
from rrcm.certification.packing import SampleRequest
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import ImageState, choose_class, decide
from rrcm.certification.stopping import StoppingRule
from rrcm.data.images import Listing
from rrcm.data.shards import evenly_spaced
from rrcm.models.load import LoadedClassifier
from rrcm.utils.errors import RRCMError
from rrcm.utils.pixels import to_unit_range

TRIED = 24  # images that get votes
SECONDS = 2.0  # of voting, over all sigmas
PLAYED = 4  # simulations of the stopping rule for each of them
READS = 2  # times that a command decodes each image


class Estimate(NamedTuple):
    """The expected time of a command, and the numbers behind it."""

    images: int
    tried: int  # images that got votes for the estimate
    speed: float  # noisy samples per second
    reading: float  # seconds to decode all images
    samples: float  # expected number per image
    most_samples: int  # largest possible number per image
    start: float = 0.0  # seconds until the first vote: to import libraries and to load the model

    def __str__(self) -> str:
        """Two lines: the times, and where they come from."""
        expected, most = (
            time_text(self.start + self.reading + self.images * samples / self.speed)
            for samples in (self.samples, self.most_samples)
        )
        each = f"about {self.samples:,.0f} samples per image, judging from {self.tried:,} of them"
        if self.samples == self.most_samples:
            return (
                f"{expected} for {self.images:,} images\n{self.speed:,.0f} samples/s; {self.most_samples:,} per image"
            )
        times = f"about {expected} for {self.images:,} images, at most {most}"
        return f"{times}\n{self.speed:,.0f} samples/s; {each}, and at most {self.most_samples:,}"


def estimate_time(
    listing: Listing,
    loaded: LoadedClassifier,
    classifier: SmoothedClassifier | CascadedClassifier,
    rule: StoppingRule | CascadeRule | int,
    limit: int | None = None,
    start: float = 0.0,
) -> Estimate:
    """Estimate the time for the listed images, or for `limit` of them. `loaded` is any of the base classifiers.

    `rule` is the stopping rule, or the number of samples that every image gets. `start` is the time in seconds that the
    command has taken so far. Raises `RRCMError` for an image that cannot be decoded.
    """
    if limit is not None and limit < 1:
        raise RRCMError(f"limit = {limit}: must be at least 1")
    positions = evenly_spaced(len(listing.files), limit).tolist()
    chosen = [positions[i] for i in evenly_spaced(len(positions), TRIED)]
    opened = time.monotonic()
    pixels = np.stack([read_square(listing.folder / listing.files[i], loaded) for i in chosen])
    reading = (time.monotonic() - opened) / len(chosen)
    images = to_unit_range(torch.from_numpy(pixels))
    scales = list(classifier.scales) if isinstance(classifier, CascadedClassifier) else [classifier]
    if isinstance(classifier, CascadedClassifier):
        classifier.share_batch_size(images[0])
    measured = [_vote(scale, images, chosen, SECONDS / len(scales)) for scale in scales]
    votes, speeds = zip(*measured, strict=True)
    rng = np.random.default_rng(0)
    samples = [_play(rule, [each[i] for each in votes], rng) for i in range(len(chosen)) for _ in range(PLAYED)]
    most = rule if isinstance(rule, int) else len(scales) * (rule.n0 + rule.looks[-1])
    speed = len(speeds) / sum(1 / each for each in speeds)
    reading, samples = READS * reading * len(positions), float(np.mean(samples))
    return Estimate(len(positions), len(chosen), speed, reading, samples, most, start)


def _vote(
    scale: SmoothedClassifier, images: torch.Tensor, indices: Sequence[int], seconds: float
) -> tuple[np.ndarray, float]:
    """The votes for each image, (B, K) int64, that fit into the time, and the samples per second in full batches."""
    size = scale.find_batch_size(images[0])
    each = max(1, size // len(images))
    batches = -(-each * len(images) // size)
    scale.count_votes([SampleRequest(images[0], indices[0], PREDICT, 0, size)])  # the first run is slower
    votes, rounds, start = 0, 0, time.monotonic()
    while not rounds or time.monotonic() - start < seconds:
        span = rounds * each, (rounds + 1) * each
        requests = [SampleRequest(*pair, PREDICT, *span) for pair in zip(images, indices, strict=True)]
        votes, rounds = votes + scale.count_votes(requests), rounds + 1
    return votes, rounds * batches * size / (time.monotonic() - start)


def _play(rule: StoppingRule | CascadeRule | int, votes: Sequence[np.ndarray], rng: np.random.Generator) -> int:
    """A number of samples that an image with these votes may need, summed over all scales.

    Its shares are drawn from their posterior, with a prior that weighs as much as one vote.
    """
    shares = [rng.dirichlet(each + 1 / len(each)) for each in votes]
    if isinstance(rule, int):
        return rule
    return _play_cascade(rule, shares, rng) if isinstance(rule, CascadeRule) else _play_single(rule, shares[0], rng)


def _play_single(rule: StoppingRule, shares: np.ndarray, rng: np.random.Generator) -> int:
    state = ImageState(0, torch.empty(0))
    state.selection = _as_votes(rng.multinomial(rule.n0, shares))
    choose_class(state, rule)
    counts, state.samples = np.zeros(len(shares), np.int64), rule.n0
    for look in rule.looks:
        counts += rng.multinomial(look - state.num_drawn, shares)
        state.counts, state.num_drawn, state.samples = _as_votes(counts), look, rule.n0 + look
        decide(state, rule, len(shares))
        if state.stop_reason:
            break
    return state.samples


def _play_cascade(rule: CascadeRule, shares: Sequence[np.ndarray], rng: np.random.Generator) -> int:
    state, num_classes = new_state(0, None, None, rule), len(shares[0])
    while not state.stop_reason:
        k, selects, start, stop = next_samples(state, rule, num_classes)
        add_votes(state, rule, k, selects, rng.multinomial(stop - start, shares[k]), num_classes)
    return state.samples


def _as_votes(counts: np.ndarray) -> dict[str, int]:
    return {str(k): int(counts[k]) for k in np.flatnonzero(counts).tolist()}


def time_text(seconds: float) -> str:
    """A time in words, such as `1 h 20 min`, with a second unit below 10."""
    for first, second, size in (("d", "h", 24), ("h", "min", 60), ("min", "s", 60)):
        unit = {"d": 86400, "h": 3600, "min": 60}[first]
        if seconds >= unit:
            whole, rest = divmod(round(seconds * size / unit), size)
            if whole >= 10:  # an estimate is no better known
                return f"{round(seconds / unit)} {first}"
            return f"{whole} {first} {rest} {second}" if rest else f"{whole} {first}"
    return f"{max(1, round(seconds))} s"
