"""Each data set in its own file format: the real data if this machine has it, otherwise small files written here."""

import gzip
import hashlib
import http.server
import io
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import medmnist
import numpy as np
import pytest
from conftest import read_with_test
from PIL import Image
from torchvision.datasets import FashionMNIST

from rrcm.config import Data
from rrcm.data.datasets import DATASETS, RawDataset, RawSplit, read_dataset
from rrcm.data.sharding import write_shards
from rrcm.data.shards import CLASSES, ShardedDataset
from rrcm.sources import cifar10, fashion_mnist
from rrcm.utils.errors import RRCMError


def settings(source: str, root: Path | None = None, size: int = 8, channels: int = 3) -> Data:
    return Data(
        source=source,
        root=None if root is None else str(root),
        image_size=size,
        channels=channels,
        val_fraction=0.1,
        labels_per_class=None,
        shard_size=10,
        workers=0,
    )


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the loopback address that serves it."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_digits_are_the_real_ones_with_a_fixed_stratified_test_set():
    from sklearn.datasets import load_digits

    dataset = read_with_test(settings("digits", size=8, channels=1))
    assert dataset.classes == list("0123456789")
    assert len(dataset.train.labels) + len(dataset.test.labels) == 1797
    assert dataset.test.images.shape[1:] == (8, 8) and dataset.test.images.dtype == np.uint8
    original = load_digits()
    every = np.concatenate([dataset.train.images, dataset.test.images]).reshape(1797, -1)
    assert sorted(map(bytes, every)) == sorted(
        bytes(v) for v in np.round(original.data * 255 / 16).astype(np.uint8)
    )  # nothing lost or repeated
    total = np.bincount(original.target)
    assert np.array_equal(np.bincount(dataset.test.labels), np.round(total * 0.2))
    assert hashlib.sha256(dataset.test.images.tobytes()).hexdigest()[:16] == "5419ff5a5f458885"  # it never changes


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def write_fashion(folder: Path) -> dict[str, np.ndarray]:
    rng, arrays = np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 20), ("t10k", 10)):
        arrays[f"{name}-images-idx3-ubyte.gz"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{name}-labels-idx1-ubyte.gz"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
    return arrays


@pytest.fixture
def other_contents(monkeypatch: pytest.MonkeyPatch):
    """Accept small files of noise in place of the published ones."""
    for module in (cifar10, fashion_mnist):
        monkeypatch.setattr(module, "check_content", lambda *_: None)


def test_fashion_mnist_from_a_folder(tmp_path: Path, other_contents: None):
    arrays = write_fashion(tmp_path)
    dataset = read_dataset(settings("fashion_mnist", tmp_path, 28, 1))
    assert dataset.classes[9] == "Ankle boot"
    assert np.array_equal(dataset.train.images, arrays["train-images-idx3-ubyte.gz"])
    assert np.array_equal(dataset.test.labels, arrays["t10k-labels-idx1-ubyte.gz"])


@pytest.mark.slow
def test_fashion_mnist_download(
    tmp_path: Path, web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, other_contents: None
):
    folder, address = web
    arrays = write_fashion(folder)
    sums = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in arrays]
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{address}/"])
    monkeypatch.setattr(FashionMNIST, "resources", sums)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    dataset = read_dataset(settings("fashion_mnist", None, 28, 1))
    assert np.array_equal(dataset.test.images, arrays["t10k-images-idx3-ubyte.gz"])
    for file in folder.iterdir():
        file.unlink()
    assert len(read_dataset(settings("fashion_mnist", None, 28, 1)).train.labels) == 20  # from data/raw


