"""The loader: each sample once per epoch, and the same batches bit for bit for any number of processes and workers."""

import errno
import http.server
import itertools
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_own_mounts

from rrcm.config import Data, Views
from rrcm.data.augment import FinetuneTransform, PretrainTransform
from rrcm.data.loader import (
    batch_loader,
    describe_step,
    epoch_batches,
    epoch_order,
    explain_lost_workers,
    steps_per_epoch,
    stream_count,
)
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset
from rrcm.utils.distributed import DistEnv
from rrcm.utils.errors import RRCMError

VIEWS = Views(
    min_crop_area=0.3,
    flip_prob=0.5,
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
    blur_prob=(1.0, 0.1),
    blur_sigma=(0.1, 0.5),
    solarize_prob=(0.0, 0.2),
)


def write(place: Path, shard_size: int) -> Path:
    sizes = {"image_size": 8, "channels": 1, "val_fraction": 0.1, "shard_size": shard_size, "workers": 0}
    data = Data(source="digits", root=None, labels_per_class=None, **sizes)
    write_shards(data, 0, place)
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loader") / "shards", 100)


def name_pixels(image, rng) -> dict[str, np.ndarray]:
    """Identify a sample and its random stream."""
    return {"image": np.asarray(image), "draw": rng.random(2, np.float32)}


def collect(images: ShardedDataset, transform, world_size: int = 1, **settings) -> list[dict[str, torch.Tensor]]:
    """Global batches, assembled from the parts of all ranks."""
    settings = {"seed": 0} | settings
    processes = [DistEnv(rank, world_size, torch.device("cpu")) for rank in range(world_size)]
    ranks = [list(batch_loader(images, transform, env=env, **settings)) for env in processes]
    return [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*ranks, strict=True)
    ]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("sizes", [[5], [100] * 40, [64, 64, 64, 7], [1, 2, 3]])
def test_order_is_a_permutation_that_changes_with_seed_and_epoch(sizes: list[int]):
    orders = [epoch_order(sizes, seed, epoch, window=16) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(sum(sizes)))
    assert np.array_equal(orders[0], epoch_order(sizes, 0, 0, window=16))
    assert sum(np.array_equal(a, b) for a, b in itertools.combinations(orders, 2)) == 0


@pytest.mark.slow
def test_order_reads_few_shards_at_a_time():
    shard = epoch_order([50] * 40, 0, 0, window=4) // 50
    for start in range(2000, 200):
        assert len(set(shard[start : start + 200])) == 4  # all 200 samples of the four
    assert len(set(shard[:50])) == 4  # mixed
    whole = epoch_order([50] * 4, 0, 0, window=4)
    assert abs(np.corrcoef(whole, np.arange(200))[0, 1]) < 0.25  # 3.5 standard errors of a full shuffle


