"""Certificate files in the format of Cohen et al. 2019, and beside them our files of sample counts.

A certificate frame has one row per image: `idx` (position in the test split), `label`, `predict` (-1: abstained),
`radius` (L2, pixel units), `correct` (0 or 1) and `time` (seconds). Our own frames also have `samples` (the number of
noisy samples), `stop_reason` (a constant of stopping.py), and the certificates that the same samples give by the binary
bound and by the margin bound. `predict` and `radius` follow from the bound that was asked for. `binary_samples` is the
number of samples after which the binary bound alone would have stopped.

The frame of a cascade has `path` and `samples_by_sigma` in place of the certificates by both bounds
(cascade_votes.py). The same functions write and read both kinds of files, and find the kind by the columns.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from rrcm.certification.stopping import ABSTAIN, ALL_SAMPLES, FUTILE, WHOLE_GRID, WRONG_CLASS
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_text

COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]
SAMPLES = ["idx", "samples", "stop_reason", "binary_samples"]  # and the certificates of both bounds
SAMPLES += ["binary_predict", "binary_radius", "margin_predict", "margin_radius"]
CASCADE_SAMPLES = ["idx", "samples", "stop_reason", "path", "samples_by_sigma"]  # in place of SAMPLES
VOTES = ["selection", "votes"]  # all other columns follow from these (votes.py)
STOP_REASONS = (ALL_SAMPLES, WHOLE_GRID, FUTILE, WRONG_CLASS)
UNKNOWN = -1  # label of an image of unknown class


def sigma_name(sigma: float) -> str:
    """The name of a noise level in paths, such as sigma_0.25 or sigma_1.0, which is how DVC's matrix writes numbers."""
    return f"sigma_{float(sigma)}"


def read_certificates(path: Path | str, *, unlabelled: bool = False) -> pd.DataFrame:
    """Read a file that we wrote in the format of Cohen et al. 2019. external.py reads the files of other groups.

    `time` may be in seconds or h:mm:ss.ffffff and is converted to seconds. Columns are found by name and other columns
    are ignored. Blank lines may follow the last row. Duplicate rows are rejected, and so are unlabelled images, unless
    `unlabelled` allows them. Raises `RRCMError` with the file, the line and the problem.
    """
    parse = _parse_any if unlabelled else parse_certificate
    return _read_rows(_read_lines(path), path, COLUMNS, parse)


def read_samples(path: Path | str) -> pd.DataFrame:
    """Read a samples file with the columns SAMPLES and VOTES, or CASCADE_SAMPLES and VOTES if it is of a cascade.

    VOTES, `path` and `samples_by_sigma` are text, which `recompute` and `recompute_cascade` compare with the votes.
    Raises `RRCMError` as `read_certificates` does.
    """
    lines = _read_lines(path)
    if "path" in lines[0].split("\t"):
        return _read_rows(lines, path, CASCADE_SAMPLES + VOTES, _parse_cascade_samples)
    return _read_rows(lines, path, SAMPLES + VOTES, _parse_samples)


def _read_lines(path: Path | str) -> list[str]:
    """The lines of a text file, at least one, without blank ones at the end."""
    try:
        return read_text(path).rstrip("\n").splitlines() or [""]
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise RRCMError(f"{path}: cannot be read as text ({error}); certify again") from None