@pytest.mark.parametrize("damage", ["cut", "short", "header", "label", "count"])
def test_fashion_mnist_damaged(tmp_path: Path, damage: str, other_contents: None):
    arrays = write_fashion(tmp_path)
    images, labels = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
    content = (tmp_path / images).read_bytes()
    match damage:
        case "cut":
            (tmp_path / images).write_bytes(content[:-100])
        case "short":
            (tmp_path / images).write_bytes(gzip.compress(gzip.decompress(content)[:-1]))
        case "header":
            (tmp_path / images).write_bytes(idx(arrays[labels]))
        case "label":
            (tmp_path / labels).write_bytes(idx(arrays[labels] + 1))
        case "count":
            (tmp_path / labels).write_bytes(idx(arrays[labels][:-1]))
    with pytest.raises(RRCMError, match=str(tmp_path)) as error:
        read_dataset(settings("fashion_mnist", tmp_path, 28, 1))
    assert "download" in one_line(error)


@pytest.mark.parametrize("source", ["fashion_mnist", "cifar10", "pathmnist"])
def test_files_of_another_data_set_are_refused(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch):
    """MNIST, for example, has files of the same names and shapes, whose digits would be taken for clothes."""
    size, name = {
        "fashion_mnist": (28, "train-images-idx3-ubyte.gz"),
        "cifar10": (32, "data_batch_1.bin"),
        "pathmnist": (28, "pathmnist.npz"),
    }[source]
    write_fashion(tmp_path)
    write_cifar(tmp_path)
    np.savez(tmp_path / "pathmnist.npz", **path_mnist())
    with pytest.raises(RRCMError, match=f"{tmp_path / name}: has other content than the published") as error:
        read_dataset(settings(source, tmp_path, size))
    assert "download" in one_line(error)
    if source != "pathmnist":  # only the content of the file counts, not how it is packed
        content = (tmp_path / name).read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
        (tmp_path / "unpacked").write_bytes(content)
        printed = subprocess.run(["git", "hash-object", tmp_path / "unpacked"], capture_output=True, text=True)
        contents = {"fashion_mnist": fashion_mnist, "cifar10": cifar10}[source].CONTENTS
        monkeypatch.setitem(contents, name.removesuffix(".gz"), printed.stdout.strip())
        with pytest.raises(RRCMError) as error:
            read_dataset(settings(source, tmp_path, size))
        assert f"{tmp_path / name}: has" not in one_line(error)  # but the next one


def test_class_names_of_other_images_are_refused(tmp_path: Path, other_contents: None):
    write_cifar(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("\r\n".join(CLASSES["cifar10"]) + "\r\n")  # as saved on Windows
    assert read_dataset(settings("cifar10", tmp_path, 32)).classes == CLASSES["cifar10"]
    (tmp_path / "batches.meta.txt").write_text("\n".join(CLASSES["cifar10"][::-1]))
    with pytest.raises(RRCMError, match=r"batches.meta.txt: has other class names than CIFAR-10; download") as error:
        read_dataset(settings("cifar10", tmp_path, 32))
    one_line(error)
    assert CLASSES["fashion_mnist"] == FashionMNIST.classes


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 0, 1], [0, 1]])
def test_labels_of_a_reader_are_checked(monkeypatch: pytest.MonkeyPatch, labels: list[int]):
    split = RawSplit(np.zeros((3, 8, 8), np.uint8), np.array(labels))
    monkeypatch.setitem(DATASETS, "mine", lambda data: RawDataset(["a", "b"], split, None))
    with pytest.raises(RRCMError, match=r"data.source mine: \d labels for 3 images, or a label outside 0..1") as error:
        read_dataset(settings("mine"))
    one_line(error)


def test_names_that_no_manifest_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = np.arange(64 * 20, dtype=np.uint8).reshape(20, 8, 8)
    dataset = RawDataset(
        ["a", ""], RawSplit(images + np.arange(20, dtype=np.uint8)[:, None, None], np.arange(20) % 2), None
    )
    monkeypatch.setitem(DATASETS, "mine", lambda data: dataset)
    with pytest.raises(RRCMError, match=r"data.source mine: classes.1: .*; correct its reader") as error:
        write_shards(settings("mine", channels=1), 0, tmp_path / "shards")
    assert one_line(error) and not (tmp_path / "shards").exists()


