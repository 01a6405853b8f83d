"""reports/PROFILE: figures, tables, metrics and report.md, made from what the other stages left.

The same inputs give the same bytes, wherever and whenever: git revision, hardware and versions are those in the records
of the stages that made the artifacts, never those of the machine that draws.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.config import METHODS, Config
from rrcm.evaluation.metrics import (
    Certificates,
    acr_difference,
    average_certified_radius,
    best_sigma_table,
)
from rrcm.report import figures
from rrcm.report.figures import Thumbnail
from rrcm.report.tables import _curves, _latex, _markdown, _metrics, _tables, _write_csv
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, read_json, sha256_file, write_json, write_text

REFERENCE_RADIUS = 0.5  # where the latency figure compares accuracy; the nearest radius of the report is taken
NOT_RESULTS = {"device": True, "launcher": True, "attack": True, "data": {"root", "workers"}}  # settings without effect


def write_report(config: Config, root: Path, output: Path) -> None:
    """Read certificates, models/*/*.{json,csv}, timings and latency under `root`; write the whole folder `output`.

    Also reads the files of other groups that `report.external_results` names. Raises `RRCMError` naming a missing file and the
    command that makes it, and when certificates of different runs are mixed. Without a `latency.n` there is no latency
    figure or table, and nothing under latency/ is read.
    """
    root = Path(root)
    inputs = _inputs(config, root)
    runs = [(method, sigma) for method in config.methods for sigma in config.sigmas]
    certificates = {run: _read_run(root, *run) for run in runs}
    others = {
        (other.label, other.sigma): read_certificates(root / other.path) for other in config.report.external_results
    }
    first = certificates[runs[0]]
    for run, frame in certificates.items():
        if not frame[["idx", "label"]].equals(first[["idx", "label"]]):
            path = root / _certificate(*run)
            raise RRCMError(f"{path}: certifies other images than {_certificate(*runs[0])}; run `dvc repro` again")
    models = {run: read_json(root / _model(*run) / "config.json") for run in runs}
    latency = {name: read_json(root / f"latency/{name}.json") for name in config.methods if config.latency.n}
    radii = config.report.radii
    finetuning = pd.concat([_history(root, models[run], *run) for run in runs], ignore_index=True)
    pretraining = representation = None
    if _needs_pretraining(config):
        pretraining = _read_csv(root / "models/pretrain/history.csv")
        representation = _read_csv(root / "models/pretrain/representation.csv")
    budgets = _budgets(config, root, models)
    tables = _tables(certificates, others, radii, budgets, latency)

    with atomic_directory(output) as folder:
        drawn = {
            "certified_accuracy": figures.draw_certified_accuracy(certificates, others),
            "envelope": figures.draw_envelope(certificates),
            "training": figures.draw_training(pretraining, finetuning),
            "sheet": _sheet(config, root, certificates),
        }
        if representation is not None:
            drawn["representation"] = figures.draw_representation(representation)
        if latency:
            radius = min(radii, key=lambda r: (abs(r - REFERENCE_RADIUS), r))
            best = best_sigma_table(certificates, [radius]).set_index("method")["certified_accuracy"]
            drawn["latency"] = figures.draw_latency(latency, best, max(config.latency.n), radius)
        for name, figure in drawn.items():
            for suffix in figures.FORMATS:
                figures.save(figure, folder / f"{name}{suffix}")
        for name, (numbers, shown) in tables.items():
            _write_csv(folder / f"{name}.csv", numbers)
            write_text(folder / f"{name}.md", _markdown(shown))
            write_text(folder / f"{name}.tex", _latex(shown))
        _write_csv(folder / "curves.csv", _curves(certificates))
        _write_csv(folder / "training.csv", finetuning.dropna(subset="val_accuracy"))  # DVC draws a gap as 0
        if pretraining is not None:
            _write_csv(folder / "pretraining.csv", pretraining)
            _write_csv(folder / "representation.csv", representation)
        write_json(folder / "metrics.json", _metrics(certificates, models, radii))
        shown = {name: shown for name, (_, shown) in tables.items()}
        write_text(folder / "report.md", _report(config, root, inputs, certificates, shown, list(drawn)))


def _certificate(method: str, sigma: float) -> str:
    return f"certificates/{method}/{sigma_name(sigma)}.tsv"


def _samples(method: str, sigma: float) -> str:
    return f"certificates/{method}/{sigma_name(sigma)}.samples.tsv"


def _read_run(root: Path, method: str, sigma: float) -> pd.DataFrame:
    """Certificates of ours with the samples that they took."""
    frame = read_certificates(root / _certificate(method, sigma))
    samples = read_samples(root / _samples(method, sigma))
    if not samples["idx"].equals(frame["idx"]):
        path = root / _samples(method, sigma)
        raise RRCMError(
            f"{path}: is of other images than the certificates beside it; run `dvc repro certify@{method}-{sigma}`"
        )
    return frame.join(samples[["samples", "stop_reason"]])


def _model(method: str, sigma: float) -> str:
    return f"models/{method}/{sigma_name(sigma)}"


def _needs_pretraining(config: Config) -> bool:
    return any(config.finetune.uses_pretraining(name) or METHODS[name].matched for name in config.methods)


def _inputs(config: Config, root: Path) -> list[str]:
    """Every file the report is made from, relative to root. Raises `RRCMError` at the first that is missing."""
    stages = {"data/shards/manifest.json": "shard-data"}
    if _needs_pretraining(config):
        names = ("config.json", "history.csv", "representation.csv")
        files = [*(f"models/pretrain/{name}" for name in names), "timings/pretrain.json"]
        stages |= dict.fromkeys(files, "pretrain")
    for method in config.methods:
        for sigma in config.sigmas:
            files = [f"{_model(method, sigma)}/{name}" for name in ("config.json", "history.csv")]
            files += [f"timings/finetune/{method}/{sigma_name(sigma)}.json"]
            stages |= dict.fromkeys(files, f"finetune@{method}-{sigma}")
            files = [_certificate(method, sigma), _samples(method, sigma)]
            files += [f"timings/certify/{method}/{sigma_name(sigma)}.json"]
            stages |= dict.fromkeys(files, f"certify@{method}-{sigma}")
        if config.latency.n:
            stages[f"latency/{method}.json"] = f"latency@{method}"
    for path, stage in stages.items():
        if not (root / path).is_file():
            raise RRCMError(
                f"{root / path}: no such file; make it with `dvc repro {stage}`, or fetch it with `dvc pull`"
            )
    for place, other in enumerate(config.report.external_results):
        if not (root / other.path).is_file():
            raise RRCMError(
                f"report.external_results.{place}.path: {root / other.path}: no such file; put it there or take the entry out"
            )
    return [*stages, *(other.path for other in config.report.external_results)]


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RRCMError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from None


def _history(root: Path, model: Mapping, method: str, sigma: float) -> pd.DataFrame:
    """Fine-tuning by epoch, with the compute spent: encoder forward passes, the share of the pre-training included."""
    history = _read_csv(root / _model(method, sigma) / "history.csv")
    compute = model["compute"]["pretrain_share"] + model["compute"]["finetune"] * history["epoch"] / len(history)
    return pd.DataFrame(
        {
            "method": method,
            "sigma": sigma,
            "epoch": history["epoch"],
            "compute": compute,
            "loss": history["loss"],
            "val_accuracy": history["val_accuracy"],
            "selected": history["epoch"] == model["selected"]["epoch"],
        }
    )


def _budgets(config: Config, root: Path, models: Mapping[tuple[str, float], Mapping]) -> pd.DataFrame:
    """Compute (encoder forward passes) and time (seconds) of each model."""
    rows = []
    for (method, sigma), model in models.items():
        place, share = f"{method}/{sigma_name(sigma)}.json", 0.0
        if config.finetune.uses_pretraining(method):
            share = read_json(root / "timings/pretrain.json")["seconds"] / config.finetune.pretrain_cost_shared_by
        rows.append(
            {
                "method": method,
                "sigma": sigma,
                "finetune_passes": model["compute"]["finetune"],
                "pretrain_share_passes": model["compute"]["pretrain_share"],
                "total_passes": model["compute"]["finetune"] + model["compute"]["pretrain_share"],
                "finetune_seconds": read_json(root / "timings/finetune" / place)["seconds"],
                "pretrain_share_seconds": share,
                "certify_seconds": read_json(root / "timings/certify" / place)["seconds"],
            }
        )
    return pd.DataFrame(rows)


def _sheet(config: Config, root: Path, certificates: Certificates) -> Figure:
    """Test images spread evenly over the certified ones, and what the first method says of each."""
    from rrcm.data.augment import centre_crop  # these import torch, which takes seconds
    from rrcm.data.shards import ShardedDataset
    from rrcm.utils.rng import numpy_rng

    images = ShardedDataset(root / "data/shards", "test")
    method, size = config.methods[0], config.data.image_size
    frames = {sigma: certificates[method, sigma] for sigma in config.sigmas}
    count = min(config.report.gallery_images, len(frames[config.sigmas[0]]))
    rows = np.linspace(0, len(frames[config.sigmas[0]]) - 1, count).round().astype(int)
    clean, noisy = [], {sigma: [] for sigma in frames}
    for row in rows.tolist():
        idx, label = (int(value) for value in frames[config.sigmas[0]].loc[row, ["idx", "label"]])
        if idx >= len(images) or images.read(idx)[1] != label:
            path = root / _certificate(method, config.sigmas[0])
            raise RRCMError(f"{path}: image {idx} is not the one in data/shards; run `dvc repro` again")
        pixels = np.asarray(centre_crop(images.read(idx)[0], size), np.float32) / 255
        noise = numpy_rng(config.seed, "sheet", idx).standard_normal(pixels.shape, np.float32)
        clean.append(pixels)
        for sigma, frame in frames.items():
            answer = frame.loc[row]
            verdict = figures.verdict(answer["predict"], label)
            predict = "" if verdict == "abstains" else images.classes[int(answer["predict"])]
            shown = (pixels + sigma * noise).clip(0, 1)
            noisy[sigma].append(Thumbnail(shown, images.classes[label][:14], predict[:14], answer["radius"], verdict))
    return figures.draw_sheet(clean, noisy, METHODS[method].label)


CAPTIONS = {
    "certified_accuracy": "Certified accuracy against L2 radius, a panel for each smoothing noise σ. Bands are 95 % "
    "Wilson intervals over test images; methods share the images, so their differences are known better than that. "
    "A dot is the value at r = 0 where the curve falls right after it.",
    "envelope": "Certified accuracy with the best σ at each radius.",
    "latency": "Certified accuracy (with the n of the certificates) against the time one takes with the n of the axis.",
    "training": "Accuracy on noisy validation images against the compute spent: a pre-trained method starts at its "
    "share of the pre-training, the dot is the epoch that was kept. On the left, the pre-training where there is one.",
    "representation": "Representations of validation images along the pre-training: k-NN accuracy, with clean training "
    "images as neighbours; the mean cosine between an image's representation at t = 2σ and its own at t_min along one "
    "noise, and that with other images' at t_min; and the first with the mean representation of each level taken off. "
    "The method is to raise it. An encoder that answers much alike to all images, as an untrained one does, has high "
    "cosines with any image; the last panel does not see what all images have in common.",
    "sheet": "Test images, clean and noisy (clipped to [0, 1] for display), spread evenly over those certified.",
}
TITLES = {
    "best_sigma": "Certified accuracy in %, best σ at each radius (in parentheses: that model's at r = 0)",
    "per_sigma": "Samples drawn for an image (mean), ACR, and certified accuracy in % at each radius",
    "latency": "Seconds to certify one image",
    "budgets": "Compute in million encoder forward passes over one image (a backward pass counts two), and seconds",
}
PROCEDURES = {
    "fixed": "*Certificates* are those of Cohen et al. 2019 (`certify.stopping: fixed`): {n0:,} samples choose an "
    "image's class, and {n:,} more bound its probability.",
    "sequential": "*Certificates* are group-sequential (`certify.stopping: sequential`): {n0:,} samples choose an "
    "image's class, and at most {n:,} more are drawn, no longer than it takes to know which radii of a grid are "
    "certified. Radii are rounded down to multiples of {radius_step:g} (`certify.radius_step`), so that ACR is a lower "
    "bound: it loses less than one step. An image whose chosen class is wrong is done with at once: its row "
    "has that class as `predict`, and radius 0.",
}
OTHERS = " Dotted in black and grey: files of other groups, over the images and with the n and alpha of their own."
BUDGETS = (
    "*Equal fine-tuning budget* compares rRCM with methods trained from scratch for as many epochs as rRCM is "
    "fine-tuned, its pre-training coming on top. *Equal total compute* compares it with the scratch methods marked "
    "*matched compute*, which train longer: for as many encoder passes as rRCM's fine-tuning and its share of the "
    "pre-training together (one part in {shared_by}, the number of models that use it)."
)
ELSEWHERE = (
    " {label} starts from weights that were pre-trained elsewhere (`{origin}`): what that took is not known and not "
    "counted, so its compute is that of fine-tuning alone, in passes of its own network, and it has no part in the "
    "comparison at equal total compute."
)


def _report(
    config: Config,
    root: Path,
    inputs: list[str],
    certificates: Certificates,
    tables: Mapping[str, pd.DataFrame],
    drawn: list[str],
) -> str:
    """report.md."""
    sections = [f"# {config.profile}", _finding(config, certificates)]
    sections += [PROCEDURES[config.certify.stopping].format(**config.certify.model_dump())]
    elsewhere = [
        ELSEWHERE.format(label=METHODS[name].label, origin=config.finetune.origin(name))
        for name in config.methods
        if METHODS[name].start is not None and not config.finetune.uses_pretraining(name)
    ]
    sections += ["".join([BUDGETS.format(shared_by=config.finetune.pretrain_cost_shared_by), *elsewhere])]
    accuracy = CAPTIONS["certified_accuracy"] + (OTHERS if config.report.external_results else "")
    captions = CAPTIONS | {"certified_accuracy": accuracy}
    sections += ["## Figures"] + [f"![{name}]({name}.png)\n\n{captions[name]}" for name in captions if name in drawn]
    sections += ["## Tables"] + [
        f"### {TITLES[name]}\n\n{_markdown(tables[name])}" for name in TITLES if name in tables
    ]
    params = config.model_dump(mode="json", exclude=NOT_RESULTS)
    hashes = [f"{sha256_file(root / path)}  {path}" for path in inputs]
    sections += [
        "## Provenance",
        _details("Parameters", "yaml", yaml.safe_dump(params, sort_keys=False)),
        _details(f"Artifacts this report was made from ({len(inputs)} files, SHA-256)", "text", "\n".join(hashes)),
        *_environments(root, [path for path in inputs if path.startswith(("timings/", "latency/"))]),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _finding(config: Config, certificates: Certificates) -> str:
    """One paragraph, from the numbers: who has the highest ACR at each sigma, in both comparisons."""
    settings, images = config.certify, len(next(iter(certificates.values())))
    equal_budget = [name for name in config.methods if not METHODS[name].matched]
    equal_compute = [name for name in config.methods if config.finetune.uses_pretraining(name) or METHODS[name].matched]
    sentences = [
        f"{images} test images of {config.data.source}, n = {settings.n:,}, alpha = {settings.alpha:g}, training seed "
        f"{config.seed}."
    ]
    for comparison, methods in (("fine-tuning budget", equal_budget), ("total compute", equal_compute)):
        if len(methods) > 1:
            leaders = [_leader(sigma, {name: certificates[name, sigma] for name in methods}) for sigma in config.sigmas]
            sentences.append(f"**At equal {comparison}**, {'; '.join(leaders)}.")
    if len(sentences) > 1:
        sentences.append("(± is the 95 % interval of the difference over these test images, for this one training.)")
    else:
        acr = (
            f"{METHODS[method].label} at σ = {sigma:g}: {average_certified_radius(frame):.3f}"
            for (method, sigma), frame in certificates.items()
        )
        sentences.append(f"No two methods to compare; ACR of {'; '.join(acr)}.")
    return " ".join(sentences)


def _leader(sigma: float, frames: Mapping[str, pd.DataFrame]) -> str:
    ranked = sorted(frames, key=lambda name: -average_certified_radius(frames[name]))
    best, second = ranked[:2]
    lead, half = acr_difference(frames[best], frames[second])
    how = "has the highest ACR" if lead > half else "is level with the next best"
    return (
        f"at σ = {sigma:g} {METHODS[best].label} {how} ({average_certified_radius(frames[best]):.3f}, "
        f"{lead:.3f} ± {half:.3f} above {METHODS[second].label})"
    )


def _environments(root: Path, records: list[str]) -> list[str]:
    """A block for each distinct environment with the records that name it."""
    made: dict[str, list[str]] = {}
    for path in records:
        text = yaml.safe_dump(read_json(root / path)["environment"], sort_keys=False)
        made.setdefault(text, []).append(path)
    return [
        _details(
            f"Environment of {len(paths)} of {len(records)} stages",
            "yaml",
            f"{text}made:\n" + "\n".join(f"- {p}" for p in paths),
        )
        for text, paths in made.items()
    ]


def _details(title: str, language: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n```{language}\n{text.strip()}\n```\n\n</details>"
