"""Counter-based normal numbers: a pure function of a key and three words per row.

Philox turns a counter and a key into random words; Box and Muller's method turns words into normals. The random words
are the same on all devices. The normals can differ in the last bit, because devices round the logarithm and the sine
differently.

On a GPU, eager Philox runs about 120 kernels that each read and write the whole batch. torch.compile fuses them into
one. Only integer operations and correctly rounded products are compiled, so the bits are the same as without compiling.
Certification has another kernel for CPUs (certification/cpu_noise.py).
"""

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch

from rrcm.utils.errors import one_line

CHUNK = 1 << 16  # counters per call on a CPU, so that the ten Philox rounds stay in its cache
FUSE_FROM = 1 << 20  # numbers per call from which a GPU uses the compiled kernel; compiling takes seconds
UINT32 = 0xFFFFFFFF

Word = int | torch.Tensor  # of the key; the compiled kernel takes tensors, since each int would be compiled anew


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[Word, Word]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four counter words and two key words give four random words.

    The counter words are int64 tensors that broadcast, with values in [0, 2^32). The results are int64 in this range.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around like uint64
        c0 = (product1 >> 32).bitwise_and_(UINT32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(UINT32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(UINT32), product0.bitwise_and_(UINT32)
        k0, k1 = (k0 + 0x9E3779B9) & UINT32, (k1 + 0xBB67AE85) & UINT32
    return c0, c1, c2, c3


def uniforms(counter: tuple[torch.Tensor, ...], key: tuple[Word, Word]) -> tuple[torch.Tensor, ...]:
    """Two pairs of arguments for `box_muller`: a uniform number in (0, 1] and a uniform angle in [0, 2 pi], float32.

    They are computed by correctly rounded operations, so every compiler and device gives the same bits.
    """
    w0, w1, w2, w3 = philox4x32(counter, key)
    return _unit(w0), _angle(w1), _unit(w2), _angle(w3)


def _unit(word: torch.Tensor) -> torch.Tensor:
    return word.float().add_(0.5).mul_(2**-32)


def _angle(word: torch.Tensor) -> torch.Tensor:
    return word.float().mul_(2 * math.pi * 2**-32)


def box_muller(uniform: torch.Tensor, angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent standard normals from a uniform number and a uniform angle, which it overwrites.

    The normals are float32 and at most 6.8 in absolute value.
    """
    radius = uniform.log_().mul_(-2).sqrt_()
    return radius * angle.cos(), angle.sin_().mul_(radius)


@cache
def fused_uniforms(device: torch.device) -> Callable[..., tuple[torch.Tensor, ...]]:
    """`uniforms` as one kernel for any number of samples and pixels, or `uniforms` itself if it cannot be compiled."""
    compiled = torch.compile(uniforms, dynamic=True)

    def fused(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        return compiled(counter, tuple(torch.tensor(word, device=device) for word in key))

    position, row = torch.arange(8, device=device), torch.arange(2, device=device)[:, None]
    try:
        fused((position, row, row, row), (0, 0))
    except (RuntimeError, OSError, ImportError) as error:  # for example without a C compiler
        warnings.warn(f"noise takes longer: its kernel cannot be compiled ({one_line(error)})", stacklevel=2)
        return uniforms
    return fused


def philox_normal(shape: tuple[int, ...], key: int, words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Standard normal numbers, (B, *shape) float32. Row i depends only on `key` and the three words of row i.

    `key` is in [0, 2^64). The words are (B,) int64 in [0, 2^32), on the device to compute on.
    """
    size = math.prod(shape)
    quads = -(-size // 4)
    count, device = len(words[0]), words[0].device
    normals = torch.empty(count, 4, quads, dtype=torch.float32, device=device)
    on_cpu = device.type == "cpu"
    rows = max(1, CHUNK // quads) if on_cpu else max(1, count)
    draw = uniforms if on_cpu or normals.numel() < FUSE_FROM else fused_uniforms(device)
    position = torch.arange(quads, device=device)
    for first in range(0, count, rows):
        chunk = slice(first, first + rows)
        counter = (position, *(word[chunk, None] for word in words))
        uniform0, angle0, uniform1, angle1 = draw(counter, (key & UINT32, key >> 32))
        normals[chunk, 0], normals[chunk, 1] = box_muller(uniform0, angle0)
        normals[chunk, 2], normals[chunk, 3] = box_muller(uniform1, angle1)
    return normals.flatten(1)[:, :size].reshape(count, *shape)
