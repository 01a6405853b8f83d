"""How fast training images come from shards, against how fast a step takes them.

Three kinds of numbers, all images a second of this machine:

- `read by a loader`: what `loader.batches` delivers to a process that does nothing else: reading, decoding, crops,
  flips, stacking. With 0 workers that process does the work itself, so the rate is that of one core; with w workers it
  is what w processes give. On a CPU workers and step share the cores, and what counts is the first: a step that takes s
  seconds an image on all c cores becomes 1 / (rate * c) slower. On a GPU the loader keeps up where the rate is above
  the need; add workers until it is. A split small enough to be kept decoded (`data.shards`) is measured so: an epoch
  has been read before.
- `colour and blur`: what the training process makes of a pre-training batch on its device before the step, from 8-bit
  pixels to both views in model space.
- `need`: images a second of a bare step of pre-training, measured by `train_step.py` (ours, D 192 depth 6, 8x8
  patches, the loader's batch, the precision that the device is fast in), or given by `--need` for a step measured
  elsewhere.

    python benchmarks/loader.py data/shards
    python benchmarks/loader.py            # 2,500 synthetic JPEG files of 224 pixels in a temporary folder
"""

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from tabulate import tabulate
from train_step import Setting, build

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.config import Data, Views
from rrcm.data.augment import FinetuneTransform, PretrainTransform, color_blur
from rrcm.data.loader import Batch, batches, steps_per_epoch
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset
from rrcm.utils.distributed import native_precision
from rrcm.utils.provenance import describe_environment
from rrcm.utils.rng import numpy_rng

VIEWS = Views(
    min_crop_area=0.08, flip=0.5, jitter=0.8, gray=0.2, blur=(1.0, 0.1), blur_sigma=(0.1, 2.0), solarize=(0.0, 0.2)
)
PIXELS, CLASSES, TEST = 224, 5, 50  # of the synthetic set; test images


def synthetic_shards(folder: Path, count: int) -> Path:
    """Shards of `count` training images that compress like photographs: noise of every scale, quality 90."""
    rng = numpy_rng(0, "synthetic images")
    for i in range(count + TEST):
        split = "train" if i < count else "test"
        path = folder / "images" / split / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(synthetic_jpeg(rng))
    data = Data(
        source="imagefolder",
        root=str(folder / "images"),
        image_size=PIXELS,
        channels=3,
        val_fraction=0.01,
        shard_size=500,
        workers=2,
    )
    write_shards(data, 0, folder / "shards")
    return folder / "shards"


def synthetic_jpeg(rng: np.random.Generator) -> bytes:
    pixels = np.full((PIXELS, PIXELS, 3), 128.0, np.float32)
    for side in (7, 14, 28, 56, 112):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        fine = np.asarray(coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC), np.float32)
        pixels += (fine - 128) * (3 / side**0.5)  # the finer, the weaker
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def loading_rate(images: ShardedDataset, transform: object, batch_size: int, workers: int, seconds: float) -> float:
    """Images a second over at least `seconds`, after the first batches or, of a split kept decoded, the first epoch."""
    epoch = steps_per_epoch(len(images), batch_size)
    loader = read(images, transform, batch_size, workers)
    for _ in range(max(epoch if images.small else 1, 2 * workers + 1)):
        next(loader)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += len(next(loader)["position"])
    return done / (time.perf_counter() - start)


def read(images: ShardedDataset, transform: object, batch_size: int, workers: int) -> Iterator[Batch]:
    return batches(images, transform, batch_size=batch_size, seed=0, first_step=0, last_step=10**9, workers=workers)


def photometric_rate(batch: Batch, device: torch.device) -> float:
    """Images a second that become two views in model space."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for i in (1, 2):
            views = 2 * color_blur(batch[f"view{i}"].to(device), batch[f"color_blur{i}"]) - 1
        views.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return len(batch["position"]) / median(seconds[1:])


def step_rate(images: ShardedDataset, batch_size: int, device: torch.device) -> float:
    """Images a second of a bare step of pre-training."""
    step = build(
        Setting(
            image_size=images.image_size,
            channels=images.channels,
            patch_size=images.image_size // 8,
            batch=batch_size,
            device=str(device),
        ),
        f"ours_{native_precision(device)}",
    )
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return batch_size / median(seconds[1:])


def measure(
    shards: Annotated[Path | None, typer.Argument(help="folder of shards; else a synthetic set is made")] = None,
    batch_size: int = 128,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 10.0,
    need: Annotated[float | None, typer.Option(help="images a second that a step takes; else measured")] = None,
    images: Annotated[int, typer.Option(help="of the synthetic set")] = 2500,
    device_name: Annotated[str, typer.Option("--device")] = "cpu",
) -> None:
    """Print what loaders with 0, 1 and 2 workers deliver, and what a step needs."""
    keep_freed_memory()
    device = torch.device(device_name)
    with tempfile.TemporaryDirectory() as folder:
        split = ShardedDataset(shards or synthetic_shards(Path(folder), images), "train")
        rates = {}
        transforms = {
            "pre-training": PretrainTransform(VIEWS, split.image_size),
            **{
                f"fine-tuning, {name}": FinetuneTransform(name, split.image_size)
                for name in ("none", "crop_flip", "randaugment")
            },
        }
        for name, transform in transforms.items():
            for workers in (0, 1, 2):
                what = f"read by a loader, {name}, {workers} workers"
                rates[what] = loading_rate(split, transform, batch_size, workers, seconds)
        batch = next(read(split, transforms["pre-training"], batch_size, 0))
        rates["colour and blur, pre-training"] = photometric_rate(batch, device)
    needed = need or step_rate(split, batch_size, device)
    where = describe_environment(device)["hardware"]
    print(
        f"{'synthetic JPEG files' if shards is None else shards}: {len(split)} images of {split.image_size} pixels, "
        f"{split.channels} channels, {'kept decoded' if split.small else 'decoded every time'}; batch {batch_size}; "
        f"{', '.join(where['gpus']) or where['cpu']}, {where['threads']} threads\n"
    )
    rows = [[what, f"{rate:,.0f}", f"{rate / needed:.1f}x"] for what, rate in rates.items()]
    rows.append([f"need: a step of pre-training{'' if need is None else ', as given'}", f"{needed:,.0f}", ""])
    print(tabulate(rows, ["", "images/s", "of the need"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(measure))
    app()
