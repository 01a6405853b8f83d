"""Certify a finished model from anywhere on the test split, as the pipeline certifies its own models."""

from functools import partial
from pathlib import Path

import torch

from rrcm.certification.certify import SplitVoter, open_images, smoothing_options
from rrcm.certification.certify_images import identify_model
from rrcm.certification.driver import finish_states
from rrcm.certification.journal import is_possible_state
from rrcm.certification.record import make_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.votes import certificate_frame
from rrcm.config import Config
from rrcm.models.kinds import LoadedClassifier
from rrcm.models.own_code import load_named_classifier
from rrcm.utils.distributed import WorkQueue, explain_lost_processes
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import check_output, write_together


@explain_lost_processes()
def certify_model(
    config: Config, model: str, sigma: float, output: Path, *, shards: Path | str, weights: Path | None = None
) -> None:
    """Certify the smoothed `model` on the test images of a run, with its settings. Nothing is trained.

    `model` and `weights` are passed on to `load_named_classifier`. Writes `output` with its votes and its record beside
    it, and continues after a kill, both as `certify_split` does. Raises `RRCMError` for a model of other images or
    classes.
    """
    check_output(output)
    env, (images,) = open_images(config, shards, "test")
    loaded = load_named_classifier(model, sigma=sigma, weights=weights)
    _check_fit(model, loaded, config, images.classes)
    smoothed = SmoothedClassifier(
        loaded.classifier.to(env.device), sigma, loaded.num_classes, **smoothing_options(config)
    )
    batch_size = smoothed.find_batch_size(torch.zeros(loaded.channels, loaded.image_size, loaded.image_size))
    identity = identify_model(model, loaded)
    inputs = {"shards": images.fingerprint, "model": identity["sha256"]}
    voter = SplitVoter(config, images, [smoothed], batch_size, WorkQueue(env, "images"), inputs).in_runtime()
    smoothed = voter.smoothed
    rule, states = make_stopping_rule(sigma=sigma, **config.certify.rule), voter.read_states(config.certify.max_images)
    run = voter.run_state(f"certify-model-{sigma}", config.certify.rule, __name__, rule)
    finish_states(
        states,
        partial(smoothed.certify_stream, rule=rule),
        run,
        partial(is_possible_state, rule=rule, num_classes=smoothed.num_classes),
        voter.queue,
        f"certify {printable(model)}",
    )
    if voter.queue.rank == 0:
        tables = certificate_tables(output, certificate_frame(states, rule, smoothed.num_classes))
        record = make_record(smoothed, batch_size, tables, model=identity, **voter.record_entries(None))
        write_together(tables | {record_path(output): record_bytes(record)})
        run.finish()


def _check_fit(model: str, loaded: LoadedClassifier, config: Config, classes: list[str]) -> None:
    """Raise `RRCMError` unless a model takes the images of the run and has its classes in the same order."""
    for what, found, wanted in (
        ("images of {} pixels", loaded.image_size, config.data.image_size),
        ("images of {} channels", loaded.channels, config.data.channels),
        ("{} classes", loaded.num_classes, len(classes)),
    ):
        if found != wanted:
            advice = "give a model for the same data, such as a function that adapts yours"
            raise RRCMError(f"{model}: is for {what.format(found)}, the run has {wanted}; {advice}")
    numbers = [str(number) for number in range(len(classes))]
    if loaded.class_names not in (classes, numbers):
        name, other = next(pair for pair in zip(loaded.class_names, classes, strict=True) if pair[0] != pair[1])
        raise RRCMError(
            f"{model}: has the class {printable(name)} where the run has {printable(other)}; give a model with the "
            f"classes {printable(', '.join(classes))}, in this order"
        )
