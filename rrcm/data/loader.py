"""The training loader.

The images of global batch k and their augmentation are a pure function of the data, the seed and k. They do not depend
on the number of processes or workers or on where a run was resumed.
"""

import errno
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rrcm.data.shards import ShardedDataset
from rrcm.utils.distributed import DistEnv
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import HINTS
from rrcm.utils.rng import numpy_rng

Transform = Callable[[Image.Image, np.random.Generator], dict[str, np.ndarray]]
Batch = dict[str, torch.Tensor]

SHUFFLE_SHARDS = 16  # samples are shuffled within groups of this many shards; a split with no more is shuffled fully
MAX_STREAMS = 64


def epoch_order(shard_sizes: list[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation of all samples, int64 (N,).

    Shards come in random order; then samples are shuffled within groups of `window` consecutive shards.
    """
    rng = numpy_rng(seed, "epoch order", epoch)
    ends = np.cumsum(shard_sizes)
    shards = rng.permutation(len(shard_sizes))
    rows = [np.arange(ends[i] - shard_sizes[i], ends[i]) for i in shards]
    return np.concatenate(
        [rng.permutation(np.concatenate(rows[start : start + window])) for start in range(0, len(rows), window)]
    )


def stream_count(shards: int, batch_size: int) -> int:
    """The number of streams from which a batch is assembled: a power of two that divides it, or 1 for few shards."""
    if shards <= SHUFFLE_SHARDS:
        return 1
    return max(2**k for k in range(MAX_STREAMS.bit_length()) if 2**k <= shards and batch_size % 2**k == 0)


def epoch_batches(shard_sizes: list[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The global batches of an epoch, int64 (steps, batch_size). Samples left over at the end are dropped.

    The epoch's order is cut into streams of equal length, and each batch takes the next samples of every stream. A
    rank's slice of a batch always comes from the same streams. Each rank thus reads its own shards and the shards at
    the stream boundaries, which it shares with its neighbours, and it reads only a few at a time.
    """
    streams = stream_count(len(shard_sizes), batch_size)
    order = epoch_order(shard_sizes, seed, epoch, window=max(1, SHUFFLE_SHARDS // streams))
    steps = steps_per_epoch(len(order), batch_size)
    return order[: steps * batch_size].reshape(streams, steps, -1).swapaxes(0, 1).reshape(steps, batch_size)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """The number of global batches per epoch. Raises `RRCMError` if the split is smaller than one batch."""
    if samples < batch_size:
        raise RRCMError(
            f"batch_size {batch_size} is larger than the split, which has {samples} images; choose a smaller one"
        )
    return samples // batch_size


def batch_loader(
    images: ShardedDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    steps: range,
    env: DistEnv | None = None,
    workers: int = 0,
) -> Generator[Batch]:
    """Yield this process's part of the global batches of `steps`.

    Step k belongs to epoch k // steps_per_epoch. `batch_size` counts images over all processes of the run `env`, and
    each process takes a contiguous slice of every batch; without `env` there is one process. A batch has the stacked
    results of `transform`, and int64 `label`, `index` (in the split) and `position` (in the global batch). `transform`
    gets its own generator for each (seed, epoch, image). If `images.labelled` limits the images, an epoch is as long as
    without the limit (`rows_at`).

    Raises `RRCMError` if the processes cannot share a batch equally, the split is smaller than a batch, a shard is
    damaged, or a worker dies.
    """
    rank, world_size = (env.rank, env.world_size) if env else (0, 1)
    if batch_size % world_size:
        raise RRCMError(f"batch_size {batch_size} is not a multiple of the {world_size} processes; choose a multiple")
    loader = DataLoader(
        GlobalBatches(images, transform, batch_size, seed, rank, world_size),
        sampler=steps,
        batch_size=None,  # each item is a whole batch
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # DataLoader draws a seed; keep the global generator untouched
    )
    return _unwrap(loader)


def _unwrap(loader: DataLoader) -> Generator[Batch]:
    """Yield the batches, and raise the first error that a worker returned."""
    with explain_lost_workers(receiving=loader.num_workers > 0):
        if loader.num_workers:
            multiprocessing.Lock()  # fails early without /dev/shm, with a short message
        batches = iter(loader)
    try:
        while True:
            with explain_lost_workers(receiving=loader.num_workers > 0):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, RRCMError):
                raise batch
            yield batch
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # torch waits for the last reference, which a traceback may hold


@contextmanager
def explain_lost_workers(receiving: bool = False) -> Iterator[None]:
    """Turn torch's error about a dead loader worker into one line that says what to set.

    torch raises this error wherever the main thread is at that moment. While the main thread is `receiving` a batch,
    other errors are possible too, because batches travel through shared memory and open files.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        from_transform = str(error).startswith("Caught ")  # an error in the worker's own code, with its traceback
        if from_transform or not (receiving or "DataLoader worker" in str(error)):
            raise
        raise RRCMError(f"a loader worker failed: {_advice(error)}; data.workers=0 does without workers") from None


def _advice(error: Exception) -> str:
    """Why a loader worker died, and what to do about it. The error's cause may contain a signal or an exit status."""
    text = f"{type(error).__name__} {error} {error.__cause__}"
    code = re.search(r"exit code (\d+)", text)
    number = int(code[1]) if code else getattr(error, "errno", None)
    if number == errno.ENOSPC or re.search("bus error|shared memory|no space left", text, re.IGNORECASE):
        with suppress(OSError):
            size = shutil.disk_usage("/dev/shm").total / 2**20
            return f"/dev/shm is full ({size:,.0f} MiB); make it larger (docker run --shm-size=16g, or --ipc=host)"
    if number == errno.EMFILE or re.search("too many open files|ancdata|EOFError", text, re.IGNORECASE):
        return "too many open files; raise the limit (ulimit -n 65536)"
    if "signal: Killed" in text:
        return "it was killed, most likely for lack of memory; allow more memory, or set fewer data.workers"
    return one_line(error)


def rows_at(positions: np.ndarray, epoch: int, images: ShardedDataset) -> np.ndarray:
    """The rows at these positions of an epoch: the positions themselves, or the labelled rows repeated.

    An epoch has as many images with few labels as with all labels. Over all epochs, the numbers of times that two
    labelled images occur differ by at most one.
    """
    if images.labelled is None:
        return positions
    return images.labelled[(epoch * len(images) + positions) % len(images.labelled)]


def describe_step(images: ShardedDataset, batch_size: int, seed: int, step: int) -> str:
    """Name the shards that hold the images of a global batch, for error messages."""
    epoch, k = divmod(step, steps_per_epoch(len(images), batch_size))
    rows = rows_at(epoch_batches(images.shard_sizes, batch_size, seed, epoch)[k], epoch, images)
    shards = np.unique(np.searchsorted(images.starts, rows, side="right") - 1)
    names = [images.split.shards[shard].name for shard in shards]
    more = f" and {len(names) - 3} more shards" if len(names) > 3 else ""
    return f"images of {', '.join(names[:3])}{more}"


def _start_worker(worker: int) -> None:
    """Prepare a worker: ignore SIGTERM, and end if a batch cannot be sent.

    Clusters send SIGTERM to all processes, but only the training process decides when to stop. If a worker dropped a
    batch that it cannot send, the training would wait for this batch for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error: Exception, batch: object) -> None:
    """End this worker with the number of the error as its exit status. torch may give it only in the message."""
    number = getattr(error, "errno", None) or int(next(iter(re.findall(r"\((\d+)\)", str(error))[-1:]), 1))
    os._exit(number)


class GlobalBatches(Dataset):
    """Item k is this rank's part of global batch k, or an `RRCMError`.

    Errors are returned rather than raised, since torch wraps exceptions from workers in long tracebacks.
    """

    def __init__(
        self, images: ShardedDataset, transform: Transform, batch_size: int, seed: int, rank: int, world_size: int
    ):
        self.images, self.transform, self.batch_size, self.seed = images, transform, batch_size, seed
        self.steps = steps_per_epoch(len(images), batch_size)
        size = batch_size // world_size
        self.positions = torch.arange(rank * size, (rank + 1) * size)
        self.epoch, self.batches = -1, np.empty((0, batch_size), np.int64)

    def __getitem__(self, step: int) -> Batch | RRCMError:
        epoch, k = divmod(step, self.steps)
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = epoch_batches(self.images.shard_sizes, self.batch_size, self.seed, epoch)
        try:
            positions = self.batches[k, self.positions.numpy()]
            rows = rows_at(positions, epoch, self.images)
            samples = list(map(self._sample, positions.tolist(), rows.tolist()))
        except RRCMError as error:
            return error
        except OSError as error:
            reason = f"{error.strerror or one_line(error)}{f': {error.filename}' if error.filename else ''}"
            hint = HINTS.get(error.errno, "correct that and run again")
            return RRCMError(f"{self.images.root}: cannot be read ({reason}); {hint}")
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        return batch | {"position": self.positions.clone()}

    def _sample(self, position: int, row: int) -> dict[str, np.ndarray]:
        image, label, _ = self.images.read(row)
        sample = self.transform(image, numpy_rng(self.seed, "augment", self.epoch, position))
        return sample | {"label": np.int64(label), "index": np.int64(row)}
