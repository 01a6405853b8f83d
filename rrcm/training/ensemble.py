"""Training of an ensemble: several classifiers of one method, each with its own seed (Horváth et al. 2022)."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from rrcm.data.shards import ShardedDataset
from rrcm.methods import JOINT, METHODS
from rrcm.models.ensembles import write_ensemble
from rrcm.models.kinds import load_model_folder
from rrcm.training.finetune import finetune
from rrcm.training.plan import Training
from rrcm.training.start import encoder_path
from rrcm.training.validation import build_validation
from rrcm.utils.distributed import DistEnv, all_reduce_min, init_distributed
from rrcm.utils.files import atomic_directory, claimed, read_json, sha256_file, sha256_folder, write_json
from rrcm.utils.resume import RunState, fingerprint
from rrcm.utils.rng import derive_seed


def finetune_ensemble(training: Training) -> None:
    """Train the members one after another, and write the model folder (config.json, history.csv, one folder per member)
    and the timing.

    Each member is a training of its own: its head, batches, noise and random initial weights come from a seed derived
    from the training's seed and the member's number. A run that was killed and is started again continues in the member
    it had reached, and ends with the same bytes.
    """
    run_state = RunState(f"ensemble-{training.name}", _identity(training))
    members = [_member(training, number, run_state.folder) for number in range(training.common.ensemble_members)]
    with init_distributed(training.device) as env:
        if env.is_main:
            run_state.lock()
        done = torch.tensor(sum(member.files.timing.exists() for member in members))
        done = int(all_reduce_min(done))  # the same in all processes
    for member in members[done:]:
        finetune(member)
    if env.is_main:
        output, timing = training.files.output, training.files.timing
        with claimed(output, timing, wait=True):
            with atomic_directory(output) as complete:
                for member in members:
                    shutil.copytree(member.files.output, complete / member.files.output.name)
                _describe(training, complete, env.device)
            _sum_timings([member.files.timing for member in members], timing)
        run_state.finish()


def _member(training: Training, number: int, folder: Path) -> Training:
    """The training of one member. Its timing is written last, so it says whether the member is complete."""
    output = folder / f"member_{number}"
    label = f"{training.label} member {number + 1} of {training.common.ensemble_members}"
    seed = derive_seed(training.seed, "member", number) % 2**31
    return replace(training, seed=seed, label=label).writing_to(output, output.with_suffix(".json"))


def _identity(training: Training) -> str:
    """The hash that names the run. It covers settings, code, images, soft labels and initial weights."""
    inputs = {"shards": ShardedDataset(training.files.shards, "train").fingerprint}
    weights = encoder_path(training.method, training.common, training.files.encoders)
    soft_labels = training.files.soft_labels if METHODS[training.method].needs_soft_labels else None
    for path in (weights, soft_labels):
        if path is not None and path.exists():  # the member's training names a file that is missing
            inputs[path.name] = sha256_folder(path) if path.is_dir() else sha256_file(path)
    return fingerprint(training.identity, inputs, __name__)


def _describe(training: Training, folder: Path, device: torch.device) -> None:
    """Write config.json and history.csv of the ensemble in `folder`, which has the members.

    The history is the mean of the members' histories.
    """
    members = sorted(path.name for path in folder.iterdir())
    configs = [read_json(folder / name / "config.json") for name in members]
    histories = pd.concat([pd.read_csv(folder / name / "history.csv") for name in members])
    histories.groupby("epoch", as_index=False).mean().to_csv(folder / "history.csv", index=False, lineterminator="\n")
    facts = {
        **({"sigma": training.sigma} if training.joint is None else {JOINT: training.joint.entries}),
        "method": training.method,
        "seed": training.seed,
        "parameters": sum(each["parameters"] for each in configs),
        "initial_weights": training.initial_weights,
        "training": configs[0]["training"],
        "compute": add_compute([each["compute"] for each in configs]),
    }
    write_ensemble(folder, members, configs[0]["class_names"], **facts)
    ensemble = load_model_folder(folder, sigma=training.sigma).classifier.to(device)
    validation = ShardedDataset(training.files.shards, "val")
    accuracy = build_validation(training, validation, DistEnv(0, 1, device), nn.Identity())(ensemble)
    selected = {"epoch": histories["epoch"].tolist()[-1], "val_accuracy": accuracy}
    write_ensemble(folder, members, configs[0]["class_names"], **facts, selected=selected)


def add_compute(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The compute of an ensemble: all fine-tunings, and once what the members share, such as a pre-training."""
    return {**members[0], "finetune": sum(member["finetune"] for member in members)}


def _sum_timings(records: list[Path], timing: Path) -> None:
    """Write the timing of the ensemble: the sum of the seconds, and images per second over all members."""
    each = [read_json(record) for record in records]
    seconds = sum(record["seconds"] for record in each)
    images = sum(record["seconds"] * record["images_per_second"] for record in each)
    write_json(timing, each[-1] | {"seconds": seconds, "images_per_second": images / seconds})
