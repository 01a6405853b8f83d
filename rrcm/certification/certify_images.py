"""Certify the images of a folder: a table to read, a file in the field's format, a sheet of the images."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tabulate import tabulate

from rrcm.certification.results import ABSTAIN, COLUMNS, UNKNOWN, write_certificates
from rrcm.certification.smoothing import ImageState, SmoothedClassifier, certificate
from rrcm.certification.stopping import Procedure
from rrcm.data.augment import centre_crop, to_array
from rrcm.models.load import LoadedClassifier, class_folders
from rrcm.report.figures import FORMATS, Thumbnail, draw_certified_images, rounded_down, save, verdict
from rrcm.utils.distributed import pick_device
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path
from rrcm.utils.progress import Progress

UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that PIL knows but cannot decode by itself
ON_A_SHEET = 48
FILES = ["idx", "file", "class", "samples", "stopped"]


def find_images(folder: Path, but: Path | None = None) -> list[Path]:
    """Files in `folder` and below that have the extension of an image format, as a person would sort them: img2 before
    img10. Hidden ones are left out, and the file `but`. Raises `RRCMError` when there are none."""
    if not folder.is_dir():
        raise RRCMError(f"{folder}: no such folder; give one with images")
    kinds = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in kinds.items() if kind in Image.OPEN.keys() - UNREADABLE}
    places = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    visible = [place for place in places if not any(part.startswith(".") for part in place.parts)]
    images = [folder / place for place in sorted(visible, key=_as_people_sort) if not (folder / place).is_dir()]
    images = [path for path in images if but is None or path.resolve() != but.resolve()]
    if not images:
        raise RRCMError(f"{folder}: no images in it or below (png, jpg and the like); give a folder that has some")
    return images


def _as_people_sort(path: Path) -> tuple:
    """Text and numbers by turns, part by part; then the path itself, so that 1.png and 01.png have an order."""
    parts = [re.split(r"(\d+)", part.casefold()) for part in path.parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], str(path)


def read_image(path: Path, subject: LoadedClassifier) -> np.ndarray:
    """The central square of an image file, cut as the pipeline does for evaluation: uint8 (C, H, W) for the subject.

    16-bit grey becomes 8-bit, what is transparent is laid on white, of an animation the first frame is taken. Raises
    `RRCMError` for a file that cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image.load()  # all of it: a file cut short opens well
            pixels = _opaque(image).convert("L" if subject.channels == 1 else "RGB")
            return to_array(centre_crop(pixels, subject.image_size))
    except Exception as error:  # decoders raise anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RRCMError(f"{path}: cannot be decoded ({reason}); replace or remove it") from None


