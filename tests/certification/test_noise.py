"""The noise of certificates: Philox's published answers, normality, and the same bits in any company."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from rrcm.certification.noise import ESTIMATE, FORWARD, PREDICT, SELECT, UINT32, box_muller, counter_normal, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((UINT32,) * 4, (UINT32, UINT32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    """The vectors that its authors publish with Random123."""
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


def draw(count: int = 200, shape: tuple = (1, 8, 8), seed: int = 0, purpose: int = ESTIMATE, image: int = 0):
    sample = torch.arange(count)
    return counter_normal(shape, seed, torch.full_like(sample, purpose), torch.full_like(sample, image), sample)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 5, 7), (1, 1, 1), (3, 96, 96)])
def test_the_same_bits_in_any_company(shape):
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


def test_the_extreme_words_are_finite():
    words = torch.tensor([0, 1, 2**31, UINT32])
    one, other = (side.flatten() for side in torch.meshgrid(words, words, indexing="ij"))
    normals = torch.stack(box_muller(one, other))
    assert normals.isfinite().all() and normals.abs().max() < 6.8
