"""The votes for validation images that the thresholds of a cascade are chosen by, and the file that keeps them.

The file thresholds.tsv has a row for each image: `idx` (position in the validation split), `label`, and `votes`, the
votes of each sigma as in the column `selection` of a cascade's samples file (cascade_votes.py). With these votes anyone
can choose the thresholds again, without the networks.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from rrcm.certification.cascade_thresholds import choose_thresholds
from rrcm.certification.cascade_votes import parse_selection, selection_text
from rrcm.certification.journal import is_duration
from rrcm.certification.noise import PREDICT
from rrcm.certification.states import Votes
from rrcm.certification.stopping import ALL_SAMPLES
from rrcm.config import Config
from rrcm.utils.errors import RRCMError

if TYPE_CHECKING:
    from rrcm.certification.smoothing import SmoothedClassifier  # imports torch, which choosing again does without
    from rrcm.data.shards import ShardedDataset

MAX_IMAGES = 2000  # at most, evenly spaced: more would cost more than they would improve the choice
COLUMNS = ["idx", "label", "votes"]


@dataclass
class ValidationState:
    """The votes for one validation image, as the journal keeps them."""

    index: int  # in the split; selects the noise
    label: int
    votes: list[Votes] = field(default_factory=list)  # by class, for each sigma
    samples: int = 0  # of all sigmas
    stop_reason: str = ""
    seconds: float = 0.0  # share of the computing time; not part of the result


def new_validation_states(images: "ShardedDataset") -> list[ValidationState]:
    """The states of the validation images that the thresholds are chosen by, without votes."""
    from rrcm.data.shards import choose_rows  # imports torch, which takes seconds

    return [ValidationState(row, int(images.labels[row])) for row in choose_rows(len(images), 1, MAX_IMAGES)]


def vote_stream(
    scales: Sequence["SmoothedClassifier"],
    images: "ShardedDataset",
    n: int,
    size: int,  # of the images, pixels
    states: Iterator[ValidationState],
    *,
    at_once: int | None,
) -> Iterator[list[ValidationState]]:
    """Count n votes at each sigma, for groups of images that fill some batches. Yields each group.

    No certificate of any image uses these samples.
    """
    from rrcm.data.shards import read_pixels
    from rrcm.utils.pixels import to_unit_range

    device = scales[0].device
    together = None
    while group := list(islice(states, 1 if together is None else min(together, at_once or together))):
        indices = [state.index for state in group]
        start, pixels = time.monotonic(), to_unit_range(read_pixels(images, size, indices).to(device))
        together = min(scale.images_per_round(pixels[0], n) for scale in scales)
        counts = [scale.count_samples(pixels, indices, PREDICT, n) for scale in scales]
        for state, *votes in zip(group, *counts, strict=True):
            state.votes = [{str(c): int(each[c]) for c in np.flatnonzero(each)} for each in votes]
            state.samples, state.stop_reason = n * len(counts), ALL_SAMPLES
            state.seconds = (time.monotonic() - start) / len(group)
        yield group


def is_possible_validation_state(saved: dict, n: int, num_classes: int, sigmas: int) -> bool:
    """Whether a journal can have these values of a `ValidationState`: n votes for existing classes at each sigma.

    Only the smallest sigma must not answer "pass", which has the number `num_classes`.
    """
    votes, samples = saved["votes"], saved["samples"]
    if type(samples) is not int or saved["stop_reason"] != ALL_SAMPLES or not is_duration(saved["seconds"]):
        return False
    whole = isinstance(votes, list) and len(votes) == sigmas and samples == n * sigmas
    return whole and all(
        isinstance(counts, dict)
        and counts.keys() <= {str(c) for c in range(num_classes + (k > 0))}
        and all(type(count) is int and count > 0 for count in counts.values())
        and sum(counts.values()) == n
        for k, counts in enumerate(votes)
    )


def votes_table(states: Iterable[ValidationState], sigmas: Sequence[float]) -> bytes:
    """The content of thresholds.tsv."""
    rows = [(state.index, state.label, selection_text(state.votes, sigmas)) for state in states]
    return pd.DataFrame(rows, columns=COLUMNS).to_csv(sep="\t", index=False, lineterminator="\n").encode()


def read_votes_table(path: Path, sigmas: Sequence[float], n: int) -> list[ValidationState]:
    """The states in thresholds.tsv. Raises `RRCMError` unless it has n votes for each image and sigma."""
    try:
        frame = pd.read_csv(path, sep="\t", dtype={"idx": int, "label": int, "votes": str}, keep_default_na=False)
        if list(frame) != COLUMNS:
            raise ValueError(f"has the columns {', '.join(frame)}, not {', '.join(COLUMNS)}")
        rows = [(row.idx, row.label, parse_selection(row.votes, sigmas)) for row in frame.itertuples()]
        for idx, _, votes in rows:
            if any(sum(counts.values()) != n for counts in votes):
                raise ValueError(f"image {idx} does not have {n} votes at each sigma")
    except (OSError, ValueError) as error:
        raise RRCMError(f"{path}: cannot be read ({' '.join(str(error).split())}); certify again") from None
    return [ValidationState(*row, samples=n * len(sigmas), stop_reason=ALL_SAMPLES) for row in rows]


def are_of_other_images(states: Sequence[ValidationState], counts: Sequence[int]) -> str | None:
    """In what the images differ from those of a validation split with `counts` images of each class; None: in nothing.

    The classes can be compared only if the thresholds were chosen by all images.
    """
    from rrcm.data.shards import choose_rows

    if [state.index for state in states] != choose_rows(sum(counts), 1, MAX_IMAGES):
        return f"has other images than the {sum(counts):,} of the validation split give"
    if len(states) == sum(counts):
        labels = Counter(state.label for state in states)
        if labels != Counter({label: count for label, count in enumerate(counts) if count}):
            return "has other numbers of images of each class than the validation split"
    return None


def choose_by_votes(
    states: Sequence[ValidationState], config: Config, num_classes: int
) -> tuple[tuple[float, ...], dict]:
    """The thresholds that the settings `cascade` choose by these votes, and how: the entry `chosen` of the record."""
    votes = np.array([[[each.get(str(c), 0) for c in range(num_classes)] for each in state.votes] for state in states])
    settings = {name: getattr(config.certify, name) for name in ("n", "alpha", "bound")}
    labels, weights = [state.label for state in states], config.cascade.weights
    thresholds, score = choose_thresholds(votes, labels, config.cascade_sigmas, weights=weights, **settings)
    by = "acr" if weights is None else {str(radius): weight for radius, weight in weights.items()}
    return thresholds, {"by": by, "n": config.cascade.choose_n, "images": len(states), "score": score}
