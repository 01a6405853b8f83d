"""The file of soft labels, which stores the votes of a smoothed classifier for each training image."""

from pathlib import Path

import torch

from rrcm.data.shards import ShardedDataset
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_tensors, save_tensors

HINT = "run `dvc repro` again"


def write_votes(path: Path, votes: torch.Tensor, images: ShardedDataset) -> None:
    """Write the votes, (N, K) int64, with one row per image in the order of the split."""
    identity = torch.frombuffer(bytearray.fromhex(images.fingerprint), dtype=torch.uint8)
    save_tensors(path, {"votes": votes, "shards": identity})


def read_soft_labels(path: Path, images: ShardedDataset) -> torch.Tensor:
    """The share of each class in the votes: (N, K) float32, in the order of the split.

    Raises `RRCMError` if the file is missing or damaged, or belongs to other images.
    """
    tensors = load_tensors(path)
    if tensors.keys() != {"votes", "shards"}:
        raise RRCMError(f"{path}: is no file of soft labels; {HINT}")
    votes = tensors["votes"]
    if tensors["shards"].numpy().tobytes().hex() != images.fingerprint:
        raise RRCMError(f"{path}: has soft labels of other images than {images.root}; {HINT}")
    if votes.shape != (len(images), len(images.classes)) or (votes.sum(1) <= 0).any():
        raise RRCMError(f"{path}: must have votes for {len(images)} images; {HINT}")
    return (votes.double() / votes.sum(1, keepdim=True)).float()
