"""The file of a joint model's votes for the training images, from which the targets of "pass" follow."""

from collections.abc import Sequence
from pathlib import Path

import torch

from rrcm.data.shards import ShardedDataset
from rrcm.data.soft_labels import HINT
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_tensors, save_tensors


def write_training_votes(path: Path, votes: torch.Tensor, images: ShardedDataset, sigmas: Sequence[float]) -> None:
    """Write the votes, (N, S, K) int64, for the images in the order of the split, at each of the `sigmas`."""
    identity = torch.frombuffer(bytearray.fromhex(images.fingerprint), dtype=torch.uint8)
    save_tensors(path, {"votes": votes, "shards": identity, "sigmas": torch.tensor(sigmas, dtype=torch.float64)})


def read_training_votes(path: Path, images: ShardedDataset, sigmas: Sequence[float]) -> torch.Tensor:
    """The votes (N, S, K) int64 at these `sigmas`.

    Raises `RRCMError` if the file is missing or damaged, or belongs to other images or sigmas.
    """
    tensors = load_tensors(path)
    if tensors.keys() != {"votes", "shards", "sigmas"}:
        raise RRCMError(f"{path}: is no file of votes for training images; {HINT}")
    votes, expected = tensors["votes"], (len(images), len(sigmas), len(images.classes))
    if tensors["shards"].numpy().tobytes().hex() != images.fingerprint:
        raise RRCMError(f"{path}: has votes for other images than {images.root}; {HINT}")
    if tensors["sigmas"].tolist() != list(sigmas):
        raise RRCMError(f"{path}: has votes at sigmas {tensors['sigmas'].tolist()}, not {list(sigmas)}; {HINT}")
    if votes.shape != expected or (votes.sum(-1) <= 0).any():
        raise RRCMError(f"{path}: must have votes for {len(images)} images at each sigma; {HINT}")
    return votes
