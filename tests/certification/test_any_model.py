"""`SmoothedClassifier` over every kind of torch module: as it is, or refused in one line."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_networks import SHAPE, ConvNet, conv_net, noise_conditioned
from torch import nn

from rrcm.certification.noise import ESTIMATE
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier, Normalized
from rrcm.models.kinds import LoadedClassifier
from rrcm.utils.errors import RRCMError


def net(train: bool = False) -> ConvNet:
    return conv_net().train(train)


def export(network: nn.Module, batch: int = 4, **dim: int) -> nn.Module:
    """The exported program of `network` as a module, with a dynamic batch if `dim` has limits of it."""
    dynamic = ({0: torch.export.Dim("batch", **dim)},) if dim else None
    return torch.export.export(network, (torch.rand(batch, *SHAPE),), dynamic_shapes=dynamic).module()


def trace(network: nn.Module) -> nn.Module:
    return torch.jit.trace(network, torch.rand(4, *SHAPE), check_trace=False)


def ours() -> NoiseConditionedClassifier:
    return noise_conditioned().eval()


WRAPPED = {
    "script": torch.jit.script,
    "trace": trace,
    "freeze": lambda network: torch.jit.freeze(torch.jit.script(network)),
    "export": lambda network: export(network, max=4096),
    "export of one batch size": export,
    "export of few batch sizes": lambda network: export(network, min=3, max=50),
    "compile": lambda network: torch.compile(network, backend="eager"),
    "DataParallel": nn.DataParallel,
    "export inside a module": lambda network: nn.Sequential(export(network, max=4096)),
    "script inside a module": lambda network: nn.Sequential(torch.jit.script(network)),
    "in place": lambda network: nn.Sequential(nn.ReLU(inplace=True), network)[1:],
}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def votes(model: nn.Module, **settings: object) -> list[list[int]]:
    smoothed = SmoothedClassifier(model, 0.5, 5, **settings)
    return smoothed.count_votes(
        [SampleRequest(image, i, ESTIMATE, 0, 150) for i, image in enumerate(images())]
    ).tolist()


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_the_votes_are_those_of_the_plain_network(kind, precision):
    model, settings = WRAPPED[kind](net()), {"precision": precision}
    if kind == "freeze" and precision == "bf16":
        with pytest.raises(RRCMError, match=r"^precision = bf16: the model has weights as constants .*use fp32$"):
            SmoothedClassifier(model, 0.5, 5, precision=precision)
        return
    assert votes(model, batch_size=64, **settings) == votes(net(), batch_size=64, **settings)
    smoothed, plain = (SmoothedClassifier(each, 0.5, 5, **settings) for each in (model, net()))
    assert smoothed.predict(images(), n=100) == plain.predict(images(), n=100)
    assert smoothed.certify(images(), n=200) == plain.certify(images(), n=200)
    smoothed.train()
    gradients = []
    for each in (smoothed, plain):
        inputs = images().requires_grad_()
        each(inputs)[:, 0].sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize(("kind", "size"), [("export of one batch size", 4), ("export of few batch sizes", 50)])
def test_an_exported_program_gets_its_batch_size(kind, size):
    smoothed = SmoothedClassifier(WRAPPED[kind](net()), 0.5, 5)
    assert smoothed.find_batch_size(images()[0]) == size
    assert smoothed(images(0)).shape == (0, 5)


@pytest.mark.parametrize("kind", ["trace", "export", "export of one batch size", "compile"])
def test_our_classifier_scripted_exported_or_compiled(kind):
    assert votes(WRAPPED[kind](ours()), batch_size=64) == votes(ours(), batch_size=64)


def test_an_exported_classifier_inside_our_classifier():
    mean, deviation = (0.5, 0.4, 0.3), (0.5, 0.5, 0.25)
    plain, exported = (Normalized(each, 5, mean, deviation) for each in (net(), export(net(), max=4096)))
    assert votes(exported, batch_size=64) == votes(plain, batch_size=64)


def test_a_program_that_was_saved_and_loaded(tmp_path):
    torch.jit.script(net()).save(tmp_path / "net.pt")
    torch.export.save(
        torch.export.export(net(), (torch.rand(4, *SHAPE),), dynamic_shapes=({0: torch.export.Dim("b", max=99)},)),
        tmp_path / "net.pt2",
    )
    loaded = torch.jit.load(tmp_path / "net.pt"), torch.export.load(tmp_path / "net.pt2").module()
    assert [votes(each, batch_size=64) for each in loaded] == [votes(net(), batch_size=64)] * 2


class DropAlways(ConvNet):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.dropout(x))


class KeepsTraining(ConvNet):
    def train(self, mode: bool = True):
        return super().train(True)


def no_dropout(network: nn.Module) -> nn.Module:
    network.drop.p = 0.0
    return network


def no_statistics() -> nn.Module:
    network = net()
    network.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return network.eval()


CHANCE, COMPANY = "the model draws random numbers in eval mode", "depends on the other images of the batch"


@pytest.mark.parametrize("batch_size", [None, 64])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: export(net(train=True), max=99), CHANCE),
        (lambda: export(no_dropout(net(train=True)), max=99), COMPANY),
        (lambda: trace(net(train=True)), CHANCE),
        (lambda: trace(no_dropout(net(train=True))), COMPANY),
        (no_statistics, COMPANY),
        (lambda: torch.jit.script(no_statistics()), COMPANY),
        (DropAlways, CHANCE),
        (lambda: torch.compile(DropAlways(), backend="eager"), CHANCE),
        (lambda: no_dropout(KeepsTraining()), COMPANY),
    ],
)
def test_models_that_stay_in_training_mode_are_refused(make, said, batch_size):
    """Their votes would depend on the other images of the batch, or not be the same again."""
    smoothed = SmoothedClassifier(make(), 0.5, 5, batch_size=batch_size)
    for method in (smoothed.certify, smoothed.predict, smoothed):
        with pytest.raises(RRCMError, match=said) as error:
            method(images())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["script", "compile", "DataParallel"])
def test_a_training_mode_that_can_be_left_is_left(kind):
    assert votes(WRAPPED[kind](net(train=True)), batch_size=64) == votes(net(), batch_size=64)


class StandardisedWeights(nn.Module):
    """As networks without batch norms do it: `batch_norm` in training mode, but of weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 192))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), F.batch_norm(self.weight[None], None, None, training=True)[0])


