"""This run against published certificates: on the same images, paired, at each sigma and with the best sigma."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from invented_run import render

from rrcm.evaluation.metrics import accuracy_difference, acr_difference, certified_accuracy
from rrcm.report.against import ONE, match_published, pairs_table, strongest_table, values_table
from rrcm.report.against_figure import MOST, differences, draw_against
from rrcm.report.build import make_tables
from rrcm.report.inputs import read_inputs

RADII = [0.0, 0.25, 0.5]
LABELS = np.arange(40) % 10


def frame(skill: float, idx: range = range(40), labels: np.ndarray = LABELS) -> pd.DataFrame:
    """Certificates whose radii grow with `skill`; every tenth image is wrong."""
    idx = np.array(idx)
    correct = (idx % 10 != 3).astype(int)
    radius = np.where(correct == 1, skill * (idx % 7) / 6, 0.0)
    return pd.DataFrame(
        {"idx": idx, "label": labels[idx], "predict": labels[idx], "radius": radius, "correct": correct}
    )


def run_of(**changes: object):
    certificates = {("rrcm_joint", 0.5): frame(0.6), ("rrcm_joint", 1.0): frame(0.9)}
    certificates |= {("smoothadv_matched_joint", 0.5): frame(0.7), ("smoothadv_matched_joint", 1.0): frame(0.8)}
    cascades = {"rrcm_joint": SimpleNamespace(label_aware=frame(0.75), record=SimpleNamespace(bound="binary"))}
    external = {("A", 0.5): frame(0.5, range(5, 40)), ("A", 1.0): frame(1.0), ("B", 0.25): frame(0.4)}
    given = {"certificates": certificates, "cascades": cascades, "external": external} | changes
    return match_published(given["certificates"], given["cascades"], given["external"])


def test_everything_is_compared_on_the_images_that_all_have():
    against = run_of()
    assert against.images == 35 and not against.fewer and not against.others
    frames = [
        frame for each in (against.ours, against.published) for frames in each.values() for frame in frames.values()
    ]
    assert all(each["idx"].tolist() == list(range(5, 40)) for each in [*frames, *against.cascades.values()])


def test_methods_with_fewer_images_and_files_of_others_are_left_out():
    """A file with another label for one image is of another data set, or in another order."""
    certificates = {("rrcm_joint", 0.5): frame(0.6), ("dds", 0.5): frame(0.6, range(0, 40, 8))}
    labels = LABELS.copy()
    labels[39] = 0
    external = {("A", 0.5): frame(0.5), ("C", 0.5): frame(0.5, labels=labels), ("D", 0.5): frame(0.5).assign(idx=99)}
    external["E", 0.5] = frame(0.5, range(2)).assign(idx=[0, 100])  # one label that agrees may do so by chance
    against = run_of(certificates=certificates, cascades={}, external=external)
    assert (against.images, against.fewer, list(against.published)) == (40, ["dds"], ["A"])
    assert against.others == ["C at σ = 0.5", "D at σ = 0.5", "E at σ = 0.5"]
    assert run_of(external={("C", 0.5): frame(0.5, labels=labels)}) is None


def test_cascades_by_the_margin_bound_are_not_compared():
    cascades = {"rrcm_joint": SimpleNamespace(label_aware=frame(0.75), record=SimpleNamespace(bound="margin"))}
    assert not run_of(cascades=cascades).cascades


def test_pairs_are_the_best_with_the_best_and_each_sigma_with_the_same():
    """A cascade is compared with the best and with each published classifier."""
    against = run_of()
    table = pairs_table(against, RADII, 7).numbers
    seen = table.drop_duplicates(["method", "deployment", "published", "published_sigma"])
    of_rrcm = seen[seen["method"] == "rrcm_joint"]
    pairs = list(zip(of_rrcm["deployment"], of_rrcm["published"], of_rrcm["published_sigma"], strict=True))
    assert sorted(pairs) == sorted(
        [("best", "A", "best"), ("0.5", "A", "0.5"), ("1", "A", "1"), ("best", "B", "best")]
        + [("cascade", "A", sigma) for sigma in ("best", "0.5", "1")]
        + [("cascade", "B", sigma) for sigma in ("best", "0.25")]
    )
    row = table.set_index(["method", "deployment", "published", "published_sigma", "measure", "at"]).sort_index()
    ours, theirs = against.ours["rrcm_joint"], against.published["A"]
    best = row.loc[("rrcm_joint", "best", "A", "best", "certified_accuracy", 0.5)]
    expected = accuracy_difference(ours[1.0], theirs[1.0], 0.5)
    assert best[["difference", "low", "high"]].tolist() == pytest.approx(list(expected))
    acr = table[(table["measure"] == "acr") & (table["deployment"] == "0.5") & (table["method"] == "rrcm_joint")]
    expected = acr_difference(ours[0.5], theirs[0.5])
    assert acr[["difference", "low", "high"]].iloc[0].tolist() == pytest.approx(list(expected))
    assert (table["images"] == 35).all() and (table["seed"] == 7).all()


def test_the_strongest_published_classifier_is_named():
    against = run_of()
    table = strongest_table(against, RADII, 0).numbers
    acr = table[table["measure"] == "acr"].set_index(["method", "deployment", "at"]).sort_index()
    assert set(acr.index.get_level_values("at")) == {ONE, 0.5, 1.0} and set(acr["published"]) == {"A"}
    cascade = acr.loc[("rrcm_joint", "cascade", ONE)]
    expected = acr_difference(against.cascades["rrcm_joint"], against.published["A"][1.0])
    assert cascade["difference"] == pytest.approx(expected.value) and cascade["difference"] < 0


def test_values_are_of_the_best_sigma_at_each_radius():
    against = run_of()
    table = values_table(against, RADII)
    assert table.numbers["method"].tolist() == ["rrcm_joint", "smoothadv_matched_joint", "rrcm_joint", "A", "B"]
    expected = [max(certified_accuracy(each, [r])[0] for each in against.ours["rrcm_joint"].values()) for r in RADII]
    assert table.numbers.loc[0, ["r_0", "r_0.25", "r_0.5"]].tolist() == expected
    assert table.text.loc[2, "ACR, cascade"] and not table.text.loc[0, "ACR, cascade"]


def test_the_figure_has_a_pair_of_panels_for_each_published_method():
    """Ours differ in more than their colours, and the line below is the difference at the radii of the grid."""
    certificates = {(name, 0.5): frame(0.6) for name in ("rrcm_joint", "dmae_joint", "gaussian", "macer", "stability")}
    against = run_of(certificates=certificates, cascades={})
    figure = draw_against(against, against.ours, 0.25)
    panels = figure.get_axes()
    assert [panel.get_title() for panel in panels if panel.get_title()] == ["A", "B"] and len(panels) == 4
    lines = [line for line in panels[0].get_lines() if line.get_label() != "published"]
    shown = [line for line in lines if not line.get_label().startswith("_")]
    assert len(shown) == MOST and len({str(line.get_linestyle()) + line.get_marker() for line in shown}) == MOST
    below = next(line for line in panels[2].get_lines() if len(line.get_xdata()) > 2)
    expected = differences(against.ours["rrcm_joint"], against.published["A"], np.array([0.0, 0.25, 0.5]))
    assert below.get_ydata()[:3] == pytest.approx(expected)


def test_the_report_has_a_chapter_on_published_certificates(invented_report):
    """A published file that is consistency's own has no difference to it. Files of other images are named."""
    config, root = invented_report
    inputs = read_inputs(config, root)
    assert inputs.against is None and "against_pairs" not in make_tables(config, inputs)
    same = {("Consistency (published)", 0.25): inputs.certificates["consistency", 0.25]}
    inputs = inputs._replace(external={**inputs.external, **same})
    pairs = make_tables(config, inputs)["against_pairs"].numbers
    own = pairs[(pairs["method"] == "consistency") & (pairs["deployment"] == "0.25")]
    assert (own["difference"] == 0).all() and len(own) == len(config.report.radii) + 1
    text = render(config, root, inputs, ["0"])
    chapter = text.split("## Against published certificates")[1].split("## Figures")[0]
    assert "\n\n\n" not in chapter and "on the 120 test images" in chapter and "Cohen et al. 2019 at σ = 1" in chapter
