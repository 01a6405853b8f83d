"""A run with invented but realistic numbers, from which the tests draw reports."""

import atexit
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import yaml
from conftest import REPOSITORY, with_derived, write_certificates, write_samples
from scipy.special import ndtr

from rrcm.certification.cascade_rules import LABEL_AWARE, CascadeRule, make_cascade_rule
from rrcm.certification.cascade_states import CascadeState, add_votes, new_state, next_samples
from rrcm.certification.cascade_votes import cascade_frame
from rrcm.certification.results import certificate_tables, sigma_name
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.stopping import ALL_SAMPLES, FUTILE, WRONG_CLASS
from rrcm.certification.votes import selection_text
from rrcm.config import Config, Data, parse_config
from rrcm.data.sharding import write_shards
from rrcm.data.shards import CLASSES, ShardedDataset, evenly_spaced
from rrcm.methods import METHODS, model_name
from rrcm.report import build, page
from rrcm.report.build import make_tables
from rrcm.report.cascade_inputs import cascade_tables
from rrcm.report.figures import FORMATS, STYLE
from rrcm.report.inputs import Inputs
from rrcm.utils.files import write_csv, write_json

ENVIRONMENT = {
    "git": {"revision": "0" * 40, "dirty": False},
    "hardware": {"cpu": "a CPU"},
    "software": {"python": "3.12"},
}
EXTERNAL = [  # the second has a sigma without a panel
    {"label": "Cohen et al. 2019", "sigma": 1.0, "path": "external/cohen_1.0.tsv"},
    {"label": "50 % more $_$", "sigma": 0.5, "path": "external/more_0.5.tsv"},
]
DENOISING = ["rrcm", "gaussian", "dds", "dds_finetuned", "densepure", "diffsmooth"]
CASCADE = {"methods": [], "sigmas": None, "thresholds": "chosen", "choose_by": "acr", "choose_n": 1000}
CASCADE |= {"multi_scale": True}
PASSES = {"dds": (1, 1), "dds_finetuned": (1, 1), "densepure": (20, 10), "diffsmooth": (1, 5)}


def make_config(external: list[dict] = EXTERNAL, **changes: object) -> Config:
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    values["report"]["external_results"] = external
    values["latency"]["rounds"] = 3
    values["cascade"] = CASCADE
    values |= {"sigmas": [0.25, 1.0], "methods": ["rrcm", "consistency", "consistency_matched"]} | changes
    return parse_config(with_derived(values))


def denoising_config(methods: list[str] = DENOISING, **changes: object) -> Config:
    """Settings with methods that denoise, of which `densepure` certifies only 40 images."""
    denoised = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["denoised"]
    denoised |= {"densepure": {"runs": 10, "steps": 2}, "max_images": {"densepure": 40}}
    return make_config([], methods=methods, denoised=denoised, **changes)


def cascade_config(**changes: object) -> Config:
    """Settings with the cascades of joint networks and of their experts."""
    cascade = CASCADE | {"methods": ["rrcm_joint", "rrcm"]}
    methods = ["rrcm", "rrcm_joint", "consistency"]
    return make_config([], **{"methods": methods, "sigmas": [0.25, 0.5, 1.0], "cascade": cascade} | changes)


@cache
def written_shards(data: str) -> Path:
    """Shards by these settings as JSON. It takes a second to write them, so they are written once."""
    folder = Path(tempfile.mkdtemp(prefix="rrcm_tests_"))
    atexit.register(shutil.rmtree, folder)
    write_shards(Data.model_validate_json(data), 0, folder / "shards")
    return folder / "shards"


