"""Read raw data sets: class names, and training and test images with labels, in a fixed order.

`DATASETS` maps the values of the setting `data.source` to readers. Validation images, and test images where there are
no official ones, are split off the training images later, when the shards are written (sharding.py).
"""

import difflib
import gzip
import hashlib
import math
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rrcm.config import Data
from rrcm.data.images import (
    LISTED,
    SPLIT_NAMES,
    SUFFIXES,
    class_name,
    is_folder,
    is_left_out,
    label_of,
    list_images,
    natural_order,
)
from rrcm.data.shards import CLASSES
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import atomic_directory, in_repository

CLASS_ORDER = "natural"  # of class folders: 2 before 10
RAW = Path("data/raw")  # without data.root, downloads go to RAW/<source>
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # the Python version is a pickle
CIFAR10_FILES = ["batches.meta.txt", *(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
# What the unpacked files hold, as `git hash-object FILE` prints it. Archives differ: Debian compresses its own.
CONTENTS = {
    "train-images-idx3-ubyte": "ff2f5a96367a3c1656f09c93649f07143ff8b11e",  # Fashion-MNIST; MNIST has the same names
    "train-labels-idx1-ubyte": "30424ca2ea876655f5bba14f9f07132769687975",
    "t10k-images-idx3-ubyte": "37bac79bc6f002d965f363e0b20514904504a4d9",
    "t10k-labels-idx1-ubyte": "2195a4d0957e013db98d03e51697e2315816cce2",
    "data_batch_1.bin": "da09f891072747be90e69e4f00ba7cba870dc87e",  # CIFAR-10
    "data_batch_2.bin": "7e958840b7a55df3353574298ebc9ca0e4bba48e",
    "data_batch_3.bin": "5259a3e9674ffdf2d5c33a1067f7192ff06c9e2f",
    "data_batch_4.bin": "301e7d16d78428f13262e87a5bc78ed45b8224aa",
    "data_batch_5.bin": "51fe428dfbdd065852912743ae8b7b63bb1e9d8d",
    "test_batch.bin": "e3f3b4653f18f27ada1558cabc3352a3ed1b25cc",
}


class RawSplit(NamedTuple):
    """Images and labels in a fixed order."""

    images: np.ndarray  # uint8 (N, H, W) or (N, H, W, 3), or N file paths (dtype object)
    labels: np.ndarray  # int64 (N,), indices into the class names


class RawDataset(NamedTuple):
    """A whole data set before it is written as shards."""

    classes: list[str]  # class names
    train: RawSplit
    test: RawSplit | None  # None: there are no official test images
    class_order: str | None = None  # how class folders were ordered
    left_out: Mapping[str, int] = {}  # files in its folder that are no images of it: number by reason
    published: bool = False  # others have used these test images, so none is left out, even if it is in train too


def read_dataset(data: Data) -> RawDataset:
    """Read the data set `data.source`. If it is public and not on this machine, download it first.

    Raises `RRCMError` for an unknown name, a missing folder or file, a folder without images, a damaged file, and fewer
    than two classes.
    """
    if data.source not in DATASETS:
        close = difflib.get_close_matches(data.source, DATASETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known data sets: {', '.join(DATASETS)}"
        raise RRCMError(f"data.source {data.source}: unknown data set; {hint}")
    dataset = DATASETS[data.source](data)
    if len(dataset.classes) < 2:
        name = printable(dataset.classes[0])
        raise RRCMError(
            f"data.root {data.root}: holds one class, {name}; a classifier needs two. "
            "Set data.root to the folder whose subfolders are the classes"
        )
    for split in (dataset.train, dataset.test):
        if split is not None:
            _checked(split, len(dataset.classes), f"data.source {data.source}")  # its reader may be another package's
    return dataset


def read_digits(data: Data) -> RawDataset:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 grey pixels. They have no official test set."""
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return RawDataset(CLASSES["digits"], RawSplit(images, digits.target.astype(np.int64)), None)


def read_fashion_mnist(data: Data) -> RawDataset:
    """Fashion-MNIST (Xiao et al. 2017), 28 x 28 grey pixels, from data.root, Debian's package or a download."""
    from torchvision.datasets import FashionMNIST

    root = _download_folder(data)
    folders = [root, root / "FashionMNIST/raw", *([] if data.root else [DEBIAN_FASHION_MNIST])]
    folder = _first_with(folders, "train-images-idx3-ubyte.gz")
    if folder is None:
        _download("fashion_mnist", ", ".join(FashionMNIST.mirrors), lambda: FashionMNIST(str(root), download=True))
        folder = root / "FashionMNIST/raw"
    train, test = (
        RawSplit(
            _read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3), _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        )
        for name in ("train", "t10k")
    )
    classes = CLASSES["fashion_mnist"]
    return RawDataset(classes, _checked(train, 10, folder), _checked(test, 10, folder), published=True)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file: magic 00 00 08 <dimensions>, big-endian int32 sizes, then unsigned bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise RRCMError(f"{path}: cannot be read ({error}); download it again") from None
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape):
        raise RRCMError(f"{path}: not an idx file of {dimensions} dimensions, or truncated; download it again")
    _check_content(path, path.stem, content)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _check_content(path: Path, name: str, content: bytes) -> None:
    """Raise `RRCMError` unless the content is that of the published file `name`, wherever it is from."""
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    if digest.hexdigest() != CONTENTS[name]:
        raise RRCMError(
            f"{path}: has other content than the published {name}, which other data sets may have too; download it "
            "again, or set data.root to the right folder"
        )


def read_cifar10(data: Data) -> RawDataset:
    """CIFAR-10 (Krizhevsky 2009), 32 x 32 RGB, binary version, from data.root or a download."""
    from torchvision.datasets.utils import download_url

    root = _download_folder(data)
    extracted = root / "cifar-10-binary/cifar-10-batches-bin"
    folder = _first_with([root, root / "cifar-10-batches-bin", extracted], "test_batch.bin")
    if folder is None:
        name = CIFAR10_URL.rpartition("/")[2]
        with atomic_directory(root / "cifar-10-binary") as scratch:
            _download("cifar10", CIFAR10_URL, lambda: download_url(CIFAR10_URL, scratch, name, CIFAR10_MD5))
            (scratch / extracted.name).mkdir()
            try:
                with tarfile.open(scratch / name) as archive:
                    for file in CIFAR10_FILES:  # by name, so that nothing else of the archive is written anywhere
                        content = archive.extractfile(f"{extracted.name}/{file}")
                        (scratch / extracted.name / file).write_bytes(content.read())
            except (OSError, EOFError, AttributeError, KeyError, tarfile.TarError) as error:
                raise RRCMError(f"{CIFAR10_URL}: cannot be unpacked ({one_line(error)}); download it again") from None
            (scratch / name).unlink()
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
            raise RRCMError(f"{folder / name}: has {len(content)} bytes, not a multiple of 3073; download it again")
        _check_content(folder / name, name, content)
    if classes != CLASSES["cifar10"]:
        raise RRCMError(f"{folder / 'batches.meta.txt'}: has other class names than CIFAR-10; download it again")
    train, test = (
        RawSplit(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0])  # stored as planes R, G, B
        for records in (np.frombuffer(c, np.uint8).reshape(-1, 3073) for c in (b"".join(batches), test))
    )
    return RawDataset(
        classes, _checked(train, len(classes), folder), _checked(test, len(classes), folder), published=True
    )


