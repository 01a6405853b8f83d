"""The table of one deployment: which classifiers and images it compares, and by which bound."""

import numpy as np
import pandas as pd
import pytest
from invented_run import ENVIRONMENT

from rrcm.certification.record import CascadeRecord
from rrcm.evaluation.metrics import accuracy_difference, acr_difference, certified_accuracy
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.deployment import (
    acceptance,
    deployment,
    deployment_differences,
    largest_shortfall,
    settled_ratio,
    shortfalls,
)
from rrcm.report.deployment_figure import draw_deployment

RADII = [0.0, 0.5, 1.0]
SMALL, MIDDLE, LARGE = 0.25, 0.5, 1.0


def frame_of(radii: list[float], samples: int = 1000, accepting: list[float] | None = None) -> pd.DataFrame:
    """Images with these radii; a negative one belongs to a wrong class."""
    radius = np.array(radii)
    frame = pd.DataFrame({"idx": range(len(radii)), "label": 1, "predict": np.where(radius < 0, 2, 1)})
    frame = frame.assign(radius=radius.clip(0), correct=(radius >= 0).astype(int), samples=samples)
    return frame if accepting is None else frame.assign(accepting_sigma=accepting)


def record_of(**changes: object) -> CascadeRecord:
    """The record of a cascade of one network at three sigmas."""
    chosen = {"by": {"0.5": 2.0, "1": 1.0}, "n": 1000, "images": 1430, "score": 0.5}
    values = {"format": 1, "models": [{"kind": "classifier", "sha256": "0" * 64}], "num_classes": 10}
    values |= {"data": {"sha256": "0" * 64, "split": "test"}, "image_size": 8, "stopping": "sequential"}
    values |= {"sigmas": [SMALL, MIDDLE, LARGE], "thresholds": [-0.1, 0.2], "certificates": "label-aware"}
    values |= {"can_pass": False, "chosen": chosen, "bound": "binary", "n0": 100, "n": 1000, "alpha": 0.001}
    values |= {"radius_step": 0.01, "labelled": True, "seed": 0, "precision": "fp32", "batch_size": 1, "compile": False}
    return CascadeRecord(**values | {"device": "cpu", "environment": ENVIRONMENT, "files": {}} | changes)


ACCEPTING = [LARGE, LARGE, SMALL, np.nan]
OWN = frame_of([1.2, 0.9, 0.4, -1], 1500, ACCEPTING)
SINGLES = {  # the middle sigma is the best at no radius
    ("rrcm", LARGE): frame_of([1.5, 1.2, -1, -1], 1000),
    ("rrcm", SMALL): frame_of([0.6, 0.6, 0.6, -1], 800),
    ("rrcm", MIDDLE): frame_of([0.7, -1, -1, -1], 900),
    ("other", LARGE): frame_of([9.0, 9.0, 9.0, 9.0], 10),  # of another method, better than all
}
CASCADES = {"rrcm": Cascade(record_of(), OWN, frame_of([0.5, -1, -1, -1], 1200, ACCEPTING), {"certification": 2.0}, {})}


def test_each_row_is_of_the_method_and_of_its_own_sigma():
    table = deployment(CASCADES, SINGLES, "binary", RADII)
    numbers = table.numbers.set_index("deployment")
    assert list(numbers.index) == ["cascade", "multi-scale", "0.25", "0.5", "1", "best"]
    assert set(numbers["bound"]) == {"binary"} and set(numbers["method"]) == {"rrcm"}
    assert numbers["deployments"].to_dict() == {name: 3 if name == "best" else 1 for name in numbers.index}
    assert numbers.loc["cascade", ["r_0", "r_0.5", "r_1"]].tolist() == [0.75, 0.5, 0.25]
    assert numbers.loc["best", ["r_0", "r_0.5", "r_1"]].tolist() == [0.75, 0.75, 0.5]  # of .25, .25 and 1
    assert numbers.loc["1", "acr"] == pytest.approx(2.7 / 4) and np.isnan(numbers.loc["best", "acr"])
    assert numbers["samples_ratio"].dropna().tolist() == pytest.approx([1.5, 1.2, 0.8, 0.9, 1.0])
    text = table.text.set_index("deployed")
    assert text.loc["one cascade", "ratio"] == "1.50" and text.loc["σ = 1 alone", "ratio"] == "1.00"
    assert text.loc["best σ at each radius (three deployments)", ["r = 0.5", "ACR", "ratio"]].tolist() == [
        "75.0",
        "",
        "",
    ]


def test_a_cascade_has_no_row_in_the_table_of_the_other_bound():
    numbers = deployment(CASCADES, SINGLES, "margin", RADII).numbers
    assert numbers["deployment"].tolist() == ["0.25", "0.5", "1", "best"] and set(numbers["bound"]) == {"margin"}


