"""Fashion-MNIST (Xiao et al. 2017)."""

import gzip
import math
from pathlib import Path

import numpy as np

from rrcm.config import Data
from rrcm.data.datasets import RawDataset, RawSplit, check_content, checked, download, download_folder, first_with
from rrcm.utils.errors import RRCMError

CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CONTENTS = {  # output of `git hash-object`; MNIST's files have the same names
    "train-images-idx3-ubyte": "ff2f5a96367a3c1656f09c93649f07143ff8b11e",
    "train-labels-idx1-ubyte": "30424ca2ea876655f5bba14f9f07132769687975",
    "t10k-images-idx3-ubyte": "37bac79bc6f002d965f363e0b20514904504a4d9",
    "t10k-labels-idx1-ubyte": "2195a4d0957e013db98d03e51697e2315816cce2",
}


def read_fashion_mnist(data: Data) -> RawDataset:
    """Fashion-MNIST (Xiao et al. 2017), 28 x 28 grey pixels, from data.root, Debian's package or a download."""
    from torchvision.datasets import FashionMNIST

    root = download_folder(data)
    folders = [root, root / "FashionMNIST/raw", *([] if data.root else [DEBIAN])]
    folder = first_with(folders, "train-images-idx3-ubyte.gz")
    if folder is None:
        download("fashion_mnist", ", ".join(FashionMNIST.mirrors), lambda: FashionMNIST(str(root), download=True))
        folder = root / "FashionMNIST/raw"
    train, test = (
        RawSplit(
            _read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3), _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        )
        for name in ("train", "t10k")
    )
    return RawDataset(CLASSES, checked(train, 10, folder), checked(test, 10, folder), published=True)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file: magic number 00 00 08 <dimensions>, big-endian int32 sizes, then unsigned bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise RRCMError(f"{path}: cannot be read ({error}); download it again") from None
    start = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:start], ">i4").tolist())
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(shape):
        raise RRCMError(f"{path}: not an idx file of {dimensions} dimensions, or truncated; download it again")
    check_content(path, path.stem, content, CONTENTS[path.stem])
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
