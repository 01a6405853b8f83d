"""The files that a report is made from: their paths, and `read_inputs`, which reads and checks them all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from rrcm.certification.external import read_external_certificates
from rrcm.certification.outcomes import find_impossible
from rrcm.certification.results import read_certificates, read_samples, sigma_name
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.votes import parse_selection
from rrcm.config import Config
from rrcm.derived import training_noise
from rrcm.evaluation.metrics import Certificates
from rrcm.methods import JOINT, METHODS, continued_method, denoising_classifier, model_name
from rrcm.report.against import Against, match_published
from rrcm.report.budgets import (
    DENOISER_TIMING,
    SOFT_LABEL_TIMING,
    Run,
    budget_table,
    own_preparation,
    preparation_passes,
    pretraining_timing,
    shared_passes,
    sigmas_served,
    timing_file,
)
from rrcm.report.cascade_inputs import Cascade, cascade_files, cascade_stage, read_cascades
from rrcm.report.records import (
    CertifyTiming,
    CleanAccuracy,
    Latency,
    ModelRecord,
    PretrainRecord,
    Timing,
    check_cost,
    check_finetuning,
    check_pretraining,
    check_representation,
    read_numbers,
    read_record,
)
from rrcm.utils.errors import RRCMError

SHARDS = "data/shards"
MANIFEST = f"{SHARDS}/manifest.json"
LATENCY = "timings/latency.json"
CLEAN = "timings/clean_accuracy.json"  # a run that was published before there was this stage lacks it
PRETRAINING_FILES = ("config.json", "history.csv", "representation.csv")
REPRESENTATION = ["step", "sigma", "knn", "same_image_cosine", "cross_image_cosine", "centred_cosine"]


class Inputs(NamedTuple):
    """The contents of the report, in the order of the settings."""

    files: list[str]  # every file read, relative to the root
    classes: list[str]  # names; a label is an index into them
    data_notes: list[str]  # on images of the data set that were left out, are duplicates, or are missing
    certificates: Certificates  # by the binary bound, with the columns of the samples files
    margin: Certificates  # from the same votes, by the margin bound
    external: Certificates  # other groups' certificates by (label, sigma)
    models: Mapping[Run, Mapping]  # config.json of each model folder
    finetuning: pd.DataFrame  # one row per epoch of each model that was trained
    budgets: pd.DataFrame  # one row per model
    pretraining: Mapping[str, pd.DataFrame]  # history.csv by objective
    representations: Mapping[str, pd.DataFrame]  # representation.csv by objective
    latency: Mapping | None  # the latency stage's record
    cascades: Mapping[str, Cascade]  # by method, in the order of `cascade.methods`
    clean: Mapping[Run, float]  # share of clean images that the base classifiers get right; {} if it is not measured

    @property
    def against(self) -> Against | None:
        """This run against published certificates on common images. None if there are no such certificates."""
        return match_published(self.certificates, self.cascades, self.external) if self.external else None

    def by_bound(self, bound: str) -> Certificates:
        """The certificates of single sigmas by one bound, each with the samples that this bound needed."""
        return self.certificates if bound == "binary" else self.margin


def certificates_file(method: str, sigma: float) -> str:
    """The certificates of a model, relative to the root."""
    return f"certificates/{method}/{sigma_name(sigma)}.tsv"


def model_folder(method: str, sigma: float) -> str:
    """The folder of a fine-tuned model, relative to the root."""
    return f"models/{method}/{model_name(method, sigma)}"


def read_inputs(config: Config, root: Path) -> Inputs:
    """Read the outputs of the other stages under `root`, and the files in `report.external_results`.

    If `latency.n` is empty, no latency is read. Raises `RRCMError` for a missing file, with the command that makes it,
    for impossible values, and for certificates of other test images than the settings select.
    """
    from rrcm.data.shards import ShardedDataset  # imports torch, which takes seconds

    stages = _list_files(config, root)
    images = ShardedDataset(root / SHARDS, "test")
    validation = sum(images.manifest.splits["val"].counts)
    runs = [(method, sigma) for method in config.methods for sigma in config.sigmas]
    certificates = {run: _read_certified(root, *run, config.certify.bound) for run in runs}
    _check_images(config, certificates, images.labels, root)
    _check_outcomes(config, certificates, len(images.classes), root)
    models = _read_models(config, root, runs, images.classes)
    timings = _read_timings(root, stages, certificates)
    external = config.report.external_results
    pretraining = {name: _read_pretraining(config, root, name, validation) for name in config.pretrain.objectives}
    return Inputs(
        files=[*stages, *(each.path for each in external)],
        classes=images.classes,
        data_notes=images.manifest.notes,
        certificates={run: _by_bound(frame, "binary") for run, frame in certificates.items()},
        margin={run: _by_bound(frame, "margin") for run, frame in certificates.items()},
        external={(each.label, each.sigma): read_external_certificates(root / each.path) for each in external},
        models=models,
        finetuning=_read_histories(root, models, validation),
        budgets=budget_table(config, timings, models).assign(images=[len(frame) for frame in certificates.values()]),
        pretraining={name: history for name, (history, _) in pretraining.items()},
        representations={name: representation for name, (_, representation) in pretraining.items()},
        latency=_read_latency(config, root, models) if config.latency.n else None,
        cascades=read_cascades(config, root, certificates, len(images.classes)),
        clean=_read_clean(root, certificates) if CLEAN in stages else {},
    )


def _samples_file(method: str, sigma: float) -> str:
    return f"certificates/{method}/{sigma_name(sigma)}.samples.tsv"


def _list_files(config: Config, root: Path) -> dict[str, str]:
    """The files that other stages write for the report, relative to `root`, each with its stage.

    Raises `RRCMError` for the first file that is missing, also in `report.external_results`.
    """
    stages = {MANIFEST: "shard-data"}
    for objective in config.pretrain.objectives:
        files = [f"models/pretrain/{objective}/{name}" for name in PRETRAINING_FILES]
        stages |= dict.fromkeys([*files, pretraining_timing(objective)], f"pretrain@{objective}")
    for method in config.methods:
        for sigma in config.sigmas:
            files = [f"{model_folder(method, sigma)}/{name}" for name in ("config.json", "history.csv")]
            stages |= dict.fromkeys([*files, timing_file("finetune", method, sigma)], _training_stage(method, sigma))
            files = [certificates_file(method, sigma), _samples_file(method, sigma)]
            stages |= dict.fromkeys([*files, timing_file("certify", method, sigma)], f"certify@{method}-{sigma}")
        if METHODS[method].needs_soft_labels:
            source = config.soft_labels
            stages[SOFT_LABEL_TIMING] = f"soft-labels@{source.method}-{source.sigma}"
        if METHODS[method].can_pass:
            voter = continued_method(method)
            done = (f"finetune@{voter}-{JOINT}", f"training-votes@{voter}")
            stages |= dict(zip(own_preparation(method), done, strict=True))
        if METHODS[method].denoises:
            stages[DENOISER_TIMING] = f"denoiser@{next(iter(config.derived['denoiser']))}"
        if (part := denoising_classifier(method, config.denoised.model_dump())) is not None:
            stages[timing_file("finetune", *part)] = "finetune@{}-{}".format(*part)
    for method in config.cascade.methods:
        stages |= dict.fromkeys(cascade_files(config, method), cascade_stage(method))
    if config.latency.n:
        stages[LATENCY] = "latency"
    if (root / CLEAN).is_file():
        stages[CLEAN] = "clean-accuracy"
    for path, stage in stages.items():
        if not (root / path).is_file():
            raise RRCMError(f"{root / path}: no such file; run `dvc repro {stage}`, or fetch it with `dvc pull`")
    for i, each in enumerate(config.report.external_results):
        if not (root / each.path).is_file():
            key = f"report.external_results.{i}.path"
            raise RRCMError(f"{key}: {root / each.path}: no such file; add the file or remove the entry")
    return stages


def _training_stage(method: str, sigma: float) -> str:
    return f"finetune@{method}-{training_noise(method, sigma)}"


def _again(stage: str) -> str:
    return f"run `dvc repro {stage}` again, or fetch its outputs with `dvc pull`"


def _read_certified(root: Path, method: str, sigma: float, bound: str) -> pd.DataFrame:
    """The certificates of a model with the columns of their samples file. Their radii must be by `bound`."""
    frame = read_certificates(root / certificates_file(method, sigma))
    path = root / _samples_file(method, sigma)
    samples = read_samples(path)
    advice = f"run `dvc repro certify@{method}-{sigma}`"
    if not samples["idx"].equals(frame["idx"]):
        raise RRCMError(f"{path}: has other images than the certificates beside it; {advice}")
    for idx, selection in zip(samples["idx"], samples["selection"], strict=True):
        try:
            parse_selection(selection)
        except ValueError as error:
            raise RRCMError(f"{path}: image {idx}: {error}; {_again(f'certify@{method}-{sigma}')}") from None
    frame = frame.join(samples.drop(columns="idx"))
    if not _by_bound(frame, bound)[["predict", "radius"]].equals(frame[["predict", "radius"]]):
        raise RRCMError(f"{path}: the {bound} bound has other radii than the certificates beside it; {advice}")
    return frame


def _by_bound(frame: pd.DataFrame, bound: str) -> pd.DataFrame:
    """`frame` with the predictions and radii by one bound, and the samples that this bound needed."""
    predict, samples = frame[f"{bound}_predict"], frame["binary_samples" if bound == "binary" else "samples"]
    changed = frame.assign(predict=predict, radius=frame[f"{bound}_radius"], samples=samples)
    return changed.assign(correct=(predict == frame["label"]).astype(int))


def _check_images(config: Config, certificates: Certificates, labels: np.ndarray, root: Path) -> None:
    """Each model must have been certified on the test images that the settings select, with their `labels`."""
    from rrcm.data.shards import choose_rows  # imports torch, which takes seconds

    settings = config.certify
    for (method, sigma), frame in certificates.items():
        expected = choose_rows(len(labels), settings.every, settings.max_images, config.denoised.max_images.get(method))
        path = root / certificates_file(method, sigma)
        if frame["idx"].tolist() != expected:
            problem = f"certifies other images than the settings say ({len(frame):,}, not {len(expected):,}, or others)"
            raise RRCMError(f"{path}: {problem}; run `dvc repro` again")
        if (other := frame["label"] != labels[expected]).any():
            idx, label = frame.loc[other.idxmax(), ["idx", "label"]]
            problem = f"image {idx} has label {label}, in data/shards it has {labels[idx]}"
            raise RRCMError(f"{path}: {problem}; run `dvc repro` again")


def _check_outcomes(config: Config, certificates: Certificates, num_classes: int, root: Path) -> None:
    """Each image must have an outcome that the settings of `certify` allow."""
    rules = {sigma: make_stopping_rule(sigma=sigma, **config.certify.rule) for sigma in config.sigmas}
    for (method, sigma), frame in certificates.items():
        if problem := find_impossible(frame, rules[sigma], num_classes):
            path, advice = root / _samples_file(method, sigma), _again(f"certify@{method}-{sigma}")
            raise RRCMError(f"{path}: {problem}, by the settings of certify; {advice}")


def _read_models(config: Config, root: Path, runs: Sequence[Run], classes: Sequence[str]) -> dict[Run, Mapping]:
    """config.json of each model folder. Raises `RRCMError` if the method, sigma, seed or classes are different ones."""
    models: dict[Run, Mapping] = {}
    for method, sigma in runs:
        path, advice = root / model_folder(method, sigma) / "config.json", _again(_training_stage(method, sigma))
        model = models[method, sigma] = read_record(path, ModelRecord, advice)
        noise = {"sigma": sigma}
        if METHODS[method].joint is not None:
            noise = {JOINT: {"sigmas": sorted(config.sigmas), "interval": config.finetune.joint_interval}}
        expected = {"method": method, **noise, "seed": config.seed, "class_names": list(classes)}
        if other := [key for key, value in expected.items() if model[key] != value]:
            raise RRCMError(f"{path}: {other[0]} differs from the settings and shards; {advice}")
        if shared_passes(model) != shared_passes(models[method, config.sigmas[0]]):
            raise RRCMError(f"{path}: the share of the preparation is another than at other sigmas; {advice}")
    return models


def _read_timings(root: Path, stages: Mapping[str, str], certificates: Certificates) -> dict[str, Mapping]:
    """Every record under timings/ except the latency. The records of certifications must match the certificates.

    For cascades, `read_cascades` checks the rest.
    """
    timings = {
        path: read_record(root / path, CertifyTiming if path.startswith("timings/certify/") else Timing, _again(stage))
        for path, stage in stages.items()
        if path.startswith("timings/") and path != LATENCY
    }
    for run, frame in certificates.items():
        path = timing_file("certify", *run)
        if problem := check_cost(timings[path], frame):
            raise RRCMError(f"{root / path}: {problem}; {_again(stages[path])}")
    return timings


def _read_latency(config: Config, root: Path, models: Mapping[Run, Mapping]) -> Mapping:
    """The record of the latency stage. Raises `RRCMError` if it is for other settings or models."""
    path, advice = root / LATENCY, _again("latency")
    record = read_record(path, Latency, advice)
    if list(record["methods"]) != config.methods or record["sigma"] != config.sigmas[0]:
        raise RRCMError(f"{path}: is of other methods, or of another sigma, than the settings; {advice}")
    for method, each in record["methods"].items():
        if len(each["seconds_per_sample"]) != config.latency.rounds or each["samples"] % each["batch_size"]:
            raise RRCMError(f"{path}: {method}: has other rounds than the settings, or no whole batches; {advice}")
        if sum(each["parameters"].values()) != models[method, config.sigmas[0]]["parameters"]:
            raise RRCMError(f"{path}: {method}: has other parameters than its model; {advice}")
    cascades, names = record.pop("cascades", {}), [sigma_name(sigma) for sigma in config.cascade_sigmas]
    for method in config.cascade.methods:
        if method not in cascades or list(cascades[method]["seconds_per_sample"]) != names:
            raise RRCMError(f"{path}: has no cascade of {method} at the sigmas of the settings; {advice}")
    return record | {"cascades": {method: cascades[method] for method in config.cascade.methods}}


def _read_clean(root: Path, certificates: Certificates) -> dict[Run, float]:
    """The accuracy of each base classifier on the clean images that it certifies."""
    path, advice = root / CLEAN, _again("clean-accuracy")
    record, shares = read_record(path, CleanAccuracy, advice), {}
    for (method, sigma), frame in certificates.items():
        correct = record["correct"].get(method, {}).get(sigma_name(sigma), -1)
        if record["images"].get(method) != len(frame) or not 0 <= correct <= len(frame):
            raise RRCMError(f"{path}: has no count of the images that {method} certifies at sigma {sigma}; {advice}")
        shares[method, sigma] = correct / len(frame)
    return shares


def _read_pretraining(config: Config, root: Path, name: str, validation: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """history.csv and representation.csv of a pre-training. `validation` is the size of the validation split."""
    folder, advice = root / f"models/pretrain/{name}", _again(f"pretrain@{name}")
    model = read_record(folder / "config.json", PretrainRecord, advice)
    sigmas = config.pretrain.settings(name).evaluate_sigmas
    history = read_numbers(folder / "history.csv", ["step", "loss"], advice)
    representation = read_numbers(folder / "representation.csv", REPRESENTATION, advice)
    problems = {
        "config.json": None if model["objective"] == name else f"objective is {model['objective']!r}, not {name!r}",
        "history.csv": check_pretraining(history, model),
        "representation.csv": check_representation(representation, model, sigmas, validation),
    }
    for file, problem in problems.items():
        if problem is not None:
            raise RRCMError(f"{folder / file}: {problem}; {advice}")
    return history, representation


def _read_histories(root: Path, models: Mapping[Run, Mapping], validation: int) -> pd.DataFrame:
    """The fine-tuning histories of all models that were trained, with one row per epoch."""
    trained = [
        _read_history(root, model, *run, validation)
        for run, model in models.items()
        if METHODS[run[0]].objective is not None
    ]
    return pd.concat(trained, ignore_index=True) if trained else pd.DataFrame()


def _read_history(root: Path, model: Mapping, method: str, sigma: float, validation: int) -> pd.DataFrame:
    """The fine-tuning of a model, with one row per epoch.

    `compute` is the number of encoder forward passes so far, including those before the fine-tuning. At each of its
    sigmas a joint model has its share of them.
    """
    path, advice = root / model_folder(method, sigma) / "history.csv", _again(_training_stage(method, sigma))
    history, served = read_numbers(path, ["epoch", "loss", "val_accuracy"], advice), sigmas_served(model)
    if problem := check_finetuning(history, model, served * validation, one_model=not METHODS[method].is_ensemble):
        raise RRCMError(f"{path}: {problem}; {advice}")
    spent = model["compute"]["finetune"] * history["epoch"] / history["epoch"].iloc[-1]
    return pd.DataFrame(
        {
            "method": method,
            "sigma": sigma,
            "epoch": history["epoch"],
            "compute": (preparation_passes(model) + spent) / served,
            "loss": history["loss"],
            "val_accuracy": history["val_accuracy"],
            "selected": history["epoch"] == model["selected"]["epoch"],
        }
    )
