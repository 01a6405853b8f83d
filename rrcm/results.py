"""Certificates on disk and the numbers made from them: certified accuracy, ACR, and the two tables of the paper.

A certificate frame has a row an image: `idx` (its place in the test split), `label`, `predict` (-1: abstained),
`radius` (L2, pixel units), `correct` (0 or 1), `time` (seconds). Everything but the two file functions is pure.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rrcm.errors import RRCMError
from rrcm.files import atomic_path

COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]
SAMPLES = ["idx", "samples", "stopped"]
ABSTAIN = -1
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

Certificates = Mapping[tuple[str, float], pd.DataFrame]  # (method, sigma) -> frame


def sigma_name(sigma: float) -> str:
    """sigma_0.25, sigma_1.0: as DVC's matrix writes it into the names of folders and files."""
    return f"sigma_{float(sigma)}"


def read_certificates(path: Path | str) -> pd.DataFrame:
    """Read a file in the format of Cohen et al. 2019. `time` may be seconds or h:mm:ss.ffffff; it becomes seconds.

    Raises `RRCMError` naming the file, the line and what is wrong with it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RRCMError(
            f"{path}: no such file; make it with `dvc repro certify`, or fetch it with `dvc pull`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RRCMError(f"{path}: cannot be read as text ({error}); certify again") from None
    header = "\t".join(COLUMNS)
    if not lines or lines[0] != header:
        raise RRCMError(f"{path}, line 1: must be the tab-separated header {header!r}")
    rows: dict[int, tuple] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = _parse_row(line)
            if row[0] in rows:
                raise ValueError(f"idx {row[0]} is there twice")
        except ValueError as error:
            raise RRCMError(f"{path}, line {number}: {error}; correct it or certify again") from None
        rows[row[0]] = row
    if not rows:
        raise RRCMError(f"{path}: holds no certificates, only the header; certify again")
    return pd.DataFrame(list(rows.values()), columns=COLUMNS)


def _parse_row(line: str) -> tuple[int, int, int, float, int, float]:
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(f"has {len(fields)} tab-separated fields, must have {len(COLUMNS)}")
    idx, label, predict, correct = (int(fields[i]) for i in (0, 1, 2, 4))
    radius, time = float(fields[3]), _seconds(fields[5])
    if idx < 0 or label < 0 or predict < ABSTAIN:
        raise ValueError(f"idx {idx}, label {label}, predict {predict}: must be classes and places, or predict -1")
    if not (math.isfinite(radius) and radius >= 0) or (predict == ABSTAIN and radius > 0):
        raise ValueError(f"radius {fields[3]}: must be a finite number >= 0, and 0 when abstained")
    if correct != (predict == label):
        raise ValueError(f"correct {correct} does not fit label {label} and predict {predict}")
    return idx, label, predict, radius, correct, time


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


def per_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """A row a method and sigma: `method`, `sigma`, `images`, `acr`, then certified accuracy in columns named by r."""
    rows = [
        {"method": method, "sigma": sigma, "images": len(frame), "acr": average_certified_radius(frame)}
        | dict(zip(radii, certified_accuracy(frame, radii), strict=True))
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
