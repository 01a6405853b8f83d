"""Torch and OpenVINO as runtimes of certification: samples per second, and how many votes differ.

Both vote alternately with the same noise, on one thread, and the table has medians over the rounds. A sample's time
includes its noise. On a busy machine, use --cpu-time to count only the CPU time of this process. The flips are per
million votes, against torch in fp32.

    python benchmarks/runtimes.py models/rrcm_joint/joint data/shards --sigma 0.5
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
from rrcm.certification.runtimes import in_runtime
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import native_precision
from rrcm.utils.provenance import describe_environment

SECONDS = 1.0  # of each runtime in each round, at least one batch


def measure(
    model: Path,
    shards: Path,
    sigma: float | None = None,
    images: int = 20,
    votes: int = 1_000_000,
    rounds: int = 7,
    cpu_time: bool = False,
) -> None:
    """Compare the runtimes of a classifier on test images. `votes` 0: no flips."""
    keep_freed_memory()
    torch.set_num_threads(1)
    classifier = load_model_folder(model, sigma=sigma).classifier
    split, size = ShardedDataset(shards, "test"), classifier.encoder.image_size
    pixels, _, indices = read_split(split, size, len(split) // images, images)
    pixels = pixels.float() / 255
    named = smoothed_by_name(classifier, pixels[0])
    rates = time_rounds(named, pixels, rounds, process_time if cpu_time else perf_counter)
    print(f"{model}, {describe_environment('cpu')['hardware']['cpu']}, batch {named['torch, fp32'].batch_size}\n")
    first, rows = classes(named["torch, fp32"], pixels, indices, votes // images), []
    for name, smoothed in named.items():
        other = first if name == "torch, fp32" else classes(smoothed, pixels, indices, votes // images)
        flips = f"{1e6 * (other != first).mean():,.0f}" if votes else ""
        ratio = median(a / b for a, b in zip(rates[name], rates["torch, fp32"], strict=True))
        spread = f"{median(rates[name]):,.0f} ({min(rates[name]):,.0f}-{max(rates[name]):,.0f})"
        rows.append([name, spread, f"{ratio:.2f}", flips])
    print(tabulate(rows, ["runtime", "samples/s", "of torch, fp32", "flips per million"], tablefmt="github"))


def smoothed_by_name(classifier: torch.nn.Module, image: torch.Tensor) -> dict[str, SmoothedClassifier]:
    """The classifier in each precision of this CPU and in each runtime, all in batches of one size."""
    named, size = {}, None
    for precision in dict.fromkeys(("fp32", native_precision(torch.device("cpu")))):
        options = {"precision": precision, "batch_size": size}
        smoothed = SmoothedClassifier(classifier, classifier.sigma, classifier.num_classes, **options)
        smoothed.batch_size = size = smoothed.find_batch_size(image)
        (other,), note = in_runtime("openvino", [smoothed], image)
        print(note)
        named[f"torch, {precision}"] = smoothed
        if other is not smoothed:
            named[f"openvino, {precision}"] = other
    return named


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
    """The classes of the first `each` samples of each image: (len(pixels) * each,) int64."""
    answers = []
    for image, index in zip(pixels, indices, strict=True):
        for first in range(0, each, smoothed.batch_size):
            samples = range(first, min(each, first + smoothed.batch_size))
            requests = [SampleRequest(image, index, ESTIMATE, k, k + 1) for k in samples]
            answers.append(smoothed.count_votes(requests).argmax(1))
    return np.concatenate(answers) if answers else np.zeros(0, np.int64)


if __name__ == "__main__":
    typer.run(measure)
