"""Tables and figures of classes, of the probability of the class, of calibration, and of what a certificate costs."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from invented_run import ENVIRONMENT
from scipy.special import ndtr

from rrcm.certification.results import read_certificates, sigma_name
from rrcm.evaluation.metrics import average_certified_radius
from rrcm.report.build import make_tables
from rrcm.report.classes import MANY, PAIRS, WORST, Deployed, by_class, choose_shown, confusion
from rrcm.report.classes_figure import draw_classes
from rrcm.report.inputs import read_inputs
from rrcm.report.votes_figure import FEWEST, draw_probabilities, draw_reliability
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json

CLEAN = "timings/clean_accuracy.json"


@pytest.fixture(scope="module")
def inputs(invented_report):
    config, root = invented_report
    return read_inputs(config, root)


def deployed(num_classes: int, method: str = "rrcm", deployment: str = "0.5") -> Deployed:
    """Two images of each class. The first k images of class k mod 3 are taken for the next class."""
    label = np.repeat(np.arange(num_classes), 2)
    wrong = np.tile([0, 1], num_classes) < label % 3
    predict = np.where(wrong, (label + 1) % num_classes, label)
    frame = pd.DataFrame({"label": label, "predict": predict, "radius": np.where(wrong, 0, 0.4), "correct": ~wrong})
    return Deployed(method, deployment, frame.astype({"correct": int}), predict)


def test_classes_are_all_shown_if_they_are_few_else_the_worst():
    names = [f"class {k}" for k in range(MANY + 10)]
    few, many = deployed(4), deployed(MANY + 10)
    table = by_class([few], names, [0.0, 0.25, 0.5], few=[0.0, 0.5])
    assert table.text["class"].tolist() == names[:4]
    assert table.text["r = 0"].tolist() == ["100.0", "50.0", "0.0", "100.0"] and set(table.text["r = 0.5"]) == {"0.0"}
    assert table.text["taken for"].tolist() == ["", "class 2 (1)", "class 3 (2)", ""]
    assert table.numbers["r_0.25"].tolist() == [1, 0.5, 0, 1] and table.numbers["wrong"].tolist() == [0, 1, 2, 0]
    assert (table.numbers["low_r_0.25"] <= table.numbers["r_0.25"]).all()
    worst = by_class([many], names, [0.0], few=[0.0]).text
    assert len(worst) == WORST and set(worst["r = 0"]) == {"0.0"}
    pairs = confusion([many], names)
    assert len(pairs.text) == PAIRS and pairs.text["wrong"].tolist() == ["2"] * PAIRS
    assert pairs.numbers["wrong"].sum() == (many.frame["correct"] == 0).sum()
    left, right, *_ = draw_classes(many, names, [0.0, 0.25]).axes
    assert len(left.get_yticklabels()) == WORST and len(right.get_xticklabels()) <= MANY
    left, right, *_ = draw_classes(few, names, [0.0, 0.25]).axes
    assert [text.get_text() for text in right.texts] == ["1", "2"]


def test_the_cascade_is_shown_or_the_best_sigma_of_the_reference():
    good, bad, cascade = deployed(3, "gaussian", "1"), deployed(9, "rrcm", "0.25"), deployed(3, "rrcm", "cascade")
    bad = bad._replace(frame=bad.frame.assign(radius=0.0))
    best = deployed(9, "rrcm", "0.5")
    assert choose_shown([good, bad, best]) is best
    assert choose_shown([good, bad, best, cascade]) is cascade
    assert (best.label, cascade.label) == ("rRCM, σ = 0.5", "rRCM, one cascade")


def test_the_share_at_a_probability_counts_the_bounds_of_correct_images(invented_report, inputs):
    config, root = invented_report
    made = make_tables(config, inputs)
    table = made["probability"].numbers
    for row in table.itertuples():
        frame = read_certificates(root / f"certificates/{row.method}/{sigma_name(row.sigma)}.tsv")
        bound = ndtr(frame["radius"] / row.sigma) + 1e-12
        assert row.share == pytest.approx(((bound >= row.p) & (frame["correct"] == 1)).mean())
        assert row.low <= row.share <= row.high
    panels = draw_probabilities(inputs.certificates).axes
    line = next(line for line in panels[0].get_lines() if line.get_label() == "rRCM")
    at_half = table[(table["method"] == "rrcm") & (table["sigma"] == 0.25) & (table["p"] == 0.5)]
    assert line.get_ydata()[0] == pytest.approx(100 * at_half["share"].item()) and line.get_xdata()[0] == 0.5
    costs = made["costs"].numbers.set_index(["method", "deployment"])
    timing = read_json(root / "timings/certify/rrcm/sigma_1.0.json")
    own, count = costs.loc[("rrcm", "1")], len(inputs.certificates["rrcm", 1.0])
    assert own["seconds"] == pytest.approx(timing["seconds"] / count)
    assert own["passes"] == own["samples"] == pytest.approx(timing["samples"] / count)
    errors = made["per_sigma"].numbers
    assert errors["acr_se"].between(0.01, 0.2).head(6).all() and "clean_accuracy" not in errors


def test_bins_with_few_images_are_not_drawn(inputs):
    votes = ["0:95 1:5"] * FEWEST + ["0:65 1:35"] * (FEWEST - 1)
    frame = pd.DataFrame({"selection": votes, "label": 0, "radius": 0.1, "correct": 1})
    (panel,) = draw_reliability({("rrcm", 0.5): frame}).axes
    line = next(line for line in panel.get_lines() if line.get_label() == "rRCM")
    assert line.get_xdata().tolist() == [95] and line.get_ydata().tolist() == [100]


def test_accuracy_without_noise_is_a_column_where_it_was_measured(invented_report, tmp_path: Path):
    config, root = invented_report
    copy = Path(shutil.copytree(root, tmp_path / "run", ignore=shutil.ignore_patterns("reports")))
    names = [sigma_name(sigma) for sigma in config.sigmas]
    record = {"seconds": 1.0, "images": dict.fromkeys(config.methods, 120), "environment": ENVIRONMENT}
    record["correct"] = {method: {name: 90 + 6 * i for i, name in enumerate(names)} for method in config.methods}
    write_json(copy / CLEAN, record)
    inputs = read_inputs(config, copy)
    table = make_tables(config, inputs)["per_sigma"]
    assert CLEAN in inputs.files and table.text["clean"].tolist()[:2] == ["75.0", "80.0"]
    assert table.numbers["clean_accuracy"].tolist()[:2] == [0.75, 0.8]
    assert table.text["clean"].tolist()[6:] == ["", ""]  # other groups' results
    del record["correct"]["rrcm"][names[1]]
    write_json(copy / CLEAN, record)
    with pytest.raises(
        RRCMError, match=r"clean_accuracy.json: has no count of the images .* `dvc repro clean-accuracy"
    ):
        read_inputs(config, copy)
    assert average_certified_radius(inputs.certificates["rrcm", 0.25]) > 0
