"""Certificates on disk and the numbers made from them: certified accuracy, ACR, and the two tables of the paper.

A certificate frame has a row an image: `idx` (its place in the test split), `label`, `predict` (-1: abstained),
`radius` (L2, pixel units), `correct` (0 or 1), `time` (seconds); ours also have `samples` (noisy copies drawn) and
`stopped` (why no more were). Everything but the four file functions is pure.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rrcm.errors import RRCMError
from rrcm.files import atomic_path
from rrcm.procedures import ABSTAIN, ALL_SAMPLES, HOPELESS, WHOLE_GRID, WRONG_CLASS

COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]
SAMPLES = ["idx", "samples", "stopped"]
STOPPED = (ALL_SAMPLES, WHOLE_GRID, HOPELESS, WRONG_CLASS)
UNKNOWN = -1  # label of an image whose class nobody has said
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

Certificates = Mapping[tuple[str, float], pd.DataFrame]  # (method, sigma) -> frame


def sigma_name(sigma: float) -> str:
    """sigma_0.25, sigma_1.0: as DVC's matrix writes it into the names of folders and files."""
    return f"sigma_{float(sigma)}"


def read_certificates(path: Path | str) -> pd.DataFrame:
    """Read a file in the format of Cohen et al. 2019, by any group.

    `time` may be seconds or h:mm:ss.ffffff; it becomes seconds. Columns are found by name, others are left out; blank
    lines may follow the last row. An image without a label or in two rows is refused: what it counts is not known.
    Raises `RRCMError` naming the file, the line and what is wrong with it.
    """
    return pd.DataFrame(_read_rows(path, COLUMNS, _parse_certificate), columns=COLUMNS)


def read_samples(path: Path | str) -> pd.DataFrame:
    """Read what `write_samples` wrote: idx, samples, stopped. Raises `RRCMError` as `read_certificates` does."""
    return pd.DataFrame(_read_rows(path, SAMPLES, _parse_samples), columns=SAMPLES)


def _read_rows(path: Path | str, columns: list[str], parse: Callable[..., tuple]) -> list[tuple]:
    """Rows of a tab-separated file with a header. `parse` takes a row's fields in the order of `columns`, idx first,
    and raises ValueError for bad ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n").splitlines()
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RRCMError(f"{path}: cannot be read as text ({error}); certify again") from None
    header = lines[0].split("\t") if lines else []
    if any(header.count(name) != 1 for name in columns):
        raise RRCMError(f"{path}, line 1: must be a tab-separated header that has each of {' '.join(columns)} once")
    places, rows = [header.index(name) for name in columns], {}
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        try:
            if len(fields) != len(header):
                raise ValueError(f"has {len(fields)} tab-separated fields, must have {len(header)}")
            row = parse(*(fields[place] for place in places))
            if row[0] in rows:
                raise ValueError(f"idx {row[0]} is there twice")
        except ValueError as error:
            raise RRCMError(f"{path}, line {number}: {error}; correct it or certify again") from None
        rows[row[0]] = row
    if not rows:
        raise RRCMError(f"{path}: holds no rows, only the header; certify again")
    return list(rows.values())


def _parse_certificate(*fields: str) -> tuple[int, int, int, float, int, float]:
    idx, label, predict, correct = (int(fields[i]) for i in (0, 1, 2, 4))
    radius, time = float(fields[3]), _seconds(fields[5])
    if label == UNKNOWN:
        raise ValueError("label -1: the true class is unknown, and with it the accuracy")
    if idx < 0 or label < 0 or predict < ABSTAIN:
        raise ValueError(f"idx {idx}, label {label}, predict {predict}: must be classes and places, or predict -1")
    if not (math.isfinite(radius) and radius >= 0) or (predict == ABSTAIN and radius > 0):
        raise ValueError(f"radius {fields[3]}: must be a finite number >= 0, and 0 when abstained")
    if correct != (predict == label):
        raise ValueError(f"correct {correct} does not fit label {label} and predict {predict}")
    return idx, label, predict, radius, correct, time


def _parse_samples(*fields: str) -> tuple[int, int, str]:
    idx, samples, stopped = int(fields[0]), int(fields[1]), fields[2]
    if idx < 0 or samples < 1:
        raise ValueError(f"idx {idx}, samples {samples}: must be a place, and at least 1")
    if stopped not in STOPPED:
        raise ValueError(f"stopped {stopped!r}: must be {' or '.join(STOPPED)}")
    return idx, samples, stopped


def _seconds(text: str) -> float:
    """Seconds from `17.5` or from what Python prints for a timedelta, `0:00:17.540437` or `1 day, 2:00:00`."""
    clock = re.fullmatch(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", text)
    if clock is None:
        return float(text)
    days, hours, minutes, seconds = (float(part or 0) for part in clock.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def write_certificates(path: Path | str, frame: pd.DataFrame) -> None:
    """Write a certificate frame in the field's format, atomically. Reading it gives the same numbers, bit for bit."""
    with atomic_path(path) as scratch:
        frame[COLUMNS].to_csv(scratch, sep="\t", index=False, lineterminator="\n")