def make_inputs(config: Config, root: Path) -> None:
    """Write the outputs of all other stages under root, with invented but realistic numbers."""
    rng = np.random.default_rng(0)
    shutil.copytree(written_shards(config.data.model_dump_json()), root / "data/shards")
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
            name, environment = f"{method}/{sigma_name(sigma)}", ENVIRONMENT | {"hardware": {"cpu": method[0]}}
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
            frame = frame.assign(margin_predict=predict, margin_radius=gained, votes="")
            top = np.where(predict < 0, label, predict)
            share = (100 * ndtr(abs(z))).round().astype(int).clip(50, 99)
            votes = [{str(k): n, str((k + 1) % 10): 100 - n} for k, n in zip(top.tolist(), share.tolist(), strict=True)]
            frame = frame.assign(selection=[selection_text(each) for each in votes])
            write_certificates(root / f"certificates/{name}.tsv", frame)
            write_samples(root / f"certificates/{name}.samples.tsv", frame)
            trained = f"{method}/{model_name(method, sigma)}"
            make_model(config, root / f"models/{trained}", method, sigma, skill[method])
            timing = {"seconds": 1.5, "environment": environment}
            write_json(root / f"timings/finetune/{trained}.json", timing)
            timing |= {"samples": int(samples.sum())}
            timing |= {"seconds_by_image": {str(i): 1.5 / len(own_idx) for i in own_idx}}
            write_json(root / f"timings/certify/{name}.json", timing)
    for method in config.cascade.methods:
        make_cascade(config, root, method, labels)
    make_latency(config, root)
    for voter in config.derived["training_votes"]:
        for name in (f"finetune/{voter}/joint", f"training_votes/{voter}"):
            write_json(root / f"timings/{name}.json", {"seconds": 1.5, "environment": ENVIRONMENT})
    if any(METHODS[method].needs_soft_labels for method in config.methods):
        write_json(root / "timings/soft_labels.json", {"seconds": 1.5, "environment": ENVIRONMENT})
    if config.derived["denoiser"]:
        write_json(root / "timings/denoiser.json", {"seconds": 61.5, "environment": ENVIRONMENT})
        for part in ("gaussian/sigma_0.001", "gaussian/sigma_0.25"):
            write_json(root / f"timings/finetune/{part}.json", {"seconds": 1.5, "environment": ENVIRONMENT})

    for extra, other in enumerate(config.report.external_results):
        rows = [f"{i}\t{i % 10}\t{i % 9}\t{0.01 * i}\t{int(i % 10 == i % 9)}\t0:00:17.5" for i in range(50 + extra)]
        (root / other.path).parent.mkdir(exist_ok=True)
        (root / other.path).write_text("\r\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows, ""]))


def make_report(config: Config, root: Path, *, pdf: bool = False) -> tuple[Config, Path]:
    """Write an invented run and its report under root. Returns both arguments."""
    make_inputs(config, root)
    draw = build.write_report if pdf else write_report
    draw(config, root, root / "reports/digits", root / "metrics.json")
    return config, root


def write_report(config: Config, root: Path, output: Path, metrics: Path | None = None) -> None:
    """As `build.write_report`, but the figures are coarse and there is no PDF, which take seconds for few tests."""
    with patch.dict(FORMATS), patch.dict(STYLE, {"savefig.dpi": 40}):
        del FORMATS[".pdf"]
        build.write_report(config, root, output, metrics)


def make_model(config: Config, folder: Path, method: str, sigma: float, skill: float) -> None:
    """Write config.json and history.csv of a model that improves, or of one that is not trained."""
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
    noise = {"sigma": sigma}
    if kind.joint is not None:
        noise = {"joint": {"sigmas": sorted(config.sigmas), "interval": config.finetune.joint_interval}}
    details = {"method": method, **noise, "seed": 0, "class_names": list(CLASSES[config.data.source])}
    details |= {"parameters": 208_000 + 308_000 * kind.denoises}
    details |= {"selected": {"val_accuracy": None} | selected, "training": {"epochs": epochs}}
    experts = 1 if kind.joint is None else len(config.sigmas)
    finetune = 8448.0 * epochs * experts * (kind.joint or 1)
    compute = {"finetune": finetune, "pretrain_share": share * experts, "soft_label_share": 0.0}
    compute |= {"joint": 5e5} if kind.can_pass else {"teacher": 7e5} if kind.is_student else {}
    write_json(folder / "config.json", details | {"compute": compute})


def make_latency(config: Config, root: Path) -> None:
    """Write a record with two microseconds per pass, from a machine that slows down from round to round."""
    methods = {}
    for i, method in enumerate(config.methods):
        denoiser, classifier = PASSES.get(method, (0, 1))
        methods[method] = {
            "parameters": {"denoiser": 308_000 * (denoiser > 0), "classifier": 208_000},
            "passes": {"denoiser": float(denoiser), "classifier": float(classifier)},
            "batch_size": 1024,
            "samples": 2048,
            "seconds_per_sample": [2e-6 * (denoiser + classifier) * (1 + 0.04 * i) * k for k in (1, 1.1, 1.3)],
        }
    record = {"device": "cpu", "dtype": "fp32", "sigma": config.sigmas[0], "methods": methods}
    if config.cascade.methods:
        each = {"predict_seconds": [2e-3, 3e-3, 4e-3], "single_predict_seconds": [1e-3, 1.5e-3, 2e-3]}
        each["seconds_per_sample"] = {f"sigma_{sigma}": [2e-6, 2.1e-6, 2.2e-6] for sigma in config.cascade_sigmas}
        record["cascades"] = dict.fromkeys(config.cascade.methods, each)
    write_json(root / "timings/latency.json", record | {"environment": ENVIRONMENT})


def make_cascade(config: Config, root: Path, method: str, labels: np.ndarray, can_pass: bool = False) -> None:
    """Write the files of a method's cascade, with the votes that invented probabilities lead to."""
    sigmas = config.cascade_sigmas
    thresholds = [0.1 * sigma for sigma in sigmas[1:]]
    idx = np.arange(len(labels))[:: config.certify.every][: config.certify.max_images]
    models = [{"kind": "classifier", "sha256": str(k) * 64} for k in range(1 if "joint" in method else len(sigmas))]
    chosen = {"by": "acr", "n": config.cascade.choose_n, "images": 143, "score": 0.4}
    details = {"format": 1, "models": models, "data": {"sha256": "a" * 64, "split": "test"}, "num_classes": 10}
    details |= {"image_size": config.data.image_size, "sigmas": sigmas, "thresholds": thresholds}
    details |= config.certify.rule | {"can_pass": can_pass, "chosen": chosen, "labelled": True, "seed": config.seed}
    details |= {"precision": "fp32", "batch_size": 1024, "compile": False, "device": "cpu", "environment": ENVIRONMENT}
    costs: dict[str, object] = {}
    for kind, table in cascade_tables(config, method).items():
        rule = make_cascade_rule(sigmas=sigmas, thresholds=thresholds, certificates=kind, **config.certify.rule)
        rng = np.random.default_rng(len(method))  # both rules see the same images
        states = [vote(i, int(labels[i]), rule, can_pass, rng) for i in idx.tolist()]
        path = root / table
        contents = certificate_tables(path, cascade_frame(states, rule, 10))
        for file, content in contents.items():
            file.write_bytes(content)
        hashes = {file.name: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        write_json(path.with_suffix(".json"), details | {"certificates": kind, "files": hashes})
        seconds = {"seconds": 2.5, "seconds_by_image": {str(i): 2.5 / len(idx) for i in idx}}
        costs[path.stem if kind != LABEL_AWARE else kind] = seconds | {"samples": sum(each.samples for each in states)}
    costs["thresholds"] = {"seconds": 1.25, "samples": 429_000}
    costs |= costs.pop(LABEL_AWARE) | {"environment": ENVIRONMENT}
    write_json(root / f"timings/certify_cascade/{method}.json", costs)


def vote(index: int, label: int, rule: CascadeRule, can_pass: bool, rng: np.random.Generator) -> CascadeState:
    """An image of class `label` on its way through a cascade, until sampling stops."""
    radius = rng.normal(1.1, 0.8) - 0.6 * np.array(rule.sigmas)
    state, votes = new_state(index, None, label, rule), np.random.default_rng(index)
    while not state.stop_reason:
        k, selects, start, stop = next_samples(state, rule, 10)
        share = ndtr(radius[k] / rule.sigmas[k])
        p = np.full(10 + (can_pass and k > 0), 0.02 * (1 - share))
        p[label], p[(label + 3) % 10] = share, 0
        p[-1 if can_pass and k > 0 else (label + 3) % 10] += 1 - p.sum()
        add_votes(state, rule, k, selects, votes.multinomial(stop - start, p), 10)
    return state


def frame_of(*radii: float) -> pd.DataFrame:
    """Correct images with these radii."""
    return pd.DataFrame({"radius": radii, "correct": 1})


def render(config: Config, root: Path, inputs: Inputs, gallery_classes: list[str]) -> str:
    """The text of report.md, without the figures that not every profile has."""
    texts = {name: table.text for name, table in make_tables(config, inputs).items()}
    return page.render_markdown(page.report_values(config, root, inputs, texts, [], gallery_classes))
