"""Let the published models vote again on the published images with the noise of the published certificates.

A smoothed classifier is treated as a cascade of one sigma.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from rrcm.certification import cascade_votes
from rrcm.certification.certify_images import (
    device_named,
    files_path,
    identify_model,
    read_square,
    sha256_images,
    sha256_pixels,
)
from rrcm.certification.noise import ESTIMATE, SELECT
from rrcm.certification.quantization import Calibration, read_calibration
from rrcm.certification.record import CascadeRecord, CertificateRecord, record_path
from rrcm.certification.runtimes import in_runtime, precision_of, runtime_entries, runtime_of
from rrcm.certification.smoothing import BATCHES_PER_SYNC, SampleRequest, SmoothedClassifier
from rrcm.certification.states import Votes
from rrcm.certification.votes import parse_selection, parse_votes
from rrcm.data.shards import ShardedDataset, choose_rows, read_pixels
from rrcm.models.load import LoadedClassifier
from rrcm.models.own_code import load_named_cascade, load_named_classifier
from rrcm.utils.distributed import set_threads
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.provenance import Environment, describe_environment


@dataclass(frozen=True)
class Inputs:
    """The models and the images of a certificate file."""

    scales: list[LoadedClassifier]  # by increasing sigma
    images: ShardedDataset | dict[int, Path]  # a split, or picture files by `idx`

    def pixels(self, indices: Sequence[int]) -> torch.Tensor:
        """The images with these `idx`: (N, C, H, W) float32 in [0, 1]."""
        loaded = self.scales[0]
        if isinstance(self.images, ShardedDataset):
            pixels = read_pixels(self.images, loaded.image_size, indices)
        else:
            pixels = torch.stack([torch.from_numpy(read_square(self.images[i], loaded).copy()) for i in indices])
        return to_unit_range(pixels)


class Settings(NamedTuple):
    """How to vote again. None means as published."""

    precision: str | None = None  # fp32 or bf16
    batch_size: int | None = None
    threads: int | None = None
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    runtime: str = "torch"  # an audit votes with torch, whichever runtime made the certificates


AS_PUBLISHED = Settings()


class RowVotes(NamedTuple):
    """The votes for an image at one sigma: the published ones, or the ones that were counted again."""

    idx: int
    selection: Votes
    votes: dict[str, Votes]  # by the number of samples
    scale: int = 0  # 0 for the smallest sigma


def load_inputs(
    path: Path,
    record: CertificateRecord | CascadeRecord,
    frame: pd.DataFrame,
    models: Path | str | Sequence[Path | str],
    images: Path,
    weights: Path | None = None,
) -> tuple[Inputs, list[str]]:
    """The models and the images of the certificates in `path`, and the problems if they are not the certified ones.

    `models` has one path, or one for each sigma, as the record does. `images` is a folder of shards if a split was
    certified, and otherwise the folder of pictures. `weights` are as for `load_named_classifier`. Raises `RRCMError`
    for missing or damaged inputs, for another number of models, and for `weights` given with a cascade.
    """
    models = [models] if isinstance(models, Path | str) else list(models)
    if len(models) != len(record.models):
        raise RRCMError(f"{path}: was certified with {len(record.models)} models, {len(models)} are given; give each")
    scales, can_pass = _load_scales(models, record.sigmas, weights)
    problems = []
    for model, loaded, published in zip(models, scales, record.models, strict=False):
        if identify_model(str(model), loaded)["sha256"] != published.sha256:
            problems.append(f"{model}: is not the model that was certified")
    if not problems and can_pass != (record.num_outputs[-1] > record.num_classes):
        problems.append(f"{record_path(path)}: can_pass is {not can_pass}, by the model it is {can_pass}")
    if record.data.split is None:
        files, content = _read_files(path, images, scales[0])
        if content != record.data.sha256:
            problems.append(f"{images}: its images are not those that were certified")
        return Inputs(scales, files), problems
    split = ShardedDataset(images, record.data.split)
    problems += filter(None, map(split.complaint, split.split.shards))
    if split.fingerprint != record.data.sha256:
        problems.append(f"{images}: its images are not those that were certified")
    elif frame["idx"].tolist() != choose_rows(len(split), record.data.every, *record.data.max_images):
        problems.append(f"{path}: has other images than every = {record.data.every} and the limits choose")
    elif frame["label"].tolist() != split.labels[frame["idx"]].tolist():
        problems.append(f"{path}: has other labels than {images}")
    return Inputs(scales, split), problems


def _load_scales(
    models: Sequence[Path | str], sigmas: Sequence[float], weights: Path | None
) -> tuple[list[LoadedClassifier], bool]:
    """The base classifiers at the sigmas of the record, and whether all but the first can pass."""
    if len(sigmas) == 1:
        return [load_named_classifier(models[0], sigma=sigmas[0], weights=weights, outside_range=True)], False
    if weights is not None:
        raise RRCMError(f"{weights}: weights are not for a cascade; leave them out")
    scales, _, can_pass = load_named_cascade(models, sigmas, outside_range=True)
    return scales, can_pass


def _read_files(path: Path, folder: Path, loaded: LoadedClassifier) -> tuple[dict[int, Path], str]:
    """The picture files by `idx`, and a hash of their pixels."""
    try:
        rows = pd.read_csv(files_path(path), sep="\t", dtype={"idx": int, "file": str}, keep_default_na=False)
        files = {idx: folder / file for idx, file in zip(rows["idx"], rows["file"], strict=True)}
    except (OSError, ValueError, KeyError) as error:
        raise RRCMError(f"{files_path(path)}: cannot be read ({one_line(error)}); certify again") from None
    return files, sha256_images(sha256_pixels(read_square(file, loaded)) for file in files.values())


def smooth_again(
    record: CertificateRecord | CascadeRecord, inputs: Inputs, settings: Settings = AS_PUBLISHED
) -> list[SmoothedClassifier]:
    """The smoothed classifier of a record at each sigma, on this machine. Sets the number of threads of this process.

    A CPU without instructions for bfloat16 gives the same results in bfloat16, but about ten times more slowly.
    Networks in int8 are quantized again, and must be the ones that were certified. Raises `RRCMError` where they are
    not, and where the runtime of the settings cannot run the networks.
    """
    calibration = None if record.quantized is None else _calibrate_again(record, inputs, settings)
    set_threads(settings.threads or record.environment.hardware.threads)
    scales = [
        SmoothedClassifier(
            loaded.classifier.to(device_named(settings.device)),
            sigma,
            num_outputs,
            seed=record.seed,
            batch_size=settings.batch_size or record.batch_size,
            precision="fp32" if calibration else settings.precision or record.precision,
            compile=record.compile,
        )
        for loaded, sigma, num_outputs in zip(inputs.scales, record.sigmas, record.num_outputs, strict=True)
    ]
    loaded = inputs.scales[0]
    runtime = "openvino" if calibration else settings.runtime
    image = torch.zeros(loaded.channels, loaded.image_size, loaded.image_size)
    scales, note = in_runtime(runtime, scales, image, calibration)
    if record.quantized is not None:
        _check_quantized(record, scales, note)
    if runtime != "torch" and runtime_of(scales[0]) is None:
        raise RRCMError(f"the certificates are by {record.runtime}, which does not run here ({note})")
    return scales


def _calibrate_again(record: CertificateRecord | CascadeRecord, inputs: Inputs, settings: Settings) -> Calibration:
    """What networks in int8 were calibrated on. Raises `RRCMError` where that is not here, or not wanted."""
    if settings.precision not in (None, "int8"):
        raise RRCMError(f"precision = {settings.precision}: in int8 another network was certified; leave it out")
    try:
        if not isinstance(inputs.images, ShardedDataset):
            raise RRCMError("a folder of pictures has none")
        return read_calibration(inputs.images.root, inputs.scales[0].image_size, record.seed)
    except RRCMError as error:
        raise RRCMError(f"the networks in int8 cannot be quantized again without validation images ({error})") from None


def _check_quantized(
    record: CertificateRecord | CascadeRecord, scales: Sequence[SmoothedClassifier], note: str | None
) -> None:
    """Raise `RRCMError` unless the networks in int8 are those of the record. `note` is that of `in_runtime`."""
    if precision_of(scales[0]) != "int8":
        raise RRCMError(f"the certificates are in int8, which does not run here ({note})")
    here = runtime_entries(scales)
    if here["quantized"]["sha256"] != record.quantized.sha256:
        made = f"{record.quantized.by} and {record.runtime} on {record.environment.hardware.cpu}"
        raise RRCMError(
            f"the networks in int8 have other ranges or weights here than those of {made}, so they cannot vote for "
            "them; audit there, or copy its folders runs/int8-* here"
        )


def same_computation(record: CertificateRecord | CascadeRecord, smoothed: SmoothedClassifier) -> bool:
    """Whether `smoothed` computes on this machine exactly as the certified one did, so that every vote is the same."""
    there, here = record.environment, Environment.model_validate(describe_environment(smoothed.device))
    names = ("cpu", "instructions", "gpus", "threads")
    return (
        record.runtime == runtime_of(smoothed)
        and all(getattr(there.hardware, name) == getattr(here.hardware, name) for name in names)
        and there.software.packages.get("torch") == here.software.packages.get("torch")
        and (record.precision, record.batch_size) == (precision_of(smoothed), smoothed.batch_size)
    )


def published_votes(frame: pd.DataFrame, record: CertificateRecord | CascadeRecord) -> list[RowVotes]:
    """The votes in a frame with `idx`, `selection` and `votes`: first of all rows at one sigma, then at the next."""
    columns = frame["idx"], frame["selection"], frame["votes"]
    if isinstance(record, CertificateRecord):
        return [RowVotes(idx, parse_selection(a), parse_votes(b)) for idx, a, b in zip(*columns, strict=True)]
    rows = []
    for idx, a, b in zip(*columns, strict=True):
        looks = cascade_votes.parse_votes(b, record.sigmas)
        for k, selection in enumerate(cascade_votes.parse_selection(a, record.sigmas)):
            if selection:
                votes = {str(drawn): counts for scale, drawn, counts in looks if scale == k}
                rows.append(RowVotes(idx, selection, votes, k))
    return sorted(rows, key=attrgetter("scale"))


def vote_again(
    scales: Sequence[SmoothedClassifier], inputs: Inputs, rows: Sequence[RowVotes]
) -> Iterator[list[RowVotes]]:
    """Count the votes of the published `rows` again, for the selection and for each published look.

    Yields them in groups of rows at the same sigma that fill some batches. The votes do not depend on the grouping.
    """
    for scale, at_sigma in groupby(rows, attrgetter("scale")):
        room, group, waiting = BATCHES_PER_SYNC * scales[scale].batch_size, [], 0
        for row in at_sigma:
            group.append(row)
            waiting += sum(row.selection.values()) + max(map(int, row.votes), default=0)
            if waiting >= room:
                yield _vote_on_group(scales[scale], inputs, group)
                group, waiting = [], 0
        if group:
            yield _vote_on_group(scales[scale], inputs, group)


def _vote_on_group(smoothed: SmoothedClassifier, inputs: Inputs, group: Sequence[RowVotes]) -> list[RowVotes]:
    requests = []
    for row, image in zip(group, inputs.pixels([row.idx for row in group]), strict=True):
        requests.append(SampleRequest(image, row.idx, SELECT, 0, sum(row.selection.values())))
        looks = [0, *map(int, row.votes)]
        requests += [SampleRequest(image, row.idx, ESTIMATE, *part) for part in pairwise(looks)]
    counts, again = iter(smoothed.count_votes(requests)), []
    for row in group:
        selection, total = _by_class(next(counts)), np.zeros(smoothed.num_classes, np.int64)
        votes = {}
        for drawn in row.votes:
            total = total + next(counts)
            votes[drawn] = _by_class(total)
        again.append(row._replace(selection=selection, votes=votes))
    return again


def vote_singly(smoothed: SmoothedClassifier, inputs: Inputs, indices: Sequence[int], samples: int) -> np.ndarray:
    """The class of each of the first `samples` estimation samples of each image: (len(indices), samples) int64."""
    pixels = zip(indices, inputs.pixels(indices), strict=True)
    requests = [SampleRequest(image, index, ESTIMATE, k, k + 1) for index, image in pixels for k in range(samples)]
    size = smoothed.batch_size
    classes = [smoothed.count_votes(requests[k : k + size]).argmax(1) for k in range(0, len(requests), size)]
    return np.concatenate(classes).reshape(len(indices), samples)


def _by_class(counts: np.ndarray) -> Votes:
    return {str(k): int(counts[k]) for k in np.flatnonzero(counts)}
