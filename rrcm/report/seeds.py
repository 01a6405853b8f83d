"""Summarize the reports of several training seeds, which differ in nothing else, in one table."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rrcm.evaluation.metrics import mean_over_seeds
from rrcm.report.tables import MEASURES, differences_text, markdown_text, method_labels
from rrcm.utils.errors import RRCMError

KEY = ["method", "measure", "at"]
VALUES = ["seed", "value", "difference"]


def seeds_text(folders: Sequence[Path]) -> str:
    """Two Markdown tables of means over all reports in `folders`: of each method, and of its difference.

    A folder is a report, or a published result with a report of each seed. Raises `RRCMError` if there are fewer than
    two reports, if two have the same seed, or if they differ in methods, radii or sigmas.
    """
    numbers = read_reports([report for folder in folders for report in find_reports(Path(folder))])
    seeds = ", ".join(str(seed) for seed in sorted(numbers["seed"].unique()))
    (reference,) = method_labels(numbers.loc[numbers["difference"].isna(), "method"].unique())
    values, differences = (over_seeds(numbers, column) for column in ("value", "difference"))
    return "\n".join(
        [
            f"Certified accuracy (%) with the best σ and ACR, mean over seeds {seeds}.\n",
            markdown_text(differences_text(values, "value")),
            f"Difference to {reference}, mean over seeds {seeds}.\n",
            markdown_text(differences_text(differences, "difference")),
            "In parentheses: the 95 % t interval over seeds.",
            "It covers the variation between training runs on these images.",
        ]
    )


def find_reports(folder: Path) -> list[Path]:
    """The reports of a published result such as results/digits, one per seed. Any other folder is itself a report."""
    return sorted(folder.glob("seed_*/report")) or [folder]


def read_reports(reports: Sequence[Path]) -> pd.DataFrame:
    """The rows of differences.csv of all reports. Raises `RRCMError` as `seeds_text` does."""
    frames = [_read(Path(report) / "differences.csv") for report in reports]
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


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path)
    except OSError:
        raise RRCMError(f"{path}: no such file; give folders such as results/digits") from None
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RRCMError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from None
    if missing := [name for name in (*KEY, *VALUES, "low", "high") if name not in frame] or ["row"] * frame.empty:
        raise RRCMError(f"{path}: has no {missing[0]}; run `dvc repro plot` again")
    if problem := _find_impossible(frame):
        raise RRCMError(f"{path}: {problem}; run `dvc repro plot` again")
    return frame


def _find_impossible(frame: pd.DataFrame) -> str | None:
    """What is wrong with a differences.csv, or None."""
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
    if frame.loc[frame["difference"].isna(), "method"].nunique() != 1:
        return "has not one method without a difference"
    return None


def over_seeds(numbers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of `column` over the seeds for each method and measure that has it, with its t interval `low` to `high`."""
    groups = numbers.dropna(subset=column).groupby(KEY, sort=False)[column]
    rows = [(*key, *mean_over_seeds(values.to_numpy())) for key, values in groups]
    return pd.DataFrame(rows, columns=[*KEY, column, "low", "high"])
