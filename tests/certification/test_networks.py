"""What the program around a call has set, and what was changed between two calls: the same votes, or one line."""

import contextlib
import copy
import pickle
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import CLASSES, SHAPE, ConvNet, conv_net, noise_conditioned
from torch import nn

from rrcm.certification.networks import usual_state
from rrcm.certification.noise import ESTIMATE, counter_normal
from rrcm.certification.smoothing import ImageState, SampleRequest, SmoothedClassifier
from rrcm.certification.stopping import group_sequential
from rrcm.utils.errors import RRCMError

IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


class Net(ConvNet):
    """Also has dropout that is no layer, and a number that it makes while it runs."""

    def __init__(self):
        super().__init__()
        self.slope, self.sample, self.seen = 1.0, False, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), x.dtype))
        slope = torch.full((1,), self.slope / 3, device=x.device).to(x.dtype)  # rounded to the default dtype first
        hidden = F.dropout(F.relu(self.norm(self.conv(x))) * slope, training=self.sample)
        return self.head(self.drop(hidden).flatten(1))


def net(seed: int = 0) -> Net:
    return conv_net(Net, seed)


def smooth(model: nn.Module, **settings: object) -> SmoothedClassifier:
    return SmoothedClassifier(model, 0.5, CLASSES, **{"batch_size": 64} | settings)


def answers(smoothed: SmoothedClassifier) -> tuple:
    """What each way of asking answers, the first of them exactly."""
    requests = [SampleRequest(image, i, ESTIMATE, 0, 150) for i, image in enumerate(IMAGES)]
    votes = smoothed.count_votes(requests).tolist()
    return votes, smoothed.certify(IMAGES, n=150), smoothed.predict(IMAGES, n=100), smoothed(IMAGES).tolist()


@contextlib.contextmanager
def setting(set_it: Callable, value: object, usual: object) -> Iterator[None]:
    set_it(value)
    try:
        yield
    finally:
        set_it(usual)


STATES = {
    "default dtype bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "products in bfloat16": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "inference": torch.inference_mode,
    "no gradient": torch.no_grad,
    "anomalies": torch.autograd.detect_anomaly,
    "device of a block": lambda: torch.device("meta"),
    "errors of numpy": lambda: np.errstate(all="raise"),
}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [net, noise_conditioned])
@pytest.mark.parametrize("state", STATES)
def test_the_state_of_the_program_does_not_matter(state, make, precision):
    smoothed, model = smooth(make(), precision=precision), make()
    expected = answers(smoothed)
    with STATES[state]():
        before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        assert answers(smoothed) == expected
        assert answers(smooth(model, precision=precision)) == expected
        assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == before
        noise = counter_normal(SHAPE, 0, *(torch.arange(3, device="cpu") for _ in range(3)))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, counter_normal(SHAPE, 0, *(torch.arange(3) for _ in range(3))))


def test_precision_says_what_the_network_computes_in():
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        smoothed = smooth(net(), precision=precision)
        network = smoothed.network
        with STATES["products in bfloat16"](), torch.autocast("cpu", torch.float16):
            answers(smoothed)
        assert set(network.seen) == {("highest", False, dtype)}


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="one setting for each operation since torch 2.9")
@pytest.mark.parametrize("general", ["tf32", "bf16", "none"])
def test_settings_of_single_operations_come_back(general):
    """Also those that follow a more general setting go on following it."""
    backends = torch.backends
    operations = [backends.mkldnn.matmul, backends.mkldnn.conv, backends.cudnn.conv, backends.cudnn.rnn]
    usual = [each.fp32_precision for each in operations]
    try:
        backends.fp32_precision = general
        backends.mkldnn.matmul.fp32_precision = "bf16"  # and torch has no common answer any more
        before = [each.fp32_precision for each in operations]
        with usual_state(torch.device("cpu")):
            assert {each.fp32_precision for each in operations} == {"ieee"}
        assert [each.fp32_precision for each in operations] == before
        backends.fp32_precision = "none"
        assert backends.mkldnn.conv.fp32_precision == "none"
    finally:
        backends.fp32_precision = "none"
        for each, value in zip(operations, usual, strict=True):
            each.fp32_precision = value
        torch.set_float32_matmul_precision("highest")


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def train_head(model: Net) -> None:
    with torch.no_grad():
        model.head.weight.mul_(-1)


def load(model: Net) -> None:
    model.load_state_dict(net(1).state_dict())


def load_in_place_of(model: Net) -> None:
    model.load_state_dict(net(1).state_dict(), assign=True)


CHANGES = {
    "trained": train_head,
    "trained past torch's counter": lambda model: model.head.weight.data.mul_(-1),
    "another head": lambda model: setattr(model, "head", nn.Linear(144, CLASSES)),
    "another weight": lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(CLASSES, 144))),
    "another value of a weight": lambda model: setattr(model.head.weight, "data", torch.ones(CLASSES, 144)),
    "a state dict": load,
    "a state dict, assigned": load_in_place_of,
    "statistics": lambda model: model.norm.running_mean.add_(1),
    "a number": lambda model: setattr(model, "slope", -1.0),
    "a hook": lambda model: model.register_forward_hook(lambda module, inputs, output: -output),
    "training mode": lambda model: model.train(),
    "training mode of a part": lambda model: model.drop.train(),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16"}], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_each_call_uses_the_model_as_it_is_then(name, settings):
    changed = net()
    smoothed = smooth(changed, **settings)
    before = answers(smoothed)
    torch.manual_seed(2)
    CHANGES[name](changed)
    statistics = buffers(changed)
    after = answers(smoothed)
    assert all(torch.equal(*pair) for pair in zip(statistics, changed.buffers(), strict=True))
    assert after == answers(smooth(copy.deepcopy(changed), **settings))
    assert (after[0] == before[0]) == (name in ("training mode", "training mode of a part", "nothing"))
    assert smoothed.state_dict().keys() == {f"model.{name}" for name in changed.state_dict()}


