"""CIFAR-10 (Krizhevsky 2009)."""

import tarfile

import numpy as np

from rrcm.config import Data
from rrcm.data.datasets import RawDataset, RawSplit, check_content, checked, download, download_folder, first_with
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import atomic_directory

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"  # the Python version is a pickle
FILES = ["batches.meta.txt", *(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CONTENTS = {  # output of `git hash-object`
    "data_batch_1.bin": "da09f891072747be90e69e4f00ba7cba870dc87e",
    "data_batch_2.bin": "7e958840b7a55df3353574298ebc9ca0e4bba48e",
    "data_batch_3.bin": "5259a3e9674ffdf2d5c33a1067f7192ff06c9e2f",
    "data_batch_4.bin": "301e7d16d78428f13262e87a5bc78ed45b8224aa",
    "data_batch_5.bin": "51fe428dfbdd065852912743ae8b7b63bb1e9d8d",
    "test_batch.bin": "e3f3b4653f18f27ada1558cabc3352a3ed1b25cc",
}


def read_cifar10(data: Data) -> RawDataset:
    """CIFAR-10 (Krizhevsky 2009), 32 x 32 RGB, binary version, from data.root or a download."""
    from torchvision.datasets.utils import download_url

    root = download_folder(data)
    extracted = root / "cifar-10-binary/cifar-10-batches-bin"
    folder = first_with([root, root / "cifar-10-batches-bin", extracted], "test_batch.bin")
    if folder is None:
        name = URL.rpartition("/")[2]
        with atomic_directory(root / "cifar-10-binary") as scratch:
            download("cifar10", URL, lambda: download_url(URL, scratch, name, MD5))
            (scratch / extracted.name).mkdir()
            try:
                with tarfile.open(scratch / name) as archive:
                    for file in FILES:  # by name, so that nothing else in the archive is written
                        content = archive.extractfile(f"{extracted.name}/{file}")
                        (scratch / extracted.name / file).write_bytes(content.read())
            except (OSError, EOFError, AttributeError, KeyError, tarfile.TarError) as error:
                raise RRCMError(f"{URL}: cannot be unpacked ({one_line(error)}); download it again") from None
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
        check_content(folder / name, name, content, CONTENTS[name])
    if classes != CLASSES:
        raise RRCMError(f"{folder / 'batches.meta.txt'}: has other class names than CIFAR-10; download it again")
    train, test = (
        RawSplit(
            records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
        )  # stored as R, G and B planes
        for records in (np.frombuffer(c, np.uint8).reshape(-1, 3073) for c in (b"".join(batches), test))
    )
    return RawDataset(
        classes, checked(train, len(classes), folder), checked(test, len(classes), folder), published=True
    )
