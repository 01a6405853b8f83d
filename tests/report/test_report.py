"""The report: the same inputs give the same bytes, tables have the right numbers, missing inputs give clear errors."""

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html import unescape
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import with_derived, write_certificates, write_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.cbook import pts_to_prestep
from PIL import Image

from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import ALL_SAMPLES, FUTILE, WRONG_CLASS
from rrcm.config import Config, parse_config
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset, evenly_spaced
from rrcm.evaluation.metrics import average_certified_radius, best_sigma_table, certified_accuracy
from rrcm.methods import FAMILIES, METHODS
from rrcm.report import figures, page, tables
from rrcm.report.build import latency_radii, make_tables, read_gallery, write_report
from rrcm.report.certified_images import certificate_table
from rrcm.report.figures import Thumbnail
from rrcm.report.inputs import Inputs, read_inputs
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import sha256_file, write_csv, write_json

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    "git": {"revision": "0" * 40, "dirty": False},
    "hardware": {"cpu": "a CPU"},
    "software": {"python": "3.12"},
}


EXTERNAL = [  # the second has a sigma without a panel
    {"label": "Cohen et al. 2019", "sigma": 1.0, "path": "external/cohen_1.0.tsv"},
    {"label": "50 % more $_$", "sigma": 0.5, "path": "external/more_0.5.tsv"},
]


def make_config(external: list[dict] = EXTERNAL, **changes: object) -> Config:
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    values["report"]["external_results"] = external
    values["latency"]["rounds"] = 3
    values |= {"sigmas": [0.25, 1.0], "methods": ["rrcm", "consistency", "consistency_matched"]} | changes
    return parse_config(with_derived(values))


def config_error(*external: dict) -> str:
    """The error, in one line, for these external results."""
    with pytest.raises(RRCMError) as error:
        make_config(list(external))
    assert "\n" not in str(error.value)
    return str(error.value)