class Scaled(nn.Module):
    """A linear network with a number that the compiler takes for a constant."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(192, CLASSES), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x.flatten(1))


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_call_uses_a_compiled_model_as_it_is_then(precision):
    model, requests = Scaled(), [SampleRequest(IMAGES[0], 0, ESTIMATE, 0, 640)]
    compiled = smooth(model, precision=precision, compile=True)
    for change in (
        lambda: None,
        lambda: model.layer.weight.data.mul_(-1),
        lambda: setattr(model, "scale", -1.0),
        lambda: setattr(model, "layer", nn.Linear(192, CLASSES)),
    ):
        change()
        expected = smooth(copy.deepcopy(model), precision=precision).count_votes(requests)
        assert np.abs(compiled.count_votes(requests) - expected).sum() / 2 <= 2  # by rounding


def test_gradients_pass_through_a_copy_to_the_images_alone():
    model = net()
    smoothed, images = smooth(model, precision="bf16"), IMAGES.clone().requires_grad_()
    smoothed(images)[:, 0].sum().backward()
    assert images.grad.abs().sum() > 0 and all(weight.grad is None for weight in model.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):  # torch's own, rather than a training in vain
        smoothed(IMAGES).sum().backward()


def test_randomness_that_is_switched_on_later_is_found():
    """As dropout for an estimate of uncertainty is."""
    for settings in ({}, {"precision": "bf16"}):
        model = net()
        smoothed = smooth(model, **settings)
        answers(smoothed)
        model.sample = True
        for method in (smoothed.certify, smoothed.predict, smoothed):
            with pytest.raises(RRCMError, match="draws random numbers in eval mode"):
                method(IMAGES)


class KeepsTraining(Net):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(True)


@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize("method", ["certify", "predict", "forward"])
def test_a_refused_model_keeps_its_statistics(method, batch_size):
    model = KeepsTraining()
    model.drop.p = 0.0
    statistics = buffers(model)
    with pytest.raises(RRCMError, match="depends on the other images"):
        getattr(smooth(model, batch_size=batch_size), method)(IMAGES)
    assert all(torch.equal(*pair) for pair in zip(statistics, model.buffers(), strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", Net()), ("sigma", 0.25), ("num_classes", 3), ("seed", 1), ("num_noise", 2), ("precision", "bf16")],
)
def test_fixed_attributes_cannot_be_changed(name, value):
    smoothed = smooth(net())
    expected = answers(smoothed)
    with pytest.raises(RRCMError, match=rf"^{name}: cannot be changed once a model is smoothed; make another [^\n]*$"):
        setattr(smoothed, name, value)
    smoothed.model = smoothed.model.to("cpu")  # the same
    assert answers(smoothed) == expected


def test_the_batch_size_can_be_changed():
    smoothed = smooth(net(), batch_size=None)
    smoothed.batch_size = np.uint8(200)
    assert smoothed.count_votes([SampleRequest(IMAGES[0], 0, ESTIMATE, 0, 300)]).sum() == 300
    for wrong in (0, -1, "7", 7.0, True):
        with pytest.raises(RRCMError, match=r"^batch_size = "):
            smoothed.batch_size = wrong


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("remake", [copy.deepcopy, lambda smoothed: pickle.loads(pickle.dumps(smoothed))])
def test_copies_are_independent(remake, precision):
    model = net()
    smoothed = smooth(model, precision=precision)
    expected = answers(smoothed)
    other = remake(smoothed)
    train_head(model)
    assert answers(other) == expected != answers(smoothed)
    with pytest.raises(RRCMError, match=r"^sigma: cannot be changed"):
        other.sigma = 1.0


def test_another_sigma_of_the_rule_is_refused():
    with pytest.raises(RRCMError, match=r"^sigma = 1.0 of the stopping rule: must be 0.5, as for the noise$"):
        next(smooth(net()).certify_stream([ImageState(0, IMAGES[0])], group_sequential(1.0)))


def changed(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> SmoothedClassifier:
    smoothed = smooth(model)
    change(smoothed)
    return smoothed


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: smooth(net().to("meta")), "^the model has weights without values"),
        (lambda: smooth(net().to("meta"), precision="bf16"), "^the model has weights without values"),
        (lambda: smooth(Lazy()), "^the model has weights without values"),
        (lambda: changed(net(), nn.Module.half), r"^precision = fp32: the model has weights of torch.float16; convert"),
        (
            lambda: changed(noise_conditioned(), nn.Module.bfloat16),
            r"^precision = fp32: the model has weights of torch.bfloat16",
        ),
        (
            lambda: changed(net(), nn.Module.double),
            r"^the model fails on 8 images .*convert the model with .float\(\)$",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_precision_are_refused(make, said):
    smoothed = make()
    for method in (smoothed.certify, smoothed.predict, smoothed):
        with pytest.raises(RRCMError, match=said) as error:
            method(IMAGES)
        assert "\n" not in str(error.value)