def write_samples(path: Path | str, frame: pd.DataFrame) -> None:
    """Write what the field's format has no place for, atomically: idx, samples used, why sampling stopped."""
    with atomic_path(path) as scratch:
        frame[SAMPLES].to_csv(scratch, sep="\t", index=False, lineterminator="\n")


def certified_accuracy(frame: pd.DataFrame, radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share of the images that are correct with radius >= r, for each r of `radii`. Abstentions count as wrong."""
    certified = np.sort(frame.loc[frame["correct"] == 1, "radius"])
    return (len(certified) - np.searchsorted(certified, radii)) / len(frame)


def certified_radii(frame: pd.DataFrame) -> np.ndarray:
    """(N,) the radius of each image where correct, else 0: ACR is its mean."""
    return (frame["radius"] * frame["correct"]).to_numpy()


def average_certified_radius(frame: pd.DataFrame) -> float:
    """ACR, in pixel units."""
    return float(certified_radii(frame).mean())


def acr_difference(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float]:
    """ACR of `one` less that of `other`, and the half width of its 95 % interval. Rows are the same images in order."""
    difference = certified_radii(one) - certified_radii(other)
    spread = difference.std(ddof=1) if len(difference) > 1 else math.inf
    return float(difference.mean()), float(NORMAL_95 * spread / math.sqrt(len(difference)))


def wilson_interval(share: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % confidence interval of a binomial proportion observed as `share` of `count` images."""
    z2 = NORMAL_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return centre - half, centre + half


def envelope(frames: Iterable[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """The highest certified accuracy over several models as an exact step curve; of one model, its own curve.

    Returns (radii, accuracy), both (K,): accuracy[k] holds on the half-open interval (radii[k-1], radii[k]], so draw it
    with steps that rise before the point. It starts at r = 0 and ends with the fall to 0.
    """
    frames = list(frames)
    radii = np.unique(np.concatenate([[0.0], *(frame.loc[frame["correct"] == 1, "radius"] for frame in frames)]))
    accuracy = np.max([certified_accuracy(frame, radii) for frame in frames], axis=0)
    return np.append(radii, radii[-1]), np.append(accuracy, 0.0)


def summary(frame: pd.DataFrame, radii: Sequence[float]) -> dict:
    """The end of a table's row: `acr`, then certified accuracy (a share) in columns named by r."""
    return {"acr": average_certified_radius(frame)} | dict(zip(radii, certified_accuracy(frame, radii), strict=True))


def mean_samples(frame: pd.DataFrame) -> float:
    """Noisy copies drawn for an image, in the mean; NaN where the file does not say."""
    return float(frame["samples"].mean()) if "samples" in frame else math.nan


def per_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """A row a method and sigma: `method`, `sigma`, `images`, `samples` (their mean), and the columns of `summary`."""
    rows = [
        {"method": method, "sigma": sigma, "images": len(frame), "samples": mean_samples(frame)} | summary(frame, radii)
        for (method, sigma), frame in certificates.items()
    ]
    return pd.DataFrame(rows)


def best_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """The paper's Table 1, a row a method and radius: `method`, `radius`, `sigma`, `certified_accuracy`, `at_zero`.

    `sigma` is the one with the highest certified accuracy at that radius (ties: the smaller), `at_zero` the certified
    accuracy of that very model at r = 0.
    """
    rows = []
    for method in dict.fromkeys(method for method, _ in certificates):
        of_sigma = {sigma: frame for (name, sigma), frame in certificates.items() if name == method}
        for radius in radii:
            accuracy = {sigma: certified_accuracy(of_sigma[sigma], [radius])[0] for sigma in sorted(of_sigma)}
            best = max(accuracy, key=accuracy.get)  # the first of equals
            rows.append(
                {
                    "method": method,
                    "radius": radius,
                    "sigma": best,
                    "certified_accuracy": accuracy[best],
                    "at_zero": certified_accuracy(of_sigma[best], [0.0])[0],
                }
            )
    return pd.DataFrame(rows)
