"""The table and the figure of latency."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from invented_run import frame_of

from rrcm.evaluation.metrics import best_sigma_table
from rrcm.methods import METHODS
from rrcm.report import latency_tables
from rrcm.report.build import few_radii
from rrcm.report.inputs import read_inputs
from rrcm.report.latency_figure import draw_latency, pareto_front


def test_latencies_are_medians_over_rounds_and_ratios_within_rounds(denoising_report):
    config, root = denoising_report
    inputs = read_inputs(config, root)
    made, rounds = (
        latency_tables.latency(inputs.latency, [10_000, 100_000], 100, inputs.budgets),
        np.array([1, 1.1, 1.3]),
    )
    table, text = made.numbers.set_index("method"), made.text
    each = table.loc["densepure"]
    assert each[["parameters", "denoiser_passes", "classifier_passes"]].tolist() == [516_000, 20, 10]
    for n in (10_000, 100_000):
        low, median, high = (n + 100) * 2e-6 * 30 * 1.16 * rounds
        seconds = each[[f"seconds_n_{n}_low", f"seconds_n_{n}", f"seconds_n_{n}_high"]]
        assert seconds.tolist() == pytest.approx([low, median, high])
    assert each[["ratio_low", "ratio", "ratio_high"]].tolist() == pytest.approx([34.8] * 3)  # drift does not matter
    assert table["certified_seconds"].to_dict() == pytest.approx(
        {m: 1.5 / (40 if m == "densepure" else 120) for m in config.methods}
    )
    row = text.set_index("method").loc["DensePure"]
    assert row["passes"] == "20 + 10" and text.set_index("method").loc["rRCM", "passes"] == "1"
    assert row["n = 100,000 (s)"] == "7.66 (6.97 to 9.06)" and row["ratio to rRCM"] == "34.8 (34.8 to 34.8)"


def test_latency_figure_has_a_panel_per_radius_and_one_of_published_latencies(denoising_report):
    config, root = denoising_report
    inputs = read_inputs(config, root)
    numbers = latency_tables.latency(inputs.latency, [10_000], 100, inputs.budgets).numbers
    radii, published = [0.0, 0.5], latency_tables.published_latencies()
    figure = draw_latency(numbers, inputs.certificates, radii, 10_000, "cpu, fp32", published)
    figure.draw_without_rendering()
    *panels, others = [axes for part in figure.subfigs for axes in part.axes]
    assert [panel.get_title() for panel in panels] == ["r = 0", "r = 0.5"]
    best = best_sigma_table(inputs.certificates, radii).set_index(["method", "radius"])["certified_accuracy"]
    for panel, radius in zip(panels, radii, strict=True):
        points = [(*each.get_offsets()[0], each.get_sizes()[0]) for each in panel.collections]
        for (x, y, area), row in zip(points, numbers.itertuples(), strict=True):
            assert (x, y) == pytest.approx((row.seconds_n_10000, 100 * best[row.method, radius]))
            assert area / points[0][2] == pytest.approx(row.parameters / numbers["parameters"][0])
        assert [text.get_text() for text in panel.texts] == ["2.2×", "7.2×", "35×"]
    drawn = {x: name for line, name in zip(others.lines, published["method"], strict=True) for x in line.get_xdata()}
    assert drawn == {1: "rRCM", 39: "DDS", 56: "DiffSmooth", 171: "DensePure"} and not others.collections
    assert "not measured here" in others.get_title(loc="left")
    (legend,) = figure.subfigs[0].legends
    assert "DensePure (40 images): 35×, 0.52 M" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("methods", [["rrcm"], ["rrcm", "dds"], list(METHODS)], ids=len)
def test_nothing_overlaps_in_the_latency_figure(methods: list[str]):
    ratios = {"dds": 5.0, "dds_finetuned": 5.0, "diffsmooth": 9.0, "densepure": 30.0}
    numbers = pd.DataFrame(
        {"method": m, "parameters": 2e5, "ratio": ratios.get(m, 1.0), "seconds_n_10000": 0.2 * ratios.get(m, 1.0)}
        for m in methods
    )
    certificates = {(method, 0.5): frame_of(0.2, 0.4) for method in methods}
    figure = draw_latency(numbers, certificates, [0.0, 0.25, 0.5], 10_000, "cpu", latency_tables.published_latencies())
    figure.draw_without_rendering()
    (legend,) = figure.subfigs[0].legends
    boxes = [axes.get_tightbbox() for part in figure.subfigs for axes in part.axes]
    boxes.append(legend.get_window_extent())
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    texts = [text.get_window_extent() for text in figure.subfigs[0].axes[0].texts]
    assert not any(one.overlaps(other) for one, other in combinations(texts, 2))


def test_the_pareto_front_has_what_no_other_method_beats():
    seconds, shares = [2.0, 1.0, 3.0, 1.0, 4.0, 5.0], [60.0, 50.0, 55.0, 40.0, 70.0, 70.0]
    assert pareto_front(seconds, shares) == [(1.0, 50.0), (2.0, 60.0), (4.0, 70.0)]
    names = ["distill_joint", "rrcm_joint", "dds"]  # the last is slower and no better
    measured = {"method": names, "parameters": 2e5, "ratio": [0.25, 1, 4], "seconds_n_10000": [0.05, 0.2, 0.8]}
    certificates = {(name, 0.5): frame_of(*each) for name, each in zip(names, ([0, 1], [1, 1], [1, 1]), strict=True)}
    figure = draw_latency(
        pd.DataFrame(measured), certificates, [0.5], 10_000, "cpu", latency_tables.published_latencies()
    )
    panel = figure.subfigs[0].axes[0]
    (front,) = [line for line in panel.lines if line.get_drawstyle() == "steps-post"]
    assert list(zip(*front.get_data(), strict=True)) == [(0.05, 50.0), (0.2, 100.0), (1.6, 100.0)]
    assert [text.get_text() for text in panel.texts] == ["0.25×", "4.0×"]


def test_latency_figure_shows_only_radii_with_some_certified_images():
    certificates = {("rrcm", 0.5): frame_of(*np.linspace(0, 1, 41)), ("gaussian", 0.5): frame_of(0.0)}
    assert few_radii(certificates, [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]) == [0.0, 0.5, 0.9]
    assert few_radii(certificates, [0.0, 0.25]) == [0.0, 0.25]
    assert few_radii({("rrcm", 0.5): frame_of(0.1)}, [2.0, 3.0]) == [2.0]  # nobody certifies any
