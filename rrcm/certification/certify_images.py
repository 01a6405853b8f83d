"""Certify the images of a folder: find and decode them, certify them in order, write the certificates."""

import hashlib
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from rrcm.certification.journal import append_states, is_possible_state, open_journal, restore_states
from rrcm.certification.record import make_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables, samples_path
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import ImageState
from rrcm.certification.stopping import ABSTAIN, StoppingRule
from rrcm.certification.votes import certificate_frame
from rrcm.data.augment import centre_crop, to_array
from rrcm.data.images import (
    Listing,
    class_level,
    describe_left_out,
    label_of,
    list_images,
    read_image,
    refuse_unreadable,
)
from rrcm.data.shards import evenly_spaced
from rrcm.models.folders import CONFIG
from rrcm.models.load import LoadedClassifier, class_folders
from rrcm.utils.distributed import pick_device
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import read_json, sha256_file, sha256_folder
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.tensors import sha256_tensors

FILES = ["idx", "file", "class", "samples", "stop_reason"]


@dataclass
class FileState(ImageState):
    """The state of an image file. Its pixels may be others when a stopped run is continued."""

    content: str = ""  # a hash of them


class FolderCertificates(NamedTuple):
    """The certificates of a folder's images."""

    frame: pd.DataFrame  # one row per image: that of `certificate_frame`, with `file` and `class` (a name or "")
    paths: list[Path]  # of the images, in the same order
    sha256: str  # of their pixels (`sha256_images`)
    smoothed: SmoothedClassifier
    batch_size: int
    seconds: float  # of computing, over all starts
    run: RunState  # to be finished when everything is written


def find_images(folder: Path, exclude: Collection[Path] = ()) -> Listing:
    """`list_images`, without the files `exclude`. Raises `RRCMError` if there is none."""
    found = list_images(folder)
    excluded = {path.resolve() for path in exclude}
    found.files = [file for file in found.files if (folder / file).resolve() not in excluded]
    if not found.files:
        left_out = describe_left_out(found.left_out)
        raise RRCMError(
            f"{printable(folder)}: no images in it or below{f', only {left_out}' if left_out else ''}; "
            "give a folder with png, jpg or similar files"
        )
    return found


def read_square(path: Path, loaded: LoadedClassifier) -> np.ndarray:
    """The central square of an image file at the classifier's size, as in the pipeline: uint8 (C, H, W).

    Raises `RRCMError` for a file that cannot be decoded.
    """
    return to_array(centre_crop(read_image(path, loaded.channels), loaded.image_size))


def certify_folder(
    found: Listing,
    loaded: LoadedClassifier,
    rule: StoppingRule,
    output: Path,
    *,
    limit: int | None = None,
    skip_unreadable: bool = False,
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int | None = None,
    device: str = "auto",
) -> FolderCertificates:
    """Certify the images that `find_images` found, or `limit` of them, evenly spaced.

    Image i of the sorted list has the noise of index i under the seed. `find_labels` says which images have a known
    label. Any other image has the label UNKNOWN and is never counted as correct. Certificates do not depend on labels.

    All images are decoded before the first is certified, and again when they are needed, so memory does not grow with
    the folder. The counts are kept in a hidden folder beside `output` until the run is finished, so a killed run
    continues. Raises `RRCMError` for bad input, after naming all unreadable images unless they are skipped, and
    KeyboardInterrupt with a text that says how many images are finished.
    """
    if limit is not None and limit < 1:
        raise RRCMError(f"limit = {limit}: must be at least 1")
    smoothed = SmoothedClassifier(
        loaded.classifier.to(_pick_device(device)),
        rule.sigma,
        loaded.num_classes,
        seed=seed,
        batch_size=batch_size,
        precision=precision,
    )
    positions = evenly_spaced(len(found.files), limit).tolist()
    states = _check_images(found, positions, loaded, skip_unreadable)
    example = torch.zeros(loaded.channels, loaded.image_size, loaded.image_size)
    size = smoothed.find_batch_size(example)
    description = [seed, size, smoothed.precision, smoothed.device.type]
    description += [torch.get_num_threads(), loaded.image_size]
    mark = fingerprint(description, {}, __name__, smoothed.model, rule)
    run = RunState(f".{output.name}", mark, output.absolute().parent)
    run.lock()
    _certify_files(smoothed, found, states, loaded, rule, run)
    frame = _frame(states, rule, found.files, find_labels(found, loaded), loaded)
    paths = [found.folder / found.files[state.index] for state in states]
    seconds, content = sum(state.seconds for state in states), sha256_images(state.content for state in states)
    return FolderCertificates(frame, paths, content, smoothed, size, seconds, run)


def find_labels(found: Listing, loaded: LoadedClassifier) -> list[int | None]:
    """The label of each listed image; None without one. Prints which folders they are from, unless that is plain.

    All labels are from one level of folders below that of the listing: where folders are named after classes, or else
    have numbers of classes. If there is none such, the folder of the listing may itself be named after a class.
    """
    named, classes = class_folders(loaded, numbers=False), class_folders(loaded)
    own, note = found.folder.resolve(), None
    level = class_level(found.files, named)
    if level is None:
        level, note = class_level(found.files, classes), "the folders are taken for numbers of classes"
    if level is not None:
        if level or note:
            where = f"labels are from the folders {printable(own)}{'/*' * (level + 1)}"
            print(f"note: {where}{f'; {note}' if note else ''}", file=sys.stderr)
        return [label_of(file, classes, level) for file in found.files]
    label = label_of(Path(own.name, "image"), named)
    note = "the images have no labels: no folder is named after a class of the model"
    if label is not None:
        note = f"all images have the label {printable(loaded.class_names[label])}, as their folder is called {own.name}"
    print(f"note: {note}", file=sys.stderr)
    return [label] * len(found.files)