def _read_rows(lines: list[str], path: Path | str, columns: list[str], parse: Callable[..., tuple]) -> pd.DataFrame:
    """The `columns` of tab-separated lines with a header, which are the lines of the file `path`.

    `parse` takes the fields of a row in the order of `columns`, idx first, and raises ValueError for bad ones.
    """
    header = lines[0].split("\t")
    if any(header.count(name) != 1 for name in columns):
        raise RRCMError(f"{path}, line 1: must be a tab-separated header with each of {' '.join(columns)} once")
    positions, rows = [header.index(name) for name in columns], {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        try:
            if len(fields) != len(header):
                raise ValueError(f"has {len(fields)} tab-separated fields, must have {len(header)}")
            cells = [fields[position] for position in positions]
            if odd := [cell for cell in cells if cell != cell.strip() or "_" in cell or not cell.isascii()]:
                raise ValueError(f"{odd[0]!r} is not as it was written")  # Python would read 1_0, and other digits
            row = parse(*cells)
            if row[0] in rows:
                raise ValueError(f"idx {row[0]} occurs twice")
        except ValueError as error:
            raise RRCMError(f"{path}, line {number}: {error}; correct it or certify again") from None
        rows[row[0]] = row
    if not rows:
        raise RRCMError(f"{path}: has a header but no rows; certify again")
    return pd.DataFrame(list(rows.values()), columns=columns)


def parse_certificate(*fields: str) -> tuple[int, int, int, float, int, float]:
    """The values of a row from its fields in the order of COLUMNS. Raises ValueError for impossible values."""
    row = _parse_any(*fields)
    if row[1] == UNKNOWN:
        raise ValueError("label -1: the true class is unknown, so accuracy is undefined")
    return row


def _parse_any(*fields: str) -> tuple[int, int, int, float, int, float]:
    idx, label, predict, correct = (int(fields[i]) for i in (0, 1, 2, 4))
    radius, time = float(fields[3]), _seconds(fields[5])
    if idx < 0 or label < UNKNOWN or predict < ABSTAIN:
        raise ValueError(f"idx {idx}, label {label}, predict {predict}: must be at least 0, predict at least -1")
    if not (math.isfinite(radius) and radius >= 0) or (predict == ABSTAIN and radius > 0):
        raise ValueError(f"radius {fields[3]}: must be a finite number >= 0, and 0 when abstained")
    if correct != (predict == label != UNKNOWN):
        raise ValueError(f"correct {correct} does not fit label {label} and predict {predict}")
    return idx, label, predict, radius, correct, time


def _parse_samples(*fields: str) -> tuple:
    idx, samples, stop_reason, alone = int(fields[0]), int(fields[1]), fields[2], int(fields[3])
    if idx < 0 or not 1 <= alone <= samples:
        numbers = f"idx {idx}, samples {samples}, binary_samples {alone}"
        raise ValueError(f"{numbers}: must be at least 0 and 1, and not more than samples")
    _check_reason(stop_reason)
    claims = []
    for predict, radius in ((int(fields[4]), float(fields[5])), (int(fields[6]), float(fields[7]))):
        if predict < ABSTAIN or not 0 <= radius < math.inf or (predict == ABSTAIN and radius > 0):
            raise ValueError(f"predict {predict}, radius {radius}: must be a class and its radius, or -1 and 0")
        claims += [predict, radius]
    return idx, samples, stop_reason, alone, *claims, *fields[8:]


def _parse_cascade_samples(*fields: str) -> tuple:
    idx, samples, stop_reason = int(fields[0]), int(fields[1]), fields[2]
    if idx < 0 or samples < 1:
        raise ValueError(f"idx {idx}, samples {samples}: must be at least 0 and 1")
    _check_reason(stop_reason)
    return idx, samples, *fields[2:]


def _check_reason(stop_reason: str) -> None:
    if stop_reason not in STOP_REASONS:
        raise ValueError(f"stop_reason {stop_reason!r}: must be {' or '.join(STOP_REASONS)}")


def _seconds(text: str) -> float:
    """Seconds from `17.5` or a printed Python timedelta: `0:00:17.540437`, `1 day, 2:00:00`."""
    clock = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    if clock is None:
        return float(text)
    days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def certificates_text(frame: pd.DataFrame) -> str:
    """A certificate frame in Cohen et al.'s format. Numbers read back bit for bit."""
    return _tsv(frame[COLUMNS])


def samples_text(frame: pd.DataFrame) -> str:
    """The columns that Cohen et al.'s format lacks, as `read_samples` reads them. Numbers read back bit for bit."""
    return _tsv(frame[(CASCADE_SAMPLES if "path" in frame else SAMPLES) + VOTES])


def certificate_tables(output: Path, frame: pd.DataFrame) -> dict[Path, bytes]:
    """The contents of a certificate file and of its samples file, by path."""
    return {output: certificates_text(frame).encode(), samples_path(output): samples_text(frame).encode()}


def _tsv(frame: pd.DataFrame) -> str:
    return frame.to_csv(sep="\t", index=False, lineterminator="\n")


def samples_path(path: Path) -> Path:
    """The samples file OUTPUT.samples.tsv beside a certificate file OUTPUT.tsv."""
    return path.with_suffix(".samples.tsv")
