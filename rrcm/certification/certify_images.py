"""Certify the images of a folder: find and decode them, certify them in order, write the certificates.

The certificates are of a smoothed classifier or of a cascade of them.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.cascade_options import CascadeOptions
from rrcm.certification.cascade_rules import CascadeRule
from rrcm.certification.cascade_states import CascadeState, is_possible_cascade_state, new_state
from rrcm.certification.cascade_votes import cascade_frame
from rrcm.certification.driver import State, finish_states
from rrcm.certification.journal import is_possible_state
from rrcm.certification.record import ChosenThresholds, make_cascade_record, make_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables, samples_path
from rrcm.certification.runtimes import in_runtime, runtime_of
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
from rrcm.utils.distributed import DistEnv, WorkQueue, pick_device
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import read_json, sha256_file, sha256_folder
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.tensors import sha256_tensors

FILES = ["idx", "file", "class", "samples", "stop_reason"]


@dataclass
class FileState(ImageState):
    """The state of an image file. The file may have changed when a stopped run continues."""

    content: str = ""  # hash of the pixels


@dataclass
class CascadeFileState(CascadeState):
    """The state of an image file in a cascade."""

    content: str = ""  # hash of the pixels


class StateFunctions(NamedTuple):
    """The functions that work with the states of one kind of classifier."""

    new: Callable[[int, str, StoppingRule | CascadeRule], State]  # from the position and the hash of the pixels
    is_possible: Callable[..., bool]
    certificate_frame: Callable[..., pd.DataFrame]


def _new_cascade_state(position: int, content: str, rule: CascadeRule) -> CascadeFileState:
    return CascadeFileState(**vars(new_state(position, NOTHING, None, rule)), content=content)


NOTHING = torch.empty(0)
SMOOTHED = StateFunctions(
    lambda position, content, rule: FileState(position, NOTHING, content=content), is_possible_state, certificate_frame
)
CASCADED = StateFunctions(_new_cascade_state, is_possible_cascade_state, cascade_frame)


class FolderCertificates(NamedTuple):
    """The certificates of a folder's images."""

    frame: (
        pd.DataFrame
    )  # `certificate_frame` or `cascade_frame` with `file` and `class` (a name, or ""), one row per image
    paths: list[Path]  # of the images, in the order of the rows
    sha256: str  # of the pixels of all images (`sha256_images`)
    classifier: SmoothedClassifier | CascadedClassifier
    batch_size: int
    seconds: float  # of computing, including interrupted runs
    run: RunState  # call its `finish` when everything is written


def find_images(folder: Path, exclude: Collection[Path] = ()) -> Listing:
    """`list_images` without the files in `exclude`. Raises `RRCMError` if no image is left."""
    listing = list_images(folder)
    excluded = {path.resolve() for path in exclude}
    listing.files = [file for file in listing.files if (folder / file).resolve() not in excluded]
    if not listing.files:
        left_out = describe_left_out(listing.left_out)
        raise RRCMError(
            f"{printable(folder)}: no images in it or below{f', only {left_out}' if left_out else ''}; "
            "give a folder with png, jpg or similar files"
        )
    return listing


def read_square(path: Path, loaded: LoadedClassifier) -> np.ndarray:
    """The central square of an image file at the classifier's size, cut as in the pipeline: uint8 (C, H, W).

    Raises `RRCMError` for a file that cannot be decoded.
    """
    return to_array(centre_crop(read_image(path, loaded.channels), loaded.image_size))


def smooth(loaded: LoadedClassifier, sigma: float, device: str, **options: object) -> SmoothedClassifier:
    """`loaded` smoothed on the device that the user names, with further `options` of `SmoothedClassifier`."""
    return SmoothedClassifier(loaded.classifier.to(device_named(device)), sigma, loaded.num_classes, **options)


def smooth_cascade(cascade: CascadeOptions, device: str, **options: object) -> CascadedClassifier:
    """The cascade on the device that the user names, with further `options` of `SmoothedClassifier`."""
    loaded, device = cascade.loaded, device_named(device)
    models = [each.classifier.to(device) for each in loaded.scales]
    num_classes = loaded.scales[0].num_classes
    return CascadedClassifier(
        models, loaded.sigmas, cascade.thresholds, num_classes, can_pass=loaded.can_pass, **options
    )


def run_by(
    runtime: str, classifier: SmoothedClassifier | CascadedClassifier, loaded: LoadedClassifier
) -> SmoothedClassifier | CascadedClassifier:
    """The classifier with its networks run by a runtime (`in_runtime`). The note of the runtime is printed.

    `loaded` is the base classifier. For a cascade, it may be any of the base classifiers.
    """
    image = torch.zeros(loaded.channels, loaded.image_size, loaded.image_size)
    if isinstance(classifier, CascadedClassifier):
        classifier.share_batch_size(image)
        scales, note = in_runtime(runtime, classifier.scales, image)
        classifier.scales = nn.ModuleList(scales)
    else:
        (classifier,), note = in_runtime(runtime, [classifier], image)
    if note:
        print(f"note: {note}", file=sys.stderr)
    return classifier


