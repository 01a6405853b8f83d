"""The files that a report is made from: where they are, and one function that reads and checks them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from rrcm.certification.external import read_external_certificates
from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.config import Config
from rrcm.evaluation.metrics import Certificates
from rrcm.methods import METHODS, classifier_of
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

MANIFEST = "data/shards/manifest.json"
SOFT_LABEL_TIMING = "timings/soft_labels.json"
DENOISER_TIMING = "timings/denoiser.json"
LATENCY = "timings/latency.json"

Run = tuple[str, float]  # method, sigma


class PretrainingFiles(NamedTuple):
    """Outputs of one pre-training, relative to the root, and the stage that writes them."""

    folder: str
    timing: str
    stage: str


class Inputs(NamedTuple):
    """All that the report shows, in the order of the settings."""

    files: list[str]  # every file read, relative to the root
    classes: list[str]  # names; a label is an index into them
    certificates: Certificates  # by the binary bound, with the columns of the samples files
    margin: Certificates  # of the same votes, by the margin bound
    external: Certificates  # other groups' certificates by (label, sigma)
    models: Mapping[Run, Mapping]  # config.json of each model folder
    finetuning: pd.DataFrame  # one row per epoch of each model that was trained
    budgets: pd.DataFrame  # one row per model
    pretraining: Mapping[str, pd.DataFrame]  # history.csv by objective
    representations: Mapping[str, pd.DataFrame]  # representation.csv by objective
    latency: Mapping | None  # the latency stage's record


def pretraining_files(objective: str) -> PretrainingFiles:
    """Where the pre-training with `objective` leaves its outputs."""
    return PretrainingFiles(
        f"models/pretrain/{objective}", f"timings/pretrain/{objective}.json", f"pretrain@{objective}"
    )


def certificates_file(method: str, sigma: float) -> str:
    """The certificates of a model, relative to the root."""
    return f"certificates/{method}/{sigma_name(sigma)}.tsv"


def read_inputs(config: Config, root: Path) -> Inputs:
    """Read the outputs of the other stages under `root`, and the files in `report.external_results`.

    Without `latency.n` no latency is read. Raises `RRCMError` for a missing file, with the command that makes it, and
    for certificates of other test images than the settings say.
    """
    files = _list_files(config, root)
    runs = [(method, sigma) for method in config.methods for sigma in config.sigmas]
    certificates = {run: _read_certified(root, *run, config.certify.bound) for run in runs}
    manifest = read_json(root / MANIFEST)
    _check_images(config, certificates, sum(manifest["splits"]["test"]["counts"]), root)
    classes = manifest["classes"]
    _check_labels(certificates, classes, root)
    models = {run: read_json(root / _model_folder(*run) / "config.json") for run in runs}
    external = config.report.external_results
    folders = {name: root / pretraining_files(name).folder for name in config.pretrain.objectives}
    return Inputs(
        files=files,
        classes=classes,
        certificates={run: _by_bound(frame, "binary") for run, frame in certificates.items()},
        margin={run: _by_bound(frame, "margin") for run, frame in certificates.items()},
        external={(each.label, each.sigma): read_external_certificates(root / each.path) for each in external},
        models=models,
        finetuning=_read_histories(root, models),
        budgets=_read_budgets(config, root, models).assign(images=[len(frame) for frame in certificates.values()]),
        pretraining={name: _read_csv(folder / "history.csv") for name, folder in folders.items()},
        representations={name: _read_csv(folder / "representation.csv") for name, folder in folders.items()},
        latency=read_json(root / LATENCY) if config.latency.n else None,
    )


def _samples_file(method: str, sigma: float) -> str:
    return f"certificates/{method}/{sigma_name(sigma)}.samples.tsv"


def _model_folder(method: str, sigma: float) -> str:
    return f"models/{method}/{sigma_name(sigma)}"


def _list_files(config: Config, root: Path) -> list[str]:
    """Every file the report is made from, relative to root. Raises `RRCMError` for the first that is missing."""
    stages = {MANIFEST: "shard-data"}
    for objective in config.pretrain.objectives:
        folder, timing, stage = pretraining_files(objective)
        files = [f"{folder}/{name}" for name in ("config.json", "history.csv", "representation.csv")]
        stages |= dict.fromkeys([*files, timing], stage)
    for method in config.methods:
        for sigma in config.sigmas:
            files = [f"{_model_folder(method, sigma)}/{name}" for name in ("config.json", "history.csv")]
            stages |= dict.fromkeys([*files, _timing("finetune", method, sigma)], f"finetune@{method}-{sigma}")
            files = [certificates_file(method, sigma), _samples_file(method, sigma)]
            stages |= dict.fromkeys([*files, _timing("certify", method, sigma)], f"certify@{method}-{sigma}")
        if METHODS[method].needs_soft_labels:
            source = config.soft_labels
            stages[SOFT_LABEL_TIMING] = f"soft-labels@{source.method}-{source.sigma}"
        if METHODS[method].denoises:
            stages[DENOISER_TIMING] = f"denoiser@{next(iter(config.derived['denoiser']))}"
        if (part := classifier_of(method, config.denoised.model_dump())) is not None:
            stages[_timing("finetune", *part)] = "finetune@{}-{}".format(*part)
    if config.latency.n:
        stages[LATENCY] = "latency"
    for path, stage in stages.items():
        if not (root / path).is_file():
            raise RRCMError(f"{root / path}: no such file; run `dvc repro {stage}`, or fetch it with `dvc pull`")
    for i, each in enumerate(config.report.external_results):
        if not (root / each.path).is_file():
            key = f"report.external_results.{i}.path"
            raise RRCMError(f"{key}: {root / each.path}: no such file; add the file or remove the entry")
    return [*stages, *(each.path for each in config.report.external_results)]


def _read_certified(root: Path, method: str, sigma: float, bound: str) -> pd.DataFrame:
    """The certificates of a model, which are by `bound`, with the columns of their samples file."""
    frame = read_certificates(root / certificates_file(method, sigma))
    path = root / _samples_file(method, sigma)
    samples = read_samples(path)
    advice = f"run `dvc repro certify@{method}-{sigma}`"
    if not samples["idx"].equals(frame["idx"]):
        raise RRCMError(f"{path}: has other images than the certificates beside it; {advice}")
    frame = frame.join(samples.drop(columns="idx"))
    if not _by_bound(frame, bound)[["predict", "radius"]].equals(frame[["predict", "radius"]]):
        raise RRCMError(f"{path}: the {bound} bound has other radii than the certificates beside it; {advice}")
    return frame


def _by_bound(frame: pd.DataFrame, bound: str) -> pd.DataFrame:
    """`frame` with the predictions and radii of one bound, and the samples that this bound took."""
    predict, samples = frame[f"{bound}_predict"], frame["binary_samples" if bound == "binary" else "samples"]
    changed = frame.assign(predict=predict, radius=frame[f"{bound}_radius"], samples=samples)
    return changed.assign(correct=(predict == frame["label"]).astype(int))


def _check_images(config: Config, certificates: Certificates, count: int, root: Path) -> None:
    """Each model must have been certified on the images that the settings choose of `count`, with the same labels."""
    from rrcm.data.shards import choose_rows  # imports torch, which takes seconds

    settings = config.certify
    labels: dict[int, int] = {}
    for (method, sigma), frame in certificates.items():
        expected = choose_rows(count, settings.every, settings.max_images, config.denoised.max_images.get(method))
        found = dict(zip(frame["idx"], frame["label"], strict=True))
        path = root / certificates_file(method, sigma)
        if list(found) != expected:
            problem = f"certifies other images than the settings say ({len(found):,}, not {len(expected):,}, or others)"
            raise RRCMError(f"{path}: {problem}; run `dvc repro` again")
        if any(labels.setdefault(idx, label) != label for idx, label in found.items()):
            raise RRCMError(f"{path}: has other labels than the other certificates; run `dvc repro` again")


def _check_labels(certificates: Certificates, classes: Sequence[str], root: Path) -> None:
    run, frame = max(certificates.items(), key=lambda each: len(each[1]))  # all have the same labels
    label = int(frame["label"].max())
    if label >= len(classes):
        problem = f"has label {label}, but the images in data/shards are of {len(classes)} classes"
        raise RRCMError(f"{root / certificates_file(*run)}: {problem}; run `dvc repro` again")


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise RRCMError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from None


def _read_histories(root: Path, models: Mapping[Run, Mapping]) -> pd.DataFrame:
    """The fine-tuning of each model that was trained, one row per epoch."""
    trained = [
        _read_history(root, model, *run) for run, model in models.items() if METHODS[run[0]].objective is not None
    ]
    return pd.concat(trained, ignore_index=True) if trained else pd.DataFrame()


def _read_history(root: Path, model: Mapping, method: str, sigma: float) -> pd.DataFrame:
    """Fine-tuning per epoch with the compute spent so far: encoder forward passes, those before it included."""
    history = _read_csv(root / _model_folder(method, sigma) / "history.csv")
    spent = model["compute"]["finetune"] * history["epoch"] / history["epoch"].iloc[-1]
    return pd.DataFrame(
        {
            "method": method,
            "sigma": sigma,
            "epoch": history["epoch"],
            "compute": _preparation(model) + spent,
            "loss": history["loss"],
            "val_accuracy": history["val_accuracy"],
            "selected": history["epoch"] == model["selected"]["epoch"],
        }
    )


def _preparation(model: Mapping) -> float:
    """Passes before the fine-tuning: the model's share of its pre-training, its soft labels, its denoiser and so on."""
    return model["compute"]["pretrain_share"] + model["compute"]["soft_label_share"]


