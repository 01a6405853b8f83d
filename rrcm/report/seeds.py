"""Several trainings of the same methods: their reports, which differ in the seed alone, in one table."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rrcm.evaluation.metrics import mean_over_seeds
from rrcm.report.tables import differences_text, markdown_text, method_labels
from rrcm.utils.errors import RRCMError

KEY = ["method", "measure", "at"]
VALUES = ["seed", "value", "difference"]


def seeds_text(reports: Sequence[Path]) -> str:
    """Two Markdown tables over the reports in these folders: the mean of each method, and that of its difference.

    Raises `RRCMError` if they are fewer than two, repeat a seed, or do not compare the same methods alike.
    """
    numbers = read_reports(reports)
    seeds = ", ".join(str(seed) for seed in sorted(numbers["seed"].unique()))
    (reference,) = method_labels(numbers.loc[numbers["difference"].isna(), "method"].unique())
    values, differences = (over_seeds(numbers, column) for column in ("value", "difference"))
    return "\n".join(
        [
            f"Certified accuracy (%) with the best σ and ACR, mean over seeds {seeds}.\n",
            markdown_text(differences_text(values, "value")),
            f"Difference to {reference}, mean over seeds {seeds}.\n",
            markdown_text(differences_text(differences, "difference")),
            "In parentheses: the 95 % t interval over seeds, for the variation between training runs on these images.",
        ]
    )


def read_reports(reports: Sequence[Path]) -> pd.DataFrame:
    """differences.csv of each report, one after another. Raises `RRCMError` as `seeds_text` does."""
    frames = [_read(Path(report) / "differences.csv") for report in reports]
    if len(frames) < 2:
        raise RRCMError(f"{', '.join(map(str, reports))}: give the report folders of at least two seeds")
    for place, frame in enumerate(frames):
        if not frame[KEY].equals(frames[0][KEY]):
            problem = "compares other methods, radii or sigmas than"
            raise RRCMError(f"{reports[place]}: {problem} {reports[0]}; run both with the same settings but the seed")
        for other, earlier in zip(reports, frames[:place], strict=False):
            if frame.loc[0, "seed"] == earlier.loc[0, "seed"]:
                raise RRCMError(f"{reports[place]}: has seed {frame.loc[0, 'seed']} like {other}; give each seed once")
    return pd.concat(frames, ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path)
    except OSError:
        raise RRCMError(f"{path}: no such file; give folders such as reports/digits") from None
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RRCMError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from None
    if missing := [name for name in (*KEY, *VALUES) if name not in frame] or ["row"] * frame.empty:
        raise RRCMError(f"{path}: has no {missing[0]}; run `dvc repro plot` again")
    return frame


def over_seeds(numbers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean of `column` over the seeds, with the t interval `low` to `high`, for each method and measure that has it."""
    groups = numbers.dropna(subset=column).groupby(KEY, sort=False)[column]
    rows = [(*key, *mean_over_seeds(values.to_numpy())) for key, values in groups]
    return pd.DataFrame(rows, columns=[*KEY, column, "low", "high"])
