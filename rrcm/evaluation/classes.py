"""Certificates by class: certified accuracy, and which wrong classes the votes preferred. Pure functions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from rrcm.certification.cascade_votes import parse_selection as parse_cascade_selection
from rrcm.certification.results import ABSTAIN
from rrcm.certification.states import Votes
from rrcm.certification.votes import parse_selection
from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy


def accuracy_by_class(frame: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    """One row for each class that has images: `label`, `images`, `acr`, and certified accuracy by radius."""
    rows = []
    for label, group in frame.groupby("label"):
        row = {"label": int(label), "images": len(group), "acr": average_certified_radius(group)}
        rows.append(row | dict(zip(radii, certified_accuracy(group, radii).tolist(), strict=True)))
    return pd.DataFrame(rows)


def confusions(frame: pd.DataFrame, preferred: np.ndarray) -> pd.DataFrame:
    """How often images of one class were not classified correctly, by the class that the votes preferred.

    `preferred` (N,) is from `preferred_classes`. One row per pair, the most frequent first: `label`, `preferred`,
    `wrong` (images of another prediction) and `abstained`. An abstention may prefer the right class.
    """
    missed = frame.assign(preferred=preferred, abstained=frame["predict"] == ABSTAIN)[frame["correct"] == 0]
    pairs = missed.groupby(["label", "preferred"])["abstained"].agg(["size", "sum"]).reset_index()
    pairs["wrong"], pairs["abstained"] = pairs["size"] - pairs["sum"], pairs["sum"]
    pairs = pairs.sort_values(["size", "label", "preferred"], ascending=[False, True, True], ignore_index=True)
    return pairs[["label", "preferred", "wrong", "abstained"]].astype(int)


def preferred_classes(frame: pd.DataFrame, num_classes: int, sigmas: Sequence[float] | None = None) -> np.ndarray:
    """The predicted class of each image, or the class with most selection votes if it abstains: (N,) int64.

    `sigmas` are the sigmas of a cascade, whose votes are taken from the smallest sigma that was asked. "Pass" is no
    class.
    """
    classes = []
    for predict, text in zip(frame["predict"], frame["selection"], strict=True):
        classes.append(predict if predict != ABSTAIN else top_class(_selection(text, sigmas), num_classes))
    return np.array(classes, np.int64)


def top_shares(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The class with most selection votes, (N,) int64, and its share of the votes, (N,) float64, at a single sigma."""
    votes = [parse_selection(text) for text in frame["selection"]]
    top = [max(each, key=lambda k: (each[k], -int(k))) for each in votes]  # the smaller class of equals
    shares = [each[k] / sum(each.values()) for each, k in zip(votes, top, strict=True)]
    return np.array(top, np.int64), np.array(shares)


def top_class(votes: Votes, num_classes: int) -> int:
    """The class with most votes, the smallest one in a tie. "Pass", which has the number `num_classes`, is ignored."""
    return max(range(num_classes), key=lambda k: (votes.get(str(k), 0), -k))


def _selection(text: str, sigmas: Sequence[float] | None) -> Votes:
    if sigmas is None:
        return parse_selection(text)
    return next(votes for votes in parse_cascade_selection(text, sigmas) if votes)
