"""The numbers of a classifier that was trained several times: means over training runs, with their intervals.

All runs certify the same images. The variance of a mean has one part that averages out over the runs and one that does
not. The first part is at most the variance between runs, divided by their number. The second is at most the mean over
the runs of the variance over images, as the mean of correlated numbers varies no more than they do on average. Each
part gives a half-width, and the half-width of the interval is the root of the sum of their squares. The interval tends
to be too wide, because variation that depends on both run and image is counted in both parts.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from rrcm.evaluation.metrics import (
    NORMAL_95,
    Interval,
    certified_accuracy,
    certified_radii,
    mean_over_seeds,
    wilson_interval,
)

MIN_RUNS = 3  # the t interval of two runs has a half-width of 12.7 standard errors, mostly beyond the scale


def over_runs(values: Sequence[float], scale: tuple[float, float]) -> Interval:
    """The mean of one value per run with its t interval, cut at `scale`, the least and the greatest possible value.

    Fewer than MIN_RUNS runs have no interval: it is NaN.
    """
    mean = mean_over_seeds(values)
    return (mean if len(values) >= MIN_RUNS else Interval(mean.value, math.nan, math.nan)).cut(*scale)


def over_runs_and_images(values: Sequence[float], below: Sequence[float], above: Sequence[float]) -> Interval:
    """The mean of one value per run with an interval for both the runs and the images.

    `below` and `above` are the lower and upper half-widths of each run's interval over images. Fewer than MIN_RUNS runs
    have no interval. A single run keeps its interval over images.
    """
    mean = over_runs(values, (-math.inf, math.inf))
    of_runs = 0.0 if len(values) == 1 else mean.high - mean.value
    low, high = (math.hypot(of_runs, math.sqrt(np.mean(np.square(half)))) for half in (below, above))
    return Interval(mean.value, mean.value - low, mean.value + high)


def accuracy_over_runs(frames: Sequence[pd.DataFrame], radii: Sequence[float]) -> list[Interval]:
    """The mean certified accuracy (a share) at each radius over the certificate frames of the runs.

    The interval over images is Wilson's. The rows of all frames are the same images.
    """
    shares = np.array([certified_accuracy(frame, radii) for frame in frames])  # (runs, radii)
    low, high = wilson_interval(shares, len(frames[0]))
    below, above = (shares - low).clip(0), (high - shares).clip(0)  # of 0 and 1 they are rounded to just below 0
    columns = zip(shares.T, below.T, above.T, strict=True)
    return [over_runs_and_images(*column).cut(0.0, 1.0) for column in columns]


def acr_over_runs(frames: Sequence[pd.DataFrame]) -> Interval:
    """The mean ACR over the certificate frames of the runs. The interval over images is the normal one of a mean."""
    radii = np.array([certified_radii(frame) for frame in frames])  # (runs, images)
    count = radii.shape[1]
    half = NORMAL_95 * radii.std(axis=1, ddof=1) / math.sqrt(count) if count > 1 else np.full(len(frames), math.inf)
    return over_runs_and_images(radii.mean(axis=1), half, half).cut(0.0, math.inf)
