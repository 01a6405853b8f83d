"""Certify the cascade of a method on the test split: its thresholds, its certificates, and those by the published rule.

Everything is shared among processes and journaled as in certify.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from rrcm.certification import split_votes
from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.cascade_rules import CERTIFICATES, LABEL_AWARE, MULTI_SCALE, CascadeRule, make_cascade_rule
from rrcm.certification.cascade_states import CascadeState, is_possible_cascade_state, new_state
from rrcm.certification.cascade_votes import CASCADE_FILES, cascade_frame
from rrcm.certification.certify import SplitVoter, describe_states, open_images, smoothing_options
from rrcm.certification.driver import finish_states
from rrcm.certification.noise import PREDICT
from rrcm.certification.record import make_cascade_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables, samples_path
from rrcm.certification.split_votes import is_possible_votes, vote_stream
from rrcm.certification.validation_votes import (
    ValidationState,
    choose_by_votes,
    new_validation_states,
    votes_table,
)
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset
from rrcm.methods import THRESHOLDS
from rrcm.models.folders import read_model_config
from rrcm.models.kinds import load_scales
from rrcm.utils.distributed import DistEnv, WorkQueue, explain_lost_processes, from_main
from rrcm.utils.files import json_bytes, sha256_folder, write_together
from rrcm.utils.resume import RunState

PARTS = ("seconds", "samples", "seconds_by_image")  # entries of the file of timings for each further file


@dataclass(frozen=True)
class Work:
    """The votes that a part of the stage has counted, and the journals from which it would continue."""

    states: Sequence[CascadeState] | Sequence[ValidationState]
    run: RunState


@explain_lost_processes()
def certify_cascade_split(
    config: Config,
    shard_folder: Path | str,
    model_folders: Sequence[Path],
    output: Path,
    timing: Path,
    max_images: int | None = None,
) -> None:
    """Certify the cascade of base classifiers on every k-th test image, with the settings `cascade` and `certify`.

    `model_folders` has a folder for each of `config.cascade_sigmas`, or only the folder of a joint model. The folder
    `output` gets cascade.tsv and, if the settings ask for the published rule, multi_scale.tsv, each with the files that
    `certify_split` writes beside its certificates. If thresholds are chosen, it also gets thresholds.tsv
    (validation_votes.py). `timing` (JSON) records the cost of cascade.tsv, and the cost of each other file under its
    name. `max_images`, processes, kills and errors are as for `certify_split`.
    """
    env, voter, cascade = open_cascade(config, shard_folder, model_folders)
    thresholds, chosen, choice = find_thresholds(env, voter, shard_folder)
    cascade = cascade.with_thresholds(thresholds)
    rules = CERTIFICATES if config.cascade.multi_scale else (LABEL_AWARE,)
    done = {rule: certify_by(rule, replace(voter, queue=WorkQueue(env, rule)), cascade, max_images) for rule in rules}
    if not env.is_main:
        return
    votes = {output / f"{THRESHOLDS}.tsv": votes_table(choice.states, cascade.sigmas)} if choice else {}
    contents = dict(votes)
    for rule, work in done.items():
        tables = certificate_tables(output / f"{CASCADE_FILES[rule]}.tsv", _frame(work, rule, cascade, config)) | votes
        entries = {"models": describe_models(model_folders), "chosen": chosen, "certificates": rule}
        entries |= voter.record_entries(max_images)
        record = make_cascade_record(cascade, voter.batch_size, tables, **entries)
        contents |= tables | {record_path(output / f"{CASCADE_FILES[rule]}.tsv"): record_bytes(record)}
    write_together(contents | {timing: _describe_time(voter, done, choice)})
    _delete_others(output, contents)
    for work in [*done.values(), *filter(None, [choice])]:
        work.run.finish()


def open_cascade(
    config: Config, shard_folder: Path | str, model_folders: Sequence[Path]
) -> tuple[DistEnv, SplitVoter, CascadedClassifier]:
    """Connect to the other processes, and load the cascade to vote on the test split. Its thresholds are still 0.

    Raises `RRCMError` for missing or damaged inputs.
    """
    env, (images, *_) = open_images(config, shard_folder, "test", "val")
    sigmas = config.cascade_sigmas
    scales, can_pass = load_scales(model_folders, sigmas)
    models = [scale.classifier.to(env.device) for scale in scales]
    settings = {"num_classes": scales[0].num_classes, "can_pass": can_pass, **smoothing_options(config)}
    cascade = CascadedClassifier(models, sigmas, [0.0] * (len(sigmas) - 1), **settings)
    image = torch.zeros(images.channels, config.data.image_size, config.data.image_size)
    batch_size = cascade.share_batch_size(image)
    inputs = {str(k): sha256_folder(folder) for k, folder in enumerate(model_folders)}
    inputs["shards"] = images.fingerprint
    voter = SplitVoter(config, images, list(cascade.scales), batch_size, WorkQueue(env, "images"), inputs).in_runtime()
    cascade.scales = nn.ModuleList(voter.scales)
    return env, voter, cascade


def describe_models(folders: Sequence[Path]) -> list[dict[str, str]]:
    """The entry `models` of a record."""
    return [{"kind": read_model_config(folder)["kind"], "sha256": sha256_folder(folder)} for folder in folders]


def find_thresholds(
    env: DistEnv, voter: SplitVoter, shard_folder: Path | str
) -> tuple[list[float], dict | None, Work | None]:
    """The thresholds of a cascade. If they are chosen, also how, and the votes for validation images behind them.

    Only the first process has all votes. Every process has the thresholds.
    """
    settings = voter.config.cascade
    if settings.thresholds != "chosen":
        return settings.thresholds, None, None
    images, num_classes = ShardedDataset(shard_folder, "val"), voter.smoothed.num_classes
    states, size = new_validation_states(images), voter.config.data.image_size
    run = voter.run_state("thresholds", settings.choose_n, split_votes.__name__)
    outputs = [scale.num_classes for scale in voter.scales]  # with "pass"
    finish_states(
        states,
        partial(vote_stream, voter.scales, images, PREDICT, settings.choose_n, size),
        run,
        partial(is_possible_votes, n=settings.choose_n, outputs=outputs),
        WorkQueue(env, THRESHOLDS),
        "choose thresholds",
    )
    thresholds, chosen = from_main(env, "thresholds", lambda: choose_by_votes(states, voter.config, num_classes))
    return thresholds, chosen, Work(states, run)


def certify_by(rule_name: str, voter: SplitVoter, cascade: CascadedClassifier, max_images: int | None) -> Work:
    """Certify the images by the rule of this name, one of CERTIFICATES. The first process has all states."""
    settings, rule = voter.config.certify, make_rule(rule_name, cascade, voter.config)
    images = voter.read_states(settings.max_images, max_images)
    states = [new_state(each.index, each.image, each.label, rule) for each in images]
    decides = settings.model_dump(mode="json", exclude={"every", "max_images"})  # these only choose the images
    run = voter.run_state(f"certify-{rule_name}", decides, __name__, rule)
    finish_states(
        states,
        partial(cascade.certify_stream, rule=rule),
        run,
        partial(is_possible_cascade_state, rule=rule, num_classes=cascade.num_classes),
        voter.queue,
        f"certify {rule_name}",
    )
    return Work(states, run)


def make_rule(rule_name: str, cascade: CascadedClassifier, config: Config) -> CascadeRule:
    """The stopping rule of a cascade, with the settings of `certify`."""
    settings = config.certify.rule
    return make_cascade_rule(
        settings.pop("stopping"), cascade.sigmas, cascade.thresholds, certificates=rule_name, **settings
    )


def _frame(work: Work, rule_name: str, cascade: CascadedClassifier, config: Config) -> pd.DataFrame:
    return cascade_frame(work.states, make_rule(rule_name, cascade, config), cascade.num_classes)


def _describe_time(voter: SplitVoter, done: Mapping[str, Work], choice: Work | None) -> bytes:
    """The cost of the cascade's certificates, of those by the published rule, and of the choice of thresholds."""
    timed = {rule: describe_states(voter, work.states) for rule, work in done.items()}
    costs = timed.pop(LABEL_AWARE)
    if MULTI_SCALE in timed:
        costs["multi_scale"] = {name: timed[MULTI_SCALE][name] for name in PARTS}
    if choice:
        costs["thresholds"] = {name: sum(getattr(each, name) for each in choice.states) for name in PARTS[:2]}
    return json_bytes(costs)


def _delete_others(output: Path, written: Iterable[Path]) -> None:
    """Delete the files that an earlier run with other settings has left beside the cascade's."""
    names = [output / f"{THRESHOLDS}.tsv"]
    for table in (output / f"{name}.tsv" for name in CASCADE_FILES.values()):
        names += [table, samples_path(table), record_path(table)]
    for path in set(names) - set(written):
        path.unlink(missing_ok=True)
