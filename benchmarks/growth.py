"""How the CPU seconds and the peak memory of certification grow with n, images, classes and processes.

The network is as cheap as a network can be: the logit of a class is a noisy pixel. So noise, counting, looks, journals
and the table of certificates are what is measured. Each point is a fork that certifies as the stage `certify` does;
several processes find each other as those of torchrun do. Seconds are of CPU, of all processes together, and medians
over the rounds. An exponent is the slope of log seconds from the point before, over the log of what grows; for n it is
over the log of the samples, which a sequential rule saves.

    python benchmarks/growth.py
"""

import multiprocessing
import os
import resource
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification.driver import finish_states
from rrcm.certification.journal import is_possible_state
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.states import ImageState
from rrcm.certification.votes import certificate_frame
from rrcm.utils.distributed import WorkQueue, connect
from rrcm.utils.errors import RRCMError
from rrcm.utils.resume import RunState

SIGMA, SIDE = 0.5, 4  # pixels


@dataclass(frozen=True)
class Point:
    """What is certified."""

    images: int = 100
    n: int = 1000
    stopping: str = "fixed"
    classes: int = 10
    processes: int = 1


BASE = Point()
MANY = 10_000  # classes
POINTS = {  # what grows, a field of `Point` before any comma
    "n": [replace(BASE, images=10, n=n) for n in (1_000, 10_000, 100_000)],
    "n, sequential": [replace(BASE, images=10, n=n, stopping="sequential") for n in (1_000, 10_000, 100_000)],
    "images": [replace(BASE, images=images) for images in (10, 100, 1_000)],
    "classes": [replace(BASE, classes=classes) for classes in (10, 100, 1_000, MANY)],
    "processes": [replace(BASE, images=400, processes=processes) for processes in (1, 2)],
    f"processes, {MANY:,} classes": [
        replace(BASE, stopping="sequential", classes=MANY, processes=processes) for processes in (1, 2)
    ],
}


class Pixels(nn.Module):
    """Logits (B, classes) that repeat the pixels of noisy images (B, 1, SIDE, SIDE)."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        pixels = noisy.flatten(1)
        return pixels.repeat(1, -(-self.classes // pixels.shape[1]))[:, : self.classes].contiguous()


def draw_images(count: int) -> torch.Tensor:
    """Black images with one bright pixel of some brightness: (count, 1, SIDE, SIDE)."""
    rng, images = np.random.default_rng(0), np.zeros((count, SIDE * SIDE), np.float32)
    images[np.arange(count), rng.integers(0, 10, count)] = rng.uniform(0.5, 1, count)
    return torch.from_numpy(images.reshape(count, 1, SIDE, SIDE))


def certify(point: Point, folder: Path) -> tuple[float, float, int]:
    """CPU seconds, peak MiB and samples of this process for the certificates of a point, with journals in `folder`."""
    start, smoothed = process_time(), SmoothedClassifier(Pixels(point.classes), SIGMA, point.classes)
    rule = make_stopping_rule(point.stopping, SIGMA, n0=100, n=point.n, alpha=0.001, radius_step=0.05)
    states = [ImageState(i, image) for i, image in enumerate(draw_images(point.images))]
    queue = WorkQueue(connect("cpu"), "images")
    stream = partial(smoothed.certify_stream, rule=rule)
    is_possible = partial(is_possible_state, rule=rule, num_classes=point.classes)
    finish_states(states, stream, RunState("growth", "run", folder), is_possible, queue, "certify")
    samples = 0
    if queue.rank == 0:
        samples = int(certificate_frame(states, rule, point.classes)["samples"].sum())
    return process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, samples


def certify_apart(point: Point) -> tuple[float, float, int]:
    """`certify` in processes of its own: the seconds of all, the memory of the largest, and all samples."""
    context, results = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        for rank in range(point.processes):
            environment = place | {"WORLD_SIZE": str(point.processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, environment, point, Path(folder)))
            process.start()
            sender.close()
            results.append(receiver)
        try:
            seconds, memory, samples = zip(*[each.recv() for each in results], strict=True)
        except EOFError:
            raise RRCMError(f"{point}: a process died; its error is above") from None
    return sum(seconds), max(memory), sum(samples)


def _send(sender: Connection, environment: dict[str, str], point: Point, folder: Path) -> None:
    os.environ.update(environment)
    sender.send(certify(point, folder))


def exponents(seconds: list[float], amounts: list[float]) -> Iterator[str]:
    """The slope of log seconds over log amounts between each point and the one before, "" for the first."""
    yield ""
    for (before, now), (less, more) in zip(pairwise(seconds), pairwise(amounts), strict=True):
        yield f"{np.log(now / before) / np.log(more / less):.2f}"


def main(rounds: int = 3) -> None:
    """Print the table."""
    keep_freed_memory()
    torch.set_num_threads(1)
    measured = {(name, point): [] for name, points in POINTS.items() for point in points}
    for _ in range(rounds):
        for (_, point), results in measured.items():
            results.append(certify_apart(point))
    rows = []
    for name, group in groupby(measured.items(), key=lambda item: item[0][0]):
        points = [(point, *map(median, zip(*results, strict=True))) for (_, point), results in group]
        amounts = [getattr(point, name.partition(",")[0]) for point, *_ in points]
        seconds, memory, samples = ([row[k] for row in points] for k in (1, 2, 3))
        of_what = samples if name.startswith("n") else amounts
        for row in zip(amounts, samples, seconds, exponents(seconds, of_what), memory, strict=True):
            amount, drawn, each, exponent, mib = row
            per_million = 1e6 * each / drawn
            cells = [f"{amount:,}", f"{drawn:,.0f}", f"{each:.2f}", f"{per_million:.1f}", exponent]
            rows.append([name, *cells, f"{mib:.0f}", f"{mib / memory[0]:.2f}"])
    head = ["what grows", "to", "samples", "CPU s", "per million samples", "exponent", "peak MiB", "of the first"]
    print(tabulate(rows, head, "github", disable_numparse=True))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
