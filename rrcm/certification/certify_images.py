"""Certify the images of a folder: find and decode them, certify them in order, write the certificates."""

import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image

from rrcm.certification.results import ABSTAIN, COLUMNS, UNKNOWN, write_certificates
from rrcm.certification.smoothing import ImageState, SmoothedClassifier, certificate
from rrcm.certification.stopping import StoppingRule
from rrcm.data.augment import centre_crop, to_array
from rrcm.models.load import LoadedClassifier, class_folders
from rrcm.utils.distributed import pick_device
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path
from rrcm.utils.progress import Progress

UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that PIL lists but cannot decode by itself
FILES = ["idx", "file", "class", "samples", "stop_reason"]


class FolderCertificates(NamedTuple):
    """The certificates of a folder's images."""

    frame: pd.DataFrame  # one row per image: COLUMNS, then `file`, `class` (a name or ""), `samples`, `stop_reason`
    paths: list[Path]  # of the images, in the same order
    seconds: float


def find_images(folder: Path, exclude: Path | None = None) -> list[Path]:
    """Files in `folder` and below with the extension of an image format, in natural order: img2 before img10.

    Hidden files and the file `exclude` are left out. Raises `RRCMError` when there are none.
    """
    if not folder.is_dir():
        raise RRCMError(f"{folder}: no such folder; give one with images")
    formats = Image.registered_extensions()
    suffixes = {suffix for suffix, name in formats.items() if name in Image.OPEN.keys() - UNREADABLE}
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    images = [folder / path for path in sorted(visible, key=_natural_order) if not (folder / path).is_dir()]
    images = [path for path in images if exclude is None or path.resolve() != exclude.resolve()]
    if not images:
        raise RRCMError(f"{folder}: no images in it or below; give a folder with png, jpg or similar files")
    return images


def _natural_order(path: Path) -> tuple:
    """Sort key: numbers inside names by value. The path itself decides between 1.png and 01.png."""
    parts = [re.split(r"(\d+)", part.casefold()) for part in path.parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], str(path)


def read_image(path: Path, loaded: LoadedClassifier) -> np.ndarray:
    """The central square of an image file at the classifier's size: uint8 (C, H, W).

    It is cropped and resized as in the pipeline's evaluation. 16-bit grey becomes 8-bit, transparent pixels are put on
    white, and of an animation the first frame is read. Raises `RRCMError` for a file that cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image.load()  # decodes all of it: a truncated file opens without an error
            pixels = _opaque(image).convert("L" if loaded.channels == 1 else "RGB")
            return to_array(centre_crop(pixels, loaded.image_size))
    except Exception as error:  # decoders raise anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RRCMError(f"{path}: cannot be decoded ({reason}); replace or remove it") from None


def _opaque(image: Image.Image) -> Image.Image:
    """The image without alpha, 8 bits per channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"pixels of mode {image.mode} outside 0..65535 have no known white")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def certify_folder(
    folder: Path,
    loaded: LoadedClassifier,
    rule: StoppingRule,
    *,
    exclude: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int | None = None,
    device: str = "auto",
) -> FolderCertificates:
    """Certify the images of `folder`, or the first `limit` of them, without the file `exclude`.

    Image i of the sorted list has the noise of index i under the seed. An image in a folder named after a class has a
    known label. Any other image has the label UNKNOWN and is never counted as correct. Certificates do not depend on
    labels.

    All images are decoded before the first is certified, and again when they are needed, so memory does not grow with
    the folder. Raises `RRCMError` for bad input, and KeyboardInterrupt with a text that says how many were finished.
    """
    if limit is not None and limit < 1:
        raise RRCMError(f"limit = {limit}: must be at least 1")
    paths = find_images(folder, exclude)[:limit]
    smoothed = SmoothedClassifier(
        loaded.classifier.to(_pick_device(device)),
        rule.sigma,
        loaded.num_classes,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    for path in paths:
        read_image(path, loaded)
    start = time.monotonic()
    states = _certify_states(smoothed, paths, loaded, rule, f"certify {folder}")
    seconds = time.monotonic() - start
    frame = _frame(states, rule, [path.relative_to(folder) for path in paths], loaded)
    return FolderCertificates(frame, paths, seconds)


def write_folder_certificates(output: Path, frame: pd.DataFrame) -> None:
    """Write `output` in Cohen et al.'s format and `files_path(output)`, which names the images."""
    write_certificates(output, frame)
    with atomic_path(files_path(output)) as scratch:
        frame[FILES].to_csv(scratch, sep="\t", index=False, lineterminator="\n")


def files_path(output: Path) -> Path:
    """OUTPUT.files.tsv, beside OUTPUT.tsv."""
    return output.with_name(f"{output.stem}.files.tsv")


def _pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise RRCMError(f"device = {name!r}: must be auto, cpu, cuda or a GPU such as cuda:0")
    return pick_device(name)


def _certify_states(
    smoothed: SmoothedClassifier, paths: Sequence[Path], loaded: LoadedClassifier, rule: StoppingRule, label: str
) -> list[ImageState]:
    """The finished states in the order of `paths`. The pixels of an image are dropped as soon as it is finished."""
    states: list[ImageState] = []

    def decoded() -> Iterator[ImageState]:
        for index, path in enumerate(paths):
            states.append(ImageState(index, torch.from_numpy(read_image(path, loaded).copy()).float() / 255))
            yield states[-1]

    with Progress(len(paths), label, "images") as progress:
        try:
            for changed in smoothed.certify_stream(decoded(), rule):
                finished = [state for state in changed if state.stop_reason]
                for state in finished:
                    state.image = torch.empty(0)
                rate = sum(state.samples for state in states) / (time.monotonic() - progress.start)
                progress.update(len(finished), samples=f"{rate:,.0f}/s")
        except KeyboardInterrupt:
            text = f": {progress.done} of {len(paths)} images were finished, nothing was written"
            raise KeyboardInterrupt(text) from None
    return states


def _frame(
    states: Sequence[ImageState], rule: StoppingRule, files: Sequence[Path], loaded: LoadedClassifier
) -> pd.DataFrame:
    """The frame of `FolderCertificates`; `files` are relative to the folder."""
    classes, rows = class_folders(loaded), []
    for state, file in zip(states, files, strict=True):
        found, label = certificate(state, rule), classes.get(file.parent.name, UNKNOWN)
        name = "" if found.prediction == ABSTAIN else loaded.class_names[found.prediction]
        field = (state.index, label, found.prediction, found.radius, int(found.prediction == label != UNKNOWN))
        rows.append((*field, state.seconds, _printable(file), name, found.samples, found.stop_reason))
    return pd.DataFrame(rows, columns=[*COLUMNS, *FILES[1:]])


def _printable(path: Path) -> str:
    """The path without control characters: file names may contain line ends and bytes that are not text."""
    return "".join(character if character.isprintable() else "?" for character in str(path))
