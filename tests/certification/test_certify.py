"""The certification engine against closed forms, a page of plain CERTIFY, statistics with a stated error rate, a second
library, killed processes and many processes."""

import math
import shutil
from itertools import takewhile

import numpy as np
import pytest
import torch
from conftest import assert_close
from scipy.stats import binomtest, norm
from torch import nn

from rrcm.certification.noise import ESTIMATE, SELECT, counter_normal
from rrcm.certification.smoothing import ABSTAIN, ImageState, SampleRequest, SmoothedClassifier, certificate
from rrcm.certification.stopping import (
    ALL_SAMPLES,
    FUTILE,
    WHOLE_GRID,
    WRONG_CLASS,
    clopper_pearson_lower,
    group_sequential,
)
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder
from rrcm.utils.errors import RRCMError


class HalfSpace(nn.Module):
    """A linear classifier: class 1 where the pixels' mean is above 0.5. Its smoothed radius is known exactly."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels)
        score = pixels.flatten(1).mean(1) - 0.5
        return torch.stack([-score, score], dim=1)


def half_space(sigma: float = 0.5, **options) -> SmoothedClassifier:
    return SmoothedClassifier(HalfSpace(), sigma, 2, **options)


class Split(nn.Module):
    """Answers class 1 for exactly `share` of each 100 samples, whatever they are."""

    def __init__(self, share: int):
        super().__init__()
        self.share = share

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(pixels)), torch.arange(len(pixels)) % 100 < self.share], dim=1) - 0.5


@pytest.fixture(scope="module")
def digits(trained) -> tuple[nn.Module, torch.Tensor, list[int], list[int]]:
    """A trained network, test images, labels and their places."""
    images = ShardedDataset(trained / "data/shards", "test")
    pixels, labels, indices = read_split(images, 8, every=30)
    classifier = load_model_folder(trained / "models/rrcm/sigma_0.5").classifier
    return classifier, pixels.float() / 255, labels.tolist(), indices


# --- the procedures ---------------------------------------------------------------------------------------------------


def plain_certify(model, image, sigma, n0, n, alpha, index):
    """CERTIFY of Cohen et al. in a few lines, a sample at a time."""

    def votes(count, purpose):
        counts = np.zeros(2, int)
        for k in range(count):
            noise = counter_normal(image.shape, 0, *torch.tensor([[purpose], [index], [k]]))
            counts[int(model(image + sigma * noise).argmax())] += 1
        return counts

    top = int(votes(n0, SELECT).argmax())
    bound = clopper_pearson_lower(int(votes(n, ESTIMATE)[top]), n, alpha)
    return (top, sigma * norm.ppf(bound)) if bound >= 0.5 else (ABSTAIN, 0.0)


def test_fixed_is_plain_certify():
    images = torch.stack([torch.full((1, 3, 3), level) for level in (0.3, 0.45, 0.5, 0.52, 0.6, 0.9)])
    answers = half_space(batch_size=64).certify(images, stopping="fixed", n0=20, n=300, indices=[5, 0, 9, 2, 7, 1])
    for image, index, answer in zip(images, [5, 0, 9, 2, 7, 1], answers, strict=True):
        predict, radius = plain_certify(HalfSpace(), image, 0.5, 20, 300, 0.001, index)
        assert (answer.prediction, answer.samples, answer.stop_reason) == (predict, 320, ALL_SAMPLES)
        assert answer.radius == pytest.approx(radius, rel=1e-9)
    assert {answer.prediction for answer in answers} == {0, 1, ABSTAIN}


def test_sequential_certifies_what_its_counts_allow():
    """The votes at the look where it stopped, counted again, certify its radius and not the next one."""
    images = torch.stack([torch.full((1, 4, 4), 0.5 + 0.025 * k) for k in range(20)])
    smoothed, rule = half_space(), group_sequential(0.5, n=10_000, radius_step=0.1)
    answers = smoothed.certify(images, n=10_000, radius_step=0.1)
    assert {answer.stop_reason for answer in answers} == {ALL_SAMPLES, FUTILE, WHOLE_GRID}
    for index, (image, answer) in enumerate(zip(images, answers, strict=True)):
        m = answer.samples - 100
        (votes,) = smoothed.count_votes([SampleRequest(image, index, ESTIMATE, 0, m)])
        passed = [
            int(smoothed.count_votes([SampleRequest(image, index, ESTIMATE, 0, look)])[0].max())
            for look in rule.looks
            if look <= m
        ]
        enough = (np.array(passed)[:, None] >= rule.efficacy_counts[: len(passed)]).any(axis=0)
        certified = [radius for radius, _ in takewhile(lambda each: each[1], zip(rule.radii, enough, strict=True))]
        assert (answer.radius if answer.prediction != ABSTAIN else None) == (certified[-1] if certified else None)
        assert answer.prediction in (ABSTAIN, int(votes.argmax()))


def test_the_radius_of_a_half_space_is_its_distance_from_below():
    """p_A = Phi(d / sigma) exactly; the certified radius is below d, and close to it at large n."""
    image, distance = torch.full((1, 1, 4, 4), 0.6), 0.1 * math.sqrt(16)
    (answer,) = half_space().certify(image, stopping="fixed")
    assert answer.prediction == 1 and distance - 0.02 < answer.radius < distance
    (answer,) = half_space().certify(image, radius_step=0.125)
    assert (answer.prediction, answer.radius) == (1, 0.375) and answer.samples < 100_000


def test_certificates_are_wrong_no_more_often_than_alpha():
    """400 certificates at alpha 0.2 of images whose true radius is known: more than 108 above it has chance < 1e-3."""
    images, distance = torch.full((400, 1, 2, 2), 0.6), 0.2
    answers = half_space().certify(images, stopping="fixed", n0=10, n=200, alpha=0.2)
    too_far = sum(answer.prediction == 0 or answer.radius > distance for answer in answers)
    assert (
        20 <= too_far <= 108
    )  # the bound is exact, so it is not empty either: fewer has chance < 1e-9 at rate >= 0.15


def test_abstains_on_the_boundary_and_radius_is_capped_by_n():
    boundary, far = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 40, 40), 1.0)
    for stopping in ("fixed", "sequential"):
        (answer,) = half_space().certify(boundary, stopping=stopping, n=500)
        assert (answer.prediction, answer.radius) == (ABSTAIN, 0.0)
    assert half_space().predict(boundary, n=500) == [ABSTAIN]
    (answer,) = half_space().certify(far, stopping="fixed", n=500)
    assert answer.radius == pytest.approx(0.5 * norm.ppf(0.001 ** (1 / 500)), rel=1e-9)
    (answer,) = half_space().certify(far, n=500, radius_step=0.1)
    assert (answer.radius, answer.stop_reason) == (1.1, WHOLE_GRID)  # 500 of 500 have a chance below alpha there
    assert half_space().predict(far, n=500) == [1]


@pytest.mark.parametrize("share", [50, 60, 64, 65, 66, 67, 68, 70, 100])
@pytest.mark.parametrize("alpha", [0.001, 0.01])
def test_predict_is_the_binomial_test(share, alpha):
    smoothed = SmoothedClassifier(Split(share), 1.0, 2, batch_size=100)
    (answer,) = smoothed.predict(torch.zeros(1, 1, 2, 2), n=100, alpha=alpha)
    assert (answer == 1) == (binomtest(share, 100, 0.5).pvalue <= alpha)


def test_an_evaluation_stops_at_a_wrong_class_and_only_then():
    images = torch.full((3, 1, 4, 4), 0.9)
    with_labels = half_space().certify(images, labels=[1, 0, 1], n=1000)
    assert [answer.stop_reason for answer in with_labels] == [WHOLE_GRID, WRONG_CLASS, WHOLE_GRID]
    assert (with_labels[1].prediction, with_labels[1].radius, with_labels[1].samples) == (1, 0.0, 100)
    assert half_space().certify(images, n=1000)[1].stop_reason == WHOLE_GRID
    exact = half_space().certify(images, labels=[1, 0, 1], stopping="fixed", n=1000)  # Cohen's never stops early
    assert [answer.samples for answer in exact] == [1100] * 3 and exact[1].radius > 1


# --- packing ----------------------------------------------------------------------------------------------------------


def certificates(smoothed, digits, at_once=None, order=slice(None), **settings) -> dict:
    _, pixels, labels, indices = digits
    rule = group_sequential(smoothed.sigma, radius_step=0.05, **settings)
    candidates = [ImageState(*each) for each in list(zip(indices, pixels, labels, strict=True))[order]]
    for moved in smoothed.certify_stream(candidates, rule, at_once=at_once):
        assert len(moved) <= (at_once or len(pixels))
    return {candidate.index: certificate(candidate, rule, 2) for candidate in candidates}


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_certificates_do_not_depend_on_other_images_or_order(digits, precision):
    smoothed = SmoothedClassifier(digits[0], 0.5, 10, batch_size=256, precision=precision)
    expected = certificates(smoothed, digits, n=2000)
    assert {answer.stop_reason for answer in expected.values()} >= {ALL_SAMPLES, FUTILE, WRONG_CLASS}
    assert certificates(smoothed, digits, n=2000, order=slice(None, None, -1)) == expected
    assert certificates(smoothed, digits, n=2000, at_once=1) == expected
    assert certificates(smoothed, digits, n=2000, at_once=5) == expected
    some = certificates(smoothed, digits, n=2000, order=slice(3, 5))
    assert some == {index: expected[index] for index in some}


@pytest.mark.thorough
def test_another_batch_size_changes_next_to_no_vote(digits):
    """Same noise to the bit; of 10,000 votes an image at most 0.2 % may fall otherwise by rounding."""
    model, pixels, _, _ = digits
    requests = [SampleRequest(image, i, ESTIMATE, 0, 10_000) for i, image in enumerate(pixels[:4])]
    votes = [
        SmoothedClassifier(model, 0.5, 10, batch_size=size, precision="bf16").count_votes(requests)
        for size in (64, 1000)
    ]
    assert np.abs(votes[0] - votes[1]).sum(1).max() / 2 <= 20
    one, other = (
        certificates(SmoothedClassifier(model, 0.5, 10, batch_size=size), digits, n=1000) for size in (64, 1000)
    )
    assert one == other


@pytest.mark.parametrize("batch_size", [1, 100, 250, 1000, 4000])
def test_every_sample_is_drawn_once_and_padding_does_not_vote(batch_size):
    smoothed, images = half_space(batch_size=batch_size), torch.rand(3, 1, 4, 4)
    smoothed.count_votes([SampleRequest(images[0], 0, ESTIMATE, 0, 1)])  # the first call tests the model as well
    smoothed.model.seen.clear()
    lengths = [1050, 1, 77]
    votes = smoothed.count_votes(
        [SampleRequest(image, i, ESTIMATE, 3, 3 + m) for i, (image, m) in enumerate(zip(images, lengths, strict=True))]
    )
    assert votes.sum(1).tolist() == lengths
    assert {len(batch) for batch in smoothed.model.seen} == {batch_size}
    rows = torch.cat(smoothed.model.seen)[: sum(lengths)]
    sample = torch.cat([torch.arange(3, 3 + m) for m in lengths])
    image = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    noise = counter_normal((1, 4, 4), 0, torch.full_like(sample, ESTIMATE), image, sample)
    assert torch.equal(rows, images[image].add_(noise, alpha=0.5))


def test_the_batch_size_is_chosen_automatically(digits):
    model, pixels, _, _ = digits
    assert SmoothedClassifier(model, 0.5, 10).find_batch_size(pixels[0]) == 1024
    small = SmoothedClassifier(model, 0.5, 10, memory_gib=2**-12)
    size = small.find_batch_size(pixels[0])
    assert 1 <= size < 64 and size & (size - 1) == 0
    assert SmoothedClassifier(model, 0.5, 10, memory_gib=2**-13).find_batch_size(pixels[0]) == size // 2
    assert half_space(memory_gib=1e-9).find_batch_size(torch.zeros(3, 64, 64)) == 1
    assert SmoothedClassifier(model, 0.5, 10, batch_size=7).find_batch_size(pixels[0]) == 7


# --- any model --------------------------------------------------------------------------------------------------------


def test_noise_is_added_in_float32_and_weights_are_bfloat16():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, pixels):
            assert pixels.dtype == self.layer.weight.dtype
            return self.layer(pixels.flatten(1))

    model = Recorder()
    answers = SmoothedClassifier(model, 0.5, 3, precision="bf16").certify(torch.rand(2, 1, 4, 4), n=200)
    assert len(answers) == 2 and model.layer.weight.dtype == torch.float32  # a copy was rounded, not the user's own


def test_it_is_a_module_that_stays_in_eval_mode(digits):
    """Batch statistics would let a sample's company change its vote."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    smoothed = SmoothedClassifier(model, 0.5, 10, compile=False)
    assert not smoothed.train().model[1].training
    assert set(smoothed.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    images = digits[1][:3].requires_grad_()
    output = smoothed(images)
    assert output.shape == (3, 10) and torch.equal(output, smoothed(images))
    assert output.exp().sum(1).detach() == pytest.approx(1, abs=1e-5)
    output[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0


def test_forward_is_the_mean_softmax_over_its_copies(digits):
    model, pixels, _, _ = digits
    smoothed = SmoothedClassifier(model, 0.5, 10, num_noise=2000)
    with torch.no_grad():
        shares = smoothed(pixels[:2]).exp()
        votes = model(pixels[0] + 0.5 * torch.randn(4000, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert (shares[0] - votes.softmax(1).mean(0)).abs().max() < 5 * math.sqrt(0.25 / 2000 + 0.25 / 4000)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_model_votes_the_same():
    torch.manual_seed(0)
    model, image = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10)), torch.rand(1, 8, 8)
    plain, compiled = (
        SmoothedClassifier(model, 0.5, 10, batch_size=250, compile=switch).count_votes(
            [SampleRequest(image, 0, ESTIMATE, 0, 2000)]
        )
        for switch in (False, True)
    )
    assert np.abs(plain - compiled).sum() / 2 <= 2


class Broken(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, pixels):
        return self.answer(pixels)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda x: x.flatten(1)[:, :2] * math.nan, "NaN"),
        (lambda x: x.flatten(1)[:, :3], "must be"),
        (lambda x: x.flatten()[:2], "must be"),
    ],
)
def test_models_without_usable_logits_are_refused(answer, complaint):
    with pytest.raises(RRCMError, match=complaint):
        SmoothedClassifier(Broken(answer), 0.5, 2).certify(torch.rand(2, 1, 2, 2), n=200)


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"n0": 0}, {"alpha": 0.0}, {"alpha": 1.0}, {"radius_step": 0.0}, {"stopping": "quick"}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(RRCMError):
        half_space().certify(torch.zeros(1, 1, 2, 2), **{"n": 200, **wrong})


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_impossible_noise_is_refused(sigma):
    with pytest.raises(RRCMError):
        half_space(sigma)


