"""The facts on which the choice of `rrcm train` rests: the folder of images, and this machine."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rrcm.config import Data
from rrcm.data.datasets import RawDataset
from rrcm.data.sharding import identify_images, split_off_test
from rrcm.data.shards import evenly_spaced
from rrcm.sources.folders import read_imagefolder
from rrcm.utils.distributed import pick_device
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.provenance import available_cores, describe_environment

LEAST_IMAGES = 5  # per class: one to test, one to validate and three to learn from
FEW_IMAGES = 100  # per class; a note is printed for fewer
UNBALANCED = 10  # a note is printed if one class has this many times the images of another
BUSY = 0.75  # a note is printed if the load of each core is at least this
MEASURED = 1000  # images whose size is read, evenly spaced
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")  # modes that images.py reads as grey


@dataclass(frozen=True)
class Folder:
    """A folder of images, split as write_shards will split it."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]  # images of each class, without those that are held out
    held_out: tuple[str, ...]  # the test images: paths relative to the folder, in the order of the test split
    side: int  # the median of the shorter sides, pixels
    pixels: int  # the average number of pixels of an image
    channels: int  # 1 if all images are grey, else 3

    @property
    def images(self) -> int:
        """The number of images for training and validation."""
        return sum(self.counts)

    @property
    def description(self) -> str:
        """The folder in one line."""
        least, most = min(self.counts), max(self.counts)
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        total, colours = self.images + len(self.held_out), "grey" if self.channels == 1 else "in colour"
        return (
            f"{total:,} images {colours}, shorter side {self.side} pixels; {len(self.classes)} classes with {each} "
            f"images each to learn from; {len(self.held_out):,} images held out"
        )

    @property
    def notes(self) -> list[str]:
        """Warnings about this folder, in one line each."""
        notes, least, most = [], min(self.counts), max(self.counts)
        smallest = printable(self.classes[self.counts.index(least)])
        if least < FEW_IMAGES:
            notes.append(f"class {smallest} has {least} images to learn from; {FEW_IMAGES} or more are better")
        if most >= UNBALANCED * least:
            largest = printable(self.classes[self.counts.index(most)])
            notes.append(
                f"class {largest} has {most / least:.0f} times as many images as {smallest}, and will be favoured"
            )
        return notes


@dataclass(frozen=True)
class Machine:
    """The machine that trains."""

    cores: int
    instructions: str  # of the CPU, such as AVX2
    gpus: tuple[str, ...]
    memory_gib: float
    load: float = 0.0  # processes that ran or waited for a core, on average over the last minute

    @property
    def notes(self) -> list[str]:
        """Warnings about this machine, in one line each."""
        if self.gpus or self.load < BUSY * self.cores:
            return []
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return [
            f"other programs keep this machine busy (load {self.load:.1f} on {cores}), so the work takes longer and "
            "estimates vary; with OMP_NUM_THREADS=1 it may be faster"
        ]

    @property
    def description(self) -> str:
        """The machine in one line."""
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''} with {self.instructions}"
        return f"{cores}, {self.memory_gib:g} GiB of memory, {', '.join(self.gpus) or 'no GPU'}"


def look_at_folder(folder: Path, data: Data) -> Folder:
    """Decode every image of `folder`. `data` has the settings with which `read_imagefolder` reads it.

    Raises `RRCMError` for a folder that is missing, has fewer than two classes or a class with fewer than LEAST_IMAGES
    images, and for images that cannot be read, after naming them all.
    """
    if not folder.is_dir():
        raise RRCMError(f"{folder}: no such folder; give one that has a folder of images for each class")
    dataset = read_imagefolder(data)
    names = [printable(name) for name in dataset.classes]
    if len(names) < 2:
        raise RRCMError(f"{folder}: has one class, {names[0]}; give a folder of two or more class folders")
    for name, count in zip(names, np.bincount(dataset.train.labels), strict=True):
        if count < LEAST_IMAGES:
            images = "1 image" if count == 1 else f"{count} images"
            raise RRCMError(f"{folder}: class {name} has {images}; add some, to have {LEAST_IMAGES}, or remove it")
    with ThreadPoolExecutor(available_cores()) as pool:
        dataset, _ = split_off_test(dataset, identify_images(dataset, data, pool))
    sides, areas, modes = _read_headers(dataset)
    return Folder(
        classes=tuple(dataset.classes),
        counts=tuple(np.bincount(dataset.train.labels, minlength=len(dataset.classes)).tolist()),
        held_out=tuple(Path(file).relative_to(folder).as_posix() for file in dataset.test.images),
        side=int(np.median(sides)),
        pixels=int(np.mean(areas)),
        channels=1 if set(modes) <= set(GREY) else 3,
    )


def _read_headers(dataset: RawDataset) -> tuple[list[int], list[int], list[str]]:
    """The shorter side, the pixels and the mode of some images."""
    sides, areas, modes = [], [], []
    for file in dataset.train.images[evenly_spaced(len(dataset.train.images), MEASURED)]:
        with Image.open(file) as image:
            sides.append(min(image.size))
            areas.append(image.width * image.height)
            modes.append(image.mode)
    return sides, areas, modes


def look_at_machine(device: str = "auto") -> Machine:
    """The parts of this machine that a training on `device` uses."""
    hardware = describe_environment(pick_device(device))["hardware"]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Machine(available_cores(), hardware["instructions"], tuple(hardware["gpus"]), hardware["memory_gib"], load)
