"""Read raw data sets: class names, and training and test images with labels, in a fixed order.

`DATASETS` of rrcm/sources/ maps the values of the setting `data.source` to readers, each in a module of its own there.
Validation images are split off the training images later, when the shards are written (sharding.py). If a data set has
no official test images, these are split off there too.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rrcm.config import Data
from rrcm.sources import DATASETS
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import in_repository

RAW = Path("data/raw")  # without data.root, downloads go to RAW/<source>


class RawSplit(NamedTuple):
    """Images and labels in a fixed order."""

    images: np.ndarray  # uint8 (N, H, W) or (N, H, W, 3), or N file paths (dtype object)
    labels: np.ndarray  # int64 (N,), indices into the class names


class RawDataset(NamedTuple):
    """A whole data set before it is written as shards."""

    classes: list[str]  # names
    train: RawSplit
    test: RawSplit | None  # None: there are no official test images
    class_order: str | None = None  # how class folders were ordered
    left_out: Mapping[str, int] = {}  # number of files in its folder that are not used, by reason
    published: bool = False  # publications use these test images, so all are kept, even those that are in train too


def read_dataset(data: Data) -> RawDataset:
    """Read the data set `data.source`. If it is public and not on this machine, download it first.

    Raises `RRCMError` for an unknown name, a missing folder or file, a folder without images, a damaged file, or fewer
    than two classes.
    """
    if data.source not in DATASETS:
        close = difflib.get_close_matches(data.source, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known data sets: {', '.join(DATASETS)}"
        raise RRCMError(f"data.source {data.source}: unknown data set; {hint}")
    dataset = DATASETS[data.source](data)
    if len(dataset.classes) < 2:
        name = printable(dataset.classes[0])
        raise RRCMError(
            f"data.root {data.root}: holds one class, {name}; a classifier needs two. "
            "Set data.root to the folder whose subfolders are the classes"
        )
    for split in (dataset.train, dataset.test):
        if split is not None:
            checked(
                split, len(dataset.classes), f"data.source {data.source}"
            )  # the reader may come from another package
    return dataset


def download_folder(data: Data) -> Path:
    """The folder of a downloadable data set: data.root, which must exist, or RAW/<source>."""
    folder = in_repository(data.root or RAW / data.source)
    if data.root and not folder.is_dir():
        raise RRCMError(f"data.root {data.root}: no such dataset folder; create it to download there, or set null")
    return folder


def first_with(folders: Iterable[Path], name: str) -> Path | None:
    """The first folder that contains a file of this name, or None."""
    return next((folder for folder in folders if (folder / name).exists()), None)


def download(name: str, address: str, action: Callable[[], object]) -> None:
    """Run the download `action`. Raises `RRCMError` if it fails."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # no network, or a wrong checksum
        problem = f"{name}: download from {address} failed ({one_line(error)})"
        raise RRCMError(f"{problem}; download it by hand and set data.root") from None


def checked(split: RawSplit, num_classes: int, source: Path | str) -> RawSplit:
    """The split with its labels as int64. Raises `RRCMError` unless each image has one label in 0..num_classes-1."""
    images, labels = split.images, split.labels.astype(np.int64)
    if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise RRCMError(
            f"{source}: {len(labels)} labels for {len(images)} images, or a label outside 0..{num_classes - 1}; "
            "correct it or download it again"
        )
    return RawSplit(images, labels)


def check_content(path: Path, name: str, content: bytes, expected: str) -> None:
    """Raise `RRCMError` unless the content of the published file `name` has the `expected` hash.

    The hash is the output of `git hash-object` for the unpacked file. Archives are not compared, since Debian, for
    example, compresses its own.
    """
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    if digest.hexdigest() != expected:
        raise RRCMError(
            f"{path}: has other content than the published {name}, which other data sets may have too; download it "
            "again, or set data.root to the right folder"
        )
