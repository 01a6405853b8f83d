"""The votes for validation images from which the thresholds of a cascade are chosen, and the file that keeps them.

The file thresholds.tsv has a row for each image: `idx` (position in the validation split), `label`, and `votes`, the
votes of each sigma as in the column `selection` of a cascade's samples file (cascade_votes.py). With these votes anyone
can choose the thresholds again, without the networks.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from rrcm.certification.cascade_thresholds import choose_thresholds
from rrcm.certification.cascade_votes import parse_selection, selection_text
from rrcm.certification.results import UNKNOWN
from rrcm.certification.split_votes import VotesState, votes_array
from rrcm.certification.stopping import ALL_SAMPLES
from rrcm.config import Config
from rrcm.utils.errors import RRCMError

if TYPE_CHECKING:
    from rrcm.data.shards import ShardedDataset  # imports torch, which choosing again does without

MAX_IMAGES = 2000  # at most, evenly spaced: more would cost more than they would improve the choice
COLUMNS = ["idx", "label", "votes"]


@dataclass
class ValidationState(VotesState):
    """The votes for one validation image."""

    label: int = UNKNOWN


def new_validation_states(images: "ShardedDataset") -> list[ValidationState]:
    """The states of the validation images from which the thresholds are chosen, without votes."""
    from rrcm.data.shards import choose_rows  # imports torch, which takes seconds

    rows = choose_rows(len(images), 1, MAX_IMAGES)
    return [ValidationState(row, label=int(images.labels[row])) for row in rows]


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
    return [ValidationState(idx, votes, n * len(sigmas), ALL_SAMPLES, label=label) for idx, label, votes in rows]


def are_of_other_images(states: Sequence[ValidationState], counts: Sequence[int]) -> str | None:
    """How the images differ from a validation split with `counts` images of each class, or None if they do not.

    The classes can be compared only if the thresholds were chosen from all images.
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
    """The thresholds that the settings `cascade` choose from these votes, and the entry `chosen` of the record."""
    settings = {name: getattr(config.certify, name) for name in ("n", "alpha", "bound")}
    labels, weights = [state.label for state in states], config.cascade.weights
    votes = votes_array(states, num_classes)
    thresholds, score = choose_thresholds(votes, labels, config.cascade_sigmas, weights=weights, **settings)
    by = "acr" if weights is None else {str(radius): weight for radius, weight in weights.items()}
    return thresholds, {"by": by, "n": config.cascade.choose_n, "images": len(states), "score": score}
