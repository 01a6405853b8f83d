"""Read the reports of several training seeds, which differ in nothing else."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rrcm.methods import METHODS
from rrcm.report.tables import MEASURES
from rrcm.utils.errors import RRCMError

KEY = ["method", "measure", "at"]
VALUES = ["seed", "value", "difference"]
DEPLOYMENT_KEY = ["method", "bound", "deployment", "deployments"]
CURVE_KEY = ["method", "sigma", "radius"]


def find_reports(folder: Path) -> list[Path]:
    """The reports of a published result such as results/digits, one per seed. Any other folder is itself a report."""
    return sorted(folder.glob("seed_*/report")) or [folder]


def every_report_has(reports: Sequence[Path], name: str) -> bool:
    """Whether the reports have the table `name`. Raises `RRCMError` if only some of them do."""
    have = [(Path(report) / name).is_file() for report in reports]
    if any(have) and not all(have):
        without = reports[have.index(False)]
        raise RRCMError(f"{without}: has no {name}; run all seeds with the same methods and cascades")
    return all(have)


def read_reports(reports: Sequence[Path], name: str = "differences.csv") -> pd.DataFrame:
    """The rows of a table of differences of all reports.

    Raises `RRCMError` if there are fewer than two reports, if two have the same seed, or if they differ in methods,
    radii or sigmas.
    """
    frames = [_read_differences(Path(report) / name) for report in reports]
    if len(frames) < 2:
        raise RRCMError(f"{', '.join(map(str, reports))}: give the reports of at least two seeds")
    for i, frame in enumerate(frames):
        if not frame[KEY].equals(frames[0][KEY]):
            problem = "compares other methods, radii or sigmas than"
            raise RRCMError(f"{reports[i]}: {problem} {reports[0]}; run both with the same settings but the seed")
        for other, earlier in zip(reports, frames[:i], strict=False):
            if frame.loc[0, "seed"] == earlier.loc[0, "seed"]:
                raise RRCMError(f"{reports[i]}: has seed {frame.loc[0, 'seed']} like {other}; give each seed once")
    return pd.concat(frames, ignore_index=True)


def read_deployments(reports: Sequence[Path]) -> pd.DataFrame:
    """The rows of deployment.csv of all reports. Raises `RRCMError` as `read_reports` does."""
    frames = [
        _read(Path(report) / "deployment.csv", [*DEPLOYMENT_KEY, "acr", "samples_ratio"], _impossible_deployment)
        for report in reports
    ]
    for report, frame in zip(reports, frames, strict=True):
        if list(frame) != list(frames[0]) or not frame[DEPLOYMENT_KEY].equals(frames[0][DEPLOYMENT_KEY]):
            problem = "has other cascades, sigmas or radii than"
            raise RRCMError(f"{report}: {problem} {reports[0]}; run both with the same settings but the seed")
    return pd.concat(frames, ignore_index=True)


def read_curves(reports: Sequence[Path]) -> pd.DataFrame:
    """The rows of curves.csv of all reports, with the number of the report as `run`. Raises `RRCMError` likewise."""
    columns = [*CURVE_KEY, "certified_accuracy"]
    frames = [_read(Path(report) / "curves.csv", columns, _impossible_curve) for report in reports]
    for report, frame in zip(reports, frames, strict=True):
        if not frame[CURVE_KEY].equals(frames[0][CURVE_KEY]):
            problem = "has other methods, sigmas or radii than"
            raise RRCMError(f"{report}: {problem} {reports[0]}; run both with the same settings but the seed")
    return pd.concat([frame[columns].assign(run=run) for run, frame in enumerate(frames)], ignore_index=True)


def _read_differences(path: Path) -> pd.DataFrame:
    relative = path.name != "differences.csv"  # each row has a difference: there is no reference method
    return _read(path, [*KEY, *VALUES, "low", "high"], lambda frame: _find_impossible(frame, relative))


def _read(path: Path, columns: Sequence[str], check: Callable[[pd.DataFrame], str | None]) -> pd.DataFrame:
    """A table with at least `columns`. Raises `RRCMError` if it cannot be read, or if `check` names a problem."""
    try:
        frame = pd.read_csv(path)
    except OSError:
        raise RRCMError(f"{path}: no such file; give folders such as results/digits") from None
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RRCMError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from None
    if missing := [name for name in columns if name not in frame] or ["row"] * frame.empty:
        raise RRCMError(f"{path}: has no {missing[0]}; run `dvc repro plot` again")
    if problem := check(frame):
        raise RRCMError(f"{path}: {problem}; run `dvc repro plot` again")
    return frame


def _find_impossible(frame: pd.DataFrame, relative: bool) -> str | None:
    """What is wrong with a table of differences, or None. With `relative` no method is without a difference."""
    numbers = frame[["at", *VALUES, "low", "high"]]
    if not all(map(pd.api.types.is_numeric_dtype, numbers.dtypes)):
        return "has text where numbers must be"
    if frame["seed"].nunique() != 1 or frame["seed"].iloc[0] != frame["seed"].iloc[0] // 1:
        return "has not one whole seed"
    if not frame["measure"].isin(MEASURES).all():
        return f"has measures other than {' and '.join(MEASURES)}"
    most = frame["measure"].map({"certified_accuracy": 1.0, "acr": math.inf})
    if not (np.isfinite(frame[["at", "value"]]).all(axis=None) and frame["value"].between(0, most).all()):
        return "has a value that is no share and no radius"
    row = frame.dropna(subset="difference")
    if not (row["difference"].between(row["low"], row["high"]) & (row["difference"].abs() < math.inf)).all():
        return "has a difference outside its interval"
    if frame.loc[frame["difference"].isna(), "method"].nunique() != (0 if relative else 1):
        return f"has {'a' if relative else 'not one'} method without a difference"
    return None


def _impossible_deployment(frame: pd.DataFrame) -> str | None:
    """What is wrong with a deployment.csv, or None."""
    shares = frame[share_columns(frame)]
    if not all(map(pd.api.types.is_numeric_dtype, [*shares.dtypes, *frame[["acr", "samples_ratio"]].dtypes])):
        return "has text where numbers must be"
    if not shares.map(lambda share: 0 <= share <= 1).all(axis=None):
        return "has a value that is no share"
    return None


def _impossible_curve(frame: pd.DataFrame) -> str | None:
    """What is wrong with a curves.csv, or None."""
    numbers = frame[["sigma", "radius", "certified_accuracy"]]
    if not all(map(pd.api.types.is_numeric_dtype, numbers.dtypes)):
        return "has text where numbers must be"
    if not (
        numbers.map(lambda number: 0 <= number < math.inf).all(axis=None) and frame["certified_accuracy"].max() <= 1
    ):
        return "has a value that is no share or no radius"
    if unknown := set(frame["method"]) - set(METHODS):
        return f"has the unknown method {min(unknown)}"
    return None


def share_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of a deployment.csv with certified accuracies."""
    return [name for name in frame if name.startswith("r_")]