@pytest.mark.skipif(not fashion_mnist.DEBIAN.exists(), reason="package dataset-fashion-mnist is not here")
def test_fashion_mnist_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    dataset = read_dataset(settings("fashion_mnist", None, 28, 1))
    assert dataset.train.images.shape == (60000, 28, 28) and dataset.test.images.shape == (10000, 28, 28)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    assert dataset.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert list(tmp_path.iterdir()) == []


def write_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write six batches of 20 records in the binary format; return pixels (120, 32, 32, 3) and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (120, 32, 32, 3), np.uint8), np.arange(120, dtype=np.uint8) % 10
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = range(20 * i, 20 * i + 20)
        records = (bytes([labels[r], *pixels[r].transpose(2, 0, 1).tobytes()]) for r in rows)
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    (folder / "batches.meta.txt").write_text(
        "\n".join(CLASSES["cifar10"]) + "\n\n"
    )  # the real file ends with an empty line
    return pixels, labels


@pytest.mark.slow
def test_cifar10_download(tmp_path: Path, web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, other_contents: None):
    folder, address = web
    pixels, labels = write_cifar(tmp_path / "cifar-10-batches-bin")
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(cifar10, "URL", f"{address}/{archive.name}")
    data = settings("cifar10", None, 32)
    with pytest.raises(RRCMError, match=r"cifar10: download from http://.* failed .*corrupted") as error:
        read_dataset(data)  # the small archive lacks the real checksum
    one_line(error)
    assert list(Path("data/raw/cifar10").iterdir()) == []
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    dataset = read_dataset(data)
    assert dataset.classes[0] == "airplane" and len(dataset.classes) == 10
    assert np.array_equal(dataset.train.images, pixels[:100]) and np.array_equal(dataset.train.labels, labels[:100])
    assert np.array_equal(dataset.test.images, pixels[100:]) and dataset.test.labels.dtype == np.int64
    archive.unlink()
    assert len(read_dataset(data).test.labels) == 20  # no second download


@pytest.mark.slow
def test_an_archive_cannot_leave_its_folder(tmp_path: Path, web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch):
    folder, address = web
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../../../escaped"))
        for name in cifar10.FILES:
            link = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "../../../../../../../etc/passwd"
            tar.addfile(link)
    monkeypatch.setattr(cifar10, "URL", f"{address}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(RRCMError, match="cannot be unpacked"):
        read_dataset(settings("cifar10", tmp_path, 32))
    assert not list(tmp_path.rglob("escaped")) and not list(tmp_path.parent.glob("escaped"))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "label"])
def test_cifar10_damaged(tmp_path: Path, damage: str, other_contents: None):
    write_cifar(tmp_path)
    path = tmp_path / "data_batch_3.bin"
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
        case "label":
            path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(RRCMError, match=str(tmp_path)) as error:
        read_dataset(settings("cifar10", tmp_path, 32))
    assert "download" in one_line(error)


def path_mnist(size: int = 28) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 36), ("val", 9), ("test", 18)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count, dtype=np.uint8) % 9)[:, None]
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(28, "pathmnist.npz"), (64, "pathmnist_64.npz")])
def test_pathmnist_download(
    tmp_path: Path, web: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, size: int, name: str
):
    folder, address = web
    arrays = path_mnist(size)
    np.savez_compressed(folder / name, **arrays)
    flag = "" if size == 28 else f"_{size}"
    monkeypatch.setitem(medmnist.INFO["pathmnist"], f"url{flag}", f"{address}/{name}?download=1")
    checksum = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setitem(medmnist.INFO["pathmnist"], f"MD5{flag}", checksum)
    monkeypatch.chdir(tmp_path)
    dataset = read_dataset(settings("pathmnist", None, size))
    assert len(dataset.classes) == 9 and dataset.classes[0] == "adipose"
    assert np.array_equal(dataset.train.images, arrays["train_images"])
    assert np.array_equal(dataset.test.labels, arrays["test_labels"].ravel())
    assert (tmp_path / "data/raw/pathmnist" / name).exists()


