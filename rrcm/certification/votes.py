"""The votes in a samples file, and the certificates that follow from them. Pure functions, without the network.

A cell of the column `selection` has the votes of the selection samples by class: `3:97 8:3`. A cell of `votes` has the
votes of the estimation samples at each look that decided something, after the number of samples:
`100=3:98,8:2 120=3:117,8:3`. It is empty if the selection chose a wrong class. A radius stays certified after an early
look has certified it, so the votes at the last look alone do not determine the radius.
"""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import pandas as pd

from rrcm.certification.results import COLUMNS, SAMPLES, UNKNOWN, VOTES
from rrcm.certification.states import ImageState, Votes, certificate, replay
from rrcm.certification.stopping import ABSTAIN, WRONG_CLASS, StoppingRule
from rrcm.utils.arguments import shown
from rrcm.utils.errors import RRCMError

S = TypeVar("S")  # the state of an image, on its way through a smoothed classifier or a cascade
COUNT = re.compile(r"(0|[1-9][0-9]{0,8}):([1-9][0-9]{0,9})")  # a class and its votes
LOOK = re.compile(r"([1-9][0-9]{0,9})=(.+)")


def selection_text(selection: Votes) -> str:
    """A cell of the column `selection`."""
    return counts_text(selection, " ")


def votes_text(votes: dict[str, Votes]) -> str:
    """A cell of the column `votes`."""
    return " ".join(f"{drawn}={counts_text(counts)}" for drawn, counts in votes.items())


def parse_selection(text: str) -> Votes:
    """The votes in a cell of `selection`. Raises ValueError unless `selection_text` writes it so."""
    selection = parse_counts(text, " ")
    if not selection or selection_text(selection) != text:
        raise ValueError(f"selection {shown(text)}: must be votes by class, each class once, as 3:97 8:3")
    return selection


def parse_votes(text: str) -> dict[str, Votes]:
    """The votes in a cell of `votes`, by the number of samples. Raises ValueError unless `votes_text` writes it so."""
    looks = [LOOK.fullmatch(look) for look in text.split(" ")] if text else []
    votes = {look[1]: parse_counts(look[2]) for look in looks if look}
    if votes_text(votes) != text:
        raise ValueError(f"votes {shown(text)}: must be votes by class at each look, as 100=3:98,8:2 120=3:117,8:3")
    return votes


def counts_text(votes: Votes, separator: str = ",") -> str:
    """Votes by class, such as `3:97,8:3`."""
    return separator.join(f"{k}:{votes[k]}" for k in sorted(votes, key=int))


def parse_counts(text: str, separator: str = ",") -> Votes:
    """The votes by class that can be read. The caller checks that they have the same text again."""
    pairs = [COUNT.fullmatch(each) for each in text.split(separator)]
    return {pair[1]: int(pair[2]) for pair in pairs if pair}


def certificate_frame(states: Iterable[ImageState], rule: StoppingRule, num_classes: int) -> pd.DataFrame:
    """The certificates of images whose sampling has stopped: COLUMNS, SAMPLES and VOTES. `time` is 0."""
    rows = []
    for state in states:
        result = certificate(state, rule, num_classes)
        label = UNKNOWN if state.label is None else state.label
        field = (state.index, label, result.prediction, result.radius, int(result.prediction == label != UNKNOWN), 0)
        wrong = result.prediction if result.stop_reason == WRONG_CLASS else ABSTAIN  # predicted without a radius
        both = [
            value
            for radius in (result.binary_radius, result.margin_radius)
            for value in ((wrong, 0.0) if radius is None else (state.top_class, radius))
        ]
        votes = selection_text(state.selection), votes_text(state.votes)
        rows.append((*field, result.samples, result.stop_reason, result.binary_samples, *both, *votes))
    return pd.DataFrame(rows, columns=[*COLUMNS, *SAMPLES[1:], *VOTES])


def recompute(frame: pd.DataFrame, rule: StoppingRule, num_classes: int, *, labelled: bool) -> pd.DataFrame:
    """`certificate_frame` of the votes in a frame with `idx`, `label`, `selection` and `votes`.

    `labelled` says whether sampling stopped as soon as the chosen class was not the label. Raises `RRCMError` for the
    first image with votes that `rule` cannot lead to.
    """

    def replay_row(row: tuple, label: int | None) -> ImageState:
        return replay(parse_selection(row.selection), parse_votes(row.votes), label, rule, num_classes)

    return certificate_frame(replay_rows(frame, replay_row, labelled), rule, num_classes)


def replay_rows(frame: pd.DataFrame, replay_row: Callable[[tuple, int | None], S], labelled: bool) -> list[S]:
    """The states to which the votes in the rows of a samples file lead.

    `replay_row` takes a row and the label that was known during sampling. Raises `RRCMError` for the first image for
    which `replay_row` raises ValueError.
    """
    states = []
    for row in frame.itertuples():
        try:
            state = replay_row(row, row.label if labelled else None)
        except ValueError as error:
            raise RRCMError(f"image {row.idx}: {error}") from None
        state.index, state.label = row.idx, None if row.label == UNKNOWN else row.label
        states.append(state)
    return states
