"""Journals of the counts of each image after each round, from which a killed run continues.

The state of an image is a dataclass. The fields of IDENTITY tell its image from others. A journal may come from a run
with more images or other images; only states of the same images are taken from it.
"""

import json
import math
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from rrcm.certification.stopping import ABSTAIN, ALL_SAMPLES, FUTILE, WHOLE_GRID, WRONG_CLASS, StoppingRule
from rrcm.utils.files import writing

IDENTITY = ("index", "label", "content")  # a state need not have all of these fields


@contextmanager
def open_journal(folder: Path, rank: int = 0) -> Iterator[TextIO]:
    """Open the journal of the process `rank` in `folder` for appending."""
    path = folder / f"journal-{rank}.txt"
    with writing(path, "run it again to continue"), path.open("a", encoding="utf-8") as journal:
        journal.write("\n")  # a killed process may have left half a line
        yield journal


def append_states(journal: TextIO, states: Iterable[object]) -> None:
    """Write one line per image with a checksum and its state. The lines are on the disk when this returns."""
    for state in states:
        text = json.dumps({name: value for name, value in vars(state).items() if name != "image"})
        journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
    journal.flush()
    os.fsync(journal.fileno())


def restore_states(states: Iterable[object], folder: Path, is_possible: Callable[[dict], bool]) -> None:
    """Replace each state by the most advanced state of the same image in the journals in `folder`.

    Incomplete, damaged and impossible lines are ignored, and so are lines about other images. The samples of a damaged
    line are drawn again. `is_possible` says whether a run can lead to these values of a state.
    """
    by_identity = {_identity(vars(state)): state for state in states}
    for path in sorted(folder.glob("journal-*.txt")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, _, text = line.partition(" ")
            if checksum != f"{zlib.crc32(text.encode()):08x}":
                continue
            saved = _parse(text)
            state = by_identity.get(_identity(saved))
            if state is None or saved.keys() != vars(state).keys() - {"image"} or not is_possible(saved):
                continue
            if saved["samples"] >= state.samples:
                vars(state).update(saved)


def _parse(text: str) -> dict:
    try:
        saved = json.loads(text)
    except ValueError:
        return {}
    return saved if isinstance(saved, dict) else {}


def _identity(values: dict) -> str:
    return json.dumps([values.get(name) for name in IDENTITY])  # 1, 1.0 and True are three


def is_possible_state(saved: dict, rule: StoppingRule, num_classes: int) -> bool:
    """Whether sampling by `rule` can lead to these values of an `ImageState`: types are right, and counts add up."""
    counts, selection, votes = saved["counts"], saved["selection"], saved["votes"]
    if not (_are_counts(counts, num_classes) and _are_counts(selection, num_classes)):
        return False
    numbers = ("num_drawn", "look", "num_certified", "margin_certified", "binary_samples", "samples")
    texts = ("test", "binary_reason", "stop_reason")
    if not (
        all(type(saved[name]) is int and saved[name] >= 0 for name in numbers)
        and all(type(saved[name]) is str for name in texts)
        and type(saved["top_class"]) is int
        and is_duration(saved["seconds"])
    ):
        return False
    drawn, look, reason = saved["num_drawn"], saved["look"], saved["stop_reason"]
    if saved["top_class"] == ABSTAIN:  # no class is chosen yet
        return (
            not (counts or look or reason or votes) and sum(selection.values()) == drawn == saved["samples"] < rule.n0
        )
    if not 0 <= saved["top_class"] < num_classes or sum(selection.values()) != rule.n0 or sum(counts.values()) != drawn:
        return False
    if not _are_kept_votes(votes, counts, rule.looks[:look], num_classes):
        return False
    if saved["samples"] != rule.n0 + drawn or saved["binary_samples"] > saved["samples"]:
        return False
    if max(saved["num_certified"], saved["margin_certified"]) > len(rule.radii):
        return False
    if reason == WRONG_CLASS:
        return drawn == 0 and saved["label"] not in (None, saved["top_class"])
    if look != bisect_right(rule.looks, drawn):
        return False
    if reason == "":
        return look < len(rule.looks)
    return reason in (ALL_SAMPLES, WHOLE_GRID, FUTILE) and look > 0 and votes.get(str(drawn)) == counts


def _are_kept_votes(votes: object, counts: dict[str, int], looks: Sequence[int], num_classes: int) -> bool:
    """Whether these are votes at some of the `looks`, in order, and no class has more votes there than in `counts`."""
    if not isinstance(votes, dict) or list(votes) != [str(drawn) for drawn in looks if str(drawn) in votes]:
        return False
    return all(
        _are_counts(kept, num_classes)
        and sum(kept.values()) == int(drawn)
        and all(count <= counts.get(k, 0) for k, count in kept.items())
        for drawn, kept in votes.items()
    )


def _are_counts(votes: object, num_classes: int) -> bool:
    """Whether these are votes by class in the form of an `ImageState`, such as {"3": 5}."""
    named = isinstance(votes, dict) and votes.keys() <= _class_names(num_classes)
    return named and all(type(n) is int and n > 0 for n in votes.values())


@lru_cache(maxsize=1)  # with 10,000 classes it takes a millisecond, and each line of a journal asks several times
def _class_names(num_classes: int) -> frozenset[str]:
    """The classes as keys of JSON."""
    return frozenset(str(k) for k in range(num_classes))


def is_duration(seconds: object) -> bool:
    """Whether a value from a journal can be a number of seconds."""
    return type(seconds) in (int, float) and 0 <= seconds < math.inf
