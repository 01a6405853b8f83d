"""Reads the raw data sets. Whatever a source looks like on disk, it becomes class names and two ordered lists of
(image, label): train and test. Validation images are carved from train later, when shards are written."""

import gzip
import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rrcm.config import Data
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory
from rrcm.utils.rng import numpy_rng

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
TEST_FRACTION = 0.2  # of sources without an official test set
RAW = Path("data/raw")  # downloads go to RAW/<source> unless data.root says where
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # the Python version is a pickle
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


class RawSplit(NamedTuple):
    """Images in a fixed order: uint8 (N, H, W) or (N, H, W, 3), or N file paths (dtype object); labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


class RawDataset(NamedTuple):
    classes: list[str]
    train: RawSplit
    test: RawSplit


def read_dataset(data: Data) -> RawDataset:
    """Read (and, where a source has a public address and no local files, first download) the raw data set.

    Raises `RRCMError` when a folder or file is missing, has no images, or is not in its format.
    """
    return READERS[data.source](data)


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows 0..N-1 into (kept, carved), both ascending: `fraction` of every class, at least one image of it,
    but never its last one."""
    carved = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        carved.append(rng.permutation(rows)[:count])
    carved = np.sort(np.concatenate(carved))
    return np.setdiff1d(np.arange(len(labels)), carved), carved


def _split_off_test(classes: list[str], images: np.ndarray, labels: np.ndarray) -> RawDataset:
    """A fixed, stratified test set: it does not depend on the run's seed, so seeds can be compared."""
    train, test = stratified_split(labels, TEST_FRACTION, numpy_rng(0, "test split"))
    return RawDataset(classes, RawSplit(images[train], labels[train]), RawSplit(images[test], labels[test]))


def read_digits(data: Data) -> RawDataset:
    from sklearn.datasets import load_digits  # a second of import that other sources need not pay

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return _split_off_test([str(digit) for digit in digits.target_names], images, digits.target.astype(np.int64))


def read_fashion_mnist(data: Data) -> RawDataset:
    from torchvision.datasets import FashionMNIST

    root = _base(data)
    places = [root, root / "FashionMNIST/raw", *([] if data.root else [DEBIAN_FASHION_MNIST])]
    folder = _find(places, "train-images-idx3-ubyte.gz")
    if folder is None:
        _download("fashion_mnist", ", ".join(FashionMNIST.mirrors), lambda: FashionMNIST(str(root), download=True))
        folder = root / "FashionMNIST/raw"
    train, test = (
        RawSplit(
            _read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3), _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        )
        for name in ("train", "t10k")
    )
    return RawDataset(FashionMNIST.classes, _checked(train, 10, folder), _checked(test, 10, folder))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A gzipped idx file of unsigned bytes: magic 00 00 08 <dimensions>, big-endian int32 sizes, then the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise RRCMError(f"{path}: cannot be read ({error}); download it again") from None
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape):
        raise RRCMError(f"{path}: not an idx file of {dimensions} dimensions, or cut short; download it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar10(data: Data) -> RawDataset:
    from torchvision.datasets.utils import download_and_extract_archive

    root = _base(data)
    extracted = root / "cifar-10-binary/cifar-10-batches-bin"
    folder = _find([root, root / "cifar-10-batches-bin", extracted], "test_batch.bin")
    if folder is None:
        with atomic_directory(root / "cifar-10-binary") as scratch:
            _download(
                "cifar10", CIFAR10_URL, lambda: download_and_extract_archive(CIFAR10_URL, scratch, md5=CIFAR10_MD5)
            )
            (scratch / CIFAR10_URL.rpartition("/")[2]).unlink()
        folder = extracted
    try:
        classes = (folder / "batches.meta.txt").read_text(encoding="ascii").split()
        batches = [(folder / f"data_batch_{i}.bin").read_bytes() for i in range(1, 6)]
        test = (folder / "test_batch.bin").read_bytes()
    except (OSError, ValueError) as error:
        raise RRCMError(f"{folder}: cannot be read as CIFAR-10's binary version ({error}); download it again") from None
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, content in zip(names, [*batches, test], strict=True):
        if not content or len(content) % 3073:
            raise RRCMError(f"{folder / name}: {len(content)} bytes are not whole records of 3073; download it again")
    train, test = (
        RawSplit(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0])  # stored as planes R, G, B
        for records in (np.frombuffer(c, np.uint8).reshape(-1, 3073) for c in (b"".join(batches), test))
    )
    return RawDataset(classes, _checked(train, len(classes), folder), _checked(test, len(classes), folder))


