"""Write a data set as shards: WebDataset tar files with an index and a manifest. shards.py describes and reads them.

The bytes depend only on the raw data set, the settings and the seed.
"""

import hashlib
import io
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import ValidationError

from rrcm.config import Data
from rrcm.data.datasets import RawDataset, RawSplit, read_dataset
from rrcm.data.images import decode_image, read_image, refuse_unreadable, to_channels
from rrcm.data.shards import BLOCK, LABEL, FileEntry, Manifest, Shard, Split, first_complaint
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import atomic_directory, sha256_file, write_text
from rrcm.utils.progress import Progress
from rrcm.utils.rng import numpy_rng

TEST_FRACTION = 0.2  # for data sets without an official test set
KEPT = {b"\xff\xd8": "jpg", b"\x89PNG": "png"}  # by content: ImageNet has a PNG file named .JPEG


def write_shards(data: Data, seed: int, output: Path) -> None:
    """Read the raw data set and write its shards to the folder `output`.

    The folder is swapped in when it is complete. Train and val are shuffled by the seed. Test keeps its order, so that
    "every k-th test image" is well defined. Every image file is decoded once before anything is written; this shows
    which files cannot be read and which images are duplicates. `data.workers` threads do the work, since reading,
    decoding and compressing release Python's lock. Their number does not change the bytes.

    Prints what was left out and how many images occur more than once. Raises `RRCMError` after naming all unreadable
    images, if no class has two training images, or if every test image is also a training image.
    """
    dataset = read_dataset(data)
    with ThreadPoolExecutor(max(1, data.workers)) as pool:
        dataset, images = split_off_test(dataset, identify_images(dataset, data, pool))
        splits, left_out, repeated = _split(dataset, images, data, seed)
        with atomic_directory(output) as folder:
            written = _write_splits(folder, splits, dataset.classes, data.shard_size, pool)
            try:
                manifest = Manifest(
                    format="rrcm-shards-1",
                    source=data.source,
                    seed=seed,
                    channels=data.channels,
                    image_size=data.image_size,
                    classes=dataset.classes,
                    class_order=dataset.class_order,
                    left_out=_sorted_counts({**dataset.left_out, **left_out}),
                    repeated=_sorted_counts(repeated),
                    splits=written,
                )
            except ValidationError as error:  # the reader may come from another package
                raise RRCMError(f"data.source {data.source}: {first_complaint(error)}; correct its reader") from None
            write_text(folder / "manifest.json", manifest.model_dump_json(indent=1, exclude_none=True) + "\n")
    for note in manifest.notes:
        print(f"note: {note}", file=sys.stderr)