def test_a_second_library_agrees(digits):
    """adversarial-robustness-toolbox certifies the same trained network. Its own noise, so radii differ by Monte-Carlo
    error: both bounds come from Bin(n, p), so counts differ by less than 5 standard deviations of their difference."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    model, pixels, _, indices = digits
    sigma, n = 0.5, 2000
    np.random.seed(0)
    torch.manual_seed(0)
    theirs = PyTorchRandomizedSmoothing(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 8, 8),
        nb_classes=10,
        sample_size=100,
        scale=sigma,
        alpha=0.001,
        device_type="cpu",
    )
    classes, radii = theirs.certify(pixels.numpy(), n=n, batch_size=1000)
    ours = SmoothedClassifier(model, sigma, 10).certify(pixels, stopping="fixed", n=n, indices=indices)
    decided = 0
    for answer, predict, radius in zip(ours, classes, radii, strict=True):
        if answer.prediction == ABSTAIN or predict == -1:
            continue
        decided += 1
        assert answer.prediction == predict
        p, q = norm.cdf(answer.radius / sigma), norm.cdf(radius / sigma)
        assert abs(p - q) < 5 * math.sqrt(2 * max(p * (1 - p), 1e-3) / n)
    assert decided >= 3


def test_a_second_library_wraps_it(digits):
    from art.estimators.classification import PyTorchClassifier

    model, pixels, _, _ = digits
    smoothed = SmoothedClassifier(model, 0.5, 10)
    wrapped = PyTorchClassifier(smoothed, nn.NLLLoss(), input_shape=(1, 8, 8), nb_classes=10, device_type="cpu")
    with torch.no_grad():
        assert_close(torch.from_numpy(wrapped.predict(pixels[:4].numpy())), smoothed(pixels[:4]))
    assert np.abs(wrapped.loss_gradient(pixels[:4].numpy(), np.eye(10)[:4])).sum() > 0
