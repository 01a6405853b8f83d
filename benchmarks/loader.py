"""Does the loader keep up with training? Compares images per second read from shards and needed by a training step.

- `read by a loader`: the rate of `batch_loader` in a process that does nothing else. It covers reading, decoding,
  crops, flips and stacking. With 0 workers that process does the work itself, so the rate is for one core. On a CPU
  the workers share the cores with training: a step that takes s seconds per image on c cores is slowed down by
  1 / (rate * c). On a GPU add workers until the rate exceeds the need. A split that fits in memory is kept decoded
  (data/shards.py) and is measured after a first epoch.
- `colour and blur`: the rate at which the training process turns 8-bit views into model space on its device.
- `need`: the images per second that a bare pre-training step processes, measured with `train_step.py` (rrcm, D 192,
  depth 6, 8 x 8 patches, the loader's batch size, native precision) or given by `--need`.

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
from rrcm.data.loader import Batch, batch_loader, steps_per_epoch
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset
from rrcm.utils.distributed import native_precision
from rrcm.utils.provenance import describe_environment
from rrcm.utils.rng import numpy_rng

VIEWS = Views(
    min_crop_area=0.08,
    flip_prob=0.5,
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
    blur_prob=(1.0, 0.1),
    blur_sigma=(0.1, 2.0),
    solarize_prob=(0.0, 0.2),
)
PIXELS, CLASSES, TEST = 224, 5, 50  # of the synthetic set: image size, classes, test images


def synthetic_shards(folder: Path, count: int) -> Path:
    """Shards of `count` training images that compress like photographs: noise at all scales, JPEG quality 90."""
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
        labels_per_class=None,
        shard_size=500,
        workers=2,
    )
    write_shards(data, 0, folder / "shards")
    return folder / "shards"


def synthetic_jpeg(rng: np.random.Generator) -> bytes:
    """One synthetic image as JPEG bytes."""
    pixels = np.full((PIXELS, PIXELS, 3), 128.0, np.float32)
    for side in (7, 14, 28, 56, 112):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        fine = np.asarray(coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC), np.float32)
        pixels += (fine - 128) * (3 / side**0.5)  # finer scales are weaker
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def loading_rate(images: ShardedDataset, transform: object, batch_size: int, workers: int, seconds: float) -> float:
    """Images per second over at least `seconds`, after a few batches, or an epoch if the split is kept decoded."""
    epoch = steps_per_epoch(len(images), batch_size)
    loader = read(images, transform, batch_size, workers)
    for _ in range(max(epoch if images.small else 1, 2 * workers + 1)):
        next(loader)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += len(next(loader)["position"])
    return done / (time.perf_counter() - start)


def read(images: ShardedDataset, transform: object, batch_size: int, workers: int) -> Iterator[Batch]:
    """An endless iterator of batches."""
    return batch_loader(images, transform, batch_size=batch_size, seed=0, steps=range(10**9), workers=workers)


def color_blur_rate(batch: Batch, device: torch.device) -> float:
    """Images per second that are turned into two views in model space."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for i in (1, 2):
            views = 2 * color_blur(batch[f"view{i}"].to(device), batch[f"color_blur{i}"]) - 1
        views.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return len(batch["position"]) / median(seconds[1:])


def step_rate(images: ShardedDataset, batch_size: int, device: torch.device) -> float:
    """Images per second of a bare pre-training step."""
    step = build(
        Setting(
            image_size=images.image_size,
            channels=images.channels,
            patch_size=images.image_size // 8,
            batch=batch_size,
            device=str(device),
        ),
        f"rrcm_{native_precision(device)}",
    )
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return batch_size / median(seconds[1:])


def measure(
    shards: Annotated[Path | None, typer.Argument(help="folder of shards; default: a synthetic set")] = None,
    batch_size: int = 128,
    seconds: Annotated[float, typer.Option(help="duration of each measurement")] = 10.0,
    need: Annotated[float | None, typer.Option(help="images per second of a training step; default: measured")] = None,
    images: Annotated[int, typer.Option(help="size of the synthetic set")] = 2500,
    device_name: Annotated[str, typer.Option("--device")] = "cpu",
) -> None:
    """Print the rates of loaders with 0, 1 and 2 workers, and the rate that a step needs."""
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
                label = f"read by a loader, {name}, {workers} workers"
                rates[label] = loading_rate(split, transform, batch_size, workers, seconds)
        batch = next(read(split, transforms["pre-training"], batch_size, 0))
        rates["colour and blur, pre-training"] = color_blur_rate(batch, device)
    needed = need or step_rate(split, batch_size, device)
    where = describe_environment(device)["hardware"]
    print(
        f"{'synthetic JPEG files' if shards is None else shards}: {len(split)} images of {split.image_size} pixels, "
        f"{split.channels} channels, {'kept decoded' if split.small else 'decoded each time'}; batch {batch_size}; "
        f"{', '.join(where['gpus']) or where['cpu']}, {where['threads']} threads\n"
    )
    rows = [[label, f"{rate:,.0f}", f"{rate / needed:.1f}x"] for label, rate in rates.items()]
    rows.append([f"need: a pre-training step{'' if need is None else ', as given'}", f"{needed:,.0f}", ""])
    print(tabulate(rows, ["", "images/s", "of the need"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(measure))
    app()