def folder_files(
    output: Path, found: FolderCertificates, loaded: LoadedClassifier, model: str, settings: Mapping[str, object]
) -> dict[Path, bytes]:
    """What is written for a folder, by path: `certificate_tables`, `files_path(output)` with the images, the record.

    `model` and the `settings` of the stopping rule are those of the command.
    """
    names = found.frame[FILES].to_csv(sep="\t", index=False, lineterminator="\n")
    tables = certificate_tables(output, found.frame) | {files_path(output): names.encode()}
    record = make_record(
        found.smoothed,
        found.batch_size,
        tables,
        model=identify_model(model, loaded),
        data={"sha256": found.sha256, "split": None},
        image_size=loaded.image_size,
        labelled=False,
        compile=False,
        **settings,
    )
    return tables | {record_path(output): record_bytes(record)}


def output_paths(output: Path) -> list[Path]:
    """The paths of `folder_files`."""
    return [output, samples_path(output), files_path(output), record_path(output)]


def identify_model(model: str, loaded: LoadedClassifier) -> dict[str, str]:
    """The entry `model` of a record: what kind of thing `model` names, and a hash of it."""
    path = Path(model)
    if (path / CONFIG).is_file():
        return {"kind": read_json(path / CONFIG).get("kind", "timm"), "sha256": sha256_folder(path)}
    if path.is_file():
        return {"kind": "file", "sha256": sha256_file(path)}
    return {"kind": "weights", "sha256": sha256_tensors(loaded.classifier.state_dict())}


def sha256_images(contents: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the hashes of images' pixels, in order."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def sha256_pixels(pixels: np.ndarray) -> str:
    """Hexadecimal SHA-256 of an image's pixels, as `read_square` returns them."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def files_path(output: Path) -> Path:
    """OUTPUT.files.tsv, beside OUTPUT.tsv."""
    return output.with_name(f"{output.stem}.files.tsv")


def _pick_device(name: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise RRCMError(f"device = {name!r}: must be auto, cpu, cuda or a GPU such as cuda:0")
    return pick_device(name)


def _check_images(
    found: Listing, positions: Sequence[int], loaded: LoadedClassifier, skip_unreadable: bool
) -> list[FileState]:
    """Decode the images at `positions` of the list: a state of each that can be read, without its pixels."""
    states, problems, nothing = [], [], torch.empty(0)
    with Progress(len(positions), f"read {printable(found.folder)}", "images", only_if_long=True) as progress:
        for position in positions:
            try:
                pixels = read_square(found.folder / found.files[position], loaded)
                states.append(FileState(position, nothing, content=sha256_pixels(pixels)))
            except RRCMError as error:
                problems.append(str(error))
            progress.update()
    if problems and not (skip_unreadable and states):
        advice = "replace or remove them" + (", or go on without them with --skip-unreadable" if states else "")
        refuse_unreadable(problems, len(positions), advice)
    if problems:
        skipped = f"note: skips {len(problems):,} of {len(positions):,} images, named above"
        print(*problems, skipped, sep="\n", file=sys.stderr)
    return states


def _certify_files(
    smoothed: SmoothedClassifier,
    found: Listing,
    states: Sequence[FileState],
    loaded: LoadedClassifier,
    rule: StoppingRule,
    run: RunState,
) -> None:
    """Finish the states. Pixels are read when they are needed, and dropped as soon as an image is finished."""
    nothing = torch.empty(0)
    restore_states(states, run.folder, lambda saved: is_possible_state(saved, rule, loaded.num_classes))
    done, samples_before = sum(state.stop_reason != "" for state in states), sum(state.samples for state in states)
    if samples_before:
        print(f"resuming: {done:,} of {len(states):,} images are finished", file=sys.stderr)

    def decoded() -> Iterator[ImageState]:
        for state in states:
            if not state.stop_reason:
                pixels = read_square(found.folder / found.files[state.index], loaded)
                state.image = to_unit_range(torch.from_numpy(pixels.copy()))
                yield state

    label = f"certify {printable(found.folder)}"
    with Progress(len(states), label, "images", done=done) as progress, open_journal(run.folder) as journal:
        try:
            for changed in smoothed.certify_stream(decoded(), rule):
                append_states(journal, changed)
                finished = [state for state in changed if state.stop_reason]
                for state in finished:
                    state.image = nothing
                samples = sum(state.samples for state in states) - samples_before
                rate = samples / (time.monotonic() - progress.start)
                progress.update(len(finished), samples=f"{rate:,.0f}/s")
        except KeyboardInterrupt:
            text = f": {progress.done} of {len(states)} images are finished; the same command continues from there"
            raise KeyboardInterrupt(text) from None


def _frame(
    states: Sequence[ImageState],
    rule: StoppingRule,
    files: Sequence[Path],
    labels: Sequence[int | None],
    loaded: LoadedClassifier,
) -> pd.DataFrame:
    """The frame of `FolderCertificates`, from files and labels by position."""
    labelled = [replace(state, label=labels[state.index]) for state in states]
    frame = certificate_frame(labelled, rule, loaded.num_classes)
    names = ["" if predict == ABSTAIN else loaded.class_names[predict] for predict in frame["predict"]]
    return frame.assign(**{"file": [printable(files[index]) for index in frame["idx"]], "class": names})
