"""Certificates by class, calibration of vote shares, and standard errors: examples by hand, and simulations."""

import numpy as np
import pandas as pd
import pytest

from rrcm.evaluation.calibration import calibration_error, reliability
from rrcm.evaluation.classes import accuracy_by_class, confusions, preferred_classes, top_shares
from rrcm.evaluation.metrics import acr_standard_error, certified_share

FRAME = pd.DataFrame(
    [
        (0, 0, 0.5, 1, "0:90 1:10"),
        (0, 0, 0.1, 1, "0:60 2:40"),
        (0, 2, 0.0, 0, "0:30 2:70"),  # wrong
        (0, -1, 0.0, 0, "0:50 2:50"),  # abstains, a tie goes to the smaller class
        (1, -1, 0.0, 0, "0:51 1:49"),  # abstains and would be wrong
        (1, 1, 0.3, 1, "1:100"),
    ],
    columns=["label", "predict", "radius", "correct", "selection"],
)


def test_accuracy_and_confusions_by_hand():
    table = accuracy_by_class(FRAME, [0.0, 0.2]).set_index("label")
    assert table["images"].to_dict() == {0: 4, 1: 2}
    assert table.loc[0, [0.0, 0.2]].tolist() == [0.5, 0.25] and table.loc[1, [0.0, 0.2]].tolist() == [0.5, 0.5]
    assert table["acr"].tolist() == pytest.approx([0.15, 0.15])
    pairs = confusions(FRAME, preferred_classes(FRAME, num_classes=3))
    assert pairs.values.tolist() == [[0, 0, 0, 1], [0, 2, 1, 0], [1, 0, 0, 1]]  # label, preferred, wrong, abstained


def test_the_votes_of_a_cascade_are_those_of_the_smallest_sigma_and_pass_is_no_class():
    cells = ["1.0=1:9,2:91 0.5=0:40,1:60", "1.0=0:20,1:10,3:70"]
    frame = pd.DataFrame({"predict": [-1, -1], "selection": cells})
    assert preferred_classes(frame, 3, [0.25, 0.5, 1.0]).tolist() == [1, 0]  # class 3 is "pass"


def test_shares_are_of_the_class_with_most_selection_votes():
    top, shares = top_shares(FRAME)
    assert top.tolist() == [0, 0, 2, 0, 0, 1]
    assert shares.tolist() == [0.9, 0.6, 0.7, 0.5, 0.51, 1.0]


def test_reliability_and_calibration_error_by_hand():
    shares, right = np.array([0.95, 0.9, 0.55, 1.0]), np.array([True, False, True, True])
    bins = reliability(shares, right)
    assert bins["images"].tolist() == [1, 3] and bins["accuracy"].tolist() == pytest.approx([1, 2 / 3])
    assert bins["share"].tolist() == pytest.approx([0.55, 0.95])
    assert (bins["low"] <= bins["accuracy"]).all() and (bins["accuracy"] <= bins["high"]).all()
    error, standard_error = calibration_error(shares, right)
    assert error == pytest.approx((1 * 0.45 + 3 * (0.95 - 2 / 3)) / 4)
    left_out = [calibration_error(np.delete(shares, i), np.delete(right, i))[0] for i in range(4)]
    assert standard_error == pytest.approx(np.sqrt(3 * np.var(left_out)))


def test_standard_errors_are_as_large_as_the_scatter():
    """Over 400 samples of 200 images, of shares that are 10 points too high, and of radii."""
    rng, errors, acrs = np.random.default_rng(0), [], []
    for _ in range(400):
        shares = rng.uniform(0.6, 1, 200)
        errors.append(calibration_error(shares, rng.random(200) < shares - 0.1))
        frame = pd.DataFrame({"radius": rng.exponential(0.5, 200), "correct": (rng.random(200) < 0.8).astype(int)})
        acrs.append((frame["radius"].mul(frame["correct"]).mean(), acr_standard_error(frame)))
    for estimates in (errors, acrs):
        values, claimed = np.array(estimates).T
        assert claimed.mean() == pytest.approx(values.std(), rel=0.12)


def test_a_share_has_its_interval():
    share = certified_share(FRAME, 0.2)
    assert share.value == pytest.approx(1 / 3) and 0 < share.low < share.value < share.high < 1
