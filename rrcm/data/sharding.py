"""TODO docstring."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from rrcm.config import Data
from rrcm.data.datasets import RawSplit, read_dataset, stratified_split
from rrcm.data.shards import BLOCK, LABEL, File, Manifest, Shard, Split, _line
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, sha256_file, write_text
from rrcm.utils.progress import Progress
from rrcm.utils.rng import numpy_rng

EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr"}


def write_shards(data: Data, seed: int, output: Path) -> None:
    """Read the source and write its shards to the folder `output`, which is swapped in when whole.

    Train and val are shuffled by the seed; test keeps the source's order, so "every k-th test image" is well defined.
    The bytes depend on the source, `data` and the seed, not on `data.workers` (threads here: reading, decoding and
    compressing release Python's lock). Every image file is decoded once: raises `RRCMError` naming the first that
    fails and how many others do.
    """
    source = read_dataset(data)
    train, val = stratified_split(source.train.labels, data.val_fraction, numpy_rng(seed, "validation split"))
    if not len(val):
        raise RRCMError(f"data.root {data.root}: no class has a second training image to validate on; add images")
    order = numpy_rng(seed, "shard order")
    splits = {
        "train": (source.train, order.permutation(train)),
        "val": (source.train, order.permutation(val)),
        "test": (source.test, np.arange(len(source.test.labels))),
    }
    total = sum(len(rows) for _, rows in splits.values())
    written, unreadable = {}, []
    with atomic_directory(output) as folder:
        with Progress(total, "shard-data", "images") as progress, ThreadPoolExecutor(max(1, data.workers)) as pool:
            for split, (records, rows) in splits.items():
                parts = np.split(rows, range(data.shard_size, len(rows), data.shard_size))
                paths = [folder / f"{split}-{number:05d}.tar" for number in range(len(parts))]
                shards, tables = [], []
                for shard, table, failures in pool.map(_write_shard, paths, repeat(records), parts):
                    progress.update(len(table) + len(failures))
                    shards.append(shard)
                    tables.append(table)
                    unreadable += failures
                index = folder / f"{split}.index.npy"
                table = np.concatenate(tables)
                np.save(index, table)
                counts = np.bincount(table[:, LABEL], minlength=len(source.classes)).tolist()
                written[split] = Split(counts=counts, index=File(**_described(index)), shards=shards)
        if unreadable:
            others = f" (and {len(unreadable) - 1} other files)" if len(unreadable) > 1 else ""
            raise RRCMError(f"{unreadable[0]}{others}")
        manifest = Manifest(
            format="rrcm-shards-1",
            source=data.source,
            seed=seed,
            channels=data.channels,
            image_size=data.image_size,
            classes=source.classes,
            splits=written,
        )
        write_text(folder / "manifest.json", manifest.model_dump_json(indent=1) + "\n")


def _described(path: Path) -> dict[str, str | int]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_shard(path: Path, records: RawSplit, rows: np.ndarray) -> tuple[Shard, np.ndarray, list[str]]:
    """One tar of the given rows: its manifest entry, its part of the index, and complaints about unreadable images."""
    from webdataset import TarWriter  # seconds of import that reading shards need not pay

    table, failures = [], []
    with path.open("wb") as file, TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as writer:
        for row in rows.tolist():
            label = int(records.labels[row])
            try:
                extension, content = _encode(records.images[row])
            except RRCMError as error:
                failures.append(str(error))
                continue
            writer.write({"__key__": f"{row:08d}", "cls": str(label).encode(), extension: content})
            end = writer.tarstream.offset  # members are sorted: cls, then the image
            table.append((end - math.ceil(len(content) / BLOCK) * BLOCK - BLOCK, len(content), label, row))
    return Shard(**_described(path), samples=len(table)), np.array(table, np.int64).reshape(-1, 4), failures


def _encode(image: np.ndarray | Path) -> tuple[str, bytes]:
    """Extension and bytes of a sample's image: JPEG and PNG files as they are, all else as PNG, without loss."""
    if isinstance(image, np.ndarray):
        return "png", _png(Image.fromarray(image))
    try:
        content = image.read_bytes()
        with Image.open(io.BytesIO(content)) as decoded:
            decoded.load()  # all of it: a file cut short opens well
            kind = decoded.format  # by content: ImageNet has PNG files named .JPEG
            if decoded.mode not in EIGHT_BIT:
                raise ValueError(f"pixels of mode {decoded.mode}, not 8 bits a channel")
            if kind in ("JPEG", "MPO"):
                return "jpg", content
            return "png", content if kind == "PNG" else _png(decoded)
    except Exception as error:  # decoders raise anything on damaged files
        raise RRCMError(f"{image}: cannot be decoded ({_line(error)}); replace or remove it") from None


def _png(image: Image.Image) -> bytes:
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):  # those PNG does not know
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
