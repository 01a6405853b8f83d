"""The report: the same bytes from the same inputs, right numbers in every table, clear words when input is missing."""

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
from PIL import Image

from rrcm.config import METHODS, Config, parse_config
from rrcm.errors import RRCMError
from rrcm.files import write_csv, write_json
from rrcm.report import _latex, write_report
from rrcm.results import average_certified_radius, certified_accuracy, read_certificates, sigma_name, write_certificates
from rrcm.shards import ShardedImages, write_shards

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"git": {"revision": "0" * 40, "dirty": False}, "hardware": {"cpu": "a CPU"}, "software": {"torch": "2"}}


def make_config(**changes: object) -> Config:
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    return parse_config(
        values | {"sigmas": [0.25, 1.0], "methods": ["rrcm", "consistency", "consistency_matched"]} | changes
    )


def make_inputs(config: Config, root: Path) -> None:
    """What the other stages would leave under root, with invented but lifelike numbers."""
    rng = np.random.default_rng(0)
    write_shards(config.data, 0, root / "data/shards")
    labels = ShardedImages(root / "data/shards", "test").labels
    idx = np.arange(len(labels))[:: config.certify.every][: config.certify.max_images]
    steps = np.arange(10, 401, 10)
    pretraining = pd.DataFrame({"step": steps, "loss": 0.0, "contrastive": 1 + 9 * np.exp(-steps / 90.0)})
    pretraining["consistency"] = 0.3 + 4 * np.exp(-steps / 60.0)
    pretraining["levels"] = 1 + 20 * 2 ** (steps // 134)
    write_csv(root / "models/pretrain/history.csv", pretraining.to_dict("records"))
    write_json(root / "models/pretrain/config.json", {"compute": {"pretrain": 1.2e6}})
    write_json(root / "timings/pretrain.json", {"seconds": 90.0, "environment": ENVIRONMENT})
    skill = dict(zip(METHODS, [0.5, 0.3, 0.0, 0.55, 0.1], strict=True))
    for method in config.methods:
        epochs = 68 if METHODS[method].matched else 20
        for sigma in config.sigmas:
            place, environment = f"{method}/{sigma_name(sigma)}", ENVIRONMENT | {"hardware": {"cpu": method[0]}}
            z = rng.normal(1.3 - 0.9 * sigma + skill[method], 1.2, len(idx)).clip(max=2.46)
            label = labels[idx]
            predict = np.where(z > 0, label, (label + 3) % 10)
            predict[abs(z) < 0.1] = -1
            radius = np.where(predict < 0, 0.0, sigma * abs(z))
            frame = {"idx": idx, "label": label, "predict": predict, "radius": radius}
            write_certificates(
                root / f"certificates/{place}.tsv",
                pd.DataFrame(frame).assign(correct=(predict == label).astype(int), time=0),
            )
            accuracy = (0.9 - 0.3 * sigma) * (1 - np.exp(-(1 + skill[method]) * np.arange(1, epochs + 1) / 9))
            history = [
                {"epoch": e, "loss": 2 / e, "cross_entropy": 1 / e, "regularizer": 1 / e, "val_accuracy": a, "lr": 0.1}
                for e, a in enumerate(accuracy.tolist(), start=1)
            ]
            history[0]["val_accuracy"] = None
            write_csv(root / f"models/{place}/history.csv", history)
            share = 4e5 if METHODS[method].pretrained else 0.0
            details = {"method": method, "sigma": sigma, "seed": 0, "parameters": 208_000}
            details |= {"selected": {"epoch": epochs - 1, "val_accuracy": float(accuracy[-2])}}
            write_json(
                root / f"models/{place}/config.json",
                details | {"compute": {"finetune": 8448.0 * epochs, "pretrain_share": share}},
            )
            for stage in ("finetune", "certify"):
                write_json(root / f"timings/{stage}/{place}.json", {"seconds": 1.5, "environment": environment})
        record = {"method": method, "parameters": 208_000, "device": "cpu", "dtype": "fp32", "batch_size": 1000}
        seconds = {"10000": 0.21, "100000": 2.0 + 0.1 * skill[method]}
        write_json(root / f"latency/{method}.json", record | {"seconds": seconds, "environment": ENVIRONMENT})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, root = make_config(), tmp_path_factory.mktemp("made")
    make_inputs(config, root)
    write_report(config, root, root / "reports/digits")
    return config, root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_in_another_folder_and_surroundings(made, tmp_path: Path):
    config, root = made
    values = config.model_dump(mode="json") | {"device": "cpu", "launcher": "torchrun --nproc-per-node 8"}
    values["data"] |= {"root": "/home/someone", "workers": 3}  # nor do settings matter that change no result
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "matplotlibrc").write_text("xtick.labelsize: 20\naxes.facecolor: pink\n")  # a user's own style
    code = (
        "import sys; from pathlib import Path; from rrcm.config import load_config; import rrcm.report;"
        "rrcm.report.write_report(load_config('config.yaml'), Path(sys.argv[1]), Path('elsewhere'))"
    )
    surroundings = {"TZ": "Asia/Kathmandu", "LANG": "de_DE.UTF-8", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    surroundings |= {"SOURCE_DATE_EPOCH": "1", "PYTHONPATH": str(REPOSITORY)}
    relative = os.path.relpath(root, tmp_path)
    subprocess.run([sys.executable, "-c", code, relative], cwd=tmp_path, env=os.environ | surroundings, check=True)
    first, again = files(root / "reports/digits"), files(tmp_path / "elsewhere")
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []


def test_figures_are_whole_and_say_nothing_of_when_or_where(made):
    _, root = made
    names = {"certified_accuracy", "envelope", "latency", "training", "sheet"}
    report = root / "reports/digits"
    assert {path.stem for path in report.glob("*.png")} == names == {path.stem for path in report.glob("*.svg")}
    for name in names:
        with Image.open(report / f"{name}.png") as image:
            image.load()
            assert image.info.keys() <= {"dpi"}
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert len(image.getcolors(2**24)) > 50
        ET.parse(report / f"{name}.svg")
        assert b"<dc:date>" not in (report / f"{name}.svg").read_bytes()
    everything = b"".join(files(report).values())
    assert str(root).encode() not in everything


def test_numbers_agree_with_the_certificates(made):
    config, root = made
    report, radii = root / "reports/digits", config.report.radii
    metrics = json.loads((report / "metrics.json").read_text())
    table = pd.read_csv(report / "per_sigma.csv").set_index(["method", "sigma"])
    curves = pd.read_csv(report / "curves.csv")
    for method in config.methods:
        for sigma in config.sigmas:
            frame = read_certificates(root / f"certificates/{method}/{sigma_name(sigma)}.tsv")
            acr, accuracy = average_certified_radius(frame), certified_accuracy(frame, radii)
            key = f"sigma_{sigma}".replace(".", "_")
            assert metrics["acr"][method][key] == pytest.approx(acr, abs=1e-6)
            assert metrics["certified_r_0_25"][method][key] == pytest.approx(accuracy[1], abs=1e-6)
            row = table.loc[(method, sigma)]
            assert row["acr"] == pytest.approx(acr, abs=1e-6)
            assert [row[f"r_{radius:g}"] for radius in radii] == pytest.approx(list(accuracy), abs=1e-6)
            drawn = curves[(curves["method"] == method) & (curves["sigma"] == sigma)]
            expected = certified_accuracy(frame, drawn["radius"].to_numpy())
            assert list(drawn["certified_accuracy"]) == pytest.approx(list(expected), abs=1e-6)
    assert not any("." in key for key in re.findall(r'"([^"]+)":', json.dumps(metrics)))
    budgets = pd.read_csv(report / "budgets.csv").set_index(["method", "sigma"])
    assert budgets.loc[("rrcm", 0.25), "total_passes"] == 8448 * 20 + 4e5
    assert budgets.loc[("rrcm", 0.25), "pretrain_share_seconds"] == 30
    assert budgets.loc[("consistency", 0.25), "pretrain_share_passes"] == 0
    training = pd.read_csv(report / "training.csv")
    last = training[(training["method"] == "rrcm") & (training["sigma"] == 1.0)].iloc[-1]
    assert last["compute"] == budgets.loc[("rrcm", 1.0), "total_passes"]
    assert training["val_accuracy"].notna().all()


def test_report_says_what_the_numbers_say(made):
    config, root = made
    text = (root / "reports/digits/report.md").read_text()
    finding = text.split("\n\n")[1]
    for group, methods in {
        "fine-tuning budget": ["rrcm", "consistency"],
        "total compute": ["rrcm", "consistency_matched"],
    }.items():
        sentence = finding.split(f"**At equal {group}**")[1]
        for sigma in config.sigmas:
            frames = {m: read_certificates(root / f"certificates/{m}/{sigma_name(sigma)}.tsv") for m in methods}
            acr = {method: average_certified_radius(frame) for method, frame in frames.items()}
            best = max(acr, key=acr.get)
            clause = sentence.split(f"at σ = {sigma:g} ")[1].split(")")[0]
            assert clause.startswith(METHODS[best].label + " ")
            assert f"({acr[best]:.3f}, {max(acr.values()) - min(acr.values()):.3f} ± " in clause
    images = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(images) == 5
    assert all((root / "reports/digits" / image).exists() for image in images)
    assert "0" * 40 in text
    assert "cpu: a CPU" in text
    assert "timings/certify/rrcm/sigma_1.0.json" in text
    assert re.search(r"^[0-9a-f]{64}  certificates/rrcm/sigma_0.25.tsv$", text, re.MULTILINE)


def test_latex_is_a_booktabs_table_with_escapes(made):
    _, root = made
    for name in ("best_sigma", "per_sigma", "budgets", "latency"):
        text = (root / f"reports/digits/{name}.tex").read_text()
        lines = text.splitlines()
        assert lines[0].startswith(r"\begin{tabular}{l")
        assert lines[-1] == r"\end{tabular}"
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        assert text.isascii()
        assert not re.search(r"(?<!\\)[_%#]", text)
        columns = {line.count("&") for line in lines if line.endswith(r"\\")}
        assert len(columns) == 1
    assert r"a\_b \& 50\% \#1 \$" in _latex(pd.DataFrame({"x_y": ["a_b & 50% #1 $"]}))


def test_one_method_one_sigma_no_latency(tmp_path: Path):
    config = make_config(methods=["gaussian"], sigmas=[0.5])
    config = config.model_copy(update={"latency": config.latency.model_copy(update={"n": []})})
    make_inputs(config, tmp_path)
    for unused in ("models/pretrain", "timings/pretrain.json", "latency"):
        (tmp_path / unused).rename(tmp_path / f"unused-{Path(unused).name}")
    write_report(config, tmp_path, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "No two methods to compare; ACR of Gaussian at σ = 0.5: 0." in text
    assert not (tmp_path / "out/latency.png").exists()
    assert not (tmp_path / "out/pretraining.csv").exists()
    assert "latency" not in text.split("## Provenance")[0]


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/shards/manifest.json", "dvc repro shard-data"),
        ("models/pretrain/history.csv", "dvc repro pretrain"),
        ("models/rrcm/sigma_1.0/history.csv", "dvc repro finetune@rrcm-1.0"),
        ("certificates/consistency/sigma_0.25.tsv", "dvc repro certify@consistency-0.25"),
        ("latency/rrcm.json", "dvc repro latency@rrcm"),
    ],
)
def test_missing_input_names_file_and_command(made, tmp_path: Path, path: str, command: str):
    config, root = made
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


@pytest.mark.parametrize("change", ["other images", "other labels"])
def test_mixed_certificates_are_refused(made, tmp_path: Path, change: str):
    config, root = made
    changed = root / "certificates/consistency/sigma_1.0.tsv"
    everything = sorted(root.glob("certificates/*/*.tsv"))
    kept = {path: path.read_bytes() for path in everything}
    try:
        for path in [changed] if change == "other images" else everything:
            frame = read_certificates(path)
            if change == "other images":
                frame["idx"] += 1
            else:  # as from another data set: consistent among themselves, not with the shards
                frame["label"] = (frame["label"] + 1) % 10
                frame["correct"] = (frame["label"] == frame["predict"]).astype(int)
            write_certificates(path, frame)
        with pytest.raises(RRCMError, match=r"sigma_.*other images|is not the one in data/shards"):
            write_report(config, root, tmp_path / "out")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_importing_the_report_does_not_import_torch():
    code = "import sys, rrcm.report, rrcm.results, rrcm.environment; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