def test_standardised_weights_are_no_batch_statistics():
    torch.manual_seed(0)
    network = StandardisedWeights()
    assert len({str(votes(each, batch_size=64)) for each in (network, trace(network), export(network, max=99))}) == 1


class Answers(nn.Module):
    """A linear network whose answer is what `change` makes of its logits."""

    def __init__(self, change: Callable = lambda logits: logits):
        super().__init__()
        self.change = change
        self.register_buffer("weight", torch.randn(192, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> object:
        return self.change(x.flatten(1) @ self.weight)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda logits: {"logits": logits, "loss": None}, lambda logits: types.SimpleNamespace(logits=logits)],
    ids=["dict", "object"],
)
def test_logits_may_be_an_attribute_or_an_item(change, limited):
    """As the outputs of transformers, which are both."""
    smoothed, plain = (SmoothedClassifier(each, 0.5, 5, batch_size=64) for each in (Answers(change), Answers()))
    if limited:
        smoothed._find_voter().batch_limits = (4, 4)  # as of an exported program
    assert smoothed.predict(images(), n=100) == plain.predict(images(), n=100)
    torch.testing.assert_close(smoothed(images()), plain(images()))


def test_other_answers_are_refused():
    with pytest.raises(RRCMError, match=r"returns a tuple for a batch of 8: .* so that it returns its logits alone$"):
        SmoothedClassifier(Answers(lambda logits: (logits, None)), 0.5, 5).certify(images())


