"""Read the shards of a data set by random access, from a folder or a URL. sharding.py writes them.

A shard folder contains WebDataset tar files `<split>-00000.tar ...`, `<split>.index.npy` and `manifest.json`. A sample
consists of `<key>.jpg` or `<key>.png`, and `<key>.cls` (ASCII label). The key is the position of the sample in the raw
data set; train and val share the positions of the raw training images. The index is int64 (N, 4), with one row per
sample: byte offset of the image's tar header in its shard, size of the image in bytes, label, key.
"""

import hashlib
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from rrcm.data.augment import centre_crop, to_array
from rrcm.data.images import decode_image, describe_left_out, natural_order, to_channels
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import HINTS, atomic_path, lock_file, sha256_file, writing
from rrcm.utils.registry import Registry

OFFSET, SIZE, LABEL, KEY = range(4)  # columns of the index
BLOCK = 512  # size of a tar block in bytes
OPEN_SHARDS = 128  # file handles kept open; twice as many as training reads from at a time
DECODED_BYTES = 256 * 2**20  # each process keeps a split that fits into this decoded in memory
DOWNLOAD_PAUSES = (1.0, 5.0)  # seconds before the second and the third attempt
RERUN_HINT = "run shard-data again (dvc repro shard-data)"
# Class names of published data sets; labels are indices into them.
CLASSES = Registry({name: f"rrcm.sources.{name}:CLASSES" for name in ("digits", "fashion_mnist", "cifar10")})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[a-z]+(-\d{5,}\.tar|\.index\.npy)$")]  # no path out of the folder
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(_Strict):
    """A file of the shard folder, with its size in bytes and its hash."""

    name: Name
    bytes: PositiveInt
    sha256: Sha256


class Shard(FileEntry):
    """A tar file and its number of samples."""

    samples: PositiveInt


class Split(_Strict):
    """Files of `train`, `val` or `test`."""

    counts: list[NonNegativeInt]  # images per class
    index: FileEntry
    shards: Annotated[list[Shard], Field(min_length=1)]


class Manifest(_Strict):
    """manifest.json: the files with their hashes, the class names, and the settings that the shards were written with.

    An inconsistent manifest is refused.
    """

    format: Literal["rrcm-shards-1"]
    source: str
    seed: int
    channels: Literal[1, 3]
    image_size: PositiveInt
    classes: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]
    class_order: Literal["natural"] | None = None  # of class folders: 2 before 10; None: the data set has its own order
    left_out: dict[str, PositiveInt] | None = None  # number of files and images that are in no split, by reason
    repeated: dict[str, PositiveInt] | None = None  # number of images that occur more than once, by kind
    splits: dict[Literal["train", "val", "test"], Split]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.class_order == "natural" and self.classes != sorted(set(self.classes), key=natural_order):
            raise ValueError("classes are not in natural order")
        if self.classes != CLASSES.get(self.source, self.classes):
            raise ValueError(f"classes differ from the classes of {self.source}")
        for name, split in self.splits.items():
            files = [split.index, *split.shards]
            if len(split.counts) != len(self.classes):
                raise ValueError(f"{name} counts {len(split.counts)} classes, but there are {len(self.classes)}")
            if sum(split.counts) != sum(shard.samples for shard in split.shards):
                raise ValueError(f"{name} counts other numbers of images than its shards")
            if any(re.split("[-.]", file.name)[0] != name for file in files):
                raise ValueError(f"{name} has files of another split")
        hashes = [shard.sha256 for split in self.splits.values() for shard in split.shards]
        if len(set(hashes)) < len(hashes):
            raise ValueError("two shards are the same")
        return self

    @property
    def notes(self) -> list[str]:
        """What readers of results should know about the data, one line each."""
        said = {"train": "training", "val": "validation", "test": "test"}
        missing = {
            said[name]: [printable(self.classes[k]) for k, count in enumerate(split.counts) if not count]
            for name, split in self.splits.items()
        }
        return [
            *([f"left out {describe_left_out(self.left_out)}"] if self.left_out else []),
            *([f"kept {describe_left_out(self.repeated)}"] if self.repeated else []),
            *(
                f"{len(names):,} of {len(self.classes):,} classes have no {name} images: "
                f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"
                for name, names in missing.items()
                if names
            ),
        ]


