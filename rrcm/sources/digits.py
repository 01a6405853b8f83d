"""The handwritten digits of scikit-learn."""

import numpy as np

from rrcm.config import Data
from rrcm.data.datasets import RawDataset, RawSplit

CLASSES = list("0123456789")


def read_digits(data: Data) -> RawDataset:
    """The 1,797 handwritten digits of scikit-learn, with 8 x 8 grey pixels. There is no official test set."""
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
    return RawDataset(CLASSES, RawSplit(images, digits.target.astype(np.int64)), None)
