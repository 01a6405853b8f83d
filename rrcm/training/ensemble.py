"""Training of an ensemble: classifiers of one method, each with a seed of its own (Horváth et al. 2022)."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.derived import watched_weights
from rrcm.methods import METHODS, SOFT_LABELS
from rrcm.models.ensembles import write_ensemble
from rrcm.models.kinds import load_model_folder
from rrcm.training.finetune import finetune
from rrcm.training.validation import NoisyValidation
from rrcm.utils.distributed import DistEnv, all_reduce_min, init_distributed, resolve_precision
from rrcm.utils.files import atomic_directory, claimed, read_json, sha256_file, sha256_folder, write_json
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.rng import derive_seed


def finetune_ensemble(
    config: Config,
    method: str,
    sigma: float,
    shard_folder: Path | str,
    pretrained: Path,
    output: Path,
    timing: Path,
    soft_labels: Path = Path(SOFT_LABELS),
) -> None:
    """Train the members of an ensemble, one after another, and write `output` (config.json, history.csv, one folder per
    member) and `timing` (JSON).

    Each member is a training of the method with a seed derived from the seed and its number. So head, batches, noise,
    and random initial weights are its own. A killed run continues in the member that it was at, and ends with
    the same bytes.
    """
    count = config.finetune.ensemble_members
    identity = _identity(config, method, sigma, shard_folder, pretrained, soft_labels)
    run_state = RunState(f"ensemble-{method}-{sigma}", identity)
    folders = [run_state.folder / f"member_{number}" for number in range(count)]
    records = [folder.with_suffix(".json") for folder in folders]  # written last
    with init_distributed(config.device) as env:
        if env.is_main:
            run_state.lock()
        done = torch.tensor(sum(record.exists() for record in records))
        done = int(all_reduce_min(done))  # the same in all processes
    for number in range(done, count):
        own = config.model_copy(update={"seed": derive_seed(config.seed, "member", number) % 2**31})
        label = f"finetune {method} sigma {sigma:g} member {number + 1} of {count}"
        finetune(own, method, sigma, shard_folder, pretrained, folders[number], records[number], soft_labels, label)
    if env.is_main:
        with claimed(output, timing, wait=True):
            with atomic_directory(output) as complete:
                for folder in folders:
                    shutil.copytree(folder, complete / folder.name)
                _describe(config, method, sigma, ShardedDataset(shard_folder, "val"), env.device, complete)
            _sum_timings(records, timing)
        run_state.finish()


def _identity(
    config: Config, method: str, sigma: float, shard_folder: Path | str, pretrained: Path, soft_labels: Path
) -> str:
    """The hash that names the run: of the settings, the code, and the data and weights that the members start from."""
    inputs = {"shards": ShardedDataset(shard_folder, "train").fingerprint}
    weights = watched_weights(method, config.finetune.model_dump(), config.denoised.model_dump())
    if config.finetune.uses_pretraining(method):
        weights = pretrained / METHODS[method].initial_weights
    for path in (weights, soft_labels if METHODS[method].needs_soft_labels else None):
        if path is not None and (path := Path(path)).exists():  # what is missing is named by the training that needs it
            inputs[path.name] = sha256_folder(path) if path.is_dir() else sha256_file(path)
    settings = config.model_dump(mode="json", include={"seed", "data", "model", "pretrain", "finetune"})
    return fingerprint({"method": METHODS[method].identity, "sigma": sigma, **settings}, inputs, __name__)


def _describe(
    config: Config, method: str, sigma: float, validation: ShardedDataset, device: torch.device, folder: Path
) -> None:
    """Write config.json and history.csv of the ensemble in `folder`, where the members are.

    The history is the mean of theirs.
    """
    members = sorted(path.name for path in folder.iterdir())
    configs = [read_json(folder / name / "config.json") for name in members]
    histories = pd.concat([pd.read_csv(folder / name / "history.csv") for name in members])
    histories.groupby("epoch", as_index=False).mean().to_csv(folder / "history.csv", index=False, lineterminator="\n")
    facts = {
        "sigma": sigma,
        "method": method,
        "seed": config.seed,
        "parameters": sum(each["parameters"] for each in configs),
        "initial_weights": config.initial_weights(method),
        "training": configs[0]["training"],
        "compute": add_compute([each["compute"] for each in configs]),
    }
    write_ensemble(folder, members, configs[0]["class_names"], **facts)
    ensemble = load_model_folder(folder).classifier.to(device)
    pixels, labels, _ = read_split(validation, config.data.image_size)
    precision = resolve_precision(device, config.finetune.precision)
    accuracy = NoisyValidation(pixels, labels, sigma, config.seed, precision, DistEnv(0, 1, device))(ensemble)
    selected = {"epoch": histories["epoch"].tolist()[-1], "val_accuracy": accuracy}
    write_ensemble(folder, members, configs[0]["class_names"], **facts, selected=selected)


def add_compute(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The compute of an ensemble: all fine-tunings, and once what the members share, as a pre-training."""
    return {**members[0], "finetune": sum(member["finetune"] for member in members)}


def _sum_timings(records: list[Path], timing: Path) -> None:
    """Write the timing of the ensemble: seconds added up, and images per second over all members."""
    each = [read_json(record) for record in records]
    seconds = sum(record["seconds"] for record in each)
    images = sum(record["seconds"] * record["images_per_second"] for record in each)
    write_json(timing, each[-1] | {"seconds": seconds, "images_per_second": images / seconds})
