"""PathMNIST, the histology images of Kather et al. 2019 in MedMNIST."""

import zipfile

import numpy as np

from rrcm.config import Data
from rrcm.data.datasets import RawDataset, RawSplit, checked, download, download_folder
from rrcm.utils.errors import RRCMError


def read_pathmnist(data: Data) -> RawDataset:
    """PathMNIST (NCT-CRC histology, Kather et al. 2019), RGB, with MedMNIST's training and test images.

    The training images take 14 GB of memory at 224 pixels.
    """
    from medmnist import INFO
    from torchvision.datasets.utils import check_md5, download_url

    if data.image_size not in (28, 64, 128, 224):
        raise RRCMError(f"data.image_size {data.image_size}: pathmnist comes in 28, 64, 128 and 224 pixels; choose one")
    info, flag = INFO["pathmnist"], "" if data.image_size == 28 else f"_{data.image_size}"
    path = download_folder(data) / f"pathmnist{flag}.npz"
    url, md5 = info[f"url{flag}"], info[f"MD5{flag}"]
    if not path.exists():
        download("pathmnist", url, lambda: download_url(url, path.parent, path.name, md5))
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
    return RawDataset(classes, checked(train, len(classes), path), checked(test, len(classes), path), published=True)
