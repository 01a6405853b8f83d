"""The report of methods that denoise: their costs, and the subsets of images that they certify."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, write_certificates, write_samples
from invented_run import DENOISING, denoising_config, make_inputs, write_report

from rrcm.certification.results import read_certificates, read_samples
from rrcm.evaluation.metrics import average_certified_radius
from rrcm.methods import METHODS
from rrcm.report import page
from rrcm.report.accuracy_figures import draw_certified_accuracy, draw_envelope
from rrcm.report.inputs import read_inputs
from rrcm.utils.errors import RRCMError


@pytest.mark.thorough
def test_denoising_methods_are_explained_and_their_costs_counted(denoising_report):
    _, root = denoising_report
    report = root / "reports/digits"
    text = (report / "report.md").read_text()
    assert "\n\n\n" not in text
    for sentence in (
        "denoises in one step, and classifies the result once (classifier trained at σ = 0.001).",
        "runs K = 10 random reverse processes of b = 2 steps from each noisy sample",
        "over m = 5 additional noise samples with σ' = 0.25 (classifier trained at σ = 0.25).",
        "DDS, fine-tuned is DDS with a classifier that was fine-tuned on denoised images",
    ):
        assert sentence in text
    assert "pre-trained elsewhere" not in text
    budgets = pd.read_csv(report / "budgets.csv").set_index(["method", "sigma"])
    assert budgets.loc[("dds", 0.25), ["epochs", "finetune_passes"]].tolist() == [0, 0]
    assert budgets.loc[("dds", 0.25), "preparation_passes"] == 6e5
    assert (budgets.loc[["dds", "diffsmooth", "dds_finetuned"], "preparation_seconds"] == 21).all()  # (61.5 + 1.5) / 3
    assert budgets["images"].to_dict() == {run: 40 if run[0] == "densepure" else 120 for run in budgets.index}
    assert set(pd.read_csv(report / "training.csv")["method"]) == {"rrcm", "gaussian", "dds_finetuned"}
    metrics = json.loads((root / "metrics.json").read_text())
    assert set(metrics["val_accuracy"]) == {"rrcm", "gaussian", "dds_finetuned"} and "dds" in metrics["acr"]


@pytest.mark.thorough
def test_subsets_of_images_are_compared_on_common_images_and_noted(denoising_report):
    config, root = denoising_report
    report = root / "reports/digits"
    text = (report / "report.md").read_text()
    assert "120 test images of digits" in text and "DensePure certifies 40 of the test images, evenly spaced." in text
    assert "**At any cost**, on the 40 images that all methods certify, *" in text
    assert "**At equal fine-tuning budget**, *" in text  # of rRCM and Gaussian
    for name in ("best_sigma", "per_sigma", "budgets", "differences"):
        lines = (report / f"{name}.md").read_text().splitlines()
        column = [cell.strip() for cell in lines[0].split("|")].index("images")
        images = {line.split("|")[1].strip(): line.split("|")[column].strip() for line in lines[2:]}
        assert images.pop("DensePure") == "40" and set(images.values()) == {"120"}
    ours, reference = (read_certificates(root / f"certificates/{m}/sigma_1.0.tsv") for m in ("densepure", "rrcm"))
    common = reference[reference["idx"].isin(ours["idx"])]
    assert len(common) == len(ours) == 40
    table = pd.read_csv(report / "differences.csv").set_index(["method", "measure", "at"]).sort_index()
    expected = average_certified_radius(ours) - average_certified_radius(common)
    assert table.loc[("densepure", "acr", 1.0), "difference"] == pytest.approx(expected, abs=1e-6)
    assert average_certified_radius(common) != pytest.approx(average_certified_radius(reference), abs=1e-3)
    shared = page._headline(config, read_inputs(config, root))[-1]
    assert (shared.name, shared.images) == ("any cost", 40)
    certificates = read_inputs(config, root).certificates
    for figure in (draw_certified_accuracy(certificates, {}), draw_envelope(certificates)):
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert sorted(texts) == sorted(
            {*(METHODS[m].label for m in DENOISING if m != "densepure"), "DensePure (40 images)"}
        )


@pytest.mark.parametrize("method", ["densepure", "dds"])
def test_certified_images_must_match_the_settings(denoising_report, tmp_path: Path, method: str):
    """Forty other images, another number of images and other labels are refused."""
    config, root = denoising_report
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    path = copy / f"certificates/{method}/sigma_0.25.tsv"
    samples, frame = path.with_suffix(".samples.tsv"), read_certificates(path)

    def write(frame: pd.DataFrame) -> None:
        write_certificates(path, frame)
        write_samples(
            samples, read_samples(root / samples.relative_to(copy)).iloc[: len(frame)].assign(idx=frame["idx"])
        )

    write(frame.assign(label=(frame["label"] + 1) % 10, correct=0))
    with pytest.raises(RRCMError, match=rf"{method}/sigma_0.25.tsv: image 0 has label 1, in data/shards it"):
        read_inputs(config, copy)
    for changed in (frame.assign(idx=frame["idx"] + 1), frame.iloc[:-1]):
        write(changed)
        with pytest.raises(RRCMError, match=rf"{method}/sigma_0.25.tsv: certifies other images than the settings say"):
            read_inputs(config, copy)


@pytest.mark.slow
def test_report_without_trained_methods(tmp_path: Path):
    pretrain = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["pretrain"] | {"objectives": []}
    config = denoising_config(["dds", "densepure"], pretrain=pretrain, sigmas=[0.5])
    make_inputs(config, tmp_path)
    write_report(config, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/training.png").exists() and not (tmp_path / "out/training.csv").exists()
    text = (tmp_path / "out/report.md").read_text()
    assert "Validation accuracy under noise" not in text and "**At any cost**" in text