@pytest.mark.parametrize(
    ("shards", "batch_size", "streams"), [(16, 64, 1), (17, 64, 16), (1000, 4096, 64), (1000, 96, 32), (1000, 75, 1)]
)
def test_batches_are_assembled_from_streams(shards: int, batch_size: int, streams: int):
    assert stream_count(shards, batch_size) == streams
    sizes = [10 + i % 3 for i in range(shards)]
    found = epoch_batches(sizes, batch_size, 0, 0)
    assert found.shape == (sum(sizes) // batch_size, batch_size)
    assert len(np.unique(found)) == found.size and found.max() < sum(sizes)  # no sample twice
    assert not np.array_equal(found, epoch_batches(sizes, batch_size, 0, 1))


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_ranks_read_shards_of_their_own(world_size: int):
    """320 shards of 20 samples. Neighbouring ranks may share the shard at the boundary of their streams."""
    shard = epoch_batches([20] * 320, 256, 0, 0) // 20
    ranks = [set(part.flatten().tolist()) for part in np.split(shard, world_size, axis=1)]
    assert set.union(*ranks) == set(range(320)) and max(map(len, ranks)) <= 320 // world_size + 2
    shared = [len(a & b) for a, b in itertools.combinations(ranks, 2)]
    assert max(shared) <= 1 and sum(shared) < world_size
    at_a_time = [len(set(step.tolist())) for step in shard]
    assert max(at_a_time) <= 2 * 64  # all ranks together


@pytest.mark.thorough
@pytest.mark.parametrize(("world_size", "workers"), list(itertools.product([1, 2, 3], [0, 2])))
@pytest.mark.parametrize("shard_size", [100, 10])
def test_each_sample_comes_once_per_epoch_in_the_same_batches(
    folder, tmp_path, shard_size: int, world_size: int, workers: int
):
    images = ShardedDataset(folder if shard_size == 100 else write(tmp_path / "shards", shard_size), "train")
    for batch_size in (30, 96, 600):
        steps = steps_per_epoch(len(images), batch_size)
        shared = {"batch_size": batch_size, "steps": range(2 * steps)}
        alone = collect(images, name_pixels, **shared)
        together = collect(images, name_pixels, world_size, workers=workers, **shared)
        assert same(alone, together)
        everything = {np.asarray(images.read(i)[0]).tobytes() for i in range(len(images))}
        assert len(everything) == len(images)
        for epoch in (together[:steps], together[steps:]):
            pixels = set(map(bytes, torch.cat([b["image"] for b in epoch]).flatten(1).numpy()))
            assert len(pixels) == steps * batch_size and pixels <= everything
        for batch in together:
            assert batch["position"].tolist() == list(range(batch_size))
        draws = torch.cat([b["draw"] for b in together])  # two float32 draws: no two samples agree by chance
        assert len(set(map(tuple, draws.tolist()))) == 2 * steps * batch_size  # a stream for each sample and epoch


def test_labels_go_with_their_images(folder: Path):
    images = ShardedDataset(folder, "train")
    label = {np.asarray(image).tobytes(): number for image, number, _ in map(images.read, range(len(images)))}
    (batch,) = collect(images, name_pixels, batch_size=1200, steps=range(1))
    assert batch["label"].tolist() == [label[bytes(pixels)] for pixels in batch["image"].flatten(1).numpy()]


def test_error_messages_name_the_shards_of_a_step(folder: Path):
    images = ShardedDataset(folder, "train")
    row = epoch_batches(images.shard_sizes, 1, 0, 1)[5, 0]
    step = len(images) + 5
    assert describe_step(images, 1, 0, step) == f"images of train-{row // 100:05d}.tar"
    assert describe_step(images, 1200, 0, 0).endswith(f" and {len(images.shard_sizes) - 3} more shards")


def test_ranks_take_equal_contiguous_parts(folder: Path):
    images = ShardedDataset(folder, "train")
    for rank in range(3):
        env = DistEnv(rank, 3, torch.device("cpu"))
        for batch in batch_loader(images, name_pixels, batch_size=96, seed=0, steps=range(20), env=env):
            assert batch["position"].tolist() == list(range(32 * rank, 32 * rank + 32))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "transform", [PretrainTransform(VIEWS, 8), FinetuneTransform("randaugment", 8)], ids=["pretrain", "randaugment"]
)
def test_augmentation_bits_do_not_depend_on_the_split(folder: Path, transform):
    images = ShardedDataset(folder, "train")
    alone = collect(images, transform, batch_size=60, steps=range(30))
    assert same(alone, collect(images, transform, 3, workers=2, batch_size=60, steps=range(30)))
    assert not same(alone, collect(images, transform, batch_size=60, steps=range(30), seed=1))


def test_resume_gives_the_same_batches(folder: Path):
    images, transform = ShardedDataset(folder, "train"), PretrainTransform(VIEWS, 8)
    whole = collect(images, transform, batch_size=100, steps=range(40))  # 14 steps per epoch
    for first in (1, 13, 14, 30):
        assert same(whole[first:], collect(images, transform, batch_size=100, steps=range(first, 40), workers=2))
    assert collect(images, transform, batch_size=100, steps=range(40, 40)) == []


def test_the_global_generators_are_left_alone(folder: Path):
    images = ShardedDataset(folder, "train")
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    collect(images, FinetuneTransform("randaugment", 8), batch_size=60, steps=range(2))
    assert (torch.rand(1), np.random.rand()) == expected


def test_batches_that_cannot_be_split_raise_an_error(folder: Path):
    images = ShardedDataset(folder, "val")
    settings = {"seed": 0, "steps": range(1)}
    with pytest.raises(RRCMError, match="batch_size 64 is not a multiple of the 3 processes"):
        batch_loader(images, name_pixels, batch_size=64, env=DistEnv(0, 3, torch.device("cpu")), **settings)
    with pytest.raises(RRCMError, match=f"batch_size 512 is larger than the split, which has {len(images)} images"):
        batch_loader(images, name_pixels, batch_size=512, **settings)
    assert steps_per_epoch(100, 30) == steps_per_epoch(90, 30) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_one_line(folder: Path, tmp_path: Path, workers: int):
    images = ShardedDataset(folder, "train")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / "train-00003.tar"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(RRCMError) as error:
        collect(ShardedDataset(tmp_path, "train"), name_pixels, batch_size=len(images), steps=range(1), workers=workers)
    assert str(error.value).startswith(f"{damaged}: has ") and "\n" not in str(error.value)


