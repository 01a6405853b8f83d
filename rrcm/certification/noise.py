"""The noise of certificates: a pure function of (seed, purpose, image, sample), by Philox (`rrcm/utils/philox.py`).

A sample has the same noise in every batch, order, process and resumed run.
"""

import torch

from rrcm.certification.cpu_noise import normal
from rrcm.utils.rng import derive_seed

SELECT, ESTIMATE, PREDICT, FORWARD, SOFT_LABEL = range(5)  # purposes of samples: no two purposes share noise


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
    return normal(shape, derive_seed(seed, *stream), (sample, image, purpose))


class CounterDraw:
    """The random numbers of a stochastic classifier for one batch of noisy samples.

    Row i is a function of (seed, name, purpose[i], image[i], sample[i]) alone. Each name is a stream of its own,
    independent of the smoothing noise, and the same name gives the same numbers again.
    """

    def __init__(self, seed: int, purpose: torch.Tensor, image: torch.Tensor, sample: torch.Tensor):
        self.seed, self.rows = seed, (purpose, image, sample)

    def normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers, (B, *shape) float32, on the device of the batch."""
        return counter_normal(shape, self.seed, *self.rows, stream=("classifier", name))
