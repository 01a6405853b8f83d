"""Certify a classifier on the test split: on one process or many, which share the images through torchrun's store.

What happens to an image depends on it alone (smoothing.py), so any number of processes, in any order, killed and
started again, writes the same bytes. Every process appends what it has counted to a journal of its own.
"""

import contextlib
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import pandas as pd
import torch.distributed as dist

from rrcm.certification import noise, smoothing
from rrcm.certification import stopping as stopping
from rrcm.certification.results import COLUMNS, write_certificates, write_samples
from rrcm.certification.smoothing import ImageState, SmoothedClassifier, certificate
from rrcm.certification.stopping import Procedure, make_stopping_rule
from rrcm.config import Config
from rrcm.data import shards
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models import vit as model
from rrcm.models.base_classifiers import Classifier
from rrcm.models.checkpoints import load_classifier
from rrcm.utils import rng
from rrcm.utils.distributed import pick_device
from rrcm.utils.files import sha256_file, write_json
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import environment
from rrcm.utils.resume import RunState, fingerprint


class Team:
    """The processes that torchrun started, on one node or several, or this one alone; they share a list of images."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._store = next(dist.rendezvous("env://"))[0] if self.world_size > 1 else dist.HashStore()

    def take(self) -> int:
        """The place of the next image in the list: no two processes get the same."""
        return self._store.add("taken", 1) - 1

    def finished(self, more: int = 0) -> int:
        """How many images all processes have finished, after this one finished `more`."""
        return self._store.add("finished", more)

    def start(self) -> None:
        """Called by the first process when the others may go on, and by those to wait for it."""
        if self.rank == 0:
            self._store.set("started", "")
        self._store.wait(["started"], timedelta(hours=1))

    def end(self) -> Iterator[None]:
        """This process is done. The first one waits for the others and yields now and then; should one of them die,
        torchrun ends this one too."""
        self._store.set(f"ended {self.rank}", "")
        for rank in range(self.world_size if self.rank == 0 else 0):
            while not self._store.check([f"ended {rank}"]):
                yield
                with contextlib.suppress(RuntimeError):  # not yet
                    self._store.wait([f"ended {rank}"], timedelta(seconds=5))


def certify_split(
    config: Config, sigma: float, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path
) -> None:
    """Certify every k-th test image and write `output` in the field's format (time 0: it would differ from run to run),
    beside it OUTPUT.samples.tsv with the samples used and why sampling stopped; `timing` (JSON) has the true seconds.

    Under torchrun all processes share the images. A killed run continues after the last samples it counted, on any
    number of processes.
    """
    settings, device, team = config.certify, pick_device(config.device), Team()
    images = ShardedDataset(shard_folder, "test")
    if team.rank == 0:
        images.verify()
    smoothed = smooth(load_classifier(model_folder).to(device), sigma, config)
    numbers = {name: getattr(settings, name) for name in ("n0", "n", "alpha", "radius_step")}
    plan = make_stopping_rule(settings.stopping, sigma, **numbers)
    pixels, labels, indices = read_split(images, config.data.image_size, settings.every, settings.max_images)
    pixels = pixels.to(device).float() / 255
    candidates = [ImageState(*each) for each in zip(indices, pixels, labels.tolist(), strict=True)]

    inputs = {
        "shards": images.fingerprint,
        "model": sha256_file(model_folder / "model.safetensors"),
        "network": sha256_file(model_folder / "config.json"),
    }
    batch_size = smoothed.find_batch_size(pixels[0])
    described = [settings.model_dump(mode="json"), config.seed, config.data.image_size, sigma, device.type]
    described += [batch_size, smoothed.precision]
    run = RunState(f"certify-{sigma}", fingerprint(described, inputs, __name__))
    if team.rank == 0:
        run.lock()
    team.start()
    _count_votes(smoothed, candidates, plan, team, run.folder, f"certify {model_folder}")
    if team.rank > 0:
        return

    _restore(candidates, run.folder)  # what the other processes did
    frame = _frame(candidates, plan)
    write_certificates(output, frame)
    write_samples(output.with_suffix(".samples.tsv"), frame)
    seconds, samples = sum(c.seconds for c in candidates), sum(c.samples for c in candidates)
    write_json(
        timing,
        {
            "seconds": seconds,
            "samples": samples,
            "samples_per_second": samples / seconds,
            "batch_size": batch_size,
            "dtype": smoothed.precision,
            "processes": team.world_size,
            "seconds_by_image": {str(candidate.index): candidate.seconds for candidate in candidates},
            "environment": environment(device),
        },
    )
    run.finish()


def smooth(network: Classifier, sigma: float, config: Config, **options: int) -> SmoothedClassifier:
    """The smoothed classifier that the settings certify, with further `options` of it."""
    settings = {name: getattr(config.certify, name) for name in ("batch_size", "memory_gib", "precision", "compile")}
    return SmoothedClassifier(network, sigma, network.head.out_features, seed=config.seed, **settings, **options)


def _count_votes(
    smoothed: SmoothedClassifier, candidates: list[ImageState], plan: Procedure, team: Team, folder: Path, label: str
) -> None:
    """Certify this process's share of the candidates, after what the journals in `folder` say was done before."""
    _restore(candidates, folder)
    done = sum(candidate.stopped != "" for candidate in candidates)
    before, start = sum(candidate.samples for candidate in candidates), time.monotonic()

    def share() -> Iterator[ImageState]:
        while (place := team.take()) < len(candidates):
            yield candidates[place]

    at_once = None if team.world_size == 1 else max(8, len(candidates) // (4 * team.world_size))
    with (
        Progress(len(candidates), label, "images", done=done, quiet=team.rank > 0) as progress,
        (folder / f"journal-{team.rank}.txt").open("a", encoding="utf-8") as journal,
    ):
        journal.write("\n")  # ends the half line that a killed process may have left
        for moved in smoothed.run(share(), plan, at_once=at_once):
            _append(journal, moved)
            finished = done + team.finished(sum(candidate.stopped != "" for candidate in moved))
            rate = (sum(candidate.samples for candidate in candidates) - before) / (time.monotonic() - start)
            progress.update(finished - progress.done, samples=f"{rate:,.0f}/s")
        journal.close()  # before the others are told: on a network file system they see it now
        for _ in team.end():
            progress.update(done + team.finished() - progress.done)
        progress.update(done + team.finished() - progress.done)


def _append(journal: TextIO, candidates: Iterable[ImageState]) -> None:
    """A line a candidate: checksum and state."""
    for candidate in candidates:
        state = {name: value for name, value in vars(candidate).items() if name != "image"}
        text = json.dumps(state)
        journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
    journal.flush()
    os.fsync(journal.fileno())


def _restore(candidates: Iterable[ImageState], folder: Path) -> None:
    """Put candidates into the furthest state that any process's journal has of them. Half-written and damaged lines
    count for nothing: what they would say is drawn again."""
    by_index = {candidate.index: candidate for candidate in candidates}
    for path in sorted(folder.glob("journal-*.txt")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, _, text = line.partition(" ")
            if checksum != f"{zlib.crc32(text.encode()):08x}":
                continue
            state = json.loads(text)
            candidate = by_index[state["index"]]
            if state["samples"] > candidate.samples:
                vars(candidate).update(state)


def _frame(candidates: Iterable[ImageState], plan: Procedure) -> pd.DataFrame:
    rows = []
    for candidate in candidates:
        answer = certificate(candidate, plan)
        correct = int(answer.predict == candidate.label)
        rows.append((candidate.index, candidate.label, answer.predict, answer.radius, correct, 0, *astuple(answer)[2:]))
    return pd.DataFrame(rows, columns=[*COLUMNS, "samples", "stopped"])