def read_pathmnist(data: Data) -> RawDataset:
    """PathMNIST's own train and test. At 224 pixels its train images take 14 GB of memory, as in medmnist itself."""
    from medmnist import INFO
    from torchvision.datasets.utils import download_url

    if data.image_size not in (28, 64, 128, 224):
        raise RRCMError(f"data.image_size {data.image_size}: kather comes in 28, 64, 128 and 224 pixels; choose one")
    info, flag = INFO["pathmnist"], "" if data.image_size == 28 else f"_{data.image_size}"
    path = _base(data) / f"pathmnist{flag}.npz"
    if not path.exists():
        url, md5 = info[f"url{flag}"], info[f"MD5{flag}"]
        _download("kather", url, lambda: download_url(url, path.parent, path.name, md5))
    try:
        with np.load(path, allow_pickle=False) as archive:
            train, test = (RawSplit(archive[f"{s}_images"], archive[f"{s}_labels"].ravel()) for s in ("train", "test"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RRCMError(f"{path}: cannot be read as PathMNIST's npz ({error}); delete it to download again") from None
    for images in (train.images, test.images):
        if images.dtype != np.uint8 or images.shape[1:] != (data.image_size, data.image_size, 3):
            raise RRCMError(f"{path}: images are {images.dtype} {images.shape}, not {data.image_size} pixels RGB")
    classes = list(info["label"].values())
    return RawDataset(classes, _checked(train, len(classes), path), _checked(test, len(classes), path))


def read_imagenet(data: Data) -> RawDataset:
    """ImageNet's train/ and val/; its official val is our test."""
    return _read_folders(_root(data), "val")


def read_imagefolder(data: Data) -> RawDataset:
    """Class folders under train/ and test/, or right under the root: then a test set is carved."""
    root = _root(data)
    if (root / "train").is_dir():
        return _read_folders(root, "test")
    classes = _class_names(root)
    return _split_off_test(classes, *_list_images(root, classes))


def _read_folders(root: Path, test: str) -> RawDataset:
    classes = _class_names(root / "train")
    unknown = sorted(set(_class_names(root / test)) - set(classes))
    if unknown:
        raise RRCMError(f"{root / test}: class folder {unknown[0]} is not in {root / 'train'}; remove or rename it")
    return RawDataset(
        classes, _list_images(root / "train", classes), _list_images(root / test, _class_names(root / test), classes)
    )


def _class_names(folder: Path) -> list[str]:
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise RRCMError(f"{folder}: no such dataset folder ({error.strerror}); set data.root to where it is") from None
    if not names:
        raise RRCMError(f"{folder}: holds no class folders; put the images of each class into a folder of its own")
    return names


def _list_images(folder: Path, names: list[str], classes: list[str] | None = None) -> RawSplit:
    """Image files of the class folders `names`, sorted; labels are places in `classes` (default: `names`)."""
    paths, labels = [], []
    for name in names:
        files = sorted(
            p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
        )
        if not files:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise RRCMError(f"{folder / name}: class folder without images ({suffixes}); add some or remove it")
        paths += files
        labels += [(classes or names).index(name)] * len(files)
    return RawSplit(np.array(paths, object), np.array(labels, np.int64))


def _root(data: Data) -> Path:
    if data.root is None:
        raise RRCMError(f"data.root: {data.source} has no default place; set it to the folder of your images")
    return Path(data.root)


def _base(data: Data) -> Path:
    """Where a source that can be downloaded lies: data.root, which must exist, or RAW/<source>."""
    if data.root and not Path(data.root).is_dir():
        raise RRCMError(f"data.root {data.root}: no such dataset folder; create it to download there, or set null")
    return Path(data.root) if data.root else RAW / data.source


def _find(places: Iterable[Path], name: str) -> Path | None:
    return next((place for place in places if (place / name).exists()), None)


def _download(name: str, address: str, action: Callable[[], object]) -> None:
    try:
        action()
    except (OSError, RuntimeError) as error:  # no network, refused, or the wrong checksum
        reason = " ".join(str(error).split())
        raise RRCMError(f"{name}: download from {address} failed ({reason}); fetch it by hand, set data.root") from None


def _checked(records: RawSplit, classes: int, origin: Path) -> RawSplit:
    """As many labels as images, at least one, all in range; labels become int64."""
    images, labels = records.images, records.labels.astype(np.int64)
    if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise RRCMError(
            f"{origin}: {len(labels)} labels for {len(images)} images, or one not in 0..{classes - 1}; download again"
        )
    return RawSplit(images, labels)


READERS = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "imagenet": read_imagenet,
    "kather": read_pathmnist,
    "imagefolder": read_imagefolder,
}