def end_with(signo: int, image, rng) -> dict[str, np.ndarray]:
    os.kill(os.getpid(), signo)


def open_no_more_files(image, rng) -> dict[str, np.ndarray]:
    """The batch is complete, but its tensors cannot be sent, because they travel as open files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    return {"image": np.zeros(1)}


def cannot_read(image, rng) -> dict[str, np.ndarray]:
    raise OSError(errno.ESTALE, "Stale file handle", "/shards/train-00000.tar")


@pytest.mark.parametrize(
    ("transform", "line"),
    [
        (partial(end_with, signal.SIGKILL), r"it was killed, most likely for lack of memory; allow more memory, .*"),
        (partial(end_with, signal.SIGBUS), r"/dev/shm is full \([\d,]+ MiB\); make it larger \(docker run --shm.*"),
        (open_no_more_files, r"too many open files; raise the limit \(ulimit -n 65536\)"),
    ],
    ids=["out of memory", "bus error", "open files"],
)
def test_the_death_of_a_worker_is_one_line(folder: Path, transform, line: str):
    with pytest.raises(RRCMError) as error:
        collect(ShardedDataset(folder, "train"), transform, batch_size=1, steps=range(5), workers=1)
    expected = f"a loader worker failed: {line}; data.workers=0 does without workers"
    assert re.fullmatch(expected, str(error.value)), error.value
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_read_is_one_line(folder: Path, workers: int):
    with pytest.raises(RRCMError, match=r"cannot be read \(Stale file handle: /shards/train-00000.tar\); correct"):
        collect(ShardedDataset(folder, "train"), cannot_read, batch_size=100, steps=range(1), workers=workers)


def test_a_bug_in_a_worker_stays_an_error_and_leaves_no_worker(folder: Path):
    """Workers ignore SIGTERM, so a worker that is left would keep this process from ending."""
    with pytest.raises(ZeroDivisionError, match="Caught ZeroDivisionError in DataLoader worker"):
        collect(ShardedDataset(folder, "train"), lambda image, rng: 1 / 0, batch_size=100, steps=range(5), workers=1)
    assert not multiprocessing.active_children()


def test_torch_tells_of_a_dead_worker_anywhere():
    """It may do so in the middle of a training step, where other errors are possible too."""
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    with pytest.raises(RRCMError, match="/dev/shm is full"), explain_lost_workers():
        raise killed
    for error in (RuntimeError("no space left on the GPU"), OSError(errno.ENOSPC, "of an output")):
        with pytest.raises(type(error)), explain_lost_workers():
            raise error


SMALL = """\
mount -t tmpfs -o size=$1 tmpfs /dev/shm || exit 77
exec "$2" -c '
import sys
import numpy as np
from rrcm.data.loader import batch_loader
from rrcm.data.shards import ShardedDataset
from rrcm.utils.errors import RRCMError
transform = lambda image, rng: {"image": np.zeros(20_000, np.uint8)}
try:
    images = ShardedDataset(sys.argv[1], "train")
    list(batch_loader(images, transform, batch_size=100, seed=0, steps=range(5), workers=2))
except RRCMError as error:
    print(error)
' "$3"
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("size", "line"),
    [("1m", "/dev/shm is full (1 MiB); make it larger"), ("1m,ro", "[Errno 30] Read-only file system")],
)
def test_a_small_dev_shm_is_one_line(folder: Path, size: str, line: str):
    """A real small /dev/shm. torch itself would drop the batch and wait for it for ever."""
    answer = in_own_mounts(SMALL, size, sys.executable, folder)
    assert answer.stdout.startswith(f"a loader worker failed: {line}") and answer.stdout.count("\n") == 1
    assert answer.stderr == ""


@pytest.mark.slow
def test_workers_read_a_url(folder: Path, tmp_path: Path):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        images = ShardedDataset(f"http://127.0.0.1:{server.server_port}", "train", tmp_path / "cache")
        got = collect(images, name_pixels, batch_size=100, steps=range(14), workers=2)
        server.shutdown()
    assert same(got, collect(ShardedDataset(folder, "train"), name_pixels, batch_size=100, steps=range(14)))
    assert len(asked) == len(set(asked)) == 2 + len(images.shard_sizes)  # each file once, though both workers need it
