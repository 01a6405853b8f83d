"""Random streams named by a key, for data and training.

Each stream is a pure function of (seed, purpose, position) and uses no global state. Results therefore do not depend on
the batch size, the number of processes or where a run was resumed. Certification draws its noise from a counter instead
(certification/noise.py).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from rrcm.utils.philox import UINT32, philox_normal


def derive_seed(seed: int, *key: str | int) -> int:
    """A 63-bit seed for the stream named by `key`, for example derive_seed(0, "noise", step, position)."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_rng(seed: int, *key: str | int) -> np.random.Generator:
    """A numpy generator for the stream named by `key`."""
    return np.random.Generator(np.random.SFC64(derive_seed(seed, *key)))


def normal_per_sample(
    shape: tuple[int, ...], seed: int, *key: str | int, positions: Sequence[int | str], device: torch.device | str
) -> torch.Tensor:
    """Standard normal noise, float32, shape (len(positions), *shape).

    Row i depends only on seed, key and positions[i], so any split of a batch over processes draws the same noise. CPU
    and CUDA draw different noise. A CPU draws row by row from torch's generator. On a GPU this would take one small
    kernel per row, and longer than a small network, so Philox draws all rows at once.
    """
    if torch.device(device).type == "cuda":
        return philox_per_sample(shape, seed, *key, positions=positions, device=device)
    generator = torch.Generator(device)
    noise = torch.empty((len(positions), *shape), dtype=torch.float32, device=device)
    for row, position in zip(noise, positions, strict=True):
        generator.manual_seed(derive_seed(seed, *key, position))
        torch.randn(shape, generator=generator, dtype=torch.float32, device=device, out=row)
    return noise


def philox_per_sample(
    shape: tuple[int, ...], seed: int, *key: str | int, positions: Sequence[int | str], device: torch.device | str
) -> torch.Tensor:
    """`normal_per_sample` by Philox, on any device: 63 bits of each row's counter name its position."""
    names = torch.tensor([derive_seed(seed, *key, position) for position in positions], dtype=torch.int64).to(device)
    words = (names & UINT32, names >> 32, torch.zeros_like(names))
    return philox_normal(shape, derive_seed(seed, "per sample"), words)