def device_named(name: str) -> torch.device:
    """The device auto, cpu, cuda or cuda:N. Raises `RRCMError` for other names, and for a GPU that does not exist."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise RRCMError(f"device = {name!r}: must be auto, cpu, cuda or a GPU such as cuda:0")
    return pick_device(name)


def certify_folder(
    listing: Listing,
    loaded: LoadedClassifier,
    classifier: SmoothedClassifier | CascadedClassifier,
    rule: StoppingRule | CascadeRule,
    output: Path,
    *,
    limit: int | None = None,
    skip_unreadable: bool = False,
) -> FolderCertificates:
    """Certify the images that `find_images` found, or `limit` of them, evenly spaced.

    `classifier` certifies them. `loaded` is its base classifier. For a cascade, it may be any of the base classifiers.

    Image i of the sorted list has the noise of index i under the seed. `find_labels` says which images have a known
    label. Any other image has the label UNKNOWN and is never counted as correct. Certificates do not depend on labels.

    All images are decoded before the first is certified, and again when they are needed, so memory does not grow with
    the folder. The counts are kept in a hidden folder beside `output` until the run is finished, so a killed run
    continues. Raises `RRCMError` for bad input, after naming all unreadable images unless they are skipped, and
    KeyboardInterrupt with a text that says how many images are finished.
    """
    if limit is not None and limit < 1:
        raise RRCMError(f"limit = {limit}: must be at least 1")
    positions = evenly_spaced(len(listing.files), limit).tolist()
    cascade = isinstance(classifier, CascadedClassifier)
    functions, scales = (CASCADED, list(classifier.scales)) if cascade else (SMOOTHED, [classifier])
    contents = check_files(listing, positions, loaded, skip_unreadable)
    states = [functions.new(position, content, rule) for position, content in contents.items()]
    image = torch.zeros(loaded.channels, loaded.image_size, loaded.image_size)
    batch_size = classifier.share_batch_size(image) if cascade else classifier.find_batch_size(image)
    description = [scales[0].seed, batch_size, scales[0].precision, scales[0].device.type]
    description += [torch.get_num_threads(), loaded.image_size]
    mark = fingerprint(description, {}, __name__, *(scale.model for scale in scales), rule)
    run = RunState(f".{output.name}", mark, output.absolute().parent)
    is_possible = partial(functions.is_possible, rule=rule, num_classes=loaded.num_classes)
    queue = WorkQueue(DistEnv(0, 1, scales[0].device), "images")
    stream = partial(_certify_stream, listing, loaded, classifier, rule)
    finish_states(states, stream, run, is_possible, queue, f"certify {printable(listing.folder)}")
    make_frame = partial(functions.certificate_frame, rule=rule, num_classes=loaded.num_classes)
    frame = _frame(states, make_frame, listing.files, find_labels(listing, loaded), loaded)
    paths = [listing.folder / listing.files[state.index] for state in states]
    seconds, content = sum(state.seconds for state in states), sha256_images(state.content for state in states)
    return FolderCertificates(frame, paths, content, classifier, batch_size, seconds, run)


def find_labels(listing: Listing, loaded: LoadedClassifier) -> list[int | None]:
    """The label of each listed image, or None. Prints where the labels come from, unless this is obvious.

    All labels come from one level of folders inside the listed folder, where the folders are named after classes or
    have numbers of classes. If there is no such level, the listed folder itself may be named after a class.
    """
    named, classes = class_folders(loaded, numbers=False), class_folders(loaded)
    own, note = listing.folder.resolve(), None
    level = class_level(listing.files, named)
    if level is None:
        level, note = class_level(listing.files, classes), "the folders are taken for numbers of classes"
    if level is not None:
        if level or note:
            where = f"labels are from the folders {printable(own)}{'/*' * (level + 1)}"
            print(f"note: {where}{f'; {note}' if note else ''}", file=sys.stderr)
        return [label_of(file, classes, level) for file in listing.files]
    label = label_of(Path(own.name, "image"), named)
    note = "the images have no labels: no folder is named after a class of the model"
    if label is not None:
        note = f"all images have the label {printable(loaded.class_names[label])}, as their folder is called {own.name}"
    print(f"note: {note}", file=sys.stderr)
    return [label] * len(listing.files)


def folder_files(
    output: Path,
    certified: FolderCertificates,
    scales: Sequence[LoadedClassifier],
    models: Sequence[str],
    settings: Mapping[str, object],
    chosen: ChosenThresholds | None = None,
) -> dict[Path, bytes]:
    """The contents of all files for a folder, by path: `certificate_tables`, the list of images, and the record.

    `models` and the `settings` of the stopping rule are the options of the command. `scales` are the base classifiers.
    """
    names = certified.frame[FILES].to_csv(sep="\t", index=False, lineterminator="\n")
    tables = certificate_tables(output, certified.frame) | {files_path(output): names.encode()}
    identified = [identify_model(model, loaded) for model, loaded in zip(models, scales, strict=False)]
    entries = {
        "data": {"sha256": certified.sha256, "split": None},
        "image_size": scales[0].image_size,
        "labelled": False,
        "compile": False,
        **settings,
    }
    if isinstance(certified.classifier, CascadedClassifier):
        make, first = make_cascade_record, certified.classifier.scales[0]
        entries |= {"models": identified, "chosen": chosen}
    else:
        make, first = make_record, certified.classifier
        entries |= {"model": identified[0]}
    entries["runtime"] = runtime_of(first)
    record = make(certified.classifier, certified.batch_size, tables, **entries)
    return tables | {record_path(output): record_bytes(record)}


def output_paths(output: Path) -> list[Path]:
    """The paths of `folder_files`."""
    return [output, samples_path(output), files_path(output), record_path(output)]


def identify_model(model: str, loaded: LoadedClassifier) -> dict[str, str]:
    """The entry `model` of a record: whether `model` names a model folder, a file or timm weights, and a hash of it."""
    path = Path(model)
    if (path / CONFIG).is_file():
        return {"kind": read_json(path / CONFIG).get("kind", "timm"), "sha256": sha256_folder(path)}
    if path.is_file():
        return {"kind": "file", "sha256": sha256_file(path)}
    return {"kind": "weights", "sha256": sha256_tensors(loaded.classifier.state_dict())}


def sha256_images(contents: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the hashes of the images' pixels, in order."""
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def sha256_pixels(pixels: np.ndarray) -> str:
    """Hexadecimal SHA-256 of an image's pixels, as `read_square` returns them."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def files_path(output: Path) -> Path:
    """The list of images OUTPUT.files.tsv beside a certificate file OUTPUT.tsv."""
    return output.with_name(f"{output.stem}.files.tsv")


def check_files(
    listing: Listing, positions: Sequence[int], loaded: LoadedClassifier, skip_unreadable: bool
) -> dict[int, str]:
    """Decode the images at `positions` of the list. Returns the hash of the pixels of those that can be read."""
    contents, problems = {}, []
    with Progress(len(positions), f"read {printable(listing.folder)}", "images", only_if_long=True) as progress:
        for position in positions:
            try:
                contents[position] = sha256_pixels(read_square(listing.folder / listing.files[position], loaded))
            except RRCMError as error:
                problems.append(str(error))
            progress.update()
    if problems and not (skip_unreadable and contents):
        advice = "replace or remove them" + (", or go on without them with --skip-unreadable" if contents else "")
        refuse_unreadable(problems, len(positions), advice)
    if problems:
        skipped = f"note: skips {len(problems):,} of {len(positions):,} images, named above"
        print(*problems, skipped, sep="\n", file=sys.stderr)
    return contents


def _certify_stream(
    listing: Listing,
    loaded: LoadedClassifier,
    classifier: SmoothedClassifier | CascadedClassifier,
    rule: StoppingRule | CascadeRule,
    states: Iterator[FileState | CascadeFileState],
    *,
    at_once: int | None,
) -> Iterator[list[FileState | CascadeFileState]]:
    """`certify_stream` of the classifier. Pixels are read when they are needed, and dropped after the last vote."""

    def with_pixels() -> Iterator[FileState | CascadeFileState]:
        for state in states:
            pixels = read_square(listing.folder / listing.files[state.index], loaded)
            state.image = to_unit_range(torch.from_numpy(pixels.copy()))
            yield state

    for changed in classifier.certify_stream(with_pixels(), rule, at_once=at_once):
        yield changed
        for state in changed:
            if state.stop_reason:
                state.image = NOTHING


def _frame(
    states: Sequence[FileState | CascadeFileState],
    make_frame: Callable[[list[State]], pd.DataFrame],
    files: Sequence[Path],
    labels: Sequence[int | None],
    loaded: LoadedClassifier,
) -> pd.DataFrame:
    """The frame of `FolderCertificates`. `files` and `labels` cover the whole listing."""
    labelled = [replace(state, label=labels[state.index]) for state in states]
    frame = make_frame(labelled)
    names = ["" if predict == ABSTAIN else loaded.class_names[predict] for predict in frame["predict"]]
    return frame.assign(**{"file": [printable(files[index]) for index in frame["idx"]], "class": names})