def test_the_number_of_classes_is_corrected():
    smoothed = SmoothedClassifier(Answers(), 0.5, 7)
    with pytest.raises(RRCMError, match=r"returns \(8, 5\) .*must be a tensor \(8, 7\); set num_classes = 5$"):
        smoothed.certify(images())


def test_a_model_without_parameters_has_a_device():
    assert SmoothedClassifier(Answers(), 0.5, 5).device == torch.device("cpu")
    meta = torch.device("meta")  # stands in for a GPU
    assert SmoothedClassifier(Answers().to(meta), 0.5, 5).device == meta
    smoothed = SmoothedClassifier(nn.Flatten(), 0.5, 192)
    assert smoothed.device == torch.device("cpu") and smoothed._device(meta) == meta
    assert len(smoothed.certify(images(), n=100)) == 3


class Locked(ConvNet):
    def __deepcopy__(self, memo: dict) -> object:
        raise TypeError("cannot pickle '_thread.lock' object")


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (Locked, {"precision": "bf16"}, r"^precision = bf16: the model cannot be copied .*lock.*; use fp32$"),
        (
            lambda: export(ours(), max=99),
            {"precision": "bf16"},
            r"^the model fails on 8 images .*; use precision fp32$",
        ),
        (lambda: net().half(), {}, r"^precision = fp32: the model has weights of torch.float16; convert .*float\(\)$"),
        (
            lambda: net().double(),
            {},
            r"^the model fails on 8 images of 3 x 8 x 8 in fp32 .*convert .* with .float\(\)$",
        ),
        (lambda: torch.jit.script(net()), {"compile": True}, "^compile = True: a scripted or traced model cannot be"),
        (
            lambda: torch.export.export(net(), (images(),)),
            {},
            r"^model is a ExportedProgram: .*; pass its .module\(\)$",
        ),
        (
            lambda: LoadedClassifier(net(), 8, 3, list("abcde")),
            {},
            r"^model is a LoadedClassifier: .*; pass its .classifier$",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 5)), {}, r"^the model fails on 8 images .*shapes cannot be"),
        (
            lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(7, 5))),
            {},
            "^the model fails .*shapes cannot",
        ),
        (lambda: lambda x: x, {}, r"^model is a function: must be a torch.nn.Module$"),
    ],
)
def test_models_that_cannot_run_are_refused_in_one_line(make, settings, said):
    with pytest.raises(RRCMError, match=said) as error:
        SmoothedClassifier(make(), 0.5, 5, **settings).certify(images(), n=100)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_error_of_the_model_is_the_cause():
    class Raises(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("of the user")

    with pytest.raises(RRCMError, match="of the user") as error:
        SmoothedClassifier(Raises(), 0.5, 5).predict(images(), n=100)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_full_memory_is_reported_in_one_line():
    class Full(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RRCMError, match=r"too little free memory \(CUDA out of memory\)"):
        SmoothedClassifier(Full(), 0.5, 5).predict(images(), n=100)


class Stochastic(BaseClassifier):
    num_classes, stochastic, keeps_float32_input = 5, True, True

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 5)

    def forward(self, noisy: torch.Tensor, draw=None) -> torch.Tensor:
        assert noisy.dtype == torch.float32
        rows = noisy + draw.normal("own", noisy.shape[1:])
        return self.layer(rows.flatten(1).to(self.layer.weight.dtype))


def test_a_stochastic_classifier_inside_data_parallel_gets_its_draws():
    torch.manual_seed(0)
    model = Stochastic()
    for precision in ("fp32", "bf16"):
        assert votes(nn.DataParallel(copy.deepcopy(model)), precision=precision) == votes(model, precision=precision)


def test_distributed_data_parallel_does_not_wait_for_others(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        smoothed = SmoothedClassifier(nn.parallel.DistributedDataParallel(net()), 0.5, 5)
        assert isinstance(smoothed.model, ConvNet)
    finally:
        torch.distributed.destroy_process_group()
