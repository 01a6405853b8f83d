"""Settings, images, labels and logits of any type: brought to the one that is meant, or refused in one line."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.utils.errors import RRCMError

CLASSES = 4
IMAGES = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LONG = pytest.param(10**5000, id="too long to be printed")
META = torch.zeros((), dtype=torch.int64, device="meta")
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning", "ignore:.*quantize:UserWarning")


class Pixels(nn.Module):
    """The first pixels are the logits, and `change` makes an answer of them."""

    def __init__(self, change: Callable = lambda logits: logits):
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> object:
        return self.change(x.flatten(1)[:, :CLASSES])


def smoothed(change: Callable = lambda logits: logits, **settings: object) -> SmoothedClassifier:
    return SmoothedClassifier(Pixels(change), **{"sigma": 0.5, "num_classes": CLASSES, "batch_size": 50} | settings)


def certificates(images: torch.Tensor = IMAGES, labels: object = None, indices: object = None, **settings: object):
    numbers = {name: settings.pop(name) for name in ("n", "n0", "alpha", "radius_step") if name in settings}
    return smoothed(**settings).certify(images, labels, indices=indices, **{"n": 120} | numbers)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, torch.tensor])
@pytest.mark.parametrize(
    ("name", "value"), [("n", 120), ("n0", 100), ("seed", 0), ("num_classes", 4), ("batch_size", 50), ("num_noise", 16)]
)
def test_whole_numbers_of_any_type_are_the_same(name, value, kind):
    assert certificates(**{name: kind(value)}) == certificates()


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, Fraction, Decimal, np.array])
@pytest.mark.parametrize(("name", "value"), [("sigma", 0.5), ("alpha", 0.0625), ("radius_step", 0.25)])
def test_numbers_of_any_type_are_the_same(name, value, kind):
    assert certificates(**{name: kind(value)}) == certificates(**{name: value})


@pytest.mark.parametrize("name", ["n", "n0", "seed", "num_classes", "batch_size", "num_noise"])
@pytest.mark.parametrize("value", [50.0, "50", True, np.True_, 1j, [50], META, LONG])
def test_other_types_are_no_whole_numbers(name, value):
    with pytest.raises(RRCMError, match=rf"^{name} = [^\n]{{1,60}}: must be a whole number$"):
        certificates(**{name: value})


@pytest.mark.parametrize("name", ["sigma", "alpha", "radius_step", "memory_gib"])
@pytest.mark.parametrize("value", ["0.5", b"1", True, 0.5j, [0.5], np.array([0.5]), torch.tensor([0.5]), META, {}])
def test_other_types_are_no_numbers(name, value):
    with pytest.raises(RRCMError, match=rf"^{name} = [^\n]{{1,60}}: must be a number$"):
        certificates(**{name: value})


@pytest.mark.parametrize("name", ["bound", "stopping", "precision", "compile"])
@pytest.mark.parametrize("value", ["no", None, 1, np.array(["fixed", "binary"]), torch.bfloat16])
def test_other_types_are_no_choices(name, value):
    with pytest.raises(RRCMError, match=rf"^{name} = [^\n]{{1,60}}: must be [^\n]*$"):
        if name in ("precision", "compile"):
            smoothed(**{name: value})
        else:
            smoothed().certify(IMAGES, n=120, **{name: value})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter, lambda values: np.array(values, np.uint8)])
def test_labels_and_indices_of_any_type_are_the_same(kind):
    assert certificates(labels=kind([1, 2]), indices=kind([7, 3])) == certificates(labels=[1, 2], indices=[7, 3])


@pytest.mark.parametrize("name", ["labels", "indices"])
@pytest.mark.parametrize(
    "value",
    [
        "12",
        3,
        [0.0, 1.0],
        [True, False],
        [None, 1],
        [2**70, -1],
        [META, META],
        {1: 0, 2: 0},
        {1, 2},
        np.eye(2),
        torch.tensor([[1], [2]]),
        torch.tensor([True, False]),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_no_labels_and_no_indices(name, value):
    with pytest.raises(RRCMError, match=rf"^{name}[^\n]*: must be [^\n]*$"):
        certificates(**{name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: images.to_sparse(), "images are torch.sparse_coo: must be a dense tensor with values"),
        (lambda images: images.to("meta"), "images are on the device meta: must be a dense tensor with values"),
        (lambda images: torch.nested.nested_tensor(list(images)), "images are nested: must be a dense tensor"),
        (lambda images: images.to(torch.complex64), "images are torch.complex64: must be float"),
        (lambda images: torch.quantize_per_tensor(images, 0.1, 0, torch.quint8), "images are torch.quint8"),
    ],
)
@pytest.mark.parametrize("method", ["certify", "predict", "forward"])
def test_images_that_are_not_dense_numbers_are_refused(method, change, said):
    with pytest.raises(RRCMError, match=f"^{said}[^\n]*$"):
        getattr(smoothed(), method)(change(IMAGES))


def test_images_of_eight_bit_floats_are_images():
    images = (IMAGES * 8).round() / 8
    assert certificates(images.to(torch.float8_e4m3fn)) == certificates(images.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_images_divided_twice_by_255_are_noticed(dtype):
    """A warning, as pictures of another range than eight bits may be so dark."""
    grey = torch.full((2, 1, 4, 4), 255.0, dtype=dtype)
    for dark in (grey / 255 / 255, IMAGES.to(dtype) / 255):
        with pytest.warns(UserWarning, match=r"all but black; were they divided by 255 twice\?$"):
            smoothed().predict(dark)


@pytest.mark.filterwarnings("error")
def test_black_images_are_no_mistake():
    for black in (
        torch.zeros(2, 1, 4, 4),
        torch.cat([IMAGES[:1] / 255, IMAGES[1:]]),
        torch.full((1, 1, 4, 4), 2 / 255),
    ):
        smoothed().predict(black)


ODD_LOGITS = {
    "bool": lambda logits: logits > 0,
    "complex": lambda logits: logits.to(torch.complex64),
    "sparse": lambda logits: logits.to_sparse(),
    "meta": lambda logits: logits.to("meta"),
    "quantized": lambda logits: torch.quantize_per_tensor(logits, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("method", ["certify", "predict", "forward"])
@pytest.mark.parametrize("kind", ODD_LOGITS)
def test_logits_that_are_not_dense_numbers_are_refused(kind, method):
    with pytest.raises(RRCMError, match=r"^the model returns logits of kind [^\n]*: must be a dense tensor of real"):
        getattr(smoothed(ODD_LOGITS[kind]), method)(IMAGES)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits / 0,
        lambda logits: torch.where(logits > 0.9, torch.inf, logits),
        lambda logits: torch.full_like(logits, -torch.inf),
        lambda logits: torch.cat([logits[:, :3], logits[:, 3:] * torch.nan], 1),
    ],
)
@pytest.mark.parametrize("method", ["certify", "predict"])
def test_votes_of_infinite_logits_are_refused(method, change):
    with pytest.raises(RRCMError, match=r"^the model returns NaN or infinite logits for noisy images, [^\n]*$"):
        getattr(smoothed(change), method)(IMAGES)


def test_logits_that_can_be_compared_vote_the_same():
    """A class may be excluded by a logit of minus infinity, as in a logarithm of probabilities."""
    expected = smoothed().predict(IMAGES, n=100)
    for change in (
        lambda logits: logits.double(),
        lambda logits: nn.functional.one_hot(logits.argmax(1), CLASSES),
        lambda logits: nn.functional.one_hot(logits.argmax(1), CLASSES).log(),
    ):
        assert smoothed(change).predict(IMAGES, n=100) == expected


@pytest.mark.parametrize("one", [lambda logits: logits[:, 0], lambda logits: logits[:, :1]])
def test_the_advice_for_a_single_logit_works(one):
    with pytest.raises(RRCMError, match=r"turn a single logit s into two, torch.stack\(\[-s, s\], -1\)") as error:
        smoothed(one, num_classes=2).certify(IMAGES)
    assert "num_classes = 1" not in str(error.value)
    assert (
        len(smoothed(lambda logits: torch.stack([-logits[:, 0], logits[:, 0]], -1), num_classes=2).certify(IMAGES)) == 2
    )
    with pytest.raises(RRCMError, match=r"^num_classes = 1: must be at least 2; let a model of one logit return two$"):
        smoothed(one, num_classes=1)
