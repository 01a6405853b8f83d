"""Summarize the reports of several training seeds, which differ in nothing else, in one table."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from rrcm.evaluation.metrics import Interval, mean_over_seeds
from rrcm.report.deployment import deployment_label
from rrcm.report.tables import MEASURES, differences_text, markdown_text, method_labels
from rrcm.utils.errors import RRCMError

MIN_SEEDS = 3  # an interval over two seeds is wider than the scale
KEY = ["method", "measure", "at"]
VALUES = ["seed", "value", "difference"]
DEPLOYMENT_KEY = ["method", "bound", "deployment", "deployments"]
PAIRED = {  # tables of paired differences that not every report has, and what they are about
    "joint.csv": "Joint networks minus their experts",
    "deployment_differences.csv": "One cascade minus the best σ at each radius, and in ACR minus each σ alone",
}
INTERVAL_OVER_SEEDS = [
    "In parentheses: the 95 % t interval over seeds.",
    "It covers the variation between training runs on these images.",
]
INTERVAL_OVER_BOTH = [
    "In parentheses: a 95 % interval that covers the training runs and the test images.",
    "Its half-width is the root of the sum of two squares: the half-width of the t interval over seeds,",
    "and the root mean square over seeds of the half-width of the interval over test images.",
]


def seeds_text(folders: Sequence[Path]) -> str:
    """Markdown tables of means over all reports in `folders`: of each method, and of its difference.

    Where the reports have joint methods or cascades, there are tables of these too. A folder is a report, or a
    published result with a report of each seed. Raises `RRCMError` if there are fewer than two reports, if two have the
    same seed, or if they differ in methods, radii or sigmas.
    """
    reports = [report for folder in folders for report in find_reports(Path(folder))]
    numbers = read_reports(reports)
    seeds = ", ".join(str(seed) for seed in sorted(numbers["seed"].unique()))
    (reference,) = method_labels(numbers.loc[numbers["difference"].isna(), "method"].unique())
    values, differences = (over_seeds(numbers, column) for column in ("value", "difference"))
    few = [f"Fewer than {MIN_SEEDS} seeds have no interval over seeds."]
    parts = [
        f"Certified accuracy (%) with the best σ and ACR, mean over seeds {seeds}.\n",
        markdown_text(differences_text(values, "value")),
        f"Difference to {reference}, mean over seeds {seeds}.\n",
        markdown_text(differences_text(differences, "difference")),
    ]
    parts += INTERVAL_OVER_SEEDS if len(reports) >= MIN_SEEDS else few
    further = further_tables(reports, seeds)
    return "\n".join([*parts, *(["", *further] if further else [])])


def further_tables(reports: Sequence[Path], seeds: str) -> list[str]:
    """The tables of joint methods and cascades, and how their intervals are made; none if no report has any."""
    parts, many = [], len(reports) >= MIN_SEEDS
    if every_report_has(reports, "deployment.csv"):
        numbers = read_deployments(reports)
        by, half = numbers["bound"].iloc[0], ", ± half of the 95 % t interval over seeds" if many else ""
        parts.append(
            f"One deployment: certified accuracy (%) and ACR by the {by} bound, mean over seeds {seeds}{half}.\n"
        )
        parts.append(markdown_text(deployments_over_seeds(numbers)))
    paired = {name: title for name, title in PAIRED.items() if every_report_has(reports, name)}
    for name, title in paired.items():
        pooled = over_seeds_and_images(read_reports(reports, name))
        parts += [f"{title}, mean over seeds {seeds}.\n", markdown_text(differences_text(pooled, "difference"))]
    return [*parts, *(INTERVAL_OVER_BOTH if many and paired else [])]


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
    """The rows of a table of differences of all reports. Raises `RRCMError` as `seeds_text` does."""
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
    """The rows of deployment.csv of all reports. Raises `RRCMError` as `seeds_text` does."""
    frames = [
        _read(Path(report) / "deployment.csv", [*DEPLOYMENT_KEY, "acr", "samples_ratio"], _impossible_deployment)
        for report in reports
    ]
    for report, frame in zip(reports, frames, strict=True):
        if list(frame) != list(frames[0]) or not frame[DEPLOYMENT_KEY].equals(frames[0][DEPLOYMENT_KEY]):
            problem = "has other cascades, sigmas or radii than"
            raise RRCMError(f"{report}: {problem} {reports[0]}; run both with the same settings but the seed")
    return pd.concat(frames, ignore_index=True)


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
    shares = frame[_shares(frame)]
    if not all(map(pd.api.types.is_numeric_dtype, [*shares.dtypes, *frame[["acr", "samples_ratio"]].dtypes])):
        return "has text where numbers must be"
    if not shares.map(lambda share: 0 <= share <= 1).all(axis=None):
        return "has a value that is no share"
    return None


def _shares(frame: pd.DataFrame) -> list[str]:
    """The columns of a deployment.csv with certified accuracies."""
    return [name for name in frame if name.startswith("r_")]


def over_seeds(numbers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of `column` over the seeds for each method and measure that has it, with its t interval `low` to `high`.

    Fewer than MIN_SEEDS seeds have no interval: it is NaN.
    """
    groups = numbers.dropna(subset=column).groupby(KEY, sort=False)[column]
    rows = [(*key, *_with_interval(mean_over_seeds(values.to_numpy()), len(values))) for key, values in groups]
    return pd.DataFrame(rows, columns=[*KEY, column, "low", "high"])


