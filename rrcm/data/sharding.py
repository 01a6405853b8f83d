"""Write a data set as shards: WebDataset tar files with an index and a manifest. shards.py describes and reads them.

The bytes depend on the raw data set, the settings and the seed only.
"""

import io
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from rrcm.config import Data
from rrcm.data.datasets import RawSplit, read_dataset, stratified_split
from rrcm.data.images import decode_image, describe_left_out, refuse_unreadable
from rrcm.data.shards import BLOCK, LABEL, FileEntry, Manifest, Shard, Split
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import atomic_directory, sha256_file, write_text
from rrcm.utils.progress import Progress
from rrcm.utils.rng import numpy_rng

KEPT = {b"\xff\xd8": "jpg", b"\x89PNG": "png"}  # by content: ImageNet has a PNG file named .JPEG


def write_shards(data: Data, seed: int, output: Path) -> None:
    """Read the raw data set and write its shards to the folder `output`.

    The folder is swapped in when it is complete. Train and val are shuffled by the seed; test keeps its order, so
    "every k-th test image" is well defined. Every image file is decoded once. `data.workers` threads do the work, since
    reading, decoding and compressing release Python's lock; their number does not change the bytes.

    Prints what was left out. Raises `RRCMError` after naming all unreadable images, or if no class has two training
    images.
    """
    dataset = read_dataset(data)
    train, val = stratified_split(dataset.train.labels, data.val_fraction, numpy_rng(seed, "validation split"))
    if not len(val):
        raise RRCMError(f"data.root {data.root}: no class has a second training image for validation; add images")
    order = numpy_rng(seed, "shard order")
    splits = {
        "train": (dataset.train, order.permutation(train)),
        "val": (dataset.train, order.permutation(val)),
        "test": (dataset.test, np.arange(len(dataset.test.labels))),
    }
    total = sum(len(rows) for _, rows in splits.values())
    written, unreadable = {}, []
    with atomic_directory(output) as folder:
        with Progress(total, "shard-data", "images") as progress, ThreadPoolExecutor(max(1, data.workers)) as pool:
            for name, (split, rows) in splits.items():
                shard_rows = np.split(rows, range(data.shard_size, len(rows), data.shard_size))
                paths = [folder / f"{name}-{number:05d}.tar" for number in range(len(shard_rows))]
                shards, indices = [], []
                for shard, index, failures in pool.map(_write_shard, paths, repeat(split), shard_rows):
                    progress.update(len(index) + len(failures))
                    shards.append(shard)
                    indices.append(index)
                    unreadable += failures
                index, path = np.concatenate(indices), folder / f"{name}.index.npy"
                np.save(path, index)
                counts = np.bincount(index[:, LABEL], minlength=len(dataset.classes)).tolist()
                written[name] = Split(counts=counts, index=FileEntry(**_file_entry(path)), shards=shards)
        if unreadable:
            refuse_unreadable(sorted(unreadable), total, "replace or remove them")
        manifest = Manifest(
            format="rrcm-shards-1",
            source=data.source,
            seed=seed,
            channels=data.channels,
            image_size=data.image_size,
            classes=dataset.classes,
            class_order=dataset.class_order,
            left_out={reason: count for reason, count in sorted(dataset.left_out.items()) if count} or None,
            splits=written,
        )
        write_text(folder / "manifest.json", manifest.model_dump_json(indent=1, exclude_none=True) + "\n")
    if manifest.left_out:
        print(f"note: left out {describe_left_out(manifest.left_out)}", file=sys.stderr)


def _file_entry(path: Path) -> dict[str, str | int]:
    """The fields of a `FileEntry`."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_shard(path: Path, split: RawSplit, rows: np.ndarray) -> tuple[Shard, np.ndarray, list[str]]:
    """Write one tar file with the given rows.

    Returns its manifest entry, its part of the index, and one message per unreadable image.
    """
    from webdataset import TarWriter  # slow to import

    index, failures = [], []
    with path.open("wb") as file, TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as writer:
        for row in rows.tolist():
            label = int(split.labels[row])
            try:
                extension, content = _encode(split.images[row])
            except RRCMError as error:
                failures.append(str(error))
                continue
            writer.write({"__key__": f"{row:08d}", "cls": str(label).encode(), extension: content})
            end = writer.tarstream.offset  # members are sorted: cls, then the image
            index.append((end - math.ceil(len(content) / BLOCK) * BLOCK - BLOCK, len(content), label, row))
    return Shard(**_file_entry(path), samples=len(index)), np.array(index, np.int64).reshape(-1, 4), failures


def _encode(image: np.ndarray | Path) -> tuple[str, bytes]:
    """Extension and bytes of an image. JPEG and PNG files are kept as they are, others become PNG without loss."""
    if isinstance(image, np.ndarray):
        return "png", _png(Image.fromarray(image))
    try:
        content = image.read_bytes()
        picture = decode_image(content)  # all of it: a truncated file opens without an error
    except (OSError, ValueError) as error:
        raise RRCMError(f"{printable(image)}: cannot be decoded ({one_line(error)})") from None
    kind = next((kind for magic, kind in KEPT.items() if content.startswith(magic)), None)
    return (kind, content) if kind else ("png", _png(picture))


def _png(image: Image.Image) -> bytes:
    """The image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