class ShardedDataset:
    """One split of a shard folder, with random access.

    root: a folder, or a URL that fsspec can read (http, https, s3, ...). Each remote file is downloaded once as a
    whole, checked against the manifest, and cached by its hash in `cache` (default ~/.cache/rrcm), so a stale file is
    never used. HTTP uses the proxy in http_proxy, https_proxy and no_proxy. Objects can be pickled and forked into
    loader workers, but threads cannot share them. Every `RRCMError` names the file.
    """

    def __init__(self, root: str | Path, split: str, cache: Path | None = None):
        self.root = str(root).rstrip("/")
        self.remote = "://" in self.root
        self.cache = cache or (_cache_folder() if self.remote else None)
        self.manifest = _read_manifest(f"{self.root}/manifest.json", self.remote)
        if split not in self.manifest.splits:
            raise RRCMError(f"{self.root}: has no split {split}; it has {', '.join(self.manifest.splits)}")
        self.split = self.manifest.splits[split]
        self.classes, self.channels = self.manifest.classes, self.manifest.channels
        self.image_size = self.manifest.image_size
        self.shard_sizes = [shard.samples for shard in self.split.shards]
        self.index = self._read_index()
        self.starts = np.cumsum([0, *self.shard_sizes[:-1]])
        self.labelled: np.ndarray | None = None  # rows that a training of classifiers is limited to; None: all
        self.small = len(self) * self.channels * self.image_size**2 <= DECODED_BYTES
        self._files: dict[int, BinaryIO] = {}
        self._decoded: dict[int, Image.Image] = {}
        self._decoded_bytes = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest. The manifest contains the hash of every shard, so this identifies the exact data."""
        return hashlib.sha256(self.manifest.model_dump_json(exclude_none=True).encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        """Labels, int64 (N,), in the order of the split."""
        return self.index[:, LABEL]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}, "_decoded": {}, "_decoded_bytes": 0}

    def read(self, i: int) -> tuple[Image.Image, int, str]:
        """Image i, its label and its key. The image has mode L or RGB. It is shared, so do not change it in place."""
        _, _, label, key = self.index[i].tolist()
        image = self._decoded.get(i)
        if image is None:
            image = self._decode(i)
            if self.small and self._decoded_bytes < DECODED_BYTES:  # stored images may exceed image_size
                self._decoded[i] = image
                self._decoded_bytes += image.width * image.height * self.channels + 1024  # plus the object itself
        return image, label, f"{key:08d}"

    def complaint(self, shard: Shard) -> str | None:
        """One line on what is wrong with the size or hash of a local shard, or None.

        Remote shards are checked when they are downloaded.
        """
        try:
            if not self.remote:
                _check(self._local(shard), shard)
        except RRCMError as error:
            return str(error)
        except OSError as error:
            return f"{self._local(shard)}: cannot be read ({error.strerror}); correct that, or {RERUN_HINT}"

    def _read_index(self) -> np.ndarray:
        entry = self.split.index
        path = self._local(entry)
        _check(path, entry)
        index = np.load(path, allow_pickle=False)
        if index.dtype != np.int64 or index.shape != (sum(self.shard_sizes), 4) or not self._is_possible(index):
            raise RRCMError(f"{path}: does not fit manifest.json; {RERUN_HINT}")
        return index

    def _is_possible(self, index: np.ndarray) -> bool:
        """Whether an index fits the manifest: images lie inside their shards, counts per class agree, keys differ."""
        ends = np.repeat([shard.bytes - BLOCK for shard in self.split.shards], self.shard_sizes)
        sizes, labels = index[:, SIZE], index[:, LABEL]
        if index.min() < 0 or (sizes > ends).any() or (index[:, OFFSET] > ends - sizes).any():
            return False
        counts = np.bincount(labels, minlength=len(self.classes)) if labels.max() < len(self.classes) else []
        return list(counts) == self.split.counts and len(np.unique(index[:, KEY])) == len(index)

    def _local(self, entry: FileEntry) -> Path:
        """The path of a file on this machine. A remote file that is not cached is downloaded first."""
        if not self.remote:
            return Path(self.root) / entry.name
        path = self.cache / f"{entry.sha256}{Path(entry.name).suffix}"
        if not path.exists():
            with writing(self.cache, "or set XDG_CACHE_HOME to another folder"):
                self.cache.mkdir(parents=True, exist_ok=True)
                lock = path.with_suffix(".lock").open("w")
            with lock:
                lock_file(lock, wait=True)  # several loader workers may need the same shard
                if not path.exists():
                    _download(f"{self.root}/{entry.name}", path, entry)
        return path

    def _open(self, shard: int) -> BinaryIO:
        file = self._files.get(shard)
        if file is None:
            entry = self.split.shards[shard]
            path = self._local(entry)
            _check_size(path, entry)
            if len(self._files) == OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[shard] = path.open("rb", buffering=0)
        return file

    def _decode(self, i: int) -> Image.Image:
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        offset, size, _, key = self.index[i].tolist()
        file = self._open(shard)
        content = os.pread(file.fileno(), BLOCK + size, offset)  # pread: forked workers share no file position
        try:
            header = tarfile.TarInfo.frombuf(content[:BLOCK], "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise RRCMError(f"{file.name}: no tar header at byte {offset} ({error}): damaged; {RERUN_HINT}") from None
        if header.size != size or Path(header.name).stem != f"{key:08d}":
            raise RRCMError(
                f"{file.name}: holds {header.name} where {key:08d} should be: from another run; {RERUN_HINT}"
            )
        try:
            return to_channels(decode_image(content[BLOCK:]), self.channels)
        except ValueError as error:
            raise RRCMError(
                f"{file.name}: sample {key:08d} cannot be decoded ({one_line(error)}); {RERUN_HINT}"
            ) from None


def read_split(
    images: ShardedDataset, size: int, every: int = 1, limit: int | None = None, part: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Read those images of a split that `choose_rows` selects.

    Returns pixels uint8 (N, C, size, size), labels int64 (N,) and the indices of the images in the split.
    """
    rows = choose_rows(len(images), every, limit, part)
    return read_pixels(images, size, rows), torch.from_numpy(images.labels[rows]), rows


