"""The training loader. Which images are in global batch k, and how each is augmented, is a pure function of the data,
the seed and k: it does not depend on the number of processes or workers, nor on where a run was resumed."""

import signal
from collections.abc import Callable, Generator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rrcm.errors import RRCMError
from rrcm.rng import numpy_rng
from rrcm.shards import ShardedImages

Transform = Callable[[Image.Image, np.random.Generator], dict[str, np.ndarray]]
Batch = dict[str, torch.Tensor]


def epoch_order(shard_sizes: list[int], seed: int, epoch: int, window: int = 16) -> np.ndarray:
    """A permutation of all samples, int64 (N,): shards in random order, then samples shuffled within each run of
    `window` shards. So few shards are open or downloaded at a time, and a small data set is shuffled fully."""
    rng = numpy_rng(seed, "epoch order", epoch)
    ends = np.cumsum(shard_sizes)
    shards = rng.permutation(len(shard_sizes))
    parts = [np.arange(ends[i] - shard_sizes[i], ends[i]) for i in shards]
    return np.concatenate(
        [rng.permutation(np.concatenate(parts[start : start + window])) for start in range(0, len(parts), window)]
    )


def steps_per_epoch(samples: int, batch_size: int, drop_last: bool = True) -> int:
    """Global batches an epoch. Raises `RRCMError` when there is not even one."""
    if drop_last and samples < batch_size:
        raise RRCMError(f"batch_size {batch_size} is more than the {samples} images of the split; choose a smaller one")
    return samples // batch_size if drop_last else -(-samples // batch_size)


def batches(
    images: ShardedImages,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    drop_last: bool = True,
) -> Generator[Batch]:
    """This rank's part of the global batches first_step..last_step-1; step k is of epoch k // steps_per_epoch.

    batch_size counts images over all ranks; a rank takes a contiguous slice of every batch. With drop_last=False an
    epoch's last batch is smaller and a rank's slice of it may even be empty. A batch holds what `transform` returns,
    stacked, and int64 `label` and `position` (place in the global batch). `transform` gets a generator of its own for
    each (seed, epoch, image). Errors in workers surface as they are.
    """
    if batch_size % world:
        raise RRCMError(f"batch_size {batch_size} is not a multiple of the {world} processes; choose one that is")
    loader = DataLoader(
        _Steps(images, transform, batch_size, seed, rank, world, drop_last),
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


def shards_of_step(images: ShardedImages, batch_size: int, seed: int, step: int) -> str:
    """The shards that the images of a global batch lie in, in words."""
    epoch, k = divmod(step, steps_per_epoch(len(images), batch_size))
    rows = epoch_order(images.shard_sizes, seed, epoch)[k * batch_size : (k + 1) * batch_size]
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
        self,
        images: ShardedImages,
        transform: Transform,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        drop_last: bool,
    ):
        self.images, self.transform = images, transform
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.steps = steps_per_epoch(len(images), batch_size, drop_last)
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __getitem__(self, step: int) -> Batch | RRCMError:
        epoch, k = divmod(step, self.steps)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, epoch_order(self.images.shard_sizes, self.seed, epoch)
        rows = self.order[k * self.batch_size : (k + 1) * self.batch_size].tolist()
        start, stop = (len(rows) * r // self.world for r in (self.rank, self.rank + 1))
        try:
            # An empty part still needs every tensor's shape and type: make one sample and cut it off below.
            samples = [self._sample(row) for row in rows[start:stop] or rows[:1]]
        except RRCMError as error:
            return error
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        batch["position"] = torch.arange(start, stop)
        return {name: values[: stop - start] for name, values in batch.items()}

    def _sample(self, row: int) -> dict[str, np.ndarray]:
        image, label, _ = self.images.read(row)
        sample = self.transform(image, numpy_rng(self.seed, "augment", self.epoch, row))
        return sample | {"label": np.int64(label)}
