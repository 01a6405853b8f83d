"""Stochastic classifiers: their votes depend only on the seed, the image and the sample."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from rrcm.certification.noise import ESTIMATE, CounterDraw, counter_normal
from rrcm.certification.smoothing import ImageState, SampleRequest, SmoothedClassifier, certificate
from rrcm.certification.stopping import (
    group_sequential,
)
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.utils.errors import RRCMError

# --- stochastic classifiers -------------------------------------------------------------------------------------------


class Dithered(BaseClassifier):
    """Compares the mean pixel with 0.5 after adding noise of its own: class 1 with probability Phi(d / s)."""

    num_classes, stochastic = 2, True

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, noisy: torch.Tensor, draw=None) -> torch.Tensor:
        score = noisy.flatten(1).mean(1) - 0.5 + 0.3 * draw.normal("dither", (3,)).to(noisy.dtype).mean(1)
        return self.gain * torch.stack([-score, score], dim=1)


def dithered(**options) -> SmoothedClassifier:
    return SmoothedClassifier(Dithered(), 0.5, 2, **options)


GREYS = torch.stack([torch.full((1, 2, 2), 0.3 + 0.05 * k) for k in range(10)])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stochastic_classifier_votes_the_same_beside_any_images(precision):
    requests = [SampleRequest(image, 7 * i, ESTIMATE, 5, 400 + 20 * i) for i, image in enumerate(GREYS)]
    expected = dithered(batch_size=64, precision=precision).count_votes(requests)
    assert (expected.min(1) > 20).all()  # no image is decided without chance
    for size in (13, 4096):
        assert (dithered(batch_size=size, precision=precision).count_votes(requests) == expected).all()
    order = [3, 9, 0, 5, 1, 2, 8, 4, 7, 6]
    backwards = dithered(batch_size=100, precision=precision).count_votes([requests[i] for i in order])
    assert (backwards == expected[order]).all()
    halves = [
        dithered(precision=precision).count_votes([SampleRequest(r.image, r.index, ESTIMATE, start, stop)])[0]
        for r in requests
        for start, stop in ((5, 100), (100, r.stop))
    ]
    assert (np.array(halves).reshape(10, 2, 2).sum(1) == expected).all()


def test_a_stochastic_classifier_is_certified_the_same_beside_any_images_and_after_a_kill():
    settings = {"n": 2000, "radius_step": 0.1}
    expected = dithered(batch_size=64).certify(GREYS, **settings)
    assert len({answer.radius for answer in expected}) > 2
    assert dithered(batch_size=500).certify(GREYS, **settings) == expected
    order = list(range(10))[::-1]
    assert dithered(batch_size=33).certify(GREYS[order], indices=order, **settings) == expected[::-1]

    rule, states = group_sequential(0.5, **settings), [ImageState(i, image) for i, image in enumerate(GREYS)]
    next(dithered(batch_size=10).certify_stream(states, rule, at_once=4))  # stopped after one round, saved and restored
    saved = [json.loads(json.dumps({k: v for k, v in vars(state).items() if k != "image"})) for state in states]
    restored = [ImageState(image=image, **state) for image, state in zip(GREYS, saved, strict=True)]
    assert any(state.samples for state in restored) and not all(state.stop_reason for state in restored)
    for _ in dithered(batch_size=77).certify_stream(restored, rule):
        pass
    assert [certificate(state, rule, 2) for state in restored] == expected


def test_a_stochastic_classifier_is_given_draws_by_predict_and_forward():
    assert dithered().predict(GREYS, n=1000) == dithered(batch_size=9).predict(GREYS, n=1000)
    smoothed, images = dithered(num_noise=5000), GREYS.clone().requires_grad_()
    shares = smoothed(images).exp()
    assert torch.equal(shares, smoothed(images).exp())
    assert (shares[1:, 1] > shares[:-1, 1]).all()
    shares[:, 1].sum().backward()
    assert (images.grad > 0).all()
    one, other = dithered(seed=1)(GREYS), dithered(seed=2)(GREYS)
    assert not torch.allclose(one, other)


def test_a_stochastic_classifier_answers_with_the_probability_of_both_noises():
    """Smoothing noise and its own are independent: their variances add up."""
    n, distance = 40_000, 0.1
    ((_, count),) = dithered().count_votes([SampleRequest(torch.full((1, 2, 2), 0.6), 0, ESTIMATE, 0, n)])
    p = norm.cdf(distance / math.sqrt(0.5**2 / 4 + 0.3**2 / 3))
    assert abs(count / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_draws_depend_on_their_row_and_name_alone():
    purpose, image, sample = torch.tensor([[1, 1, 2], [0, 5, 5], [0, 0, 9]])
    draw = CounterDraw(0, purpose, image, sample)
    whole = draw.normal("a", (2, 3))
    assert whole.shape == (3, 2, 3) and whole.dtype == torch.float32
    assert torch.equal(draw.normal("a", (2, 3)), whole)
    for row in range(3):
        alone = CounterDraw(0, *(values[row : row + 1] for values in (purpose, image, sample)))
        assert torch.equal(alone.normal("a", (2, 3))[0], whole[row])
    different = [whole, draw.normal("b", (2, 3)), CounterDraw(1, purpose, image, sample).normal("a", (2, 3))]
    different += [counter_normal((2, 3), 0, purpose, image, sample)]  # the smoothing noise
    values = torch.cat(different).flatten()
    assert len(values.unique()) == len(values)


def test_a_stochastic_classifier_is_not_compiled():
    with pytest.raises(RRCMError, match=r"^compile = True: a stochastic classifier cannot be compiled.*$"):
        dithered(compile=True)