def choose_rows(count: int, every: int = 1, limit: int | None = None, part: int | None = None) -> list[int]:
    """Every `every`-th of `count` rows, thinned out evenly to at most `limit`, and then to at most `part` of them."""
    rows = np.arange(0, count, every)
    for most in (limit, part):
        rows = rows[evenly_spaced(len(rows), most)]
    return rows.tolist()


def evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of 0..count - 1, as int64. They are evenly spaced, because images may be sorted by class."""
    return np.linspace(0, count - 1, min(count, limit or count)).astype(np.int64)


def read_pixels(images: ShardedDataset, size: int, rows: Sequence[int]) -> torch.Tensor:
    """The centre crops of the images `rows`: uint8 (len(rows), C, size, size)."""
    pixels = torch.empty((len(rows), images.channels, size, size), dtype=torch.uint8)
    for target, row in zip(pixels, rows, strict=True):
        target.copy_(torch.from_numpy(to_array(centre_crop(images.read(row)[0], size)).copy()))
    return pixels


def _cache_folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rrcm"
    except RuntimeError:  # neither HOME nor a passwd entry
        raise RRCMError(
            "remote shards need a folder for their cache, but HOME is not set; set XDG_CACHE_HOME"
        ) from None


def read_manifest(root: str | Path) -> Manifest:
    """The manifest of a shard folder or URL. Raises `RRCMError` if it cannot be read."""
    root = str(root).rstrip("/")
    return _read_manifest(f"{root}/manifest.json", "://" in root)


def _read_manifest(location: str, remote: bool) -> Manifest:
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest.json" if remote else Path(location)
            if remote:  # never cached, because it decides which cached files are valid
                _fetch(location, path)
            content = path.read_bytes()
    except OSError as error:
        raise RRCMError(f"{location}: cannot be read ({one_line(error)}); correct it, or {RERUN_HINT}") from None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        raise RRCMError(f"{location}: not a shard manifest ({first_complaint(error)}); {RERUN_HINT}") from None


def first_complaint(error: ValidationError) -> str:
    """The first error in a manifest, and where it is."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise RRCMError(f"{path}: shard is missing; {RERUN_HINT}, or run dvc pull") from None
    if size != entry.bytes:
        raise RRCMError(
            f"{path}: has {size} bytes, manifest.json says {entry.bytes}: truncated or from another run; {RERUN_HINT}"
        )


def _check(path: Path, entry: FileEntry) -> None:
    _check_size(path, entry)
    if sha256_file(path) != entry.sha256:
        raise RRCMError(f"{path}: does not match its hash in manifest.json: damaged or from another run; {RERUN_HINT}")


def _download(url: str, path: Path, entry: FileEntry) -> None:
    """Download a file of the manifest to `path`, atomically, and check its size and hash.

    Several processes may do so at once where locks do not work, for example on different machines.
    """
    with atomic_path(path) as scratch:
        try:
            _fetch(url, scratch)
        except OSError as error:
            if error.errno in HINTS:
                raise
            raise RRCMError(
                f"{url}: download failed ({one_line(error)}); check the address and any proxy, and run again"
            ) from None
        if scratch.stat().st_size != entry.bytes or sha256_file(scratch) != entry.sha256:
            raise RRCMError(
                f"{url}: does not match manifest.json: damaged or from another run; upload the shards again"
            )


def _fetch(url: str, path: Path) -> None:
    """Copy a remote file to `path`, in up to three attempts. Raises OSError if all fail."""
    import fsspec

    through_proxy = {"client_kwargs": {"trust_env": True}}  # respects http_proxy etc.; other protocols do so themselves
    options = through_proxy if url.partition("://")[0] in ("http", "https") else {}
    for pause in (*DOWNLOAD_PAUSES, None):
        try:
            system, remote_path = fsspec.url_to_fs(url, **options)
            system.get_file(remote_path, str(path))
            return
        except (ImportError, ValueError) as error:  # an unknown protocol, or its package is not installed
            raise RRCMError(
                f"{url}: cannot be opened ({one_line(error)}); correct the address, any proxy, or install the package"
            ) from None
        except Exception as error:  # each protocol raises its own exceptions
            if isinstance(error, OSError) and error.errno in HINTS:  # a problem of this machine, such as a full disk
                raise
            if pause is None or isinstance(error, FileNotFoundError):
                raise OSError(one_line(error)) from error
            time.sleep(pause)
