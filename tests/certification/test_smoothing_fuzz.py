"""Any settings and images: the right answer, or an error of one line.

The models read pixels without rounding, so that batch size cannot change a vote; the right answers come from closed
forms, from scipy, or from votes counted again.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom, binomtest
from torch import nn

from rrcm.certification.noise import ESTIMATE, PREDICT, SELECT, counter_normal
from rrcm.certification.smoothing import ABSTAIN, Certificate, SampleRequest, SmoothedClassifier
from rrcm.certification.stopping import (
    ALL_SAMPLES,
    BOUNDS,
    FUTILE,
    WHOLE_GRID,
    WRONG_CLASS,
    clopper_pearson_lower,
    group_sequential,
)
from rrcm.utils.errors import RRCMError

pytestmark = pytest.mark.thorough  # hundreds of random settings

QUICK = settings(derandomize=True, deadline=None, max_examples=100)

BATCH_SIZES = st.sampled_from([None, 7, 33, 257, 1001])
CLASSES = st.sampled_from([2, 3, 10, 1000])
SIGMAS = st.floats(-4, 4).map(lambda exponent: 10**exponent)
ALPHAS = st.sampled_from([1e-300, 1e-9, 0.001, 0.05, 0.3, 0.5])
SAMPLES = st.integers(1, 500)
STOPPING = st.sampled_from(["fixed", "sequential"])


def enough(n: int, alpha: float) -> int:
    """n, or as many samples as it takes for PREDICT, and so for CERTIFY, to say something at alpha."""
    return max(n, math.ceil(1 - math.log2(alpha)))


class Constant(nn.Module):
    """Always the same class."""

    def __init__(self, classes: int, answer: int):
        super().__init__()
        self.classes, self.answer = classes, answer

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.full((len(pixels),), self.answer), self.classes).float()


class Linear(nn.Module):
    """Class k's logit is pixel k less pixel k + shift, counted round the image: exact in any batch."""

    def __init__(self, pixels: int, classes: int, shift: int = 0):
        super().__init__()
        weight, k = torch.zeros(classes, pixels), torch.arange(classes)
        weight[k, k % pixels] = 1
        if shift % pixels:
            weight[k, (k + shift) % pixels] = -1
        self.layer = nn.Linear(pixels, classes, bias=False)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels.flatten(1))


@st.composite
def cases(draw: st.DrawFn) -> tuple[SmoothedClassifier, torch.Tensor]:
    """A smoothed linear classifier and images for it."""
    count, shape = draw(st.integers(0, 4)), draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (3, 3, 2), (2, 1, 7)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    classes = draw(CLASSES)
    model = Linear(math.prod(shape), classes, draw(st.integers(0, 3)))
    smoothed = SmoothedClassifier(
        model, draw(SIGMAS), classes, seed=draw(st.integers(-1, 5)), batch_size=draw(BATCH_SIZES), num_noise=5
    )
    return smoothed, torch.rand(count, *shape, generator=generator)


def with_batch_size(smoothed: SmoothedClassifier, batch_size: int | None) -> SmoothedClassifier:
    return SmoothedClassifier(
        smoothed.model, smoothed.sigma, smoothed.num_classes, seed=smoothed.seed, batch_size=batch_size
    )


def check_sane(answers: list[Certificate], images: int, classes: int, n0: int, n: int) -> None:
    """What holds of any answer."""
    assert len(answers) == images
    for answer in answers:
        assert isinstance(answer.prediction, int)
        assert isinstance(answer.samples, int)
        assert ABSTAIN <= answer.prediction < classes
        assert 0 <= answer.radius < math.inf
        assert n0 <= answer.samples <= n0 + n
        assert answer.stop_reason in (ALL_SAMPLES, WHOLE_GRID, FUTILE, WRONG_CLASS)
        if answer.prediction == ABSTAIN or answer.stop_reason == WRONG_CLASS:
            assert answer.radius == 0
        if answer.stop_reason == WRONG_CLASS:
            assert answer.samples == n0


def answered(call: Callable, *args, **options) -> object | None:
    """The answer, or None for an `RRCMError` of one line."""
    try:
        return call(*args, **options)
    except RRCMError as error:
        assert str(error)
        assert "\n" not in str(error)


