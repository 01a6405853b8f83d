"""The training loader.

The images of global batch k and their augmentation are a pure function of the data, the seed and k. They do not depend
on the number of processes or workers, or on where a run was resumed.
"""

import signal
from collections.abc import Callable, Generator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rrcm.data.shards import ShardedDataset
from rrcm.utils.errors import RRCMError
from rrcm.utils.rng import numpy_rng

Transform = Callable[[Image.Image, np.random.Generator], dict[str, np.ndarray]]
Batch = dict[str, torch.Tensor]

SHUFFLE_SHARDS = 16  # samples are shuffled within this many shards; a split of at most as many is shuffled fully
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
    """Number of streams that a batch is assembled from: a power of two that divides it, or 1 for few shards."""
    if shards <= SHUFFLE_SHARDS:
        return 1
    return max(2**k for k in range(MAX_STREAMS.bit_length()) if 2**k <= shards and batch_size % 2**k == 0)


def epoch_batches(shard_sizes: list[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The global batches of an epoch, int64 (steps, batch_size). The last samples, too few for a batch, are left out.

    The epoch's order is cut into streams of equal length, and each batch takes the next samples of every stream. A
    rank's slice of a batch always comes from the same streams. Each rank thus reads its own shards, plus those at the
    stream boundaries that it shares with its neighbours, and only a few at a time.
    """
    streams = stream_count(len(shard_sizes), batch_size)
    order = epoch_order(shard_sizes, seed, epoch, window=max(1, SHUFFLE_SHARDS // streams))
    steps = steps_per_epoch(len(order), batch_size)
    return order[: steps * batch_size].reshape(streams, steps, -1).swapaxes(0, 1).reshape(steps, batch_size)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Number of global batches per epoch. Raises `RRCMError` if there is not even one."""
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
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Generator[Batch]:
    """Yield this rank's part of the global batches first_step..last_step-1.

    Step k belongs to epoch k // steps_per_epoch. `batch_size` counts images over all ranks, and each rank takes a
    contiguous slice of every batch. A batch holds the stacked results of `transform`, and int64 `label` and `position`
    (index in the global batch). `transform` gets its own generator for each (seed, epoch, image).

    Raises `RRCMError` if the ranks cannot share the batch equally, the split is smaller than a batch, or a shard is
    damaged; errors in workers surface unchanged.
    """
    if batch_size % world_size:
        raise RRCMError(f"batch_size {batch_size} is not a multiple of the {world_size} processes; choose a multiple")
    loader = DataLoader(
        GlobalBatches(images, transform, batch_size, seed, rank, world_size),
        sampler=range(first_step, last_step),
        batch_size=None,  # each item is a whole batch
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_sigterm,
        generator=torch.Generator(),  # DataLoader draws a seed; keep the global generator untouched
    )
    return _unwrap(loader)


def _unwrap(loader: DataLoader) -> Generator[Batch]:
    """Yield the batches; raise an error that a worker returned."""
    for batch in loader:
        if isinstance(batch, RRCMError):
            raise batch
        yield batch


def describe_step(images: ShardedDataset, batch_size: int, seed: int, step: int) -> str:
    """Name the shards that hold the images of a global batch, for error messages."""
    epoch, k = divmod(step, steps_per_epoch(len(images), batch_size))
    rows = epoch_batches(images.shard_sizes, batch_size, seed, epoch)[k]
    shards = np.unique(np.searchsorted(images.starts, rows, side="right") - 1)
    names = [images.split.shards[shard].name for shard in shards]
    more = f" and {len(names) - 3} more shards" if len(names) > 3 else ""
    return f"images of {', '.join(names[:3])}{more}"


def _ignore_sigterm(worker: int) -> None:
    """Clusters send SIGTERM to all processes. The training process decides when to stop; workers wait for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class GlobalBatches(Dataset):
    """Item k is this rank's part of global batch k, or an `RRCMError`.

    Errors are returned, since torch would wrap an exception raised in a worker in a long traceback.
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
            samples = [self._sample(row) for row in self.batches[k, self.positions].tolist()]
        except RRCMError as error:
            return error
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        return batch | {"position": self.positions.clone()}

    def _sample(self, row: int) -> dict[str, np.ndarray]:
        image, label, _ = self.images.read(row)
        sample = self.transform(image, numpy_rng(self.seed, "augment", self.epoch, row))
        return sample | {"label": np.int64(label)}