def _read_budgets(config: Config, root: Path, models: Mapping[Run, Mapping]) -> pd.DataFrame:
    """Compute (encoder forward passes) and time (seconds) of each model."""

    def seconds(*paths: str) -> float:
        return sum(read_json(root / path)["seconds"] for path in paths)

    rows = []
    for (method, sigma), model in models.items():
        rows.append(
            {
                "method": method,
                "sigma": sigma,
                "epochs": model["training"]["epochs"],
                "finetune_passes": model["compute"]["finetune"],
                "preparation_passes": _preparation(model),
                "total_passes": model["compute"]["finetune"] + _preparation(model),
                "finetune_seconds": seconds(_timing("finetune", method, sigma)),
                "preparation_seconds": seconds(*_shared_timings(config, method))
                / config.finetune.pretrain_cost_shared_by,
                "certify_seconds": seconds(_timing("certify", method, sigma)),
            }
        )
    return pd.DataFrame(rows)


def _shared_timings(config: Config, method: str) -> list[str]:
    """The timings of what a method is prepared with, and shares with other models."""
    shared = []
    if config.finetune.uses_pretraining(method):
        shared.append(pretraining_files(METHODS[method].initial_weights).timing)
    if METHODS[method].needs_soft_labels:
        shared += [_timing("finetune", config.soft_labels.method, config.soft_labels.sigma), SOFT_LABEL_TIMING]
    if METHODS[method].denoises:
        shared.append(DENOISER_TIMING)
    if (part := classifier_of(method, config.denoised.model_dump())) is not None:
        shared.append(_timing("finetune", *part))
    return shared


def _timing(stage: str, method: str, sigma: float) -> str:
    return f"timings/{stage}/{method}/{sigma_name(sigma)}.json"
