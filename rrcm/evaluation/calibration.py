"""Calibration of vote shares: is the class right for 90 % of the images with a share of 90 %? Pure functions."""

import math

import numpy as np
import pandas as pd

from rrcm.evaluation.metrics import wilson_interval

BINS = 10  # of equal width


def reliability(shares: np.ndarray, right: np.ndarray) -> pd.DataFrame:
    """Accuracy by the vote share of the top class. shares (N,) in [0, 1], right (N,) bool.

    The frame has one row for each bin that contains images: `images`, `share` (mean), `accuracy`, and its 95 % Wilson
    interval from `low` to `high`.
    """
    rows, bins = [], _bins(shares)
    for each in np.unique(bins):
        inside = bins == each
        accuracy, count = float(right[inside].mean()), int(inside.sum())
        low, high = (float(bound) for bound in wilson_interval(np.array(accuracy), count))
        rows.append({"images": count, "share": float(shares[inside].mean()), "accuracy": accuracy})
        rows[-1] |= {"low": low, "high": high}
    return pd.DataFrame(rows)


def calibration_error(shares: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """The expected calibration error (Guo et al. 2017) and its jackknife standard error over the images.

    It is the mean over the images of abs(accuracy - mean share) of their bin. Chance alone raises it above 0, more so
    with fewer images.
    """
    bins, count = _bins(shares), len(shares)
    gaps = np.bincount(bins, right - shares, BINS)  # sums over the bin; the error is the sum of their sizes by N
    error = float(np.abs(gaps).sum() / count)
    if count < 2:
        return error, math.nan
    without = np.abs(gaps).sum() - np.abs(gaps[bins]) + np.abs(gaps[bins] - (right - shares))
    without /= count - 1
    return error, float(np.sqrt((count - 1) * np.mean((without - without.mean()) ** 2)))


def _bins(shares: np.ndarray) -> np.ndarray:
    return np.minimum((shares * BINS).astype(int), BINS - 1)