def _opaque(image: Image.Image) -> Image.Image:
    """Without alpha, 8 bits a channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"pixels of mode {image.mode} that are not in 0..65535: which of them is white?")
        return Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def certify_folder(
    folder: Path,
    subject: LoadedClassifier,
    plan: Procedure,
    *,
    output: Path,  # .tsv; beside it OUTPUT.files.tsv, which says which image is which
    sheet: Path,  # .png or .svg
    limit: int | None = None,  # the first so many images
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int | None = None,
    device: str = "auto",
) -> str:
    """Certify the images of `folder`, write `output` and `sheet`, return a table of them with a summary below.

    Image i of the sorted list has the noise of index i under the seed. Where an image lies in a folder named as one of
    the classes its label is known; else it is UNKNOWN, and no answer counts as correct. The certificates do not depend
    on labels. All images are decoded before the first is certified, and again when it is their turn: memory does not
    grow with the folder. Raises `RRCMError` for what a person can put right, and KeyboardInterrupt with a text that
    says how far it came; then nothing is written.
    """
    if limit is not None and limit < 1:
        raise RRCMError(f"limit = {limit}: must be at least 1")
    files = output.with_name(f"{output.stem}.files.tsv")
    _check_places(output, files, sheet)
    images = find_images(folder, but=sheet)[:limit]
    smoothed = SmoothedClassifier(
        subject.network.to(_pick_device(device)),
        plan.sigma,
        len(subject.names),
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    for path in images:
        read_image(path, subject)

    start = time.monotonic()
    candidates = _count_votes(smoothed, images, subject, plan, f"certify {folder}")
    seconds = time.monotonic() - start

    frame = _frame(candidates, plan, [path.relative_to(folder) for path in images], subject)
    write_certificates(output, frame)
    with atomic_path(files) as scratch:
        frame[FILES].to_csv(scratch, sep="\t", index=False, lineterminator="\n")
    tiles = [_tile(frame.loc[i], path, subject) for i, path in enumerate(images[:ON_A_SHEET])]
    some = f", the first {ON_A_SHEET} of {len(images):,} images" if len(images) > ON_A_SHEET else ""
    save(draw_certified_images(tiles, f"σ = {plan.sigma:g}, n = {plan.looks[-1]:,}, α = {plan.alpha:g}{some}"), sheet)
    return f"{_table(frame)}\n\n{_summary(frame, plan, seconds)}\nwritten: {output}, {files}, {sheet}"


def _check_places(*paths: Path) -> None:
    """Better now than after an hour of computing."""
    for path in paths:
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
            raise RRCMError(f"{path}: no file can be written there; give another place")
    if len(set(paths)) < len(paths):
        raise RRCMError(f"{paths[-1]}: is to hold both the certificates and the sheet; give two names")
    if paths[-1].suffix not in FORMATS:
        raise RRCMError(f"{paths[-1]}: the sheet's name must end in {' or '.join(FORMATS)}")


def _pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise RRCMError(f"device = {name!r}: must be auto, cpu, cuda or cuda:0 and so on")
    return pick_device(name)


def _count_votes(
    smoothed: SmoothedClassifier, images: Sequence[Path], subject: LoadedClassifier, plan: Procedure, label: str
) -> list[ImageState]:
    """Finished candidates in the order of `images`; their pixels are dropped as soon as they are."""
    taken: list[ImageState] = []

    def candidates() -> Iterator[ImageState]:
        for index, path in enumerate(images):
            taken.append(ImageState(index, torch.from_numpy(read_image(path, subject).copy()).float() / 255))
            yield taken[-1]

    with Progress(len(images), label, "images") as progress:
        try:
            for moved in smoothed.run(candidates(), plan):
                finished = [candidate for candidate in moved if candidate.stopped]
                for candidate in finished:
                    candidate.image = torch.empty(0)
                rate = sum(candidate.samples for candidate in taken) / (time.monotonic() - progress.start)
                progress.update(len(finished), samples=f"{rate:,.0f}/s")
        except KeyboardInterrupt:
            text = f": {progress.done} of {len(images)} images were finished, nothing was written"
            raise KeyboardInterrupt(text) from None
    return taken


def _frame(
    candidates: Sequence[ImageState], plan: Procedure, places: Sequence[Path], subject: LoadedClassifier
) -> pd.DataFrame:
    """A row an image: the field's columns, then its `file`, the `class` by name or "", `samples` and `stopped`."""
    known, rows = class_folders(subject), []
    for candidate, place in zip(candidates, places, strict=True):
        answer, label = certificate(candidate, plan), known.get(place.parent.name, UNKNOWN)
        name = "" if answer.predict == ABSTAIN else subject.names[answer.predict]
        field = (candidate.index, label, answer.predict, answer.radius, int(answer.predict == label != UNKNOWN))
        rows.append((*field, candidate.seconds, _printable(place), name, answer.samples, answer.stopped))
    return pd.DataFrame(rows, columns=[*COLUMNS, *FILES[1:]])


def _printable(path: Path) -> str:
    """File names can hold anything, line ends and bytes that are no text among it."""
    return "".join(character if character.isprintable() else "?" for character in str(path))


def _tile(row: pd.Series, path: Path, subject: LoadedClassifier) -> Thumbnail:
    """`row` is the image's of `_frame`."""
    certified = row["label"] == UNKNOWN and row["predict"] != ABSTAIN
    kind = "certified" if certified else verdict(row["predict"], row["label"])
    return Thumbnail(read_image(path, subject).transpose(1, 2, 0) / 255, row["file"], row["class"], row["radius"], kind)


def _table(frame: pd.DataFrame) -> str:
    radii = np.where(frame["predict"] == ABSTAIN, "abstains", frame["radius"].map(rounded_down))
    columns = {
        "file": frame["file"],
        "class": frame["class"].replace("", "-"),
        "radius": radii,
        "samples": frame["samples"].map("{:,}".format),
    }
    return tabulate(columns, headers="keys", disable_numparse=True, colalign=("left", "left", "right", "right"))


def _summary(frame: pd.DataFrame, plan: Procedure, seconds: float) -> str:
    labelled, abstained = frame[frame["label"] != UNKNOWN], (frame["predict"] == ABSTAIN).sum()
    correct = f" ({labelled['correct'].sum():,} of {len(labelled):,} of known label correct)" if len(labelled) else ""
    return (
        f"{len(frame) - abstained:,} certified{correct}, {abstained:,} abstained; {seconds:.1f} s, "
        f"{frame['samples'].sum() / seconds:,.0f} samples/s; each certificate is wrong with probability at most "
        f"{plan.alpha:g}"
    )
