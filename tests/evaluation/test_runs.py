"""Means over training runs, and their intervals for the runs and the images."""

import math

import numpy as np
import pandas as pd
import pytest

from rrcm.evaluation.metrics import NORMAL_95, certified_accuracy, certified_radii, mean_over_seeds, wilson_interval
from rrcm.evaluation.runs import accuracy_over_runs, acr_over_runs, over_runs

RNG = np.random.default_rng(0)
FRAMES = [
    pd.DataFrame({"correct": RNG.integers(0, 2, 50), "radius": RNG.random(50), "idx": range(50)}) for _ in range(3)
]


def test_a_single_run_has_the_intervals_over_images():
    (share,) = accuracy_over_runs(FRAMES[:1], [0.3])
    value = certified_accuracy(FRAMES[0], [0.3])[0]
    assert share == pytest.approx((value, *wilson_interval(value, 50)))
    acr, radii = acr_over_runs(FRAMES[:1]), certified_radii(FRAMES[0])
    assert acr.high - acr.value == pytest.approx(NORMAL_95 * radii.std(ddof=1) / math.sqrt(50))
    assert acr_over_runs([FRAMES[0].head(1)]).high == math.inf


def test_two_runs_have_no_interval():
    (share,), acr = accuracy_over_runs(FRAMES[:2], [0.3]), acr_over_runs(FRAMES[:2])
    assert share.value == np.mean([certified_accuracy(frame, [0.3]) for frame in FRAMES[:2]])
    assert np.isnan([*share[1:], *acr[1:], *over_runs([0.1, 0.2], (0, 1))[1:]]).all()


def test_three_runs_have_an_interval_for_runs_and_images():
    (share,) = accuracy_over_runs(FRAMES, [0.3])
    shares = np.array([certified_accuracy(frame, [0.3])[0] for frame in FRAMES])
    mean, (low, high) = mean_over_seeds(shares), wilson_interval(shares, 50)
    t = mean.high - mean.value
    below, above = (np.hypot(t, np.sqrt(np.mean(half**2))) for half in (shares - low, high - shares))
    assert share == pytest.approx((shares.mean(), shares.mean() - below, shares.mean() + above))


def test_intervals_stay_on_their_scale():
    sure = FRAMES[0].assign(correct=1, radius=1.0)
    (share,) = accuracy_over_runs([sure, sure, sure.assign(correct=0)], [0.5])
    assert share.high == 1 and share.low == 0
    assert acr_over_runs([sure, sure.assign(radius=0.0), sure.assign(radius=9.0)]).low == 0
    (never,) = accuracy_over_runs([sure] * 3, [2.0])
    assert never.value == never.low == 0 < never.high
