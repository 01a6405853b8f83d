"""WebDataset tar shards of a data set: written deterministically, read by random access from a folder or a URL.

A shard folder holds `<split>-00000.tar ...`, `<split>.index.npy` and `manifest.json`. A sample is `<key>.jpg` or
`<key>.png` plus `<key>.cls` (ASCII label); its key is its place in the source's own order (train and val share the
source's train). The index is int64 (N, 4), a row a sample: byte offset of the image's tar header in its shard, bytes of
the image, label, key.
"""

import fcntl
import hashlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrcm.data.augment import centre_crop, to_array
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path, sha256_file

OFFSET, SIZE, LABEL, KEY = range(4)  # columns of the index
BLOCK = 512  # tar's unit
OPEN_SHARDS = 128  # file handles a reader keeps; twice what a training reads from at a time
DECODED_BYTES = 256 * 2**20  # a split that fits into this is kept decoded, by each process
DOWNLOAD_PAUSES = (1.0, 5.0)  # seconds before the second and the third try
REDO = "run shard-data again (dvc repro shard-data)"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[a-z]+(-\d{5,}\.tar|\.index\.npy)$")]  # no way out of the folder
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(_Strict):
    name: Name
    bytes: int
    sha256: Sha256


class Shard(File):
    samples: int


class Split(_Strict):
    counts: list[int]  # images of each class
    index: File
    shards: Annotated[list[Shard], Field(min_length=1)]


