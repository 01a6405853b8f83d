"""The text of report.md: its headline, what it says about data and certificates, and its sources."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, write_certificates
from invented_run import EXTERNAL, frame_of, make_config, make_inputs, render, write_report

from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy
from rrcm.methods import METHODS
from rrcm.report import page
from rrcm.report.build import make_tables
from rrcm.report.inputs import read_inputs
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import sha256_file


def test_headline_names_the_two_best_methods_and_their_difference(invented_report):
    config, root = invented_report
    text = (root / "reports/digits/report.md").read_text()
    assert "\n\n\n" not in text
    headline = text.split("## Figures")[0]
    assert headline.index("r = 0 |") < headline.index("ACR (σ) |") < headline.index("ACR, σ = 0.25")
    assert "120 test images of digits, n = 1,000, alpha = 0.001" in headline
    runs = [(method, sigma) for method in config.methods for sigma in config.sigmas]
    frames = {(m, s): read_certificates(root / f"certificates/{m}/{sigma_name(s)}.tsv") for m, s in runs}
    for group, methods in {
        "fine-tuning budget": ["rrcm", "consistency"],
        "total compute": ["rrcm", "consistency_matched"],
    }.items():
        sentence, table, *_ = headline.split(f"**At equal {group}**")[1].split("\n\n")
        assert any(METHODS[method].label in sentence for method in methods)
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        radii = config.report.radii
        assert len(rows) == len(radii) + len(config.sigmas)
        for radius, row in zip(radii, rows, strict=False):
            best = {m: max(certified_accuracy(frames[m, s], [radius])[0] for s in config.sigmas) for m in methods}
            assert_top_two(row, f"accuracy (%), r = {radius:g}", {m: 100 * share for m, share in best.items()}, ".1f")
        for sigma, row in zip(config.sigmas, rows[len(radii) :], strict=True):
            acr = {m: average_certified_radius(frames[m, sigma]) for m in methods}
            assert_top_two(row, f"ACR, σ = {sigma:g}", acr, ".3f")


def assert_top_two(row: list[str], name: str, values: dict[str, float], digits: str) -> None:
    """Check that a row of a comparison has the best method, the second best and their difference."""
    second, best = sorted(values, key=values.get)
    assert row[0] == name
    if values[best] > values[second]:
        assert row[1:3] == [f"{METHODS[method].label} {values[method]:{digits}}" for method in (best, second)]
    decimals = int(digits[1])  # half a unit of the last one, or a tie, which may be rounded either way
    shown = float(row[3].partition(" (")[0])
    assert abs(shown - (values[best] - values[second])) <= 0.5 * 10**-decimals + 1e-9


@pytest.mark.thorough
def test_margin_table_shows_the_gain_over_the_binary_bound(invented_report, tmp_path: Path):
    """The margin radii of the fixture are one step larger. The main table stays the same with the margin bound."""
    config, root = invented_report
    text = (root / "reports/digits/report.md").read_text()
    assert text.index("r = 0 |") < text.index("**Margin bound.**") < text.index("**At equal fine-tuning budget**")
    assert "Sampling followed the stopping rule of the binary bound" in text
    gained = pd.read_csv(root / "reports/digits/margin.csv")
    for row in gained.itertuples():
        frame = read_certificates(root / f"certificates/{row.method}/{sigma_name(row.sigma)}.tsv")
        larger = frame.assign(radius=(frame["radius"] + config.certify.radius_step).round(10))
        assert row.certified_accuracy == pytest.approx(certified_accuracy(larger, [row.radius])[0], abs=1e-6)
    assert (gained["gain"] >= 0).all() and gained["gain"].max() > 0
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    asked = config.model_copy(update={"certify": config.certify.model_copy(update={"bound": "margin"})})
    with pytest.raises(RRCMError, match=r"samples.tsv: the margin bound has other radii .*`dvc repro certify@rrcm-"):
        write_report(asked, copy, tmp_path / "out")
    for path in copy.glob("certificates/*/*[0-9].tsv"):
        frame, samples = read_certificates(path), read_samples(path.with_suffix(".samples.tsv"))
        write_certificates(path, frame.assign(radius=samples["margin_radius"], predict=samples["margin_predict"]))
    write_report(asked, copy, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "the number of samples after which the binary bound alone would have stopped" in text
    same = ("best_sigma.csv", "margin.csv", "certified_accuracy.svg")
    assert all((tmp_path / "out" / name).read_bytes() == (root / "reports/digits" / name).read_bytes() for name in same)


def test_equal_total_compute_follows_from_the_passes_spent(invented_report):
    """A method with half the compute of rRCM is not in the comparison at equal total compute."""
    config, root = invented_report
    inputs = read_inputs(config, root)
    passes = inputs.budgets["total_passes"].where(
        inputs.budgets["method"] == "rrcm", inputs.budgets["total_passes"] / 2
    )
    cheap = inputs._replace(budgets=inputs.budgets.assign(total_passes=passes))
    names = [[comparison.name for comparison in page._headline(config, each)] for each in (inputs, cheap)]
    assert names == [["equal fine-tuning budget", "equal total compute"], ["equal fine-tuning budget"]]


def test_the_report_says_that_labels_are_few(invented_report):
    config, root = invented_report
    inputs = read_inputs(config, root)
    few = config.model_copy(update={"data": config.data.model_copy(update={"labels_per_class": 3})})
    said = "Fine-tuning sees 3 labelled images of each class"
    assert said in render(few, root, inputs, ["0"]) and said not in render(config, root, inputs, ["0"])


def test_leaders_have_the_highest_accuracy_at_their_radii():
    certificates = {("rrcm", 0.5): frame_of(0.0, 0.6), ("gaussian", 0.5): frame_of(0.3, 0.3)}
    leaders = page._leaders(certificates, [0.0, 0.25, 0.5, 0.75])
    assert leaders == [(["rRCM", "Gaussian"], ["0"]), (["Gaussian"], ["0.25"]), (["rRCM"], ["0.5"])]


def test_report_lists_its_figures_and_hashes_its_inputs(invented_report):
    _, root = invented_report
    text = (root / "reports/digits/report.md").read_text()
    images = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(images) == 9
    assert all((root / "reports/digits" / image).exists() for image in images)
    assert "0" * 40 in text
    assert "cpu: a CPU" in text
    assert "timings/certify/rrcm/sigma_1.0.json" in text
    for name in ("certificates/rrcm/sigma_0.25.tsv", "certificates/rrcm/sigma_0.25.samples.tsv", EXTERNAL[0]["path"]):
        assert f"\n{sha256_file(root / name)}  {name}\n" in text


def test_external_pretraining_is_named_and_not_counted(tmp_path: Path):
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    finetune, pretrain = values["finetune"], values["pretrain"] | {"objectives": []}
    finetune |= {"initial_weights": "nnet_ema.pth", "timm": {"model": "vit_tiny_patch16_224", "weights": None}}
    config = make_config(methods=["rrcm", "timm", "consistency"], pretrain=pretrain, finetune=finetune, sigmas=[0.25])
    make_inputs(config, tmp_path)
    shutil.rmtree(tmp_path / "models/pretrain/rrcm")  # nobody needs it
    (tmp_path / "timings/pretrain/rrcm.json").unlink()
    inputs = read_inputs(config, tmp_path)
    budgets = make_tables(config, inputs)["budgets"].numbers.set_index("method")
    assert not budgets[["preparation_passes", "preparation_seconds"]].to_numpy().any()
    assert (budgets["total_passes"] == budgets["finetune_passes"]).all()
    text = render(config, tmp_path, inputs, ["0"])
    assert "rRCM starts from weights that were pre-trained elsewhere (`nnet_ema.pth`)" in text
    assert "timm starts from weights that were pre-trained elsewhere (`vit_tiny_patch16_224`)" in text
    assert "**At equal fine-tuning budget**" in text and "**At equal total compute**" not in text


def test_report_names_the_stopping_rule(invented_report, tmp_path: Path):
    config, root = invented_report
    text = (root / "reports/digits/report.md").read_text()
    assert "`certify.stopping: sequential`" in text
    assert "100 samples select" in text and "at most 1,000 more" in text
    assert "multiples of 0.01 (`certify.radius_step`)" in text and "ACR is therefore a lower bound" in text
    fixed = config.certify.model_copy(update={"stopping": "fixed"})
    text = render(config.model_copy(update={"certify": fixed}), root, read_inputs(config, root), ["0"])
    assert "`certify.stopping: fixed`" in text and "sequential" not in text.split("## Figures")[0]


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([12, 0, 1300], r"Images of each class: \*0\* (12), \*1\* (0) and \*2\* (1,300)."),
        ([1] * 500 + [0] * 500, "They are from 500 of the 1,000 classes, 1 image each."),
        ([5] * 21, "They are from all 21 classes, 5 images each."),
        ([4] * 20 + [6], "They are from all 21 classes, 4 to 6 images each."),
    ],
)
def test_report_counts_the_images_of_each_class(invented_report, counts: list[int], sentence: str):
    config, root = invented_report
    inputs = read_inputs(config, root)
    (run, frame), *others = inputs.certificates.items()
    labels = np.repeat(np.arange(len(counts)), counts)
    frame = frame.iloc[[0] * sum(counts)].assign(idx=np.arange(sum(counts)), label=labels)
    inputs = inputs._replace(classes=[f"*{i}*" for i in range(len(counts))])
    inputs = inputs._replace(certificates={run: frame} | {each: frame for each, _ in others})
    text = render(config, root, inputs, ["0"])
    assert (
        f"\n{sum(counts):,} test images of digits, n = 1,000, alpha = 0.001, training seed 0.\n{sentence}\n\n" in text
    )


def test_report_has_the_notes_on_the_data(invented_report):
    config, root = invented_report
    inputs = read_inputs(config, root)
    assert inputs.data_notes == [] and "Data:" not in render(config, root, inputs, ["0"])
    notes = ["left out test images that are training images too (14)", "1 of 3 classes have no test images: *a*"]
    text = render(config, root, inputs._replace(data_notes=notes), ["0"])
    assert f"\nData: {notes[0]}.\nData: 1 of 3 classes have no test images: \\*a\\*.\n" in text


@pytest.mark.thorough
def test_published_results_have_a_section_of_their_own(invented_report, tmp_path: Path):
    config, root = invented_report
    cifar10 = config.data.model_copy(update={"source": "cifar10"})
    write_report(config.model_copy(update={"data": cifar10}), root, tmp_path / "out")
    section = (tmp_path / "out/report.md").read_text().split("### Published results")[1].split("## Provenance")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    status = {row[0]: row[rows[0].index("status")] for row in rows[2:]}
    assert status["Consistency"] == "here" and status["Gaussian"] == status["SmoothMix"] == "not run"
    assert "None of these numbers was measured here" in section
    assert "Published results" not in (root / "reports/digits/report.md").read_text()
    for name in ("best_sigma.csv", "per_sigma.csv", "certified_accuracy.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "reports/digits" / name).read_bytes()
