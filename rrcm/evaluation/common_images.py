"""Which images several certificate files have in common, and whether their image numbers mean the same images.

The files of other groups name neither their data set nor the order of its images. They only have the label of each
image. Labels cannot distinguish two data sets that have the same classes in the same order.
"""

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import pandas as pd

from rrcm.utils.errors import RRCMError, printable

MAX_CHANCE = 0.001  # with which labels of unrelated images may agree


def on_same_images(frames: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows of each certificate frame for the images that all of them have, in the order of `idx`.

    The frames belong to the same data set if every image number that two of them share has the same label in both, and
    if there are enough such numbers: labels of unrelated images must agree on them with a probability of at most
    MAX_CHANCE. Frames with exactly the same image numbers and labels need no more evidence. Raises `RRCMError` for all
    others.
    """
    labels = {name: frame.set_index("idx")["label"].sort_index() for name, frame in frames.items()}
    for one, other in _pairs(labels):
        check_labels(one, labels[one], other, labels[other])
    common = sorted(set.intersection(*(set(each.index) for each in labels.values())))
    for one, other in _pairs(labels):
        chance = chance_of_agreement(labels[one], labels[other], common)
        if not labels[one].equals(labels[other]) and chance > MAX_CHANCE:
            raise RRCMError(f"{_named(one, other)}: {_too_few(len(common), chance)}; compare files of the same images")
    return {name: frame.set_index("idx").loc[common].reset_index() for name, frame in frames.items()}


def have_same_images(first: pd.Series, second: pd.Series) -> bool:
    """Whether two classifiers were certified on images of the same data set, by the rule of `on_same_images`.

    `first` and `second` are labels by image number.
    """
    numbers = sorted(first.index.intersection(second.index))
    agree = bool(numbers) and bool((first[numbers] == second[numbers]).all())
    return agree and (first.equals(second) or chance_of_agreement(first, second, numbers) <= MAX_CHANCE)


def check_labels(one: str, first: pd.Series, other: str, second: pd.Series) -> None:
    """Raise `RRCMError` if a common image number has two labels. `first` and `second` are labels by image number."""
    numbers = first.index.intersection(second.index)
    unequal = numbers[(first[numbers] != second[numbers]).to_numpy()]
    if len(unequal):
        image = f"image {unequal[0]} has label {first[unequal[0]]} in one and {second[unequal[0]]} in the other"
        count = f"{len(unequal):,} of {len(numbers):,} common image numbers have two labels, such as {image}"
        reason = "they are of different data sets, or number the images differently"
        raise RRCMError(f"{_named(one, other)}: {count}: {reason}; compare files of the same images with a column idx")


def chance_of_agreement(first: pd.Series, second: pd.Series, numbers: list[int]) -> float:
    """The probability that two unrelated sequences of labels agree on all image `numbers`.

    It is the probability that one label of each agrees, to the power of the number of images. Consecutive images of one
    class count as one, since data sets that are sorted by class agree on many images by a single coincidence.
    """
    one, other = (labels.value_counts(normalize=True) for labels in (first, second))
    runs = np.count_nonzero(np.diff(first[numbers].to_numpy())) + 1 if len(numbers) else 0
    return float(one.mul(other, fill_value=0.0).sum() ** runs)


def adopt_numbers(frames: Mapping[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """The frames with corrected image numbers, and for each corrected frame the name of the frame they come from.

    A file without image numbers is read with the numbers 0, 1, 2, ... If another frame has the same labels in the same
    order, but other numbers, the file has the images of that frame.
    """
    adopted, sources = dict(frames), {}
    for name, other in permutations(frames, 2):
        frame, source = frames[name], frames[other].sort_values("idx", ignore_index=True)
        counted = frame["idx"].equals(pd.Series(range(len(frame)))) and not source["idx"].equals(frame["idx"])
        if name not in sources and counted and frame["label"].equals(source["label"]):
            labels = frame["label"]
            if chance_of_agreement(labels, labels, list(range(len(labels)))) <= MAX_CHANCE:
                adopted[name], sources[name] = frame.assign(idx=source["idx"]), other
    return adopted, sources


def _pairs(names: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(one, other) for i, other in enumerate(names) for one in list(names)[:i]]


def _named(one: str, other: str) -> str:
    return f"{printable(one)!r} and {printable(other)!r}"


def _too_few(images: int, chance: float) -> str:
    """The reason why this number of common images is too little evidence."""
    if images == 0:
        return "no image is in all files"
    return f"only {images:,} images are in all files, and other labels would agree with probability {chance:.2g}"
