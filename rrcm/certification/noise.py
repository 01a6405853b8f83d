"""Counter-based Gaussian noise: a pure function of (seed, purpose, image, sample).

Philox turns a counter and a key into random words; Box and Muller's method turns words into normals. A sample has the
same noise in every batch, order, process and resumed run. The random words are the same on all devices. The normals can
differ in the last bit, because devices round the logarithm and the sine differently.
"""

import math

import torch

from rrcm.utils.rng import derive_seed

SELECT, ESTIMATE, PREDICT, FORWARD, SOFT_LABEL = range(5)  # purposes of samples: no two purposes share noise

CHUNK = 1 << 16  # counters per call on a CPU: the ten Philox rounds then stay in its cache
UINT32 = 0xFFFFFFFF


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four counter words and two key words give four random words.

    The counter words are int64 tensors that broadcast, with values in [0, 2^32). So are the results.
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


def box_muller(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent standard normals from two random 32-bit words: float32, at most 6.8 in absolute value."""
    radius = one.float().add_(0.5).mul_(2**-32).log_().mul_(-2).sqrt_()
    angle = other.float().mul_(2 * math.pi * 2**-32)
    return radius * angle.cos(), radius * angle.sin()


def counter_normal(
    shape: tuple[int, ...],
    seed: int,
    purpose: torch.Tensor,
    image: torch.Tensor,
    sample: torch.Tensor,
    *,
    stream: tuple[str, ...] = ("smoothing",),
) -> torch.Tensor:
    """Standard normal noise, (B, *shape) float32.

    Row i is a function of (seed, stream, purpose[i], image[i], sample[i]) alone. purpose, image and sample are (B,)
    int64 in [0, 2^32), on the device to compute on. Different streams are independent.
    """
    size = math.prod(shape)
    quads = -(-size // 4)
    word = derive_seed(seed, *stream)
    key = (word & UINT32, word >> 32)
    noise = torch.empty(len(sample), 4, quads, device=sample.device)
    rows = max(1, CHUNK // quads) if sample.device.type == "cpu" else max(1, len(sample))
    position = torch.arange(quads, device=sample.device)
    for first in range(0, len(sample), rows):
        chunk = slice(first, first + rows)
        counter = (position, sample[chunk, None], image[chunk, None], purpose[chunk, None])
        w0, w1, w2, w3 = philox4x32(counter, key)
        noise[chunk, 0], noise[chunk, 1] = box_muller(w0, w1)
        noise[chunk, 2], noise[chunk, 3] = box_muller(w2, w3)
    return noise.flatten(1)[:, :size].unflatten(1, shape)


class CounterDraw:
    """The random draws of a stochastic classifier for one batch of noisy samples.

    Row i of each draw is a function of (seed, name, purpose[i], image[i], sample[i]) alone. The streams differ from the
    smoothing noise and from each other by name, and the same name gives the same numbers again.
    """

    def __init__(self, seed: int, purpose: torch.Tensor, image: torch.Tensor, sample: torch.Tensor):
        self.seed, self.rows = seed, (purpose, image, sample)

    def normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers, (B, *shape) float32, on the device of the batch."""
        return counter_normal(shape, self.seed, *self.rows, stream=("classifier", name))