class _Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["cut", "pickle", "shape", "label", "key", "npy"])
def test_pathmnist_damaged(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch):
    path, arrays = tmp_path / "pathmnist.npz", path_mnist()
    if damage == "pickle":
        arrays["train_images"] = np.array([_Code(tmp_path / "ran")], object)
    if damage == "shape":
        arrays["test_images"] = arrays["test_images"][:, :27]
    if damage == "label":
        arrays["test_labels"] = arrays["test_labels"] + 1
    if damage == "key":
        del arrays["test_labels"]
    np.savez(path, **arrays)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    if damage == "npy":
        np.save(path.open("wb"), arrays["train_images"])
    monkeypatch.setitem(medmnist.INFO["pathmnist"], "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    with pytest.raises(RRCMError, match=str(path)) as error:
        read_dataset(settings("pathmnist", tmp_path, 28))
    one_line(error)
    assert not (tmp_path / "ran").exists()


def test_pathmnist_sizes(tmp_path: Path):
    with pytest.raises(RRCMError, match="image_size 32"):
        read_dataset(settings("pathmnist", tmp_path, 32))


def test_an_unknown_data_set_is_named_with_a_suggestion():
    with pytest.raises(RRCMError, match=r"data.source imagefolders: unknown data set; did you mean imagefolder\?"):
        read_dataset(settings("imagefolders"))
    with pytest.raises(RRCMError, match="known data sets: digits, fashion_mnist, cifar10"):
        read_dataset(settings("xyz"))


def test_a_data_set_from_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It needs one function and one entry. The settings accept its name, and it becomes shards like any other."""

    def read_stripes(data: Data) -> RawDataset:
        images = np.zeros((80, data.image_size, data.image_size), np.uint8)
        labels = np.arange(80) % 2
        images[labels == 1, ::2] = 175
        images += np.arange(80, dtype=np.uint8)[:, None, None]
        return RawDataset(["plain", "striped"], RawSplit(images[:40], labels[:40]), RawSplit(images[40:], labels[40:]))

    monkeypatch.setitem(DATASETS, "stripes", read_stripes)
    write_shards(settings("stripes", channels=1), 0, tmp_path / "shards")
    images = ShardedDataset(tmp_path / "shards", "test")
    assert images.classes == ["plain", "striped"] and images.manifest.source == "stripes" and len(images) == 40
    assert np.asarray(images.read(1)[0]).max() == 175 + 41 and images.labels.tolist() == [0, 1] * 20


def test_without_network_the_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cifar10, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(RRCMError, match=r"cifar10: download from .* failed") as error:
        read_dataset(settings("cifar10", tmp_path, 32))
    one_line(error)


def test_an_idx_file_needs_its_whole_header(tmp_path: Path):
    write_fashion(tmp_path)
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb") as file:
        file.write(b"\0\0")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(stream.getvalue())
    with pytest.raises(RRCMError, match="not an idx file"):
        read_dataset(settings("fashion_mnist", tmp_path, 28, 1))


def test_relative_folders_are_found_from_a_copy_that_dvc_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_contents: None
):
    """Queued experiments run in such a copy, which lacks the files that git ignores."""
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (9, 9), i).save(tmp_path / "pictures" / name / f"{i}.png")
    write_fashion(tmp_path / "data/raw/fashion_mnist")
    copy = tmp_path / ".dvc/tmp/exps/tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    assert read_dataset(settings("imagefolder", Path("pictures"))).classes == ["a", "b"]
    read_dataset(settings("fashion_mnist", size=28, channels=1))  # as it was downloaded before
