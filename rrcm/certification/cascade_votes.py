"""The votes in the samples file of a cascade, and the certificates that follow from them. votes.py has single sigmas.

Each cell names the sigmas as Python writes them. Classes have their number, and "pass" has the number of classes.

    selection         1.0=3:51,8:49 0.5=3:97,8:3           of the sigmas that were asked, the largest first
    votes             0.5/100=3:98,8:2 1.0/120=3:61,8:59   at each look that decided something, in the order of drawing
    path              0.5 above the threshold, 1.0 binary  the claims of a certificate, from the accepting sigma upwards
    samples_by_sigma  0.25=0 0.5=200 1.0=220

All other columns follow from `selection` and `votes`.
"""

import re
from collections.abc import Iterable, Sequence

import pandas as pd

from rrcm.certification.cascade_rules import LABEL_AWARE, MULTI_SCALE, CascadeRule
from rrcm.certification.cascade_states import CascadeState, cascade_certificate, replay
from rrcm.certification.results import CASCADE_SAMPLES, COLUMNS, UNKNOWN, VOTES
from rrcm.certification.states import Votes
from rrcm.certification.votes import counts_text, parse_counts, replay_rows
from rrcm.methods import CASCADE, MULTI_SCALE_FILE
from rrcm.utils.arguments import shown

CASCADE_FILES = {LABEL_AWARE: CASCADE, MULTI_SCALE: MULTI_SCALE_FILE}  # the names of files, by their certificates
ASKED = re.compile(r"([^/= ]+)=([^= ]+)")  # a sigma and its votes
LOOK = re.compile(r"([^/= ]+)/([1-9][0-9]{0,9})=([^= ]+)")  # a sigma, its samples and their votes


def selection_text(selection: Sequence[Votes], sigmas: Sequence[float]) -> str:
    """A cell of the column `selection`, for the votes of each scale."""
    asked = [(sigma, votes) for sigma, votes in zip(sigmas, selection, strict=True) if votes]
    return " ".join(f"{sigma}={counts_text(votes)}" for sigma, votes in reversed(asked))


def votes_text(votes: Iterable[Sequence], sigmas: Sequence[float]) -> str:
    """A cell of the column `votes`, for the entry `votes` of a `CascadeState`."""
    return " ".join(f"{sigmas[scale]}/{drawn}={counts_text(counts)}" for scale, drawn, counts in votes)


def parse_selection(text: str, sigmas: Sequence[float]) -> list[Votes]:
    """The votes of each scale in a cell of `selection`. Raises ValueError unless `selection_text` writes it so."""
    pairs = [ASKED.fullmatch(part) for part in text.split(" ")]
    asked = {pair[1]: parse_counts(pair[2]) for pair in pairs if pair}
    selection = [asked.get(str(sigma), {}) for sigma in sigmas]
    if not asked or selection_text(selection, sigmas) != text:
        raise ValueError(f"selection {shown(text)}: must be votes of some sigmas by class, as 1.0=3:51,8:49 0.5=3:100")
    return selection


def parse_votes(text: str, sigmas: Sequence[float]) -> list[list]:
    """Scale, samples and votes of each look in a cell. Raises ValueError unless `votes_text` writes it so."""
    scales = {str(sigma): scale for scale, sigma in enumerate(sigmas)}
    looks = [LOOK.fullmatch(part) for part in text.split(" ")] if text else []
    votes = [[scales[look[1]], int(look[2]), parse_counts(look[3])] for look in looks if look and look[1] in scales]
    if votes_text(votes, sigmas) != text:
        raise ValueError(f"votes {shown(text)}: must be votes by class at looks of some sigmas, as 0.5/100=3:98,8:2")
    return votes


def cascade_frame(states: Iterable[CascadeState], rule: CascadeRule, num_classes: int) -> pd.DataFrame:
    """The certificates of images whose sampling has stopped: COLUMNS, CASCADE_SAMPLES and VOTES. `time` is 0."""
    rows, sigmas = [], rule.sigmas
    for state in states:
        result = cascade_certificate(state, rule, num_classes)
        label = UNKNOWN if state.label is None else state.label
        rows.append(
            (
                *(state.index, label, result.prediction, result.radius, int(result.prediction == label != UNKNOWN), 0),
                *(result.samples, result.stop_reason),
                ", ".join(f"{sigma} {claim}" for sigma, claim in result.path),
                " ".join(f"{sigma}={drawn}" for sigma, drawn in zip(sigmas, result.samples_by_sigma, strict=True)),
                *(selection_text(state.selection, sigmas), votes_text(state.votes, sigmas)),
            )
        )
    return pd.DataFrame(rows, columns=[*COLUMNS, *CASCADE_SAMPLES[1:], *VOTES])


def recompute_cascade(frame: pd.DataFrame, rule: CascadeRule, num_classes: int, *, labelled: bool) -> pd.DataFrame:
    """`cascade_frame` of the votes in a frame with `idx`, `label`, `selection` and `votes`.

    `labelled` says whether sampling stopped as soon as the chosen class was not the label. Raises `RRCMError` for the
    first image with votes that `rule` cannot lead to.
    """

    def replay_row(row: tuple, label: int | None) -> CascadeState:
        votes = parse_selection(row.selection, rule.sigmas), parse_votes(row.votes, rule.sigmas)
        return replay(*votes, label, rule, num_classes)

    return cascade_frame(replay_rows(frame, replay_row, labelled), rule, num_classes)