def make_inputs(config: Config, root: Path) -> None:
    """Write what the other stages would leave under root, with invented but realistic numbers."""
    rng = np.random.default_rng(0)
    write_shards(config.data, 0, root / "data/shards")
    labels = ShardedDataset(root / "data/shards", "test").labels
    idx = np.arange(len(labels))[:: config.certify.every][: config.certify.max_images]
    steps = np.arange(10, 401, 10)
    pretraining = pd.DataFrame({"step": steps, "loss": 0.0, "contrastive": 1 + 9 * np.exp(-steps / 90.0)})
    pretraining["consistency"] = 0.3 + 4 * np.exp(-steps / 60.0)
    pretraining["levels"] = 1 + 20 * 2 ** (steps // 134)
    write_csv(root / "models/pretrain/rrcm/history.csv", pretraining.to_dict("records"))
    representations = [
        {
            "step": step,
            "sigma": s,
            "knn": (90 - 30 * s) / 100,
            "same_image_cosine": 1 - s / (2 + step / 50),
            "cross_image_cosine": 0.2 + 0.1 * s,
            "centred_cosine": 1 - s / (1 + step / 50),
        }
        for step in (0, 100, 200, 400)
        for s in (0.0, 0.25, 0.5, 1.0)
    ]
    write_csv(root / "models/pretrain/rrcm/representation.csv", representations)
    encoder = {"objective": "rrcm", "training": {"steps": 400}, "compute": {"pretrain": 1.2e6}}
    write_json(root / "models/pretrain/rrcm/config.json", encoder)
    write_json(root / "timings/pretrain/rrcm.json", {"seconds": 90.0, "environment": ENVIRONMENT})
    skill = dict(zip(METHODS, np.linspace(0.5, -0.3, len(METHODS)), strict=True)) | {"consistency_matched": 0.55}
    for method in config.methods:
        own_idx = idx[evenly_spaced(len(idx), config.denoised.max_images.get(method))]
        for sigma in config.sigmas:
            place, environment = f"{method}/{sigma_name(sigma)}", ENVIRONMENT | {"hardware": {"cpu": method[0]}}
            z = rng.normal(1.3 - 0.9 * sigma + skill[method], 1.2, len(own_idx))
            label = labels[own_idx]
            predict = np.where(z > 0, label, (label + 3) % 10)
            predict[abs(z) < 0.1] = -1
            correct, grid = predict == label, np.array(make_stopping_rule(sigma=sigma, **config.certify.rule).radii)
            reached = (sigma * abs(z) // config.certify.radius_step).astype(int).clip(max=len(grid) - 3)
            radius = np.where(correct, grid[reached], 0.0)
            stop_reason = np.select([correct, predict < 0], [ALL_SAMPLES, FUTILE], WRONG_CLASS)
            samples = np.select([correct, predict < 0], [1100, 348], 100)
            frame = pd.DataFrame({"idx": own_idx, "label": label, "predict": predict, "radius": radius})
            frame = frame.assign(correct=correct.astype(int), time=0, samples=samples, stop_reason=stop_reason)
            gained = np.where(correct, grid[reached + 1], 0.0)  # the margin bound certifies a bit more
            frame = frame.assign(binary_samples=samples, binary_predict=predict, binary_radius=radius)
            frame = frame.assign(margin_predict=predict, margin_radius=gained, selection="", votes="")
            write_certificates(root / f"certificates/{place}.tsv", frame)
            write_samples(root / f"certificates/{place}.samples.tsv", frame)
            make_model(config, root / f"models/{place}", method, sigma, skill[method])
            timing = {"seconds": 1.5, "environment": environment}
            write_json(root / f"timings/finetune/{place}.json", timing)
            timing |= {"samples": int(samples.sum())}
            timing |= {"seconds_by_image": {str(i): 1.5 / len(own_idx) for i in own_idx}}
            write_json(root / f"timings/certify/{place}.json", timing)
    make_latency(config, root)
    if config.derived["denoiser"]:
        write_json(root / "timings/denoiser.json", {"seconds": 61.5, "environment": ENVIRONMENT})
        for part in ("gaussian/sigma_0.001", "gaussian/sigma_0.25"):
            write_json(root / f"timings/finetune/{part}.json", {"seconds": 1.5, "environment": ENVIRONMENT})

    for place, other in enumerate(config.report.external_results):
        rows = [f"{i}\t{i % 10}\t{i % 9}\t{0.01 * i}\t{int(i % 10 == i % 9)}\t0:00:17.5" for i in range(50 + place)]
        (root / other.path).parent.mkdir(exist_ok=True)
        (root / other.path).write_text("\r\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows, ""]))


def make_model(config: Config, folder: Path, method: str, sigma: float, skill: float) -> None:
    """config.json and history.csv of a model that gets better, or of one that is not trained."""
    kind = METHODS[method]
    epochs = 0 if kind.objective is None else 68 if kind.matched else 20
    accuracy = (0.9 - 0.3 * sigma) * (1 - np.exp(-(1 + skill) * np.arange(1, epochs + 1) / 9))
    accuracy = np.arange(1, epochs + 1) / 4000 + (accuracy * 1000).round() / 1000
    accuracy[-1:] = 0.1  # the one before it is selected
    history = [
        {"epoch": e, "loss": 2 / e, "cross_entropy": 1 / e, "regularizer": 1 / e, "val_accuracy": a, "lr": 0.1}
        for e, a in enumerate(accuracy.tolist(), start=1)
    ] or [{"epoch": 0, "loss": None, "val_accuracy": None, "lr": None}]
    history[0]["val_accuracy"] = None
    write_csv(folder / "history.csv", history)
    share = 4e5 if config.finetune.uses_pretraining(method) else 6e5 if kind.denoises else 0.0
    selected = {"epoch": epochs - 1, "val_accuracy": float(accuracy[-2])} if epochs else {"epoch": 0}
    details = {"method": method, "sigma": sigma, "seed": 0, "class_names": [str(i) for i in range(10)]}
    details |= {"parameters": 208_000 + 308_000 * kind.denoises}
    details |= {"selected": {"val_accuracy": None} | selected, "training": {"epochs": epochs}}
    compute = {"finetune": 8448.0 * epochs, "pretrain_share": share, "soft_label_share": 0.0}
    write_json(folder / "config.json", details | {"compute": compute})


PASSES = {"dds": (1, 1), "dds_finetuned": (1, 1), "densepure": (20, 10), "diffsmooth": (1, 5)}


def make_latency(config: Config, root: Path) -> None:
    """Two microseconds a pass, and a machine that gets slower from round to round."""
    methods = {}
    for place, method in enumerate(config.methods):
        denoiser, classifier = PASSES.get(method, (0, 1))
        methods[method] = {
            "parameters": {"denoiser": 308_000 * (denoiser > 0), "classifier": 208_000},
            "passes": {"denoiser": float(denoiser), "classifier": float(classifier)},
            "batch_size": 1024,
            "samples": 2048,
            "seconds_per_sample": [2e-6 * (denoiser + classifier) * (1 + 0.04 * place) * k for k in (1, 1.1, 1.3)],
        }
    record = {"device": "cpu", "dtype": "fp32", "sigma": config.sigmas[0], "methods": methods}
    write_json(root / "timings/latency.json", record | {"environment": ENVIRONMENT})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, root = make_config(), tmp_path_factory.mktemp("made")
    make_inputs(config, root)
    write_report(config, root, root / "reports/digits", root / "metrics.json")
    return config, root


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_same_bytes_in_another_folder_and_surroundings(made, tmp_path: Path):
    config, root = made
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


def test_figures_are_whole_and_say_nothing_of_when_or_where(made):
    _, root = made
    names = {"certified_accuracy", "envelope", "latency", "training", "representation", "gallery"}
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


def test_report_says_what_the_numbers_say(made):
    config, root = made
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


def test_the_margin_table_says_what_it_gains(made, tmp_path: Path):
    """The fixture's margin radii are one step larger. Where the margin bound is asked for, the page leads as before."""
    config, root = made
    text = (root / "reports/digits/report.md").read_text()
    assert text.index("r = 0 |") < text.index("**Margin bound.**") < text.index("**At equal fine-tuning budget**")
    assert "Sampling stopped as the binary bound wants it" in text
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
    assert "those after which the binary bound alone would have stopped" in (tmp_path / "out/report.md").read_text()
    same = ("best_sigma.csv", "margin.csv", "certified_accuracy.svg")
    assert all((tmp_path / "out" / name).read_bytes() == (root / "reports/digits" / name).read_bytes() for name in same)


def assert_top_two(row: list[str], name: str, values: dict[str, float], digits: str) -> None:
    """A row of a comparison has the best method, the second best and their difference."""
    second, best = sorted(values, key=values.get)
    assert row[0] == name
    if values[best] > values[second]:
        assert row[1:3] == [f"{METHODS[method].label} {values[method]:{digits}}" for method in (best, second)]
    assert row[3].startswith(f"{values[best] - values[second]:{digits}} (")


def test_equal_total_compute_is_read_from_what_was_spent(made):
    """An encoder whose pre-training was cheaper does not stand beside rRCM at equal total compute."""
    config, root = made
    inputs = read_inputs(config, root)
    passes = inputs.budgets["total_passes"].where(
        inputs.budgets["method"] == "rrcm", inputs.budgets["total_passes"] / 2
    )
    cheap = inputs._replace(budgets=inputs.budgets.assign(total_passes=passes))
    names = [[comparison.name for comparison in page._headline(config, each)] for each in (inputs, cheap)]
    assert names == [["equal fine-tuning budget", "equal total compute"], ["equal fine-tuning budget"]]


def test_leaders_have_the_highest_accuracy_at_their_radii():
    certificates = {("rrcm", 0.5): frame_of(0.0, 0.6), ("gaussian", 0.5): frame_of(0.3, 0.3)}
    leaders = page._leaders(certificates, [0.0, 0.25, 0.5, 0.75])
    assert leaders == [(["rRCM", "Gaussian"], ["0"]), (["Gaussian"], ["0.25"]), (["rRCM"], ["0.5"])]


def test_report_shows_its_figures_and_sources(made):
    _, root = made
    text = (root / "reports/digits/report.md").read_text()
    images = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert len(images) == 6
    assert all((root / "reports/digits" / image).exists() for image in images)
    assert "0" * 40 in text
    assert "cpu: a CPU" in text
    assert "timings/certify/rrcm/sigma_1.0.json" in text
    for name in ("certificates/rrcm/sigma_0.25.tsv", "certificates/rrcm/sigma_0.25.samples.tsv", EXTERNAL[0]["path"]):
        assert f"\n{sha256_file(root / name)}  {name}\n" in text


def test_pretraining_elsewhere_is_named_and_not_counted(tmp_path: Path):
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    finetune, pretrain = values["finetune"], values["pretrain"] | {"objectives": []}
    finetune |= {"initial_weights": "nnet_ema.pth", "timm": {"model": "vit_tiny_patch16_224", "weights": None}}
    config = make_config(methods=["rrcm", "timm", "consistency"], pretrain=pretrain, finetune=finetune, sigmas=[0.25])
    make_inputs(config, tmp_path)
    shutil.rmtree(tmp_path / "models/pretrain/rrcm")  # nobody needs it
    (tmp_path / "timings/pretrain/rrcm.json").unlink()
    write_report(config, tmp_path, tmp_path / "out")
    budgets = pd.read_csv(tmp_path / "out/budgets.csv").set_index("method")
    assert not budgets[["preparation_passes", "preparation_seconds"]].to_numpy().any()
    assert (budgets["total_passes"] == budgets["finetune_passes"]).all()
    text = (tmp_path / "out/report.md").read_text()
    assert "rRCM starts from weights that were pre-trained elsewhere (`nnet_ema.pth`)" in text
    assert "timm ViT starts from weights that were pre-trained elsewhere (`vit_tiny_patch16_224`)" in text
    assert "**At equal fine-tuning budget**" in text and "**At equal total compute**" not in text


def test_report_says_how_certificates_were_made(made, tmp_path: Path):
    config, root = made
    text = (root / "reports/digits/report.md").read_text()
    assert "`certify.stopping: sequential`" in text
    assert "100 samples choose" in text and "at most 1,000 more" in text
    assert "multiples of 0.01 (`certify.radius_step`)" in text and "ACR is therefore a lower bound" in text
    fixed = config.certify.model_copy(update={"stopping": "fixed"})
    text = render(config.model_copy(update={"certify": fixed}), root, read_inputs(config, root), ["0"])
    assert "`certify.stopping: fixed`" in text and "sequential" not in text.split("## Figures")[0]


def test_external_results_stay_apart(made, tmp_path: Path):
    _, root = made
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


def test_no_two_methods_look_alike():
    for (one, a), (other, b) in combinations(METHODS.items(), 2):
        if a.colour.lower() == b.colour.lower():
            assert f"{one}_matched" == other or f"{other}_matched" == one, f"{one} and {other} have the same colour"
            assert figures.line_style(one)["linestyle"] != figures.line_style(other)["linestyle"]
    assert set(figures.MARKERS) == set(FAMILIES)


CLASSES = ["Ba$$in", "a|b", "<b>&amp;", "x & y", "`tick`", "_under_ *star*", "日本", r"$\frac{1}", "[link](x)", "a\nb"]


HOSTILE = [
    "<script>alert(1)</script><!--",
    "](javascript:alert(1)) ![x](y) <a@b.c>",
    "two\r\nlines\tof \x1b[31mred\x07\x9b2J",
    "\u202egnp.exe\u2066",
    "\u05e2\u05d1\u05e8\u05d9\u05ea\u200f \ufdfd",
    "\U0001f600 \U0001f3f3\ufe0f\u200d\U0001f308",
    "n" * 150 + "m" * 150,
    "null\x00 \x85\u2028",
    "~~x~~ \\$ &lt; https:",
    "\\",
]


def with_classes(root: Path, classes: list[str]) -> Path:
    """A copy of the inputs in root/../renamed whose manifest and models have other class names.

    The last one has all further images of the manifest.
    """
    copy = root.parent / "renamed"
    shutil.copytree(root, copy, dirs_exist_ok=True)
    path = copy / "data/shards/manifest.json"
    manifest = json.loads(path.read_text()) | {"classes": classes, "source": "other digits"}
    for split in manifest["splits"].values():
        last = len(classes) - 1
        split["counts"] = [*split["counts"][:last], sum(split["counts"][last:])]
    write_json(path, manifest)
    for model in copy.glob("models/*/sigma_*/config.json"):
        write_json(model, json.loads(model.read_text()) | {"class_names": classes})
    return copy


def render(config: Config, root: Path, inputs: Inputs, gallery_classes: list[str]) -> str:
    """report.md without the figures that not every profile has."""
    texts = {name: table.text for name, table in make_tables(config, inputs).items()}
    return page.render_report(config, root, inputs, texts, [], gallery_classes)


def to_html(markdown: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(markdown)


def plain_text(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


@pytest.mark.parametrize("classes", [CLASSES, HOSTILE], ids=["odd", "hostile"])
def test_class_names_survive_figures_and_markdown(made, tmp_path: Path, classes: list[str]):
    config, root = made
    renamed = with_classes(root, classes)
    inputs = read_inputs(config, renamed)
    gallery = read_gallery(config, renamed, inputs.certificates)
    figures.save(figures.draw_gallery(gallery.clean, gallery.noisy, "rRCM"), tmp_path / "gallery.svg")
    ET.parse(tmp_path / "gallery.svg")
    html = to_html(render(config, renamed, inputs, gallery.classes))
    names = [printable(" ".join(name.split())) for name in classes]
    frame = read_certificates(root / "certificates/rrcm/sigma_1.0.tsv")
    *first, last = [f"{name} ({(frame['label'] == label).sum()})" for label, name in enumerate(names)]
    assert f"\nImages of each class: {', '.join(first)} and {last}.\n" in plain_text(html).replace("</p>", "\n")
    sentence = plain_text(html).split("True classes, from left to right: ")[1].split(".\n")[0]
    assert set(re.split(", | and ", sentence)) <= set(names)
    assert not {"script", "a", "b", "i", "del"} & set(re.findall(r"<(\w+)", html))
    assert html.count("<img") == 3
    assert printable(html.replace("\n", "")) == html.replace("\n", "")
    table = to_html(tables.markdown_text(pd.DataFrame({"a|b": classes})))
    assert [unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", table)] == ["a|b", *names]
    assert printable(tables.latex_text(pd.DataFrame({"": classes})).replace("\n", "")).count(r"\\") >= len(classes)


@given(st.text(st.characters(), max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_shown_by_markdown_as_it_is(text: str):
    text = f"-{text}"  # at least one visible character
    html = to_html(f"Class {tables.escape_markdown(text)}, code {page._code(text)}.\n")
    shown = printable(" ".join(text.split()))
    assert unescape(html) == f"<p>Class {shown}, code <code>{shown}</code>.</p>\n"


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([12, 0, 1300], r"Images of each class: \*0\* (12), \*1\* (0) and \*2\* (1,300)."),
        ([1] * 500 + [0] * 500, "They are from 500 of the 1,000 classes, 1 image each."),
        ([5] * 21, "They are from all 21 classes, 5 images each."),
        ([4] * 20 + [6], "They are from all 21 classes, 4 to 6 images each."),
    ],
)
def test_report_says_how_many_images_of_which_classes(made, counts: list[int], sentence: str):
    config, root = made
    inputs = read_inputs(config, root)
    (run, frame), *others = inputs.certificates.items()
    frame = frame.iloc[[0] * sum(counts)].assign(label=np.repeat(np.arange(len(counts)), counts))
    inputs = inputs._replace(classes=[f"*{i}*" for i in range(len(counts))])
    inputs = inputs._replace(certificates={run: frame} | {each: frame for each, _ in others})
    text = render(config, root, inputs, ["0"])
    assert (
        f"\n{sum(counts):,} test images of digits, n = 1,000, alpha = 0.001, training seed 0.\n{sentence}\n\n" in text
    )


def test_report_says_what_was_left_out_or_is_missing(made):
    config, root = made
    inputs = read_inputs(config, root)
    assert inputs.data_notes == [] and "Data:" not in render(config, root, inputs, ["0"])
    notes = ["left out test images that are training images too (14)", "1 of 3 classes have no test images: *a*"]
    text = render(config, root, inputs._replace(data_notes=notes), ["0"])
    assert f"\nData: {notes[0]}.\nData: 1 of 3 classes have no test images: \\*a\\*.\n" in text


def test_more_classes_in_the_certificates_than_in_the_shards(made, tmp_path: Path):
    config, root = made
    with pytest.raises(
        RRCMError, match=r"data/shards/test.index.npy: does not fit manifest.json; run shard-data again"
    ):
        write_report(config, with_classes(root, ["a", "b", "c"]), tmp_path / "out")


@pytest.mark.parametrize("classes", [CLASSES, HOSTILE], ids=["odd", "hostile"])
@pytest.mark.filterwarnings("error")
def test_class_names_are_drawn_literally_and_fit(classes: list[str]):
    thumbnails = [Thumbnail(np.zeros((2, 2, 1)), name, name * 9, 0.5, "correct") for name in classes]
    figure = figures.draw_gallery([each.pixels for each in thumbnails], {0.5: thumbnails}, "rRCM")
    figures.set_fonts(figure)
    figure.draw_without_rendering()
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert classes is HOSTILE or labels[0] == r"Ba\$\$in"
    assert all(printable(line) == line for label in labels for line in label.split("\n"))
    for axes in figure.axes:
        assert axes.xaxis.label.get_window_extent().width < axes.get_window_extent().width


def test_names_in_the_table_of_certify_leave_the_terminal_alone():
    names = [*HOSTILE, "not UTF-8 \udcff"]
    frame = pd.DataFrame({"file": names, "class": names, "predict": 0, "radius": 0.5, "samples": 100})
    lines = certificate_table(frame).split("\n")
    assert len(lines) == 2 + len(names) and all(printable(line) == line for line in lines)


@pytest.mark.filterwarnings("error")
def test_legend_takes_any_name(tmp_path: Path):
    names = [
        *CLASSES,
        *HOSTILE,
        "not UTF-8 \udcff",
        " ",
        "_child",
        "n" * 149 + "o" + "m" * 150,
    ]  # the last is like another when shortened
    figure = figures.draw_comparison({name: frame_of(0.1, 0.2) for name in names})
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names)
    figures.set_fonts(figure)
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    figures.save(figure, tmp_path / "names.svg")
    ET.parse(tmp_path / "names.svg")


@pytest.mark.filterwarnings("error")
def test_letters_come_from_any_font_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A letter that DejaVu Sans lacks is drawn in a font that has it; matplotlib brings one. Boxes are said."""
    letter, nowhere = "\u1d15", "\u0378"  # of DejaVu Serif, and of no font: unassigned
    assert figures._families(f"a{letter}") == ["DejaVu Sans", "DejaVu Serif"]
    assert figures._truncate(f"a{letter}{nowhere}", 70, 8) == f"a{letter}□"
    figure = figures.draw_comparison({f"a{letter}": frame_of(0.1, 0.2)})
    figures.save(figure, tmp_path / "with.png")
    assert figure.legends[0].get_texts()[0].get_fontfamily() == ["DejaVu Sans", "DejaVu Serif"]
    assert figures.note_on_letters(["a", letter, "line\nbreak"]) is None
    monkeypatch.setattr(figures, "_family_of", lambda sign: "DejaVu Sans" if sign.isascii() else None)
    note = figures.note_on_letters(["cat", "\u732b", "\u72ac"])
    assert note == (
        "no font here has \u72ac \u732b (CJK), so figures show boxes; install one that has, such as Noto Sans CJK"
    )
    assert "(THAI)" in figures.note_on_letters(["\u0e41"]) and "Noto Sans Thai" in figures.note_on_letters(["\u0e41"])


def test_html_in_labels_and_paths_is_escaped(made, tmp_path: Path):
    _, root = made
    shutil.copytree(root, tmp_path / "root")
    path = "external/</pre>&.tsv"
    (tmp_path / "root/external/<").mkdir()
    (tmp_path / "root" / path).write_bytes((root / EXTERNAL[0]["path"]).read_bytes())
    label = "A & <i>B</i>\x1b[0m\u202e\r$x$"
    config = make_config(external=[EXTERNAL[0] | {"label": label, "path": path}])
    write_report(config, tmp_path / "root", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert text.count("<pre") == text.count("</pre>") == text.count("<details>") == text.count("</details>")
    assert "external/&lt;/pre&gt;&amp;.tsv" in text
    assert r"A \& \<i\>B\</i\>\\x1b\[0m\\u202e \$x\$ (external)" in text
    for path in (tmp_path / "out").glob("*.svg"):
        ET.parse(path)
    for path in [*(tmp_path / "out").glob("*.md"), *(tmp_path / "out").glob("*.tex")]:
        lines = path.read_text().replace("\n", "")
        assert printable(lines) == lines


def test_published_results_are_labelled_and_apart(made, tmp_path: Path):
    config, root = made
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


def test_published_latencies_stand_beside_published_accuracies():
    table = tables.published("imagenet", ["dds"])
    latencies = table[table["latency"] != ""].set_index("method")
    assert latencies["latency"].to_dict() == {"rRCM": "1", "DDS": "39", "DiffSmooth": "56", "DensePure": "171"}
    assert latencies.loc["DDS", "status"] == "here" and latencies.loc["DensePure", "status"] == "not run"
    assert "latency" not in tables.published("fashion_mnist", ["dds"])


def test_published_rows_are_whole():
    rows = tables.read_published()
    assert not rows.duplicated(["dataset", "method", "model", "sigma", "n", "source"]).any()
    for row in rows.itertuples():
        cells = [re.fullmatch(r"([\d.]+):([\d.]+)(\([\d.]+\))?", text) for text in row.certified_accuracy.split()]
        assert (cells or float(row.latency) > 0) and all(cells) and row.dataset and row.method and row.source
        radii, shares = ([float(cell[i]) for cell in cells] for i in (1, 2))
        assert radii == sorted(set(radii)) and shares == sorted(shares, reverse=True) and max(shares, default=0) <= 100
    assert len(tables.published_latencies()[["dataset", "n"]].drop_duplicates()) == 1  # one axis for all


def frame_of(*radii: float) -> pd.DataFrame:
    """Correct images with these radii."""
    return pd.DataFrame({"radius": radii, "correct": 1})


def test_a_step_holds_up_to_and_with_its_radius():
    certificates = {("rrcm", 0.5): frame_of(0.0, 0.25, 0.25, 0.5), ("gaussian", 0.5): frame_of(0.1, 0.1, 0.1, 0.1)}
    external = {("A", 0.5): frame_of(0.5, 0.75), ("B", 0.5): frame_of(0.3), ("B", 1.0): frame_of(9.0)}
    (panel,) = figures.draw_certified_accuracy(certificates, external).axes
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
    together = list(METHODS)[: figures.MAX_TOGETHER]
    methods = {(method, sigma): frame_of(0.2, 0.4) for method in together for sigma in (0.25, 0.5, 1.0)}
    external = {
        ("Salman et al. 2019", 1.0): frame_of(0.1),
        ("_$ by a group with a long name", 0.5): frame_of(0.3),
    }
    for sigmas in ((0.25, 0.5, 1.0), (0.5, 1.0), (0.5,)):
        certificates = {run: frame for run, frame in methods.items() if run[1] in sigmas}
        figure = figures.draw_certified_accuracy(certificates, external)
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        shown = {label.replace("$", r"\$") for label, sigma in external if sigma in sigmas}
        assert sorted(names) == sorted({METHODS[name].label for name in together} | shown)
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        assert box.y1 < min(panel.get_tightbbox().y0 for panel in figure.axes)


def many_methods(draw: str):
    """A figure of all methods by its name, with the number of panels per legend."""
    runs = {(method, sigma): frame_of(0.2, 0.4) for method in METHODS for sigma in (0.25, 0.5, 1.0)}
    if draw == "certified_accuracy":
        return figures.draw_certified_accuracy(runs, {("A group with a long name " * 5, 1.0): frame_of(0.1)}), 3
    if draw == "envelope":
        return figures.draw_envelope(runs), 1
    row = {"compute": [1.0, 2.0], "val_accuracy": [0.5, 0.6], "selected": [False, True]}
    finetuning = pd.concat(pd.DataFrame(row).assign(method=method, sigma=sigma) for method, sigma in runs)
    history = pd.DataFrame({"step": [1, 2], "loss": 1.0, "contrastive": 1.0, "lr": 0.1})
    pretraining = dict.fromkeys(("one", "two", "three", "four"), history)
    return figures.draw_training(pretraining, finetuning), 3


@pytest.mark.parametrize("draw", ["certified_accuracy", "envelope", "training"])
def test_many_methods_are_drawn_one_family_at_a_time(draw: str):
    """Each method is in colour in one row, rRCM in all, the others are grey. No legend covers anything else."""
    figure, columns = many_methods(draw)
    figure.draw_without_rendering()
    legends = [
        (axes, legend) for axes in figure.axes if (legend := axes.get_legend()) and legend.get_title().get_text()
    ]
    named = {legend.get_title().get_text(): [text.get_text() for text in legend.get_texts()] for _, legend in legends}
    by_family = {family: [k.label for k in METHODS.values() if k.family == family] for family in named}
    for family, labels in named.items():
        assert labels[0] == "rRCM"
        assert family == "other groups" or sorted({"rRCM", *by_family[family]}) == sorted(labels)
    assert set(by_family) >= {kind.family for kind in METHODS.values()}
    panels = [axes for axes in figure.axes if any(line.get_label() == "rRCM" for line in axes.get_lines())]
    assert len(panels) == columns * len(legends)
    for panel in panels:
        in_colour = [line for line in panel.get_lines() if line.get_color() != figures.OTHERS["color"]]
        grey = len(panel.get_lines()) - len(in_colour)
        assert grey + sum(line.get_label() in {kind.label for kind in METHODS.values()} for line in in_colour) == len(
            METHODS
        )
    boxes = [legend.get_window_extent() for _, legend in legends]
    assert all(box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    others = [axes.get_window_extent() for axes in figure.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i] + others)


def test_gallery_claims_no_radius_for_a_wrong_image():
    answers = [("correct", "3", 0.0), ("wrong", "7", 0.0), ("wrong", "7", 0.25), ("abstains", "", 0.0)]
    tiles = [Thumbnail(np.zeros((2, 2, 1)), "3", predict, radius, verdict) for verdict, predict, radius in answers]
    figure = figures.draw_gallery([tile.pixels for tile in tiles], {0.5: tiles}, "rRCM")
    below = [axes.get_xlabel() for axes in figure.axes[4:]]
    assert below == ["✓ 3\nr = 0.000", "✗ 7\n", "✗ 7\nr = 0.250", "? abstains\n"]


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


def test_latex_is_a_booktabs_table_with_escapes(made):
    _, root = made
    for name in ("best_sigma", "per_sigma", "differences", "budgets", "latency"):
        text = (root / f"reports/digits/{name}.tex").read_text()
        lines = text.splitlines()
        assert lines[0].startswith(r"\begin{tabular}{l")
        assert lines[-1] == r"\end{tabular}"
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        assert text.isascii()
        assert not re.search(r"(?<!\\)[_%#]", text)
        columns = {line.count("&") for line in lines if line.endswith(r"\\")}
        assert len(columns) == 1
    assert r"a\_b \& 50\% \#1 \$" in tables.latex_text(pd.DataFrame({"x_y": ["a_b & 50% #1 $"]}))


def test_one_method_one_sigma_no_latency(tmp_path: Path):
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


def test_missing_or_bad_external_file_is_named(made, tmp_path: Path):
    _, root = made
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


def test_samples_of_other_images_raise(made, tmp_path: Path):
    config, root = made
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
def test_mixed_certificates_raise(made, tmp_path: Path, change: str):
    config, root = made
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


DENOISING = ["rrcm", "gaussian", "dds", "dds_finetuned", "densepure", "diffsmooth"]


def denoising_config(methods: list[str] = DENOISING, **changes: object) -> Config:
    """`densepure` certifies 40 images."""
    denoised = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["denoised"]
    denoised |= {"densepure": {"runs": 10, "steps": 2}, "max_images": {"densepure": 40}}
    return make_config([], methods=methods, denoised=denoised, **changes)


@pytest.fixture(scope="module")
def denoised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, root = denoising_config(), tmp_path_factory.mktemp("denoised")
    make_inputs(config, root)
    write_report(config, root, root / "reports/digits", root / "metrics.json")
    return config, root


def test_methods_that_denoise_are_explained_and_paid_for(denoised):
    _, root = denoised
    report = root / "reports/digits"
    text = (report / "report.md").read_text()
    assert "\n\n\n" not in text
    for sentence in (
        "denoises in one step, and classifies the result once (classifier trained at σ = 0.001).",
        "K = 10 random reverse processes of b = 2 steps run from each noisy sample",
        "over m = 5 further noises of σ' = 0.25 (classifier trained at σ = 0.25).",
        "DDS, fine-tuned does as DDS",
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


def test_fewer_images_are_never_compared_unsaid(denoised):
    config, root = denoised
    report = root / "reports/digits"
    text = (report / "report.md").read_text()
    assert "120 test images of digits" in text and "DensePure certifies 40 of them, evenly spaced." in text
    assert "**At any cost**, on the 40 images that all certify, the highest" in text
    assert "**At equal fine-tuning budget** the highest" in text  # of rRCM and Gaussian
    for name in ("best_sigma", "per_sigma", "budgets", "differences"):
        lines = (report / f"{name}.md").read_text().splitlines()
        place = [cell.strip() for cell in lines[0].split("|")].index("images")
        found = {line.split("|")[1].strip(): line.split("|")[place].strip() for line in lines[2:]}
        assert found.pop("DensePure") == "40" and set(found.values()) == {"120"}
    ours, reference = (read_certificates(root / f"certificates/{m}/sigma_1.0.tsv") for m in ("densepure", "rrcm"))
    common = reference[reference["idx"].isin(ours["idx"])]
    assert len(common) == len(ours) == 40
    table = pd.read_csv(report / "differences.csv").set_index(["method", "measure", "at"]).sort_index()
    expected = average_certified_radius(ours) - average_certified_radius(common)
    assert table.loc[("densepure", "acr", 1.0), "difference"] == pytest.approx(expected, abs=1e-6)
    assert average_certified_radius(common) != pytest.approx(average_certified_radius(reference), abs=1e-3)
    shared = page._headline(config, read_inputs(config, root))[-1]
    assert (shared.name, shared.images) == ("any cost", 40)
    for name in ("certified_accuracy", "envelope"):
        draw = getattr(figures, f"draw_{name}")
        arguments = [read_inputs(config, root).certificates, {}][: 2 - (name == "envelope")]
        texts = [text.get_text() for text in draw(*arguments).legends[0].get_texts()]
        assert sorted(texts) == sorted(
            {*(METHODS[m].label for m in DENOISING if m != "densepure"), "DensePure (40 images)"}
        )


@pytest.mark.parametrize("method", ["densepure", "dds"])
def test_images_must_be_those_that_the_settings_declare(denoised, tmp_path: Path, method: str):
    """Forty others, or a subset that no setting declares, are refused, and so are other labels."""
    config, root = denoised
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


def test_only_methods_that_are_not_trained(tmp_path: Path):
    pretrain = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["pretrain"] | {"objectives": []}
    config = denoising_config(["dds", "densepure"], pretrain=pretrain, sigmas=[0.5])
    make_inputs(config, tmp_path)
    write_report(config, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out/training.png").exists() and not (tmp_path / "out/training.csv").exists()
    text = (tmp_path / "out/report.md").read_text()
    assert "Validation accuracy under noise" not in text and "**At any cost**" in text


def test_latencies_are_medians_over_rounds_and_ratios_within_them(denoised):
    config, root = denoised
    inputs = read_inputs(config, root)
    (table, text), rounds = (
        tables.latency(inputs.latency, [10_000, 100_000], 100, inputs.budgets),
        np.array([1, 1.1, 1.3]),
    )
    table = table.set_index("method")
    each = table.loc["densepure"]
    assert each[["parameters", "denoiser_passes", "classifier_passes"]].tolist() == [516_000, 20, 10]
    for n in (10_000, 100_000):
        low, median, high = (n + 100) * 2e-6 * 30 * 1.16 * rounds
        found = each[[f"seconds_n_{n}_low", f"seconds_n_{n}", f"seconds_n_{n}_high"]]
        assert found.tolist() == pytest.approx([low, median, high])
    assert each[["ratio_low", "ratio", "ratio_high"]].tolist() == pytest.approx([34.8] * 3)  # drift does not matter
    assert table["certified_seconds"].to_dict() == pytest.approx(
        {m: 1.5 / (40 if m == "densepure" else 120) for m in config.methods}
    )
    row = text.set_index("method").loc["DensePure"]
    assert row["passes"] == "20 + 10" and text.set_index("method").loc["rRCM", "passes"] == "1"
    assert row["n = 100,000 (s)"] == "7.66 (6.97 to 9.06)" and row["ratio to rRCM"] == "34.8 (34.8 to 34.8)"


def test_latency_figure_has_a_panel_per_radius_and_the_published_ones_apart(denoised):
    config, root = denoised
    inputs = read_inputs(config, root)
    numbers = tables.latency(inputs.latency, [10_000], 100, inputs.budgets).numbers
    radii, published = [0.0, 0.5], tables.published_latencies()
    figure = figures.draw_latency(numbers, inputs.certificates, radii, 10_000, "cpu, fp32", published)
    figure.draw_without_rendering()
    *panels, others = [axes for part in figure.subfigs for axes in part.axes]
    assert [panel.get_title() for panel in panels] == ["r = 0", "r = 0.5"]
    best = best_sigma_table(inputs.certificates, radii).set_index(["method", "radius"])["certified_accuracy"]
    for panel, radius in zip(panels, radii, strict=True):
        points = [(*each.get_offsets()[0], each.get_sizes()[0]) for each in panel.collections[::-1]]
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
def test_nothing_in_the_latency_figure_covers_anything_else(methods: list[str]):
    ratios = {"dds": 5.0, "dds_finetuned": 5.0, "diffsmooth": 9.0, "densepure": 30.0}
    numbers = pd.DataFrame(
        {"method": m, "parameters": 2e5, "ratio": ratios.get(m, 1.0), "seconds_n_10000": 0.2 * ratios.get(m, 1.0)}
        for m in methods
    )
    certificates = {(method, 0.5): frame_of(0.2, 0.4) for method in methods}
    figure = figures.draw_latency(numbers, certificates, [0.0, 0.25, 0.5], 10_000, "cpu", tables.published_latencies())
    figure.draw_without_rendering()
    (legend,) = figure.subfigs[0].legends
    boxes = [axes.get_tightbbox() for part in figure.subfigs for axes in part.axes]
    boxes.append(legend.get_window_extent())
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    texts = [text.get_window_extent() for text in figure.subfigs[0].axes[0].texts]
    assert not any(one.overlaps(other) for one, other in combinations(texts, 2))


def test_the_latency_figure_shows_radii_that_matter():
    certificates = {("rrcm", 0.5): frame_of(*np.linspace(0, 1, 41)), ("gaussian", 0.5): frame_of(0.0)}
    assert latency_radii(certificates, [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]) == [0.0, 0.5, 0.9]
    assert latency_radii(certificates, [0.0, 0.25]) == [0.0, 0.25]
    assert latency_radii({("rrcm", 0.5): frame_of(0.1)}, [2.0, 3.0]) == [2.0]  # nobody certifies any


def test_importing_the_report_does_not_import_torch():
    code = "import sys, rrcm.report.build, rrcm.utils.provenance; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)
