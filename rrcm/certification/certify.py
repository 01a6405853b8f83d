"""Certify a classifier on the test split, on one process or on many that share the images through torchrun's store.

Each image is certified independently of the others (smoothing.py). Any number of processes, in any order, killed and
restarted, therefore writes the same bytes. Each process appends the counts of its images to a journal.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from rrcm.certification.journal import append_states, is_possible_state, open_journal, restore_states
from rrcm.certification.record import make_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import ImageState
from rrcm.certification.stopping import StoppingRule
from rrcm.certification.votes import certificate_frame
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.verification import verify_shards
from rrcm.models.ensembles import with_consensus
from rrcm.models.folders import read_model_config
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import WorkQueue, connect, explain_lost_processes, set_threads
from rrcm.utils.files import json_bytes, sha256_folder, write_together
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint

# With this file, the code that decides the result.


@explain_lost_processes()
def certify_split(
    config: Config,
    sigma: float,
    shard_folder: Path | str,
    model_folder: Path,
    output: Path,
    timing: Path,
    max_images: int | None = None,
) -> None:
    """Certify every k-th test image and write `output` (TSV, Cohen et al.'s format).

    Beside it are OUTPUT.samples.tsv with the votes, and OUTPUT.json with all that decided them. With `max_images` at
    most so many of the images are certified.
    The column `time` is 0 because the true seconds differ from run to run; `timing` (JSON) has them. Under torchrun all
    processes share the images. A killed run continues from the last samples it counted, on any number of processes.
    Raises `RRCMError` for missing or damaged inputs.
    """
    set_threads(config.threads)
    settings, env = config.certify, connect(config.device)
    device, queue = env.device, WorkQueue(env, "images")
    images = ShardedDataset(shard_folder, "test")
    verify_shards([images], env)
    classifier = load_model_folder(model_folder).classifier
    smoothed = make_smoothed_classifier(classifier.to(device), sigma, config)
    rule = make_stopping_rule(sigma=sigma, **settings.rule)
    limits = settings.max_images, max_images
    pixels, labels, indices = read_split(images, config.data.image_size, settings.every, *limits)
    pixels = to_unit_range(pixels.to(device))
    states = [ImageState(*each) for each in zip(indices, pixels, labels.tolist(), strict=True)]

    inputs = {"shards": images.fingerprint, "model": sha256_folder(model_folder)}
    batch_size = smoothed.find_batch_size(pixels[0])
    description = [
        settings.model_dump(mode="json", exclude={"every", "max_images"}),  # the images; each is its own work
        config.seed,
        config.data.image_size,
        config.threads,
        sigma,
        device.type,
    ]
    description += [batch_size, smoothed.precision]
    run_state = RunState(f"certify-{sigma}", fingerprint(description, inputs, __name__, smoothed.model, rule))
    if queue.rank == 0:
        run_state.lock()
    queue.start()
    _certify_share(smoothed, states, rule, queue, run_state.folder, f"certify {model_folder}")
    if queue.rank > 0:
        return

    _restore(states, run_state.folder, rule, smoothed)  # the other processes' journals
    tables = certificate_tables(output, certificate_frame(states, rule, smoothed.num_classes))
    record = make_record(
        smoothed,
        batch_size,
        tables,
        model={"kind": read_model_config(model_folder)["kind"], "sha256": inputs["model"]},
        data={"sha256": inputs["shards"], "split": "test", "every": settings.every, "max_images": list(limits)},
        image_size=config.data.image_size,
        labelled=True,
        compile=settings.compile,
        consensus=settings.consensus,
        **settings.rule,
    )
    timed = json_bytes(_describe_time(states, batch_size, smoothed, queue.world_size))
    write_together(tables | {record_path(output): record_bytes(record), timing: timed})
    run_state.finish()


def make_smoothed_classifier(classifier: nn.Module, sigma: float, config: Config, **options: int) -> SmoothedClassifier:
    """`classifier` smoothed as the `certify` settings say, with further `options` of `SmoothedClassifier`."""
    classifier = with_consensus(classifier, config.certify.consensus)
    settings = {name: getattr(config.certify, name) for name in ("batch_size", "precision", "compile")}
    return SmoothedClassifier(classifier, sigma, classifier.num_classes, seed=config.seed, **settings, **options)


def _certify_share(
    smoothed: SmoothedClassifier,
    states: list[ImageState],
    rule: StoppingRule,
    queue: WorkQueue,
    folder: Path,
    label: str,
) -> None:
    """Certify this process's share of the images, starting from the journals in `folder`."""
    _restore(states, folder, rule, smoothed)
    done = sum(state.stop_reason != "" for state in states)
    samples_before, start = sum(state.samples for state in states), time.monotonic()

    def share() -> Iterator[ImageState]:
        while (position := queue.next_index()) < len(states):
            yield states[position]

    at_once = None if queue.world_size == 1 else max(8, len(states) // (4 * queue.world_size))
    with (
        Progress(len(states), label, "images", done=done, quiet=queue.rank > 0) as progress,
        open_journal(folder, queue.rank) as journal,
    ):
        for changed in smoothed.certify_stream(share(), rule, at_once=at_once):
            append_states(journal, changed)
            finished = done + queue.report_done(sum(state.stop_reason != "" for state in changed))
            rate = (sum(state.samples for state in states) - samples_before) / (time.monotonic() - start)
            progress.update(finished - progress.done, samples=f"{rate:,.0f}/s")
        journal.close()  # before reporting: on a network file system the others see a file's content when it is closed
        for _ in queue.close():
            progress.update(done + queue.report_done() - progress.done)
        progress.update(done + queue.report_done() - progress.done)


def _restore(states: list[ImageState], folder: Path, rule: StoppingRule, smoothed: SmoothedClassifier) -> None:
    restore_states(states, folder, lambda saved: is_possible_state(saved, rule, smoothed.num_classes))


def _describe_time(
    states: Sequence[ImageState], batch_size: int, smoothed: SmoothedClassifier, processes: int
) -> dict[str, object]:
    """What the images have cost."""
    seconds, samples = sum(state.seconds for state in states), sum(state.samples for state in states)
    return {
        "seconds": seconds,
        "samples": samples,
        "samples_per_second": samples / seconds,
        "batch_size": batch_size,
        "dtype": smoothed.precision,
        "processes": processes,
        "seconds_by_image": {str(state.index): state.seconds for state in states},
        "environment": describe_environment(smoothed.device),
    }