def over_seeds_and_images(numbers: pd.DataFrame) -> pd.DataFrame:
    """Mean of the paired differences over the seeds, with an interval for both seeds and test images.

    The variance of the mean has a part that averages out over the seeds and one that does not, as all seeds have the
    same images. The first is at most the variance between seeds, divided by their number. The second is at most the
    mean over the seeds of the variance over images, as the mean of correlated numbers varies no more than they do on
    average. Each leads to a half-width, and the half-width of the interval is the root of the sum of their squares. It
    is too wide rather than too narrow, because what varies with seed and image is in both parts. Fewer than MIN_SEEDS
    seeds have no interval: it is NaN.
    """
    rows = []
    for key, group in numbers.groupby(KEY, sort=False):
        mean = mean_over_seeds(group["difference"].to_numpy())
        over_images = ((group["high"] - group["low"]) / 2).to_numpy()
        half_width = math.hypot(mean.high - mean.value, math.sqrt(np.mean(over_images**2)))
        both = Interval(mean.value, mean.value - half_width, mean.value + half_width)
        rows.append((*key, *_with_interval(both, len(group))))
    return pd.DataFrame(rows, columns=[*KEY, "difference", "low", "high"])


def _with_interval(interval: Interval, seeds: int) -> Interval:
    return interval if seeds >= MIN_SEEDS else Interval(interval.value, math.nan, math.nan)


def mean_text(values: Sequence[float], unit: float, digits: str) -> str:
    """The mean over seeds times `unit`, from MIN_SEEDS seeds on with half the width of its t interval."""
    mean = mean_over_seeds(values)
    interval = f" ± {unit * (mean.high - mean.value):{digits}}" if len(values) >= MIN_SEEDS else ""
    return f"{unit * mean.value:{digits}}{interval}"


def deployments_over_seeds(numbers: pd.DataFrame) -> pd.DataFrame:
    """Each deployment as text, with the means over the seeds. `numbers` are from `read_deployments`."""
    rows = []
    for (method, _, name, count), group in numbers.groupby(DEPLOYMENT_KEY, sort=False):
        row = {"method": method_labels([method])[0], "deployed": deployment_label(name, count)}
        row |= {f"r = {share.removeprefix('r_')}": mean_text(group[share], 100, ".1f") for share in _shares(numbers)}
        for column, heading, digits in (("acr", "ACR", ".3f"), ("samples_ratio", "ratio", ".2f")):
            row[heading] = "" if group[column].isna().any() else mean_text(group[column], 1, digits)
        rows.append(row)
    return pd.DataFrame(rows)
