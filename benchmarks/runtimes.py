"""Torch and OpenVINO as runtimes of certification: samples per second, votes that differ, and certificates.

All vote alternately with the same noise, on one thread, and the table has medians over the rounds. A sample's time
includes its noise. On a busy machine, use --cpu-time to count only the CPU time of this process. The flips are per
million votes, against torch in fp32. The certificates are of all test images, or of as many as --certify says.
Torch in bf16 is not timed on a CPU without its instructions, and has a twentieth of the votes and no certificates.

    python benchmarks/runtimes.py models/rrcm_joint/joint data/shards --sigma 0.5 --certify 120
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np
import torch
import typer
from tabulate import tabulate

from rrcm.utils.app import keep_freed_memory
from rrcm.certification.noise import ESTIMATE
from rrcm.certification.packing import SampleRequest
from rrcm.certification.quantization import Calibration, read_calibration
from rrcm.certification.runtimes import in_runtime, precision_of
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import native_precision
from rrcm.utils.provenance import describe_environment

SECONDS = 1.0  # of each runtime in each round, at least one batch
FIRST = "torch, fp32"  # what the others are compared with
EMULATED = "torch, bf16 (emulated)"  # on a CPU without its instructions
RULE = {"n0": 100, "n": 1000, "alpha": 0.001, "radius_step": 0.01}  # of the certificates, as for the published digits


def measure(
    model: Path,
    shards: Path,
    sigma: float | None = None,
    images: int = 20,
    votes: int = 1_000_000,
    rounds: int = 7,
    cpu_time: bool = False,
    certify: int = 0,
) -> None:
    """Compare the runtimes of a classifier on test images. `votes` 0: no flips."""
    keep_freed_memory()
    torch.set_num_threads(1)
    classifier = load_model_folder(model, sigma=sigma).classifier
    split, size = ShardedDataset(shards, "test"), classifier.encoder.image_size
    pixels, _, indices = read_split(split, size, len(split) // images, images)
    pixels = pixels.float() / 255
    named = smoothed_by_name(classifier, pixels[0], read_calibration(shards, size, 0))
    timed = {name: each for name, each in named.items() if name != EMULATED}
    rates = time_rounds(timed, pixels, rounds, process_time if cpu_time else perf_counter)
    print(f"{model}, {describe_environment('cpu')['hardware']['cpu']}, batch {named[FIRST].batch_size}\n")
    first, rows = classes(named[FIRST], pixels, indices, votes // images), []
    for name, smoothed in named.items():
        each = votes // images // (20 if name == EMULATED else 1)
        other = first[:, :each] if name == FIRST else classes(smoothed, pixels, indices, each)
        flips = [f"{each * images:,}", f"{1e6 * (other != first[:, :each]).mean():,.0f}"] if votes else ["", ""]
        speed = ["", ""]
        if name in timed:
            ratio = median(a / b for a, b in zip(rates[name], rates[FIRST], strict=True))
            spread = f"{median(rates[name]):,.0f} ({min(rates[name]):,.0f}-{max(rates[name]):,.0f})"
            speed = [spread, f"{ratio:.2f}"]
        rows.append([name, *speed, *flips])
    names = ["runtime", "samples/s", "of torch, fp32", "votes", "flips per million"]
    print(tabulate(rows, names, tablefmt="github"), flush=True)
    if certify:
        print("\n" + compare_certificates(timed, split, size, certify))


def smoothed_by_name(
    classifier: torch.nn.Module, image: torch.Tensor, calibration: Calibration
) -> dict[str, SmoothedClassifier]:
    """The classifier in each precision and in each runtime, all in batches of one size."""
    named, size = {}, None
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "batch_size": size}
        smoothed = SmoothedClassifier(classifier, classifier.sigma, classifier.num_classes, **options)
        smoothed.batch_size = size = smoothed.find_batch_size(image)
        native = precision in ("fp32", native_precision(torch.device("cpu")))
        named[f"torch, {precision}" if native else EMULATED] = smoothed
        for quantized in (None, calibration) if precision == "fp32" else (None,):
            (other,), note = in_runtime("openvino", [smoothed], image, quantized)
            print(note, flush=True)
            if other is not smoothed:
                named[f"openvino, {precision_of(other)}"] = other
    return named


def compare_certificates(named: dict[str, SmoothedClassifier], split: ShardedDataset, size: int, limit: int) -> str:
    """A table of the certificates of test images by each runtime, with the same noise."""
    pixels, labels, indices = read_split(split, size, len(split) // limit, limit)
    rows, first = [], None
    for name, smoothed in named.items():
        found = smoothed.certify(pixels.float() / 255, labels, indices=indices, **RULE)
        first = first or found
        pairs = list(zip(found, first, strict=True))
        equal = sum((a.prediction, a.radius) == (b.prediction, b.radius) for a, b in pairs)
        close = sum(
            a.prediction == b.prediction and abs(a.radius - b.radius) < 1.5 * RULE["radius_step"] for a, b in pairs
        )
        right = [each.radius * (each.prediction == label) for each, label in zip(found, labels.tolist(), strict=True)]
        rows.append([name, len(pairs), equal, close, f"{sum(right) / len(right):.4f}"])
    return tabulate(rows, ["runtime", "images", "equal", "within one step", "ACR"], tablefmt="github")


def time_rounds(
    named: dict[str, SmoothedClassifier], pixels: torch.Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Samples per second of each in each round."""
    rates: dict[str, list[float]] = {name: [] for name in named}
    batches = dict.fromkeys(named, 1)
    for number in range(rounds + 1):
        for name, smoothed in named.items():
            samples = batches[name] * smoothed.batch_size
            start = clock()
            smoothed.count_votes([SampleRequest(pixels[0], 0, ESTIMATE, 0, samples)])
            seconds = clock() - start
            if number:
                rates[name].append(samples / seconds)
            else:  # the first one warms up
                batches[name] = max(1, round(SECONDS / seconds))
    return rates


def classes(smoothed: SmoothedClassifier, pixels: torch.Tensor, indices: list[int], each: int) -> np.ndarray:
    """The classes of the first `each` samples of each image: (len(pixels), each) int64."""
    answers = []
    for image, index in zip(pixels, indices, strict=True):
        for first in range(0, each, smoothed.batch_size):
            samples = range(first, min(each, first + smoothed.batch_size))
            requests = [SampleRequest(image, index, ESTIMATE, k, k + 1) for k in samples]
            answers.append(smoothed.count_votes(requests).argmax(1))
    return np.concatenate(answers).reshape(len(pixels), each) if answers else np.zeros((len(pixels), 0), np.int64)


if __name__ == "__main__":
    typer.run(measure)
