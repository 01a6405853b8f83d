"""Certify a classifier on the test split, on one process or on many that share the images through torchrun's store."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from rrcm.certification.driver import State, finish_states
from rrcm.certification.journal import is_possible_state
from rrcm.certification.quantization import read_calibration
from rrcm.certification.record import make_record, record_bytes, record_path
from rrcm.certification.results import certificate_tables
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.runtimes import in_runtime, precision_of, runtime_entries
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import ImageState
from rrcm.certification.votes import certificate_frame
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.verification import verify_shards
from rrcm.models.folders import read_model_config
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import DistEnv, WorkQueue, connect, explain_lost_processes, set_threads
from rrcm.utils.files import json_bytes, sha256_folder, write_together
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, fingerprint


@dataclass(frozen=True)
class SplitVoter:
    """Smoothed classifiers, the split whose images they vote on, and the processes that share the images."""

    config: Config
    images: ShardedDataset
    scales: Sequence[SmoothedClassifier]  # one, or one for each sigma of a cascade, all on the same device
    batch_size: int  # noisy samples per forward pass
    queue: WorkQueue
    inputs: dict[str, str]  # SHA-256 of `shards`, and of each model folder by a name

    @property
    def smoothed(self) -> SmoothedClassifier:
        """The smoothed classifier, or the first one of a cascade."""
        return self.scales[0]

    def in_runtime(self) -> "SplitVoter":
        """The same voter, with its networks run by the runtime of `certify.runtime`. The main process prints a note."""
        config, size = self.config, self.config.data.image_size
        in_int8 = config.certify.precision == "int8"
        calibration = read_calibration(self.images.root, size, config.seed) if in_int8 else None
        image = torch.zeros(self.images.channels, size, size)
        scales, note = in_runtime(config.certify.runtime, self.scales, image, calibration)
        if note and self.queue.rank == 0:
            print(f"note: {note}", file=sys.stderr)
        return replace(self, scales=scales)

    def run_state(self, name: str, settings: object, module: str, *objects: object) -> RunState:
        """The journals of the work `name`, which depends on the `settings` and `objects` and on what `module` does."""
        description = [settings, self.config.seed, self.config.data.image_size, self.config.threads]
        description += [self.smoothed.device.type, self.batch_size, self.smoothed.precision]
        models = [scale.model for scale in self.scales]
        return RunState(name, fingerprint(description, self.inputs, module, *models, *objects))

    def read_states(self, *limits: int | None) -> list[ImageState]:
        """The images to certify, on the device of the classifier, without any votes. `limits` are their numbers."""
        pixels, labels, indices = read_split(
            self.images, self.config.data.image_size, self.config.certify.every, *limits
        )
        pixels = to_unit_range(pixels.to(self.smoothed.device))
        return [ImageState(*each) for each in zip(indices, pixels, labels.tolist(), strict=True)]

    def describe_time(self, seconds: float, samples: int) -> dict[str, object]:
        """The entries of a file of timings: what the samples have cost, and where."""
        return {
            "seconds": seconds,
            "samples": samples,
            "samples_per_second": samples / seconds,
            "batch_size": self.batch_size,
            "dtype": precision_of(self.smoothed),
            "processes": self.queue.world_size,
            "environment": describe_environment(self.smoothed.device),
        }

    def describe_votes(self, states: Sequence[State]) -> dict[str, object]:
        """`describe_time` of the votes for all images."""
        return self.describe_time(sum(state.seconds for state in states), sum(state.samples for state in states))

    def record_entries(self, max_images: int | None) -> dict[str, object]:
        """The entries of the record of certificates that follow from the settings and the split."""
        settings = self.config.certify
        limits = [settings.max_images, max_images]
        data = {"sha256": self.inputs["shards"], "split": "test", "every": settings.every, "max_images": limits}
        size = self.config.data.image_size
        network = {"compile": settings.compile} | runtime_entries(self.scales)
        return {"data": data, "image_size": size, "labelled": True} | network | settings.rule


def open_split(config: Config, sigma: float, shard_folder: Path | str, split: str, model_folder: Path) -> SplitVoter:
    """Load the classifier in `model_folder` to vote on a split of `shard_folder`, with the settings of `certify`.

    Finds the processes that torchrun started. Raises `RRCMError` for missing or damaged inputs.
    """
    env, (images,) = open_images(config, shard_folder, split)
    classifier = load_model_folder(model_folder, sigma=sigma).classifier
    smoothed = make_smoothed_classifier(classifier.to(env.device), sigma, config)
    batch_size = smoothed.find_batch_size(torch.zeros(images.channels, config.data.image_size, config.data.image_size))
    inputs = {"shards": images.fingerprint, "model": sha256_folder(model_folder)}
    return SplitVoter(config, images, [smoothed], batch_size, WorkQueue(env, "images"), inputs)


def open_images(config: Config, shard_folder: Path | str, *splits: str) -> tuple[DistEnv, list[ShardedDataset]]:
    """Connect to the processes that torchrun started, and open splits whose shards they check together."""
    set_threads(config.threads)
    env, images = connect(config.device), [ShardedDataset(shard_folder, split) for split in splits]
    verify_shards(images, env)
    return env, images


def make_smoothed_classifier(classifier: nn.Module, sigma: float, config: Config, **options: int) -> SmoothedClassifier:
    """`classifier` smoothed with the settings of `certify`, and with further `options` of `SmoothedClassifier`."""
    return SmoothedClassifier(classifier, sigma, classifier.num_classes, **smoothing_options(config), **options)


def smoothing_options(config: Config) -> dict[str, object]:
    """The options of a `SmoothedClassifier` that the settings decide."""
    settings = {name: getattr(config.certify, name) for name in ("batch_size", "compile")}
    return {"seed": config.seed, "precision": config.certify.torch_precision} | settings


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
    """Certify every k-th test image and write `output` (TSV in the format of Cohen et al.), OUTPUT.samples.tsv with
    the votes, and OUTPUT.json with everything that decided them.

    `max_images` limits the number of images further. The column `time` is 0, because the true seconds differ from run
    to run; they are in `timing` (JSON). Under torchrun all processes share the images. A killed run continues from the
    last samples it counted, on any number of processes. Raises `RRCMError` for missing or damaged inputs.
    """
    voter, settings = open_split(config, sigma, shard_folder, "test", model_folder).in_runtime(), config.certify
    rule, smoothed = make_stopping_rule(sigma=sigma, **settings.rule), voter.smoothed
    states = voter.read_states(settings.max_images, max_images)
    decides = settings.model_dump(mode="json", exclude={"every", "max_images"})  # these only choose the images
    run = voter.run_state(f"certify-{sigma}", decides, __name__, rule)
    finish_states(
        states,
        partial(smoothed.certify_stream, rule=rule),
        run,
        partial(is_possible_state, rule=rule, num_classes=smoothed.num_classes),
        voter.queue,
        f"certify {model_folder}",
    )
    if voter.queue.rank == 0:
        tables = certificate_tables(output, certificate_frame(states, rule, smoothed.num_classes))
        record = _describe_certificates(voter, tables, read_model_config(model_folder)["kind"], max_images)
        written = {record_path(output): record, timing: json_bytes(describe_states(voter, states))}
        write_together(tables | written)
        run.finish()


def _describe_certificates(voter: SplitVoter, tables: dict[Path, bytes], kind: str, max_images: int | None) -> bytes:
    """The record of the certificate tables, for a model folder of this kind."""
    model = {"kind": kind, "sha256": voter.inputs["model"]}
    return record_bytes(
        make_record(voter.smoothed, voter.batch_size, tables, model=model, **voter.record_entries(max_images))
    )


def describe_states(voter: SplitVoter, states: Sequence[State]) -> dict[str, object]:
    """The entries of a file of timings: the cost of each image and of all images together."""
    return voter.describe_votes(states) | {"seconds_by_image": {str(state.index): state.seconds for state in states}}
