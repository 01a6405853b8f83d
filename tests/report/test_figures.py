"""Figures of certified accuracy, training and images: exact curves, and legends that name every line and fit."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from invented_run import frame_of
from matplotlib.cbook import pts_to_prestep

from rrcm.evaluation.metrics import certified_accuracy
from rrcm.methods import FAMILIES, METHODS, expert_of
from rrcm.report.accuracy_figures import draw_certified_accuracy, draw_envelope
from rrcm.report.figures import MARKERS, line_style
from rrcm.report.gallery import Thumbnail, draw_gallery
from rrcm.report.panels import MAX_TOGETHER, OTHERS
from rrcm.report.training_figure import draw_training


def test_methods_differ_in_colour_or_line_style():
    for (one, a), (other, b) in combinations(METHODS.items(), 2):
        if a.colour.lower() == b.colour.lower():
            same = {expert_of(name).removesuffix("_matched") for name in (one, other)}
            assert len(same) == 1, f"{one} and {other} have the same colour"
            assert line_style(one)["linestyle"] != line_style(other)["linestyle"]
    assert set(MARKERS) == set(FAMILIES)


def test_curves_equal_the_certified_accuracy_at_every_radius():
    certificates = {("rrcm", 0.5): frame_of(0.0, 0.25, 0.25, 0.5), ("gaussian", 0.5): frame_of(0.1, 0.1, 0.1, 0.1)}
    external = {("A", 0.5): frame_of(0.5, 0.75), ("B", 0.5): frame_of(0.3), ("B", 1.0): frame_of(9.0)}
    (panel,) = draw_certified_accuracy(certificates, external).axes
    lines = {line.get_label(): line for line in panel.get_lines()}
    drawn = {"rRCM": certificates["rrcm", 0.5], "Gaussian": certificates["gaussian", 0.5], "A": external["A", 0.5]}
    for label, frame in drawn.items():
        x, y = pts_to_prestep(*lines[label].get_data())
        assert lines[label].get_drawstyle() == "steps-pre"
        for r in (0.05, 0.1, 0.15, 0.2499, 0.2501, 0.3, 0.4999, 0.5001, 0.7):
            k = np.flatnonzero((x[:-1] < r) & (r <= x[1:]))  # level pieces are the ones with width
            assert (y[k[0]] if len(k) else 0) == pytest.approx(100 * certified_accuracy(frame, [r])[0])
    at_zero = {label for label in ("rRCM", "Gaussian") if 0 in lines[label].get_markevery()}
    assert at_zero == {"rRCM"}  # only its curve has a step at 0
    assert not [line for line in panel.get_lines() if line.get_label() not in lines]
    assert panel.get_xlim()[1] == pytest.approx(1.03 * 0.75)
    assert len({(lines[name].get_color(), str(lines[name].get_linestyle())) for name in ("A", "B")}) == 2


def test_legend_names_every_line_once_and_fits():
    together = list(METHODS)[:MAX_TOGETHER]
    methods = {(method, sigma): frame_of(0.2, 0.4) for method in together for sigma in (0.25, 0.5, 1.0)}
    external = {
        ("Salman et al. 2019", 1.0): frame_of(0.1),
        ("_$ by a group with a long name", 0.5): frame_of(0.3),
    }
    for sigmas in ((0.25, 0.5, 1.0), (0.5, 1.0), (0.5,)):
        certificates = {run: frame for run, frame in methods.items() if run[1] in sigmas}
        figure = draw_certified_accuracy(certificates, external)
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        shown = {label.replace("$", r"\$") for label, sigma in external if sigma in sigmas}
        assert sorted(names) == sorted({METHODS[name].label for name in together} | shown)
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.y1 < min(panel.get_tightbbox().y0 for panel in figure.axes)


EXPERTS = {name: row for name, row in METHODS.items() if row.joint is None}


def many_methods(draw: str):
    """The figure with this name, for all methods but joint ones, and its number of panels per legend."""
    runs = {(method, sigma): frame_of(0.2, 0.4) for method in EXPERTS for sigma in (0.25, 0.5, 1.0)}
    if draw == "certified_accuracy":
        return draw_certified_accuracy(runs, {("A group with a long name " * 5, 1.0): frame_of(0.1)}), 3
    if draw == "envelope":
        return draw_envelope(runs), 1
    row = {"compute": [1.0, 2.0], "val_accuracy": [0.5, 0.6], "selected": [False, True]}
    finetuning = pd.concat(pd.DataFrame(row).assign(method=method, sigma=sigma) for method, sigma in runs)
    history = pd.DataFrame({"step": [1, 2], "loss": 1.0, "contrastive": 1.0, "lr": 0.1})
    pretraining = dict.fromkeys(("one", "two", "three", "four"), history)
    return draw_training(pretraining, finetuning), 3


@pytest.mark.thorough
@pytest.mark.parametrize("draw", ["certified_accuracy", "envelope", "training"])
def test_many_methods_are_drawn_one_family_at_a_time(draw: str):
    """Each method is in colour in one row, rRCM is in colour in all, and the others are grey. No legend overlaps."""
    figure, columns = many_methods(draw)
    figure.draw_without_rendering()
    legends = [
        (axes, legend) for axes in figure.axes if (legend := axes.get_legend()) and legend.get_title().get_text()
    ]
    named = {legend.get_title().get_text(): [text.get_text() for text in legend.get_texts()] for _, legend in legends}
    by_family = {family: [k.label for k in EXPERTS.values() if k.family == family] for family in named}
    for family, labels in named.items():
        assert labels[0] == "rRCM"
        assert family == "other groups" or sorted({"rRCM", *by_family[family]}) == sorted(labels)
    assert set(by_family) >= {kind.family for kind in EXPERTS.values()}
    panels = [axes for axes in figure.axes if any(line.get_label() == "rRCM" for line in axes.get_lines())]
    assert len(panels) == columns * len(legends)
    for panel in panels:
        in_colour = [line for line in panel.get_lines() if line.get_color() != OTHERS["color"]]
        grey = len(panel.get_lines()) - len(in_colour)
        assert grey + sum(line.get_label() in {kind.label for kind in EXPERTS.values()} for line in in_colour) == len(
            EXPERTS
        )
    boxes = [legend.get_window_extent() for _, legend in legends]
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    others = [axes.get_window_extent() for axes in figure.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i] + others)


def test_gallery_shows_no_radius_that_is_not_certified():
    answers = [("correct", "3", 0.0), ("wrong", "7", 0.0), ("wrong", "7", 0.25), ("abstains", "", 0.0)]
    tiles = [Thumbnail(np.zeros((2, 2, 1)), "3", predict, radius, verdict) for verdict, predict, radius in answers]
    figure = draw_gallery([tile.pixels for tile in tiles], {0.5: tiles}, "rRCM")
    below = [axes.get_xlabel() for axes in figure.axes[4:]]
    assert below == ["✓ 3\nr = 0.000", "✗ 7\n", "✗ 7\nr = 0.250", "? abstains\n"]