def test_differences_are_paired_with_the_best_sigma_at_each_radius_and_with_each_acr():
    table = deployment_differences(CASCADES, SINGLES, RADII, seed=3)
    numbers = table.numbers.set_index(["measure", "at"])
    for radius, best in ((0.0, SMALL), (0.5, SMALL), (1.0, LARGE)):
        expected = accuracy_difference(OWN, SINGLES["rrcm", best], radius)
        row = numbers.loc[("certified_accuracy", radius)]
        assert tuple(row[["difference", "low", "high"]]) == pytest.approx(expected)
        assert row["value"] == certified_accuracy(OWN, [radius])[0]
    for sigma in (SMALL, MIDDLE, LARGE):
        expected = acr_difference(OWN, SINGLES["rrcm", sigma])
        assert tuple(numbers.loc[("acr", sigma), ["difference", "low", "high"]]) == pytest.approx(expected)
    assert list(table.text) == ["method", *(f"r = {r:g}" for r in RADII), *(f"ACR, σ = {s:g}" for s in (0.25, 0.5, 1))]
    assert set(numbers["seed"]) == {3} and set(numbers["images"]) == {4}


def test_the_largest_shortfall_is_over_all_radii_not_only_those_of_the_table():
    singles = [SINGLES["rrcm", sigma] for sigma in (SMALL, MIDDLE, LARGE)]
    share, radius = largest_shortfall(OWN, singles)
    dense = np.arange(0, 2, 0.001)
    best = np.max([certified_accuracy(single, dense) for single in singles], axis=0)
    assert share == max(best - certified_accuracy(OWN, dense)) == 0.25 and radius == 0.6
    one = frame_of([0.31, 0.31, 0.31])  # the table's radii show no difference
    assert largest_shortfall(frame_of([0.3, 0.3, 0.31]), [one]) == (pytest.approx(2 / 3), 0.31)
    assert largest_shortfall(frame_of([2.0, 2.0]), [frame_of([1.0, -1])])[0] <= 0


def test_the_sentence_never_states_too_small_a_shortfall():
    images = 359
    for missing in (1, 3, 7):
        own = frame_of([1.0] * (images - missing) + [-1.0] * missing, 1, [LARGE] * images)
        singles = {("rrcm", sigma): frame_of([1.0] * images) for sigma in (SMALL, MIDDLE, LARGE)}
        (each,) = shortfalls({"rrcm": Cascade(record_of(), own, None, {}, {})}, singles)
        assert 0 <= each.points - 100 * missing / images < 0.1 and each.deployments == "three"
    (ahead,) = shortfalls({"rrcm": Cascade(record_of(), frame_of([9.0] * 4), None, {}, {})}, SINGLES)
    assert (
        ahead.points == 0 and ahead.acr == 9 and (ahead.best_acr, ahead.best_sigma) == (pytest.approx(2.7 / 4), LARGE)
    )


def test_how_a_cascade_decides():
    frame = OWN.assign(samples=[1500, 1100, 5000, 100])
    passing = Cascade(record_of(can_pass=True), frame, None, {"certification": 2.0}, {MIDDLE: 0.25, LARGE: 0.5})
    table = acceptance({"rrcm": passing}, SINGLES)
    (row,) = table.numbers.to_dict("records")
    assert [row[f"accepts_{sigma}"] for sigma in ("0.25", "0.5", "1")] == [0.25, 0, 0.5]
    assert row["nothing_certified"] == 0.25 and (row["threshold_0.5"], row["threshold_1"]) == (-0.1, 0.2)
    assert (row["pass_0.5"], row["pass_1"]) == (0.25, 0.5)
    assert row["settled_ratio"] == settled_ratio(passing, SINGLES, "rrcm") == 1.3  # 2,600 samples of the first two
    (text,) = table.text.to_dict("records")
    assert text["chosen for"] == "2 x accuracy at r = 0.5 + 1 x accuracy at r = 1, 1,430 validation images, n = 1,000"
    assert text["pass at σ = 1"] == "50.0" and text["networks"] == "1"
    assert not [name for name in acceptance(CASCADES, SINGLES).text if "pass" in name]


def test_the_figure_names_each_curve_once_and_its_legend_fits():
    both = CASCADES | {"consistency": CASCADES["rrcm"]}
    singles = SINGLES | {("consistency", sigma): SINGLES["rrcm", sigma] for sigma in (SMALL, MIDDLE, LARGE)}
    for cascades, colours in ((CASCADES, 1), (both, 2)):
        figure = draw_deployment(cascades, singles)
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert len(names) == len(set(names)) == 5 + colours
        assert {"best σ at each radius (three deployments)", "σ = 0.25 alone", "one cascade, multi-scale rule"} <= {
            *names
        }
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.y1 < min(panel.get_tightbbox().y0 for panel in figure.axes)
        for panel in figure.axes:
            lines = {line.get_label(): line for line in panel.get_lines()}
            widths = {name: lines[name].get_linewidth() for name in lines if not name.startswith("_")}
            assert max(widths, key=widths.get).startswith("one cascade") and panel.get_xlim()[1] == 1.03 * 1.5
