"""The training images whose labels fine-tuning may use: all, or a few of each class."""

import numpy as np

from rrcm.data.shards import KEY, ShardedDataset
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.rng import numpy_rng


def check_label_budget(per_class: int | None, counts: list[int], classes: list[str]) -> None:
    """Raise `RRCMError` if a class has fewer than `per_class` training images. `counts` has their numbers by class."""
    for name, count in zip(classes, counts, strict=True):
        if per_class is not None and count < per_class:
            raise RRCMError(
                f"data.labels_per_class = {per_class}: class {printable(name)} has {count:,} training images; lower "
                "it, or set null to use all labels"
            )


def labelled_rows(images: ShardedDataset, per_class: int) -> np.ndarray:
    """The rows of `per_class` images of each class: int64 (per_class * K,), one of each class after another.

    They depend on the seed of the shards and on nothing else, so all methods have the same images. The images of a
    smaller number are among the images of a larger one. Raises `RRCMError` if a class has too few images.
    """
    check_label_budget(per_class, images.split.counts, images.classes)
    chosen = []
    for label in range(len(images.classes)):
        rows = np.flatnonzero(images.labels == label)
        rows = rows[np.argsort(images.index[rows, KEY])]  # the order of the raw data set, whatever the shards' order
        chosen.append(numpy_rng(images.manifest.seed, "labelled images", label).permutation(rows)[:per_class])
    return np.stack(chosen, axis=1).ravel()
