"""Noise on a CPU, eager and by the kernel in C: microseconds per sample, and samples per second of certification.

Both alternate in one process on one thread, with the same bits. Times are CPU time of the process, so that other work
on the machine counts little. Networks have random weights, and vote on random images in float32.

    python benchmarks/noise.py
"""

import resource
import time
from collections.abc import Callable
from math import inf
from statistics import median
from typing import Annotated
from unittest import mock

import torch
import typer
from tabulate import tabulate
from torch import nn

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification import cpu_noise
from rrcm.certification.noise import ESTIMATE, counter_normal
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.models.architectures import build_network
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.cnn import NoiseConditionedCNN
from rrcm.utils.errors import RRCMError
from rrcm.utils.provenance import describe_environment

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224)]
NUMBERS = 1 << 20  # drawn per call
SIGMA, CLASSES = 0.5, 10
HEAD = ["eager (range)", "fused (range)", "ratio"]


def networks() -> dict[str, nn.Module]:
    """The classifiers of grey images of 28 x 28 pixels: of the profiles `fashion_mnist` and `fashion_mnist_lenet`."""
    cnn = NoiseConditionedClassifier(NoiseConditionedCNN(28, 1, 7, 512), CLASSES, 2 * SIGMA)
    return {"CNN of `fashion_mnist`": cnn, "LeNet": build_network("lenet", 28, 1, CLASSES)}


def seconds_of_both(run: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """The process's seconds of `run()` with eager noise and with the kernel, in each round after one that warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for load_from, seconds in zip((inf, 0), times, strict=True):
            with mock.patch.object(cpu_noise, "LOAD_FROM", load_from):
                start = time.process_time()
                run()
                if number:
                    seconds.append(time.process_time() - start)
    return times


def cells(one: list[float], other: list[float]) -> list[str]:
    """The medians with their ranges, and the median of how many times faster the kernel is."""
    digits = 0 if median(one) >= 100 else 1
    spreads = [f"{median(each):,.{digits}f} ({min(each):,.{digits}f}-{max(each):,.{digits}f})" for each in (one, other)]
    ratio = median(a / b for a, b in zip(one, other, strict=True))
    return [*spreads, f"{max(ratio, 1 / ratio):.2f}"]


def main(
    rounds: Annotated[int, typer.Option(help="Rounds that are timed.")] = 9,
    samples: Annotated[int, typer.Option(help="Samples that a network votes on in a round.")] = 2048,
) -> None:
    """Print two tables."""
    keep_freed_memory()
    torch.set_num_threads(1)
    print_costs()
    rows = []
    for shape in SHAPES:
        count = max(1, NUMBERS // torch.Size(shape).numel())
        words = torch.arange(3 * count).view(3, count)
        times = seconds_of_both(lambda shape=shape, words=words: counter_normal(shape, 0, *words), rounds)
        rows.append(["x".join(map(str, shape)), *cells(*([1e6 * t / count for t in each] for each in times))])
    print(tabulate(rows, ["noise, µs per sample", *HEAD], tablefmt="github"), "\n")
    rows, image = [], torch.rand(1, 28, 28)
    for name, network in networks().items():
        smoothed = SmoothedClassifier(network, SIGMA, CLASSES)
        request = [SampleRequest(image, 0, ESTIMATE, 0, samples)]
        times = seconds_of_both(lambda smoothed=smoothed, request=request: smoothed.count_votes(request), rounds)
        rows.append([name, *cells(*([samples / t for t in each] for each in times))])
    print(tabulate(rows, ["certification, samples/s", *HEAD], tablefmt="github"))


def print_costs() -> None:
    """The seconds of the CPU to compile the kernel, if it is not in the cache yet, and to load it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if cpu_noise.find_kernel(compile=True) is None:
        raise RRCMError("there is no kernel to compare with")
    compiled = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    start = time.process_time()
    cpu_noise.find_kernel(compile=False)
    loaded = 1e3 * (time.process_time() - start)
    print(describe_environment("cpu")["hardware"]["cpu"])
    print(f"compiling took {compiled:.2f} s of the CPU, loading {loaded:.1f} ms\n")


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