def read_pathmnist(data: Data) -> RawDataset:
    """PathMNIST (NCT-CRC histology, Kather et al. 2019), RGB, with MedMNIST's own training and test images.

    At 224 pixels the training images take 14 GB of memory.
    """
    from medmnist import INFO
    from torchvision.datasets.utils import check_md5, download_url

    if data.image_size not in (28, 64, 128, 224):
        raise RRCMError(f"data.image_size {data.image_size}: pathmnist comes in 28, 64, 128 and 224 pixels; choose one")
    info, flag = INFO["pathmnist"], "" if data.image_size == 28 else f"_{data.image_size}"
    path = _download_folder(data) / f"pathmnist{flag}.npz"
    url, md5 = info[f"url{flag}"], info[f"MD5{flag}"]
    if not path.exists():
        _download("pathmnist", url, lambda: download_url(url, path.parent, path.name, md5))
    try:
        if not check_md5(path, md5):
            raise RRCMError(f"{path}: has other content than the published file; delete it to download again")
        with np.load(path, allow_pickle=False) as archive:
            train, test = (RawSplit(archive[f"{s}_images"], archive[f"{s}_labels"].ravel()) for s in ("train", "test"))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RRCMError(f"{path}: cannot be read as PathMNIST's npz ({error}); delete it to download again") from None
    for images in (train.images, test.images):
        if images.dtype != np.uint8 or images.shape[1:] != (data.image_size, data.image_size, 3):
            raise RRCMError(f"{path}: images are {images.dtype} {images.shape}, not {data.image_size} pixels RGB")
    classes = list(info["label"].values())
    return RawDataset(classes, _checked(train, len(classes), path), _checked(test, len(classes), path), published=True)


def read_imagenet(data: Data) -> RawDataset:
    """ImageNet's folders train/ and val/. The official validation images are our test images."""
    return _read_train_and_test(_root(data), "val")._replace(published=True)


def read_imagefolder(data: Data) -> RawDataset:
    """Class folders under train/ and test/, or directly under the root."""
    root = _root(data)
    names = _folders(root)
    if "train" in names or (names and all(name.casefold() in SPLIT_NAMES for name in names)):
        return _read_train_and_test(root, "test")
    classes, images, left_out = _read_class_folders(root)
    return RawDataset(classes, images, None, CLASS_ORDER, left_out)


