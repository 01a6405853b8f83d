"""The noise of certificates: normality, and the same bits in any company."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from rrcm.certification.noise import ESTIMATE, FORWARD, PREDICT, SELECT, counter_normal


def draw(count: int = 200, shape: tuple = (1, 8, 8), seed: int = 0, purpose: int = ESTIMATE, image: int = 0):
    sample = torch.arange(count)
    return counter_normal(shape, seed, torch.full_like(sample, purpose), torch.full_like(sample, image), sample)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 5, 7), (1, 1, 1), (3, 96, 96)])
def test_the_same_bits_in_any_batch(shape):
    """In batches of any size, in another order, among samples of other images, on another number of threads."""
    count = 150
    together, sample = draw(count, shape), torch.arange(count)
    threads = torch.get_num_threads()
    for size in (1, 7, 64):
        for first in range(0, count, size):
            some = sample[first : first + size]
            purpose, image = torch.full_like(some, ESTIMATE), torch.zeros_like(some)
            assert torch.equal(counter_normal(shape, 0, purpose, image, some), together[first : first + size])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([order, order])  # every other row belongs to image 5
    image = torch.cat([torch.zeros_like(order), torch.full_like(order, 5)])
    torch.set_num_threads(3)
    drawn = counter_normal(shape, 0, torch.full_like(mixed, ESTIMATE), image, mixed)
    torch.set_num_threads(threads)
    assert torch.equal(drawn[:count], together[order])
    assert torch.equal(drawn[count:], draw(count, shape, image=5)[order])


def test_no_two_streams_are_the_same():
    kinds = [(seed, purpose, image) for seed in (0, 1) for purpose in range(4) for image in (0, 1, 2**32 - 1)]
    assert {SELECT, ESTIMATE, PREDICT, FORWARD} == set(range(4))
    noises = [draw(2, seed=seed, purpose=purpose, image=image).flatten() for seed, purpose, image in kinds]
    for i, noise in enumerate(noises):
        for other in noises[:i]:
            assert abs(np.corrcoef(noise, other)[0, 1]) < 5 / math.sqrt(len(noise))


def test_it_is_standard_normal():
    """3.2 million numbers: moments within 5 standard errors, Kolmogorov-Smirnov with error rate 1e-6, the tails' share,
    and no correlation between neighbours in a sample, between samples, or between images."""
    noise = draw(50_000).double()
    flat = noise.flatten().numpy()
    n = flat.size
    assert abs(flat.mean()) < 5 / math.sqrt(n)
    assert abs(flat.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((flat**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((flat**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert kstest(flat, "norm").pvalue > 1e-6
    tail = math.erfc(4 / math.sqrt(2))
    assert abs((np.abs(flat) > 4).sum() - n * tail) < 5 * math.sqrt(n * tail)
    pixels = noise.flatten(1).numpy()
    correlation = np.corrcoef(pixels.T) - np.eye(64)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(len(pixels))  # 2,016 pairs
    other = draw(50_000, image=1).flatten(1).double().numpy()
    for one, two in ((pixels[:-1, 0], pixels[1:, 0]), (pixels[:, 0], other[:, 0]), (pixels[:, 0], other[:, 1])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(len(one))
