"""Randomized smoothing against closed forms, scipy, statistics with a stated error rate, and a second library."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from rrcm.certify import BLOCK, certify, clopper_pearson_lower, predict, vote
from rrcm.checkpoint import load_classifier
from rrcm.errors import RRCMError
from rrcm.results import ABSTAIN, read_certificates
from rrcm.shards import ShardedImages, read_split


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 100), (1, 100), (50, 100), (99, 100), (100, 100)])
def test_clopper_pearson_against_scipy(k, n, alpha):
    """scipy's exact two-sided interval at 1 - 2 alpha has our one-sided bound as its lower end."""
    expected = binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact").low
    assert clopper_pearson_lower(k, n, alpha) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [0, 1, 50_000, 50_489, 99_999, 100_000])
def test_clopper_pearson_at_a_hundred_thousand(k):
    expected = binomtest(k, 100_000).proportion_ci(0.998, method="exact").low
    assert clopper_pearson_lower(k, 100_000, 0.001) == pytest.approx(expected, rel=1e-7, abs=1e-12)
    if k == 100_000:
        assert clopper_pearson_lower(k, k, 0.001) == pytest.approx(0.001 ** (1 / k), rel=1e-12)


def split_vote(share: int):
    """A classifier that answers class 1 for exactly `share` of each 100 samples, whatever they are."""
    return lambda pixels: torch.stack([torch.zeros(100), torch.arange(100) < share], dim=1) - 0.5


@pytest.mark.parametrize("share", [50, 60, 64, 65, 66, 67, 68, 70, 100])
@pytest.mark.parametrize("alpha", [0.001, 0.01])
def test_predict_is_the_binomial_test(share, alpha):
    answer = predict(split_vote(share), torch.zeros(1, 2, 2), sigma=1.0, num_classes=2, n=100, alpha=alpha)
    assert (answer == 1) == (binomtest(share, 100, 0.5).pvalue <= alpha)


def half_space(pixels: torch.Tensor) -> torch.Tensor:
    """A linear classifier: class 1 where the pixels' mean is above 0.5. Its smoothed radius is known exactly."""
    score = pixels.flatten(1).mean(1) - 0.5
    return torch.stack([-score, score], dim=1)


def test_the_radius_of_a_half_space_is_its_distance_from_below():
    """p_A = Phi(d / sigma) exactly; the certified radius is below d, and close to it at large n."""
    image = torch.full((1, 4, 4), 0.6)
    distance = 0.1 * math.sqrt(16)
    answer = certify(half_space, image, sigma=0.5, num_classes=2, n=100_000, batch_size=20_000)
    assert answer.predict == 1
    assert distance - 0.02 < answer.radius < distance


def test_certificates_are_wrong_no_more_often_than_alpha():
    """400 certificates at alpha 0.2 of images whose true radius is known: more than 108 above it has chance < 1e-3."""
    image = torch.full((1, 2, 2), 0.6)
    distance, alpha, trials = 0.2, 0.2, 400
    answers = [
        certify(half_space, image, sigma=0.5, num_classes=2, n0=10, n=200, alpha=alpha, batch_size=200, index=i)
        for i in range(trials)
    ]
    too_far = sum(answer.predict == 0 or answer.radius > distance for answer in answers)
    assert too_far <= 108
    assert too_far >= 20  # the bound is exact, so it is not empty either: fewer has chance < 1e-9 at rate >= 0.15


def test_abstains_on_the_boundary_and_radius_is_capped_by_n():
    image = torch.full((1, 4, 4), 0.5)
    assert certify(half_space, image, sigma=0.5, num_classes=2, n=500).predict == ABSTAIN
    assert predict(half_space, image, sigma=0.5, num_classes=2, n=500) == ABSTAIN
    far = certify(half_space, torch.full((1, 4, 4), 9.0), sigma=0.5, num_classes=2, n=500)
    assert far.radius == pytest.approx(0.5 * norm.ppf(0.001 ** (1 / 500)), rel=1e-9)
    assert predict(half_space, torch.full((1, 4, 4), 9.0), sigma=0.5, num_classes=2, n=500) == 1