def stratified_split(
    labels: np.ndarray, images: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows 0..N-1 into two ascending arrays (kept, split_off) by the labels (N,).

    From each class, `fraction` of the images is split off: at least one, but never all. Rows with the same number in
    `images` (N,) are copies of one image. They stay together, and the label of the first one counts.
    """
    first = np.sort(np.unique(images, return_index=True)[1])
    split_off = []
    for label in np.unique(labels[first]):
        rows = first[labels[first] == label]
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        split_off.append(rng.permutation(rows)[:count])
    is_split_off = np.isin(images, images[np.concatenate(split_off)])
    return np.flatnonzero(~is_split_off), np.flatnonzero(is_split_off)


def identify_images(dataset: RawDataset, data: Data, pool: ThreadPoolExecutor) -> np.ndarray:
    """For each image of train, then of test, the position of the first image with the same pixels: int64 (N,).

    Raises `RRCMError` after naming all unreadable images.
    """
    parts = [
        (split, rows)
        for split in (dataset.train, dataset.test)
        if split is not None
        for rows in _in_shards(np.arange(len(split.labels)), data.shard_size)
    ]
    digests, unreadable = [], []
    total = sum(len(rows) for _, rows in parts)
    with Progress(total, "compare images", "images") as progress:
        for hashes, failures in pool.map(_hash_pixels, *zip(*parts, strict=True), repeat(data.channels)):
            progress.update(len(hashes) + len(failures))
            digests += hashes
            unreadable += failures
    if unreadable:
        refuse_unreadable(sorted(unreadable), total, "replace or remove them")
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(digest, position) for position, digest in enumerate(digests)])


def _hash_pixels(split: RawSplit, rows: np.ndarray, channels: int) -> tuple[list[bytes], list[str]]:
    """Hashes of the pixels, as a network sees them, for the readable images of `rows`; messages for the others."""
    digests, failures = [], []
    for row in rows.tolist():
        image = split.images[row]
        try:
            picture = Image.fromarray(image) if isinstance(image, np.ndarray) else read_image(image, channels)
        except RRCMError as error:
            failures.append(str(error))
            continue
        pixels = to_channels(picture, channels).tobytes()
        digests.append(hashlib.sha256(b"%d %d " % picture.size + pixels).digest())
    return digests, failures


def split_off_test(dataset: RawDataset, images: np.ndarray) -> tuple[RawDataset, np.ndarray]:
    """Split test images off the training images if the data set has none. Returns it, and `images` in its new order.

    `images` comes from `identify_images`. The test images are the same for every seed, so that seeds can be compared.
    """
    train = dataset.train
    if dataset.test is not None:
        return dataset, images
    rows = stratified_split(train.labels, images, TEST_FRACTION, numpy_rng(0, "test split"))
    train, test = (RawSplit(train.images[part], train.labels[part]) for part in rows)
    return dataset._replace(train=train, test=test), images[np.concatenate(rows)]


def _split(
    dataset: RawDataset, images: np.ndarray, data: Data, seed: int
) -> tuple[dict[str, tuple[RawSplit, np.ndarray]], dict[str, int], dict[str, int]]:
    """The raw images and rows of train, val and test, and the numbers of images left out and of duplicates."""
    train, test = dataset.train, dataset.test
    in_train, in_test = np.split(images, [len(train.labels)])
    kept, val = stratified_split(train.labels, in_train, data.val_fraction, numpy_rng(seed, "validation split"))
    if not len(val):
        raise RRCMError(f"data.root {data.root}: no class has a second training image for validation; add images")
    trained_on = np.isin(in_test, in_train)
    tested = np.flatnonzero(~trained_on | dataset.published)
    if not len(tested):
        raise RRCMError(f"data.root {data.root}: every test image is a training image too; give it other test images")
    both = {"test images that are training images too": int(trained_on.sum())}
    repeated = {
        "images in several classes": _count_several_classes(images, np.concatenate([train.labels, test.labels])),
        "copies among the training images": len(in_train) - len(np.unique(in_train)),
        "copies among the test images": len(tested) - len(np.unique(in_test[tested])),
    }
    order = numpy_rng(seed, "shard order")
    splits = {
        "train": (train, order.permutation(kept)),
        "val": (train, order.permutation(val)),
        "test": (test, tested),
    }
    return (splits, {}, repeated | both) if dataset.published else (splits, both, repeated)


def _count_several_classes(images: np.ndarray, labels: np.ndarray) -> int:
    """The number of different images (by `identify_images`) that have several labels."""
    _, first, number = np.unique(images, return_index=True, return_inverse=True)
    return len(np.unique(number[labels != labels[first][number]]))


def _sorted_counts(counts: Mapping[str, int]) -> dict[str, int] | None:
    """The counts above 0, by name; None if there are none."""
    return {name: count for name, count in sorted(counts.items()) if count} or None


def _in_shards(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """The rows of each shard."""
    return np.split(rows, range(size, len(rows), size))


def _write_splits(
    folder: Path,
    splits: Mapping[str, tuple[RawSplit, np.ndarray]],
    classes: Sequence[str],
    shard_size: int,
    pool: ThreadPoolExecutor,
) -> dict[str, Split]:
    """Write tar files and an index for the rows of each split; returns their entries in the manifest."""
    written = {}
    with Progress(sum(len(rows) for _, rows in splits.values()), "shard-data", "images") as progress:
        for name, (split, rows) in splits.items():
            parts = _in_shards(rows, shard_size)
            paths = [folder / f"{name}-{number:05d}.tar" for number in range(len(parts))]
            shards, indices = [], []
            for shard, index in pool.map(_write_shard, paths, repeat(split), parts):
                progress.update(len(index))
                shards.append(shard)
                indices.append(index)
            index, path = np.concatenate(indices), folder / f"{name}.index.npy"
            np.save(path, index)
            counts = np.bincount(index[:, LABEL], minlength=len(classes)).tolist()
            written[name] = Split(counts=counts, index=FileEntry(**_file_entry(path)), shards=shards)
    return written


def _file_entry(path: Path) -> dict[str, str | int]:
    """The fields of a `FileEntry`."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _write_shard(path: Path, split: RawSplit, rows: np.ndarray) -> tuple[Shard, np.ndarray]:
    """Write one tar file with the given rows. Returns its manifest entry and its part of the index."""
    from webdataset import TarWriter  # slow to import

    index = []
    with path.open("wb") as file, TarWriter(file, "", "", 0o644, encoder=False, mtime=0) as writer:
        for row in rows.tolist():
            label = int(split.labels[row])
            extension, content = _encode(split.images[row])
            writer.write({"__key__": f"{row:08d}", "cls": str(label).encode(), extension: content})
            end = writer.tarstream.offset  # members are sorted: cls, then the image
            index.append((end - math.ceil(len(content) / BLOCK) * BLOCK - BLOCK, len(content), label, row))
    return Shard(**_file_entry(path), samples=len(index)), np.array(index, np.int64)


def _encode(image: np.ndarray | Path) -> tuple[str, bytes]:
    """Extension and bytes of an image. JPEG and PNG files are copied; all others are converted to PNG without loss."""
    if isinstance(image, np.ndarray):
        return "png", _png(Image.fromarray(image))
    try:
        content = image.read_bytes()
        kind = next((kind for magic, kind in KEPT.items() if content.startswith(magic)), None)
        return (kind, content) if kind else ("png", _png(decode_image(content)))
    except (OSError, ValueError) as error:
        raise RRCMError(f"{printable(image)}: cannot be decoded ({one_line(error)})") from None


def _png(image: Image.Image) -> bytes:
    """The image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
