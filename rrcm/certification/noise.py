"""Gaussian noise as a pure function of (seed, purpose, image, sample): Philox counters, then Box and Muller.

A sample's noise is the same bits in whatever batch, order, process or resumed run it is drawn. Between devices the
random words are the same bits too; the normals made of them can differ in the last place, where the devices' logarithm
and sine do.
"""

import math

import torch

from rrcm.utils.rng import derive_seed

SELECT, ESTIMATE, PREDICT, FORWARD = range(4)  # what samples are for: no noise is ever used for two of them

PIECE = 1 << 16  # counters at a time on a CPU, so that the ten rounds stay in its cache
WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 of Salmon et al. 2011: four words of counter (int64 tensors that broadcast, values below 2^32) and
    two words of key give four random words, int64 below 2^32."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps around as unsigned 64 bit numbers do
        c0 = (product1 >> 32).bitwise_and_(WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product0 >> 32).bitwise_and_(WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product1.bitwise_and_(WORD), product0.bitwise_and_(WORD)
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def box_muller(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent standard normals (float32, at most 6.8 in absolute value) of two random 32-bit words."""
    radius = one.float().add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = other.float().mul_(2 * math.pi * 2**-32)
    return radius * angle.cos(), radius * angle.sin()


def counter_normal(
    shape: tuple[int, ...], seed: int, purpose: torch.Tensor, image: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Standard normal noise (B, *shape) float32. Row i belongs to (seed, purpose[i], image[i], sample[i]), each (B,)
    int64 in [0, 2^32) on the device to draw on."""
    size = math.prod(shape)
    quads = -(-size // 4)
    word = derive_seed(seed, "smoothing")
    key = (word & WORD, word >> 32)
    noise = torch.empty(len(sample), 4, quads, device=sample.device)
    rows = max(1, PIECE // quads) if sample.device.type == "cpu" else max(1, len(sample))
    place = torch.arange(quads, device=sample.device)
    for piece in range(0, len(sample), rows):
        some = slice(piece, piece + rows)
        counter = (place, sample[some, None], image[some, None], purpose[some, None])
        w0, w1, w2, w3 = philox4x32(counter, key)
        noise[some, 0], noise[some, 1] = box_muller(w0, w1)
        noise[some, 2], noise[some, 3] = box_muller(w2, w3)
    return noise.flatten(1)[:, :size].unflatten(1, shape)
