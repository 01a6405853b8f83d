"""The report: the same inputs give the same bytes, and missing or mixed inputs give clear errors."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, write_certificates, write_samples
from invented_run import EXTERNAL, make_config, make_inputs, write_report
from PIL import Image

from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy
from rrcm.report.figures import FORMATS
from rrcm.utils.errors import RRCMError


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.thorough
def test_the_report_has_the_same_bytes_in_another_environment(invented_report, tmp_path: Path):
    config, root = invented_report
    values = config.model_dump(mode="json") | {"device": "cpu", "launcher": "torchrun --nproc-per-node 8"}
    values["data"] |= {"root": "/home/someone", "workers": 3}  # settings that change no result
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "matplotlibrc").write_text("xtick.labelsize: 20\naxes.facecolor: pink\n")  # a user's own style
    code = (
        "import sys; from pathlib import Path; from rrcm.config import load_config; import rrcm.report.build;"
        "rrcm.report.build.write_report(load_config('config.yaml'), Path(sys.argv[1]), Path('elsewhere'))"
    )
    surroundings = {"TZ": "Asia/Kathmandu", "LANG": "de_DE.UTF-8", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    surroundings |= {"SOURCE_DATE_EPOCH": "1", "PYTHONPATH": str(REPOSITORY)}
    surroundings |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # a notebook's; not installed
    relative = os.path.relpath(root, tmp_path)
    subprocess.run([sys.executable, "-c", code, relative], cwd=tmp_path, env=os.environ | surroundings, check=True)
    first, again = files(root / "reports/digits"), files(tmp_path / "elsewhere")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_figures_are_complete_and_hold_no_date_or_path(invented_report):
    _, root = invented_report
    names = {"certified_accuracy", "envelope", "latency", "training", "representation", "gallery"}
    names |= {"probability", "calibration", "classes"}
    report = root / "reports/digits"
    assert all({path.stem for path in report.glob(f"*{suffix}")} == names for suffix in FORMATS)
    for name in names:
        with Image.open(report / f"{name}.png") as image:
            image.load()
            assert image.info.keys() <= {"dpi"}
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert len(image.getcolors(2**24)) > 50
        ET.parse(report / f"{name}.svg")
        assert b"<dc:date>" not in (report / f"{name}.svg").read_bytes()
        pdf = (report / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-") and b"/CIDFontType2" in pdf  # TrueType
        assert not any(key in pdf for key in (b"/CreationDate", b"/Producer", b"/Creator", b"/FontType 3", b"/Type3"))
    everything = b"".join(files(report).values())
    assert str(root).encode() not in everything


def test_tables_and_metrics_agree_with_the_certificates(invented_report):
    config, root = invented_report
    report, radii = root / "reports/digits", config.report.radii
    metrics = json.loads((root / "metrics.json").read_text())
    table = pd.read_csv(report / "per_sigma.csv").set_index(["method", "sigma"])
    curves = pd.read_csv(report / "curves.csv")
    for method in config.methods:
        for sigma in config.sigmas:
            frame = read_certificates(root / f"certificates/{method}/{sigma_name(sigma)}.tsv")
            acr, accuracy = average_certified_radius(frame), certified_accuracy(frame, radii)
            key = f"sigma_{sigma}".replace(".", "_")
            assert metrics["acr"][method][key] == pytest.approx(acr, abs=1e-6)
            assert metrics["certified_r_0_25"][method][key] == pytest.approx(accuracy[1], abs=1e-6)
            samples = read_samples(root / f"certificates/{method}/{sigma_name(sigma)}.samples.tsv")["samples"].mean()
            assert metrics["samples"][method][key] == pytest.approx(samples, abs=1e-6)
            row = table.loc[(method, sigma)]
            assert row["samples"] == pytest.approx(samples, abs=1e-6)
            assert row["acr"] == pytest.approx(acr, abs=1e-6)
            assert [row[f"r_{radius:g}"] for radius in radii] == pytest.approx(list(accuracy), abs=1e-6)
            drawn = curves[(curves["method"] == method) & (curves["sigma"] == sigma)]
            expected = certified_accuracy(frame, drawn["radius"].to_numpy())
            assert list(drawn["certified_accuracy"]) == pytest.approx(list(expected), abs=1e-6)
    assert not any("." in key for key in re.findall(r'"([^"]+)":', json.dumps(metrics)))
    differences = pd.read_csv(report / "differences.csv").set_index(["method", "measure", "at"]).sort_index()
    assert set(differences["seed"]) == {config.seed}
    acr = differences.xs("acr", level="measure")
    assert acr["value"].to_dict() == pytest.approx(table.loc[acr.index, "acr"].to_dict(), abs=1e-6)
    assert acr.loc[("consistency", 1.0), "difference"] == pytest.approx(
        table.loc[("consistency", 1.0), "acr"] - table.loc[("rrcm", 1.0), "acr"], abs=2e-6
    )
    budgets = pd.read_csv(report / "budgets.csv").set_index(["method", "sigma"])
    assert budgets.loc[("rrcm", 0.25), "total_passes"] == 8448 * 20 + 4e5
    assert budgets.loc[("rrcm", 0.25), "preparation_seconds"] == 30
    assert budgets.loc[("consistency", 0.25), "preparation_passes"] == 0
    training = pd.read_csv(report / "training.csv")
    last = training[(training["method"] == "rrcm") & (training["sigma"] == 1.0)].iloc[-1]
    assert last["compute"] == budgets.loc[("rrcm", 1.0), "total_passes"]
    assert training["val_accuracy"].notna().all()


@pytest.mark.thorough
def test_external_results_change_only_their_own_rows_and_curves(invented_report, tmp_path: Path):
    _, root = invented_report
    report = root / "reports/digits"
    table = pd.read_csv(report / "per_sigma.csv").set_index(["method", "sigma"])
    for other in EXTERNAL:
        frame = read_certificates(root / other["path"])
        row = table.loc[(f"{other['label']} (external)", other["sigma"])]
        assert row["images"] == len(frame)
        assert row["acr"] == pytest.approx(average_certified_radius(frame), abs=1e-6)
        assert np.isnan(row["samples"])
    assert len(table) == 6 + len(EXTERNAL)
    write_report(make_config(external=[]), root, tmp_path / "out", tmp_path / "metrics.json")
    assert (tmp_path / "metrics.json").read_bytes() == (root / "metrics.json").read_bytes()
    without, same = tmp_path / "out", ["best_sigma.md", "curves.csv", "budgets.md", "envelope.svg"]
    assert all((without / name).read_bytes() == (report / name).read_bytes() for name in same)
    assert len(pd.read_csv(without / "per_sigma.csv")) == 6
    headline, headline_without = ((f / "report.md").read_text().split("## Figures")[0] for f in (report, without))
    assert headline == headline_without
    assert "other groups" in (report / "report.md").read_text()
    assert "other groups" not in (without / "report.md").read_text()


def config_error(*external: dict) -> str:
    """The error message for these external results."""
    with pytest.raises(RRCMError) as error:
        make_config(list(external))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_external_results_are_checked_before_any_work():
    good = EXTERNAL[0]
    for path in ("cohen.tsv", "/external/cohen.tsv", "external_results", "external/../data/x.tsv", ""):
        assert "must be a file below external/" in config_error(good | {"path": path})
    assert config_error(good, good).endswith("'Cohen et al. 2019' at sigma 1.0 appears twice; give each its own label")
    assert "report.external_results.0.label = 'rRCM': is the label of a built-in method" in config_error(
        good | {"label": "rRCM"}
    )
    assert "report.external_results.0.sigma = -1" in config_error(good | {"sigma": -1})
    assert "report.external_results.1.label = 'a|b'" in config_error(good, good | {"label": "a|b"})
    assert "report.external_results.0.file: unknown key" in config_error(good | {"file": "x"})
    assert "allowed here: label, sigma, path" in config_error(good | {"zzz": "x"})


@pytest.mark.slow
def test_report_of_one_method_without_latency(tmp_path: Path):
    pretrain = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["pretrain"] | {"objectives": []}
    config = make_config(external=[], methods=["gaussian"], sigmas=[0.5], pretrain=pretrain)
    config = config.model_copy(update={"latency": config.latency.model_copy(update={"n": []})})
    make_inputs(config, tmp_path)
    for unused in ("models/pretrain/rrcm", "timings/pretrain/rrcm.json", "timings/latency.json"):
        (tmp_path / unused).rename(tmp_path / f"unused-{Path(unused).name}")
    write_report(config, tmp_path, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "There is only one method, so there is no comparison." in text
    assert not (tmp_path / "out/latency.png").exists()
    assert not (tmp_path / "out/pretraining.csv").exists()
    assert "latency" not in text.split("## Provenance")[0]


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/shards/manifest.json", "dvc repro shard-data"),
        ("models/pretrain/rrcm/history.csv", "dvc repro pretrain@rrcm"),
        ("models/rrcm/sigma_1.0/history.csv", "dvc repro finetune@rrcm-1.0"),
        ("certificates/consistency/sigma_0.25.tsv", "dvc repro certify@consistency-0.25"),
        ("certificates/consistency/sigma_0.25.samples.tsv", "dvc repro certify@consistency-0.25"),
        ("timings/latency.json", "dvc repro latency"),
    ],
)
def test_missing_input_names_file_and_command(invented_report, tmp_path: Path, path: str, command: str):
    config, root = invented_report
    (root / path).rename(tmp_path / "away")
    try:
        with pytest.raises(RRCMError) as error:
            write_report(config, root, tmp_path / "out")
    finally:
        (tmp_path / "away").rename(root / path)
    assert path in str(error.value)
    assert f"`{command}`" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_or_bad_external_file_is_named(invented_report, tmp_path: Path):
    _, root = invented_report
    missing = EXTERNAL[1] | {"path": "external/none.tsv"}
    message = r"report\.external_results\.1\.path: .*external/none\.tsv: no such file"
    with pytest.raises(RRCMError, match=message):
        write_report(make_config(external=[EXTERNAL[0], missing]), root, tmp_path / "out")
    (root / "external/none.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\n")
    try:
        with pytest.raises(RRCMError, match=r"external/none\.tsv, line 2: has 4 columns, must have 6"):
            write_report(make_config(external=[missing]), root, tmp_path / "out")
    finally:
        (root / "external/none.tsv").unlink()
    assert not (tmp_path / "out").exists()


def test_samples_of_other_images_raise(invented_report, tmp_path: Path):
    config, root = invented_report
    path = root / "certificates/rrcm/sigma_1.0.samples.tsv"
    kept = path.read_bytes()
    try:
        write_samples(path, read_samples(path).iloc[1:])
        with pytest.raises(RRCMError, match=r"sigma_1.0.samples.tsv: has other images .*`dvc repro certify@rrcm-1.0`"):
            write_report(config, root, tmp_path / "out")
    finally:
        path.write_bytes(kept)


MIXED = {
    "other images": r"sigma_1.0.tsv: certifies other images than",
    "other labels": "has label 1, in data/shards it has 0; run",
}


@pytest.mark.parametrize("change", MIXED)
def test_mixed_certificates_raise(invented_report, tmp_path: Path, change: str):
    config, root = invented_report
    changed = root / "certificates/consistency/sigma_1.0.tsv"
    samples = changed.with_suffix(".samples.tsv")
    everything = sorted(root.glob("certificates/*/*[0-9].tsv"))
    kept = {path: path.read_bytes() for path in [*everything, samples]}
    try:
        for path in [changed] if change == "other images" else everything:
            frame = read_certificates(path)
            if change == "other images":
                frame["idx"] += 1
                write_samples(samples, read_samples(samples).assign(idx=frame["idx"]))
            else:  # as from another data set: consistent among themselves, not with the shards
                frame["label"] = (frame["label"] + 1) % 10
                frame["correct"] = (frame["label"] == frame["predict"]).astype(int)
            write_certificates(path, frame)
        with pytest.raises(RRCMError, match=MIXED[change]):
            write_report(config, root, tmp_path / "out")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_importing_the_report_does_not_import_torch():
    code = "import sys, rrcm.report.build, rrcm.utils.provenance; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