class Manifest(_Strict):
    """manifest.json. `seed` and `source` say where the shards come from."""

    format: Literal["rrcm-shards-1"]
    source: str
    seed: int
    channels: Literal[1, 3]
    image_size: int
    classes: list[str]
    splits: dict[Literal["train", "val", "test"], Split]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class ShardedDataset:
    """One split of a shard folder, by random access.

    root: a folder or a URL (http, https, s3, ... whatever fsspec reads). Files behind a URL are downloaded whole, once,
    checked against the manifest and kept in `cache` (default ~/.cache/rrcm) under their hash, so no stale one is used.
    May be pickled and forked into loader workers; threads must not share one. Every `RRCMError` names the file.
    """

    def __init__(self, root: str | Path, split: str, cache: Path | None = None):
        self.root = str(root).rstrip("/")
        self.remote = "://" in self.root
        self.cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rrcm"
        self.manifest = _read_manifest(f"{self.root}/manifest.json", self.remote)
        if split not in self.manifest.splits:
            raise RRCMError(f"{self.root}: has no split {split}; it has {', '.join(self.manifest.splits)}")
        self.split = self.manifest.splits[split]
        self.classes, self.channels = self.manifest.classes, self.manifest.channels
        self.image_size = self.manifest.image_size
        self.index = self._read_index()
        self.shard_sizes = [shard.samples for shard in self.split.shards]
        self.starts = np.cumsum([0, *self.shard_sizes[:-1]])
        self.small = len(self) * self.channels * self.image_size**2 <= DECODED_BYTES
        self._files: dict[int, BinaryIO] = {}
        self._decoded: dict[int, Image.Image] = {}
        self._decoded_bytes = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which has the hash of every shard: names the data set's exact bytes."""
        return hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        return self.index[:, LABEL]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}, "_decoded": {}, "_decoded_bytes": 0}

    def read(self, i: int) -> tuple[Image.Image, int, str]:
        """Image i in mode L or RGB (shared: do not change it in place), its label and its key."""
        _, _, label, key = self.index[i].tolist()
        image = self._decoded.get(i)
        if image is None:
            image = self._decode(i)
            if self.small and self._decoded_bytes < DECODED_BYTES:  # stored images may be larger than image_size
                self._decoded[i] = image
                self._decoded_bytes += image.width * image.height * self.channels + 1024  # and the object itself
        return image, label, f"{key:08d}"

    def verify(self) -> None:
        """Check that every local shard of the split is there and has its size and hash.

        Behind a URL there is nothing to do yet: a shard is checked when a read first downloads it.
        """
        if self.remote:
            return

        def complaint(shard: Shard) -> str | None:
            try:
                _check(self._local(shard), shard)
            except RRCMError as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            complaints = [c for c in pool.map(complaint, self.split.shards) if c]
        if complaints:
            others = f" (and {len(complaints) - 1} other shards)" if len(complaints) > 1 else ""
            raise RRCMError(complaints[0] + others)

    def _read_index(self) -> np.ndarray:
        entry = self.split.index
        path = self._local(entry)
        _check(path, entry)
        index = np.load(path, allow_pickle=False)
        if index.dtype != np.int64 or index.shape != (sum(shard.samples for shard in self.split.shards), 4):
            raise RRCMError(f"{path}: does not fit manifest.json; {REDO}")
        return index

    def _local(self, entry: File) -> Path:
        """The file on this machine, downloaded if need be."""
        if not self.remote:
            return Path(self.root) / entry.name
        path = self.cache / f"{entry.sha256}{Path(entry.name).suffix}"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # loader workers want the same shard at the same time
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
        content = os.pread(file.fileno(), BLOCK + size, offset)  # no shared position: forked workers cannot collide
        try:
            header = tarfile.TarInfo.frombuf(content[:BLOCK], "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise RRCMError(f"{file.name}: no tar header at byte {offset} ({error}): damaged; {REDO}") from None
        if header.size != size or Path(header.name).stem != f"{key:08d}":
            raise RRCMError(f"{file.name}: holds {header.name} where {key:08d} should be: of another run; {REDO}")
        try:
            with Image.open(io.BytesIO(content[BLOCK:])) as image:
                return image.convert("L" if self.channels == 1 else "RGB")
        except Exception as error:  # decoders raise anything on damaged bytes
            raise RRCMError(f"{file.name}: sample {key:08d} cannot be decoded ({_line(error)}); {REDO}") from None


def read_split(
    images: ShardedDataset, size: int, every: int = 1, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Every k-th image of a split, at most `limit`: uint8 (N, C, size, size), int64 labels (N,), their indices."""
    rows = list(range(0, len(images), every)[:limit])
    return read_pixels(images, size, rows), torch.from_numpy(images.labels[rows]), rows


def read_pixels(images: ShardedDataset, size: int, rows: Sequence[int]) -> torch.Tensor:
    """The central squares of images: uint8 (len(rows), C, size, size)."""
    pixels = torch.empty((len(rows), images.channels, size, size), dtype=torch.uint8)
    for place, row in zip(pixels, rows, strict=True):
        place.copy_(torch.from_numpy(to_array(centre_crop(images.read(row)[0], size)).copy()))
    return pixels


def _read_manifest(place: str, remote: bool) -> Manifest:
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest.json" if remote else Path(place)
            if remote:  # every time: it says which of the cached files are the right ones
                _fetch(place, path)
            content = path.read_bytes()
    except OSError as error:
        raise RRCMError(f"{place}: cannot be read ({_line(error)}); {REDO}, or correct the place") from None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RRCMError(f"{place}: not a shard manifest ({key + ': ' if key else ''}{first['msg']}); {REDO}") from None


def _check_size(path: Path, entry: File) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise RRCMError(f"{path}: shard is missing; {REDO}, or fetch it (dvc pull)") from None
    if size != entry.bytes:
        raise RRCMError(
            f"{path}: has {size} bytes, manifest.json says {entry.bytes}: truncated or of another run; {REDO}"
        )


def _check(path: Path, entry: File) -> None:
    _check_size(path, entry)
    if sha256_file(path) != entry.sha256:
        raise RRCMError(f"{path}: does not match its hash in manifest.json: damaged or of another run; {REDO}")


def _download(url: str, path: Path, entry: File) -> None:
    """Download a file of the manifest to `path`, atomically, and check it."""
    with atomic_path(path) as scratch:
        try:
            _fetch(url, scratch)
        except OSError as error:
            raise RRCMError(f"{url}: download failed ({_line(error)}); check the address and run again") from None
        if scratch.stat().st_size != entry.bytes or sha256_file(scratch) != entry.sha256:
            raise RRCMError(f"{url}: does not match manifest.json: damaged or of another run; upload the shards again")


def _fetch(url: str, path: Path) -> None:
    """Copy what is behind a URL to `path`. Tries three times; raises OSError."""
    import fsspec

    for pause in (*DOWNLOAD_PAUSES, None):
        try:
            system, place = fsspec.url_to_fs(url)
            system.get_file(place, str(path))
            return
        except (ImportError, ValueError) as error:  # no package for this protocol, or no such protocol
            raise RRCMError(f"{url}: cannot be opened ({_line(error)}); install what it names") from None
        except Exception as error:  # each protocol has its own exceptions
            if pause is None or isinstance(error, FileNotFoundError):
                raise OSError(_line(error)) from error
            time.sleep(pause)