def _read_train_and_test(root: Path, test: str) -> RawDataset:
    """Class folders below root/train and root/`test`."""
    names = _folders(root)
    for name, content in (("train", "training"), (test, "test")):
        if name not in names:
            found = ", ".join(f"{printable(other)}/" for other in names[:5]) or "no folders"
            raise RRCMError(
                f"{root}: holds {found} but no {name}/; rename the folder of the {content} images to {name}/ "
                "(validation images are split off train/)"
            )
    classes, train, left_out = _read_class_folders(root / "train")
    _, test_images, left_out_of_test = _read_class_folders(root / test, classes)
    left_out += left_out_of_test
    for name in set(names) - {"train", test}:
        left_out[f"images in {printable(name)}/, which is not used"] += len(list_images(root / name).files)
    return RawDataset(classes, train, test_images, CLASS_ORDER, left_out)


def _read_class_folders(folder: Path, classes: Sequence[str] = ()) -> tuple[list[str], RawSplit, Counter[str]]:
    """Class names in natural order (or the given `classes`), image files with labels, and what was left out.

    Raises `RRCMError` for folders that cannot be classes, are not among the given ones, or hold no images.
    """
    by_class: dict[str, Path] = {}
    for name in _folders(folder):
        try:
            other = by_class.setdefault(class_name(name), folder / name)
        except ValueError as error:
            raise RRCMError(f"{folder}: class folder {name!r} {error}") from None
        if other.name != name:
            raise RRCMError(f"{folder}: two class folders are called {class_name(name)}; rename one of them")
    if not by_class:
        raise RRCMError(f"{folder}: holds no class folders; put the images of each class into its own folder")
    if unknown := [name for name in by_class if classes and name not in classes]:
        raise RRCMError(f"{folder}: class folder {unknown[0]} is not among the training images; remove or rename it")
    labels = {name: label for label, name in enumerate(classes or sorted(by_class, key=natural_order))}
    found = list_images(folder)
    labelled = [(file, label) for file in found.files if (label := label_of(file, labels)) is not None]
    found.left_out["images outside class folders"] += len(found.files) - len(labelled)
    elsewhere = {link.parts[0]: listed for link, listed in found.links}
    with_images = {label for _, label in labelled}
    for name, path in by_class.items():
        if labels[name] not in with_images:
            kinds = ", ".join(sorted(SUFFIXES))
            if path.name in elsewhere:
                raise RRCMError(f"{path}: leads only to what is in {elsewhere[path.name]}; remove one of the classes")
            raise RRCMError(f"{path}: class folder without images ({kinds}); add some or remove it")
    linked = [[label_of(path / "_", labels) for path in paths] for paths in found.links]
    between = sum(None not in pair and pair[0] != pair[1] for pair in linked)
    found.left_out[LISTED] -= between
    found.left_out["links from one class to images of another"] += between
    files = np.empty(len(labelled), object)
    files[:] = [folder / file for file, _ in labelled]
    return list(labels), RawSplit(files, np.array([label for _, label in labelled], np.int64)), found.left_out


def _folders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that are read, in natural order. Raises `RRCMError` if there is none such."""
    try:
        return sorted(
            (e.name for e in os.scandir(folder) if is_folder(e) and not is_left_out(e.name)), key=natural_order
        )
    except OSError as error:
        raise RRCMError(f"{folder}: no such dataset folder ({error.strerror}); set data.root to where it is") from None


def _root(data: Data) -> Path:
    """data.root, for data sets that cannot be downloaded."""
    if data.root is None:
        raise RRCMError(f"data.root: {data.source} has no default folder; set it to the folder of your images")
    return in_repository(data.root)


def _download_folder(data: Data) -> Path:
    """Folder of a data set that can be downloaded: data.root, which must exist, or RAW/<source>."""
    folder = in_repository(data.root or RAW / data.source)
    if data.root and not folder.is_dir():
        raise RRCMError(f"data.root {data.root}: no such dataset folder; create it to download there, or set null")
    return folder


def _first_with(folders: Iterable[Path], name: str) -> Path | None:
    return next((folder for folder in folders if (folder / name).exists()), None)


def _download(name: str, address: str, action: Callable[[], object]) -> None:
    """Run the download `action`. Raises `RRCMError` if it fails."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # no network, or a wrong checksum
        problem = f"{name}: download from {address} failed ({one_line(error)})"
        raise RRCMError(f"{problem}; download it by hand and set data.root") from None


def _checked(split: RawSplit, num_classes: int, source: Path | str) -> RawSplit:
    """The split with int64 labels. Raises `RRCMError` unless each image has one label in 0..num_classes-1."""
    images, labels = split.images, split.labels.astype(np.int64)
    if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= num_classes:
        raise RRCMError(
            f"{source}: {len(labels)} labels for {len(images)} images, or a label outside 0..{num_classes - 1}; "
            "correct it or download it again"
        )
    return RawSplit(images, labels)


# To add a data set, write a reader and enter it here; from another package: DATASETS["mine"] = read_mine.
DATASETS: dict[str, Callable[[Data], RawDataset]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar10,
    "imagenet": read_imagenet,
    "pathmnist": read_pathmnist,
    "imagefolder": read_imagefolder,
}
