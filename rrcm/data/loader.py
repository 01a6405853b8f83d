"""The training loader. Which images are in global batch k, and how each is augmented, is a pure function of the data,
the seed and k: it does not depend on the number of processes or workers, nor on where a run was resumed."""

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


WINDOW = 16  # shards whose samples are mixed; as many or fewer in all are shuffled fully
MOST_STREAMS = 64


def epoch_order(shard_sizes: list[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation of all samples, int64 (N,): shards in random order, then samples shuffled within each run of
    `window` shards."""
    rng = numpy_rng(seed, "epoch order", epoch)
    ends = np.cumsum(shard_sizes)
    shards = rng.permutation(len(shard_sizes))
    parts = [np.arange(ends[i] - shard_sizes[i], ends[i]) for i in shards]
    return np.concatenate(
        [rng.permutation(np.concatenate(parts[start : start + window])) for start in range(0, len(parts), window)]
    )


def stream_count(shards: int, batch_size: int) -> int:
    """Streams that a batch is put together from: a power of two that divides it; 1 for a few shards."""
    if shards <= WINDOW:
        return 1
    return max(2**k for k in range(MOST_STREAMS.bit_length()) if 2**k <= shards and batch_size % 2**k == 0)


def epoch_batches(shard_sizes: list[int], batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The global batches of an epoch, int64 (steps, batch_size): every sample once, but for those left over in the end.

    The order of the epoch is cut into streams of equal length, and a batch takes the next few samples of each. A rank's
    share of every batch is then of the same streams: it reads shards of its own (those at the ends of its streams are
    its neighbours' too), and few at a time.
    """
    streams = stream_count(len(shard_sizes), batch_size)
    order = epoch_order(shard_sizes, seed, epoch, window=max(1, WINDOW // streams))
    steps = steps_per_epoch(len(order), batch_size)
    return order[: steps * batch_size].reshape(streams, steps, -1).swapaxes(0, 1).reshape(steps, batch_size)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Global batches an epoch. Raises `RRCMError` when there is not even one."""
    if samples < batch_size:
        raise RRCMError(f"batch_size {batch_size} is more than the {samples} images of the split; choose a smaller one")
    return samples // batch_size


def batches(
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
    """This rank's part of the global batches first_step..last_step-1; step k is of epoch k // steps_per_epoch.

    batch_size counts images over all ranks; a rank takes a contiguous slice of every batch. A batch holds what
    `transform` returns, stacked, and int64 `label` and `position` (place in the global batch). `transform` gets a
    generator of its own for each (seed, epoch, image). Errors in workers surface as they are.
    """
    if batch_size % world_size:
        raise RRCMError(f"batch_size {batch_size} is not a multiple of the {world_size} processes; choose one that is")
    loader = DataLoader(
        _Steps(images, transform, batch_size, seed, rank, world_size),
        sampler=range(first_step, last_step),
        batch_size=None,  # an item of the dataset is a batch: workers take whole ones
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_sigterm,
        generator=torch.Generator(),  # DataLoader draws a seed: not from the global generator
    )
    return _unwrap(loader)


def _unwrap(loader: DataLoader) -> Generator[Batch]:
    for batch in loader:
        if isinstance(batch, RRCMError):
            raise batch
        yield batch


def describe_step(images: ShardedDataset, batch_size: int, seed: int, step: int) -> str:
    """The shards that the images of a global batch lie in, in words."""
    epoch, k = divmod(step, steps_per_epoch(len(images), batch_size))
    rows = epoch_batches(images.shard_sizes, batch_size, seed, epoch)[k]
    shards = np.unique(np.searchsorted(images.starts, rows, side="right") - 1)
    names = [images.split.shards[shard].name for shard in shards]
    more = f" and {len(names) - 3} more shards" if len(names) > 3 else ""
    return f"images of {', '.join(names[:3])}{more}"


def _ignore_sigterm(worker: int) -> None:
    """A cluster tells all processes to stop; the training decides when, and its readers must last till then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Steps(Dataset):
    """Item k is this rank's part of global batch k, or the RRCMError that kept it from being made: raised in a worker,
    torch would bury its one line in a traceback."""

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
