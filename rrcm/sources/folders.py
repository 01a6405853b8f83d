"""Data sets stored as folders of images: ImageNet, and your own."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rrcm.config import Data
from rrcm.data.datasets import RawDataset, RawSplit
from rrcm.data.images import (
    LISTED,
    SPLIT_NAMES,
    SUFFIXES,
    class_name,
    is_folder,
    is_left_out,
    label_of,
    list_images,
    natural_order,
)
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import in_repository

CLASS_ORDER = "natural"  # of class folders: 2 before 10


def read_imagenet(data: Data) -> RawDataset:
    """ImageNet's folders train/ and val/. The official validation images are our test images."""
    return _read_train_and_test(_root(data), "val")._replace(published=True)


def read_imagefolder(data: Data) -> RawDataset:
    """Class folders under train/ and test/, or directly under the root."""
    root = _root(data)
    names = _folders(root)
    if "train" in names or (names and all(name.casefold() in SPLIT_NAMES for name in names)):
        return _read_train_and_test(root, "test")
    classes, images, left_out = _read_class_folders(root)
    return RawDataset(classes, images, None, CLASS_ORDER, left_out)


def _read_train_and_test(root: Path, test: str) -> RawDataset:
    """Class folders below root/train and root/`test`."""
    names = _folders(root)
    for name, content in (("train", "training"), (test, "test")):
        if name not in names:
            held = ", ".join(f"{printable(other)}/" for other in names[:5]) or "no folders"
            raise RRCMError(
                f"{root}: holds {held} but no {name}/; rename the folder of the {content} images to {name}/ "
                "(validation images are split off train/)"
            )
    classes, train, left_out = _read_class_folders(root / "train")
    _, test_images, left_out_of_test = _read_class_folders(root / test, classes)
    left_out += left_out_of_test
    for name in set(names) - {"train", test}:
        left_out[f"images in {printable(name)}/, which is not used"] += len(list_images(root / name).files)
    return RawDataset(classes, train, test_images, CLASS_ORDER, left_out)


def _read_class_folders(folder: Path, classes: Sequence[str] = ()) -> tuple[list[str], RawSplit, Counter[str]]:
    """Class names in natural order (or the given `classes`), image files with labels, and counts of files left out.

    Raises `RRCMError` for folders that cannot be classes, are not among the given classes, or contain no images.
    """
    by_class: dict[str, Path] = {}
    for name in _folders(folder):
        try:
            other = by_class.setdefault(class_name(name), folder / name)
        except ValueError as error:
            raise RRCMError(f"{folder}: class folder {name!r} {error}") from None
        if other.name != name:
            raise RRCMError(f"{folder}: two class folders are called {class_name(name)}; rename one of them")
    if not by_class:
        raise RRCMError(f"{folder}: holds no class folders; put the images of each class into its own folder")
    if unknown := [name for name in by_class if classes and name not in classes]:
        raise RRCMError(f"{folder}: class folder {unknown[0]} is not among the training images; remove or rename it")
    labels = {name: label for label, name in enumerate(classes or sorted(by_class, key=natural_order))}
    listing = list_images(folder)
    labelled = [(file, label) for file in listing.files if (label := label_of(file, labels)) is not None]
    listing.left_out["images outside class folders"] += len(listing.files) - len(labelled)
    elsewhere = {link.parts[0]: listed for link, listed in listing.links}
    with_images = {label for _, label in labelled}
    for name, path in by_class.items():
        if labels[name] not in with_images:
            kinds = ", ".join(sorted(SUFFIXES))
            if path.name in elsewhere:
                raise RRCMError(f"{path}: leads only to what is in {elsewhere[path.name]}; remove one of the classes")
            raise RRCMError(f"{path}: class folder without images ({kinds}); add some or remove it")
    linked = [[label_of(path / "_", labels) for path in paths] for paths in listing.links]
    between = sum(None not in pair and pair[0] != pair[1] for pair in linked)
    listing.left_out[LISTED] -= between
    listing.left_out["links from one class to images of another"] += between
    files = np.empty(len(labelled), object)
    files[:] = [folder / file for file, _ in labelled]
    return list(labels), RawSplit(files, np.array([label for _, label in labelled], np.int64)), listing.left_out


def _folders(folder: Path) -> list[str]:
    """The names of the folders in `folder` that are read, in natural order. Raises `RRCMError` for a missing folder."""
    try:
        return sorted(
            (e.name for e in os.scandir(folder) if is_folder(e) and not is_left_out(e.name)), key=natural_order
        )
    except OSError as error:
        raise RRCMError(f"{folder}: no such dataset folder ({error.strerror}); set data.root to where it is") from None


def _root(data: Data) -> Path:
    """data.root, which must be set for data sets that cannot be downloaded."""
    if data.root is None:
        raise RRCMError(f"data.root: {data.source} has no default folder; set it to the folder of your images")
    return in_repository(data.root)