@given(CLASSES, st.data(), SIGMAS, ALPHAS, SAMPLES, st.integers(1, 50), BATCH_SIZES)
@QUICK
def test_a_constant_classifier_has_the_radius_of_n_votes_out_of_n(classes, data, sigma, alpha, n, n0, batch_size):
    """Its bound is alpha^(1/n); under `sequential` the radius is the last of the grid in it, found at whatever look."""
    n, answer = enough(n, alpha), data.draw(st.integers(0, classes - 1))
    radius_step = sigma * data.draw(st.floats(0.01, 5))
    smoothed = SmoothedClassifier(Constant(classes, answer), sigma, classes, batch_size=batch_size)
    images, numbers = torch.zeros(2, 1, 2, 1), {"n0": n0, "n": n, "alpha": alpha}

    bound = alpha ** (1 / n)
    right = (answer, pytest.approx(sigma * ndtri(bound), rel=1e-9, abs=1e-9 * sigma))
    for certificate in smoothed.certify(images, stopping="fixed", **numbers):
        assert (certificate.prediction, certificate.radius) == right
        assert (certificate.samples, certificate.stop_reason) == (n0 + n, ALL_SAMPLES)

    reach = sigma * ndtri(bound)
    answers = smoothed.certify(images, radius_step=radius_step, **numbers)
    check_sane(answers, 2, classes, n0, n)
    for certificate in answers:
        assert certificate.prediction == answer
        assert certificate.radius == pytest.approx(radius_step * (max(reach, 0) // radius_step), rel=1e-9)
        assert certificate.stop_reason == WHOLE_GRID

    assert smoothed.predict(images, n=n, alpha=alpha) == [answer if binomtest(n, n).pvalue <= alpha else ABSTAIN] * 2


@given(
    cases(),
    STOPPING,
    st.sampled_from(BOUNDS),
    SAMPLES,
    st.integers(1, 50),
    ALPHAS,
    st.floats(0.1, 3),
    BATCH_SIZES,
    st.data(),
)
@QUICK
def test_an_image_has_one_answer(case, stopping, bound, n, n0, alpha, step, batch_size, data):
    """Whatever the batch size, the company, the order and the float type; and labels only end it sooner."""
    (smoothed, images), n = case, enough(n, alpha)
    options = {
        "stopping": stopping,
        "bound": bound,
        "n": n,
        "n0": n0,
        "alpha": alpha,
        "radius_step": step * smoothed.sigma,
    }
    answers = smoothed.certify(images, **options)
    check_sane(answers, len(images), smoothed.num_classes, n0, n)
    assert with_batch_size(smoothed, batch_size).certify(images, **options) == answers

    order = data.draw(st.permutations(range(len(images))))
    again = smoothed.certify(images[order].double(), indices=order, **options)
    assert again == [answers[place] for place in order]
    half = images.half()
    assert smoothed.certify(half, **options) == smoothed.certify(half.float(), **options)

    labels = data.draw(st.lists(st.integers(0, 1), min_size=len(images), max_size=len(images)))
    for labelled, answer, label in zip(smoothed.certify(images, labels, **options), answers, labels, strict=True):
        if labelled.stop_reason == WRONG_CLASS:
            assert stopping == "sequential"
            assert labelled.prediction != label
            assert answer.prediction in (ABSTAIN, labelled.prediction)
        else:
            assert labelled == answer
            assert stopping == "fixed" or answer.prediction in (ABSTAIN, label)


@given(cases(), SAMPLES, st.integers(1, 50), ALPHAS, st.floats(0.1, 3))
@QUICK
def test_sequential_is_fixed_at_each_look(case, n, n0, alpha, step):
    """Counted again, sample by sample: the radii are certified one by one, each when the exact bound of `fixed` at a
    look, with the alpha that is left for that radius there, reaches it."""
    (smoothed, images), n = case, enough(n, alpha)
    rule = group_sequential(smoothed.sigma, n0=n0, n=n, alpha=alpha, radius_step=step * smoothed.sigma)
    answers = smoothed.certify(images, n=n, n0=n0, alpha=alpha, radius_step=step * smoothed.sigma)
    spent = binom.sf(
        rule.efficacy_counts - 1, np.array(rule.looks)[:, None], ndtr(np.array(rule.radii) / smoothed.sigma)
    )
    left = np.cumsum(rule.alphas)[:, None] - np.cumsum(spent, axis=0) + spent  # (looks, radii)
    for index, (image, answer) in enumerate(zip(images, answers, strict=True)):
        top = smoothed.count_votes([SampleRequest(image, index, SELECT, 0, n0)])[0].argmax()
        level, seen = 0, [look for look in rule.looks if look <= answer.samples - n0]
        assert seen[-1] == answer.samples - n0
        for look, alphas in zip(seen, left[: len(seen)], strict=True):
            count = int(smoothed.count_votes([SampleRequest(image, index, ESTIMATE, 0, look)])[0][top])
            while level < len(rule.radii):
                bound = clopper_pearson_lower(count, look, alphas[level])
                if bound < ndtr(rule.radii[level] / smoothed.sigma) * (1 - 1e-12):
                    break
                level += 1
        assert (answer.prediction, answer.radius) == ((top, rule.radii[level - 1]) if level else (ABSTAIN, 0.0))
        assert answer.stop_reason == FUTILE or answer.samples == n0 + n or level == len(rule.radii)


@given(cases(), SAMPLES, ALPHAS, BATCH_SIZES)
@QUICK
def test_predict_is_the_binomial_test_of_plainly_counted_votes(case, n, alpha, batch_size):
    (smoothed, images), n = case, enough(n, alpha)
    answers = smoothed.predict(images, n=n, alpha=alpha)
    assert with_batch_size(smoothed, batch_size).predict(images, n=n, alpha=alpha) == answers
    for index, answer in enumerate(answers):
        row = torch.ones(n, dtype=torch.int64)
        noise = counter_normal(images.shape[1:], smoothed.seed, PREDICT * row, index * row, torch.arange(n))
        noisy = images[index].expand_as(noise).add(noise, alpha=smoothed.sigma)
        votes = smoothed.model(noisy).argmax(1).bincount(minlength=smoothed.num_classes).numpy()
        assert (smoothed.count_votes([SampleRequest(images[index], index, PREDICT, 0, n)])[0] == votes).all()
        runner_up, top = np.sort(votes)[-2:].tolist()
        sure = binomtest(top, top + runner_up).pvalue <= alpha
        assert answer == (votes.argmax() if sure else ABSTAIN)


@given(cases(), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
@QUICK
def test_forward_is_the_mean_softmax(case, dtype):
    smoothed, images = case
    images = images.to(dtype).requires_grad_()
    log_mean = smoothed(images)
    assert log_mean.shape == (len(images), smoothed.num_classes)
    assert log_mean.dtype == torch.float32
    torch.testing.assert_close(log_mean.exp().sum(1), torch.ones(len(images)), rtol=0, atol=1e-4)
    assert torch.equal(smoothed(images), log_mean)
    log_mean[:, 0].sum().backward()
    assert images.grad.shape == images.shape
    assert images.grad.isfinite().all()


NUMBERS = st.sampled_from(
    [-math.inf, -1.0, -0.0, 5e-324, 1e-40, 1e-30, 0.3, 1 - 1e-16, 1.0, 1e30, 1e39, math.inf, math.nan]
)
COUNTS = st.sampled_from([-1, 0, 1, 2, 101, 2**31, 10**30, 1.0, 100.5, math.inf, math.nan])


@given(
    STOPPING,
    NUMBERS,
    st.fixed_dictionaries({}, optional={"alpha": NUMBERS, "radius_step": NUMBERS, "n": COUNTS, "n0": COUNTS}),
    st.booleans(),
)
@settings(QUICK, max_examples=300)
def test_any_settings_are_answered_or_refused(stopping, sigma, options, constant):
    images, options = torch.full((2, 1, 2, 2), 0.5), {"n": 150, "n0": 5} | options
    model = Constant(4, 2) if constant else Linear(4, 4)
    if (smoothed := answered(SmoothedClassifier, model, sigma, 4, batch_size=50)) is None:
        return
    answers = answered(smoothed.certify, images, stopping=stopping, **options)
    if answers is not None:
        check_sane(answers, 2, 4, options["n0"], options["n"])
    answers = answered(smoothed.predict, images, n=options["n"], alpha=options.get("alpha", 0.001))
    assert answers is None or (len(answers) == 2 and set(answers) <= {ABSTAIN, 0, 1, 2, 3})


@given(
    st.lists(st.integers(0, 3), min_size=0, max_size=5),
    st.sampled_from(
        [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool]
    ),
    st.sampled_from([0.0, 0.5, 1.0, -0.01, 1.01, 255.0, math.nan, math.inf, -math.inf]),
    BATCH_SIZES,
)
@settings(QUICK, max_examples=300)
def test_any_images_are_answered_or_refused(shape, dtype, value, batch_size):
    images = torch.full(shape, value).to(dtype)
    smoothed = SmoothedClassifier(Linear(max(1, math.prod(shape[1:])), 4), 0.5, 4, batch_size=batch_size)
    batch = len(shape) == 4 and 0 not in shape[1:] and dtype.is_floating_point
    good = batch and (len(images) == 0 or 0 <= value <= 1)
    answers = answered(smoothed.certify, images, n=50, n0=3)
    assert (answers is not None) == (answered(smoothed.predict, images, n=50) is not None) == good
    if good:
        check_sane(answers, len(images), 4, 3, 50)
    logits = answered(smoothed, images)  # its values are the caller's business: attacks may leave [0, 1]
    assert logits.shape == (len(images), 4) if batch else logits is None


@given(
    st.none() | st.lists(st.sampled_from([0, 1, 3, 4, -1, 0.5, math.nan, "cat", None]), min_size=1, max_size=3),
    st.none() | st.lists(st.sampled_from([0, 1, 2, 2**32 - 1, 2**32, -1, 0.5, math.nan, None]), min_size=1, max_size=3),
    st.sampled_from([list, tuple, np.array, torch.tensor]),
)
@settings(QUICK, max_examples=300)
def test_any_labels_and_indices_are_answered_or_refused(labels, indices, kind):
    smoothed, images = SmoothedClassifier(Linear(4, 4), 0.5, 4), torch.full((2, 1, 2, 2), 0.5)
    good_labels = labels is None or (len(labels) == 2 and set(labels) <= {0, 1, 3})
    good_indices = indices is None or (len(set(indices)) == len(indices) == 2 and set(indices) <= {0, 1, 2, 2**32 - 1})
    if good_labels and labels is not None:
        labels = kind(labels)
    answers = answered(smoothed.certify, images, labels, indices=indices, n=50, n0=3)
    assert (answers is not None) == (good_labels and good_indices)
    if answers is not None:
        check_sane(answers, 2, 4, 3, 50)


@pytest.mark.parametrize("images", [None, 0.5, [[[[0.5]]]], np.zeros((1, 1, 2, 2), np.float32)], ids=repr)
@pytest.mark.parametrize("method", ["certify", "predict", "forward"])
def test_images_are_a_tensor(images, method):
    smoothed = SmoothedClassifier(Linear(4, 2), 0.5, 2)
    assert answered(getattr(smoothed, method), images) is None


class Wrong(nn.Module):
    """Answers what `change` makes of right logits."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, pixels: torch.Tensor) -> object:
        return self.change(pixels.flatten(1)[:, :3])


@pytest.mark.parametrize("method", ["certify", "predict", "forward"])
@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, 0],
        lambda logits: logits[:, :2],
        lambda logits: logits[:-1],
        lambda logits: logits[..., None],
        lambda logits: (logits,),
        lambda logits: {"scores": logits},
        lambda logits: None,
    ],
    ids=["no classes", "too few classes", "too few images", "too many dimensions", "tuple", "dict", "None"],
)
def test_a_model_without_one_logit_per_class_is_refused(change, batch_size, method):
    smoothed = SmoothedClassifier(Wrong(change), 0.5, 3, batch_size=batch_size)
    with pytest.raises(RRCMError, match=r"^the model returns .*$"):
        getattr(smoothed, method)(torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("stopping", ["fixed", "sequential"])
def test_a_model_that_answers_nan_is_refused(stopping):
    smoothed = SmoothedClassifier(Wrong(lambda logits: logits.log()), 0.5, 3)  # of negative pixels
    with pytest.raises(RRCMError, match=r"^the model returns NaN .*$"):
        smoothed.certify(torch.zeros(2, 1, 2, 2), stopping=stopping, n=50)


@pytest.mark.parametrize("memory_gib", [0.0, -1.0, math.inf, math.nan])
def test_impossible_memory_is_refused(memory_gib):
    with pytest.raises(RRCMError, match=r"^memory_gib = .*$"):
        SmoothedClassifier(Linear(4, 2), 0.5, 2, memory_gib=memory_gib)


@pytest.mark.parametrize("stopping", ["", "Fixed", None])
def test_an_unknown_stopping_rule_is_refused(stopping):
    with pytest.raises(RRCMError, match=r"^stopping = .*$"):
        SmoothedClassifier(Linear(4, 2), 0.5, 2).certify(torch.zeros(1, 1, 2, 2), stopping=stopping)
