"""Read the certificate files of a board's entries, with what the records beside our own files say about them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from rrcm.certification.external import read_external_certificates
from rrcm.certification.record import CascadeRecord, CertificateRecord, read_record, record_path
from rrcm.certification.results import read_samples, samples_path
from rrcm.evaluation.common_images import adopt_numbers, check_labels
from rrcm.methods import CASCADE
from rrcm.report.board_entries import Board, Entry
from rrcm.report.records import Timing
from rrcm.report.records import read_record as read_timing
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import sha256_file
from rrcm.utils.progress import Progress

SETTINGS = ("n", "n0", "alpha", "bound", "stopping")  # of the certification; the names of a record's entries
USUAL = {"bound": "binary", "stopping": "fixed"}  # where neither the entry nor a record tells it

FindFile = Callable[[Path], Path]  # where the content of a file is that an entry names


class File(NamedTuple):
    """A certificate file."""

    name: str  # relative to the list of entries
    path: Path  # where that is
    sha256: str
    frame: pd.DataFrame
    settings: dict[str, object]  # SETTINGS
    samples: float  # mean number of noisy samples per image; NaN: unknown
    seconds: float  # mean per image; NaN: unknown


class Deployed(NamedTuple):
    """A deployed classifier of an entry: one sigma or a cascade, from one or several training runs."""

    entry: Entry
    name: str  # sigma as text, or "cascade"
    files: list[File]  # by run

    @property
    def frames(self) -> list[pd.DataFrame]:
        return [file.frame for file in self.files]

    @property
    def sigma(self) -> float | None:
        """Pixel units; None: a cascade."""
        return None if self.name == CASCADE else float(self.name)

    @property
    def label(self) -> str:
        """The name that a page shows."""
        return "cascade" if self.name == CASCADE else f"σ = {self.name}"


def read_deployed(board: Board, folder: Path, find: FindFile) -> list[Deployed]:
    """The deployed classifiers of all entries, in their order. Paths are relative to `folder`.

    Raises `RRCMError` for files that cannot be read, that contradict their entry or their record, and that are not of
    the images of the other files for the same data.
    """
    deployed = []
    count = sum(len(entry.files) * len(entry.runs) for entry in board.entries)
    with Progress(count, "read", "files", only_if_long=True) as progress:
        for entry in board.entries:
            for name, file in entry.files.items():
                files = []
                for run in entry.runs:
                    relative = (Path(run) / file).as_posix()
                    files.append(_read_file(entry, name, relative, folder / relative, find))
                    progress.update()
                deployed.append(Deployed(entry, name, files))
    return check_images(deployed)


def _read_file(entry: Entry, deployed: str, name: str, path: Path, find: FindFile) -> File:
    real = find(path)
    frame, beside = read_external_certificates(real), record_path(real)
    record = read_record(beside) if beside.is_file() and beside != real else None
    if record is not None:
        _check_record(path, real, record, deployed)
    settings = _settings(entry, path, record)
    tables = samples_path(real)
    if record is not None and tables.is_file():
        samples = float(read_samples(tables)["samples"].mean())
    else:
        known = settings["stopping"] == "fixed" and settings["n0"] is not None
        samples = float(settings["n0"] + settings["n"]) if known else math.nan
    return File(name, path, sha256_file(real), frame, settings, samples, _seconds(real, frame))


def _check_record(path: Path, real: Path, record: CertificateRecord | CascadeRecord, name: str) -> None:
    """Raise `RRCMError` if the record is of another file or another deployment."""
    for table in (real, samples_path(real)):
        if table.is_file() and record.files.get(table.name) != sha256_file(table):
            raise RRCMError(f"{path}: {table.name} is not the file that the record beside it describes; restore both")
    recorded = CASCADE if isinstance(record, CascadeRecord) else f"{record.sigma:g}"
    if recorded != name:
        raise RRCMError(f"{path}: is listed as {name}, but its record says {recorded}; correct the entry")


def _settings(entry: Entry, path: Path, record: CertificateRecord | CascadeRecord | None) -> dict[str, object]:
    """The settings of a certification, from the record or else from the entry.

    Raises `RRCMError` if the two differ, or if both lack a setting.
    """
    settings = {}
    for name in SETTINGS:
        given, recorded = getattr(entry, name), getattr(record, name, None)
        if None not in (given, recorded) and given != recorded:
            raise RRCMError(f"{path}: the entry says {name} {given}, its record {recorded}; correct the entry")
        settings[name] = next((value for value in (recorded, given, USUAL.get(name)) if value is not None), None)
        if settings[name] is None and name != "n0":
            raise RRCMError(f"{path}: has no record of its certification; give {name} in the entry {entry.name!r}")
    return settings


def _seconds(path: Path, frame: pd.DataFrame) -> float:
    """The mean seconds per image: from the column `time`, else from the timing of a run of this package."""
    if frame["time"].notna().all() and frame["time"].sum() > 0:
        return float(frame["time"].mean())
    method, root = path.parent.name, path.parents[2] if len(path.parents) > 2 else path.parent
    timing = root / "timings/certify" / method / f"{path.stem}.json"
    if path.stem == CASCADE:
        timing = root / "timings/certify_cascade" / f"{method}.json"
    if path.parents[1].name != "certificates" or not timing.is_file():
        return math.nan
    return read_timing(timing, Timing, "publish the run again")["seconds"] / len(frame)


def check_images(deployed: Sequence[Deployed]) -> list[Deployed]:
    """The same files with the image numbers that `adopt_numbers` finds.

    In all entries for the same data, an image number must have one label.

    Raises `RRCMError` if they do not, and if the runs of an entry have different images.
    """
    checked = []
    for data in dict.fromkeys((each.entry.data, each.entry.threat) for each in deployed):
        of_data = [each for each in deployed if (each.entry.data, each.entry.threat) == data]
        frames = {
            f"{each.entry.name}, {each.label} ({file.path})": file.frame for each in of_data for file in each.files
        }
        frames, _ = adopt_numbers(frames)
        _check_labels(frames)
        numbered = iter(frames.values())
        for each in of_data:
            files = [file._replace(frame=next(numbered)) for file in each.files]
            for file in files[1:]:
                if set(file.frame["idx"]) != set(files[0].frame["idx"]):
                    raise RRCMError(f"{file.path}: has other images than {files[0].path}; list runs on the same images")
            checked.append(Deployed(each.entry, each.name, files))
    return checked


def _check_labels(frames: Mapping[str, pd.DataFrame]) -> None:
    """Raise `RRCMError` if an image number has two labels in all the files together."""
    known, source = pd.Series(dtype="int64"), ""
    labels = {name: frame.set_index("idx")["label"] for name, frame in frames.items()}
    for name in sorted(labels, key=lambda each: -len(labels[each])):
        if source:
            check_labels(source, known, name, labels[name])
        known, source = known.combine_first(labels[name]).astype("int64"), source or name