@pytest.mark.parametrize("batch_size", [1, BLOCK, 250, 1000, 4000])
def test_noise_does_not_depend_on_the_batch_size(batch_size):
    seen = []

    def record(pixels):
        seen.append(pixels)
        return half_space(pixels)

    image = torch.rand(1, 4, 4)
    vote(record, image, 1050, 0.5, 2, batch_size, 3, "estimate", 7)
    noise = torch.cat(seen) - image
    seen.clear()
    vote(record, image, 1050, 0.5, 2, BLOCK, 3, "estimate", 7)
    assert len(noise) == 1050 and torch.equal(noise, torch.cat(seen) - image)
    seen.clear()
    vote(record, image, 1050, 0.5, 2, BLOCK, 3, "estimate", 8)
    assert not torch.equal(noise, torch.cat(seen) - image)


def test_noise_is_standard_normal_and_independent():
    """30,000 samples of 16 pixels: mean, deviation, kurtosis and correlations within 5 standard errors."""
    seen = []
    vote(lambda x: seen.append(x) or half_space(x), torch.zeros(1, 4, 4), 30_000, 1.0, 2, 1000, 0, "estimate", 0)
    noise = torch.cat(seen).flatten(1).double().numpy()
    n = noise.size
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / n)
    correlation = np.corrcoef(noise.T) - np.eye(16)
    assert np.abs(correlation).max() < 5 / math.sqrt(len(noise))
    lagged = np.corrcoef(noise[:-BLOCK, 0], noise[BLOCK:, 0])[0, 1]  # across the blocks' streams
    assert abs(lagged) < 5 / math.sqrt(len(noise))


@pytest.mark.parametrize(
    "wrong", [{"sigma": 0.0}, {"sigma": -1.0}, {"n": 50}, {"n0": 0}, {"alpha": 0.0}, {"alpha": 1.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(RRCMError):
        certify(half_space, torch.zeros(1, 2, 2), **{"sigma": 0.5, "num_classes": 2, "n": 200, **wrong})


def test_a_second_library_agrees(trained):
    """adversarial-robustness-toolbox certifies the same trained network. Its own noise, so radii differ by Monte-Carlo
    error: both bounds come from Bin(n, p), so counts differ by less than 5 standard deviations of their difference."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    sigma, n = 0.5, 2000
    classifier = load_classifier(trained / "models/rrcm/sigma_0.5")
    images = ShardedImages(trained / "data/shards", "test")
    pixels = read_split(images, 8, every=30)[0].float() / 255
    np.random.seed(0)
    torch.manual_seed(0)
    theirs = PyTorchRandomizedSmoothing(
        model=classifier,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        sample_size=100,
        scale=sigma,
        alpha=0.001,
        device_type="cpu",
    )
    classes, radii = theirs.certify(pixels.numpy(), n=n, batch_size=1000)
    decided = 0
    for i, image in enumerate(pixels):
        ours = certify(classifier, image, sigma=sigma, num_classes=10, n=n, index=i)
        if ours.predict == ABSTAIN or classes[i] == -1:
            continue
        decided += 1
        assert ours.predict == classes[i]
        p, q = norm.cdf(ours.radius / sigma), norm.cdf(radii[i] / sigma)
        assert abs(p - q) < 5 * math.sqrt(2 * max(p * (1 - p), 1e-3) / n)
    assert decided >= 3


def test_the_certify_stage_writes_what_the_function_answers(trained):
    frame = read_certificates(trained / "certificates/rrcm/sigma_0.5.tsv")
    assert frame["idx"].tolist() == list(range(0, 360, 10)) and (frame["time"] == 0).all()
    classifier = load_classifier(trained / "models/rrcm/sigma_0.5").bfloat16()  # as the digits' profile has it
    pixels, labels, indices = read_split(ShardedImages(trained / "data/shards", "test"), 8, every=10)
    assert labels.tolist() == frame["label"].tolist()
    for row, image, index in zip(frame.itertuples(), pixels, indices, strict=True):
        answer = certify(
            classifier, image.float() / 255, sigma=0.5, num_classes=10, n=1000, batch_size=200, index=index
        )
        assert (answer.predict, answer.predict == row.label) == (row.predict, bool(row.correct))
        assert answer.radius == pytest.approx(row.radius, abs=1e-6)
