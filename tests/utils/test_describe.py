"""Descriptions cover every attribute, every line of code and every number of every kind of model."""

import enum
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from importlib.util import cache_from_source
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import nn

from rrcm.certification.stopping import fixed_sample, group_sequential
from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NoiseConditionedClassifier, Normalized
from rrcm.models.denoised import DDS, DensePure, DiffSmooth
from rrcm.models.denoiser import DiffusersUNet, DiscreteDenoiser, EDMDenoiser, PixelViT
from rrcm.models.ensembles import Ensemble
from rrcm.models.vit import BlockOptions, NoiseConditionedViT
from rrcm.objectives import FINETUNING, PRETRAINING
from rrcm.utils.describe import Description
from rrcm.utils.errors import RRCMError

OWN = set(vars(nn.Module()))  # what every module has; parameters and buffers are varied one by one


def described(value: object) -> str:
    return json.dumps(Description().of(value))


# --- every kind of model ----------------------------------------------------------------------------------------------


def vit(**sizes: float) -> NoiseConditionedViT:
    return NoiseConditionedViT(8, 1, **({"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2} | sizes))


def classifier(t: float = 0.5, **sizes: float) -> NoiseConditionedClassifier:
    torch.manual_seed(0)
    return NoiseConditionedClassifier(vit(**sizes), 3, t)


def denoiser() -> EDMDenoiser:
    torch.manual_seed(1)
    return EDMDenoiser(PixelViT(vit()))


def public_denoiser() -> DiscreteDenoiser:
    torch.manual_seed(2)
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    unet = DiffusersUNet({**config, **blocks, "layers_per_block": 1, "attention_head_dim": 4})
    return DiscreteDenoiser(unet, torch.linspace(0.99, 0.01, 100), "epsilon")


def network(name: str, size: int = 16) -> nn.Module:
    torch.manual_seed(3)
    architecture = {"name": name, "image_size": size, "channels": 1, "pixel_mean": None, "pixel_std": [0.5]}
    return network_classifier(architecture, 3, 0.25)


def timm_model(name: str, **options: object) -> Normalized:
    torch.manual_seed(4)
    return Normalized(timm.create_model(name, num_classes=3, **options), 3, [0.5] * 3, [0.25] * 3)


def parts() -> tuple[nn.Module, nn.Module]:
    return denoiser(), classifier()


RUNS = {"runs": 3, "steps": 2, "sigma": 0.25, "classifier_size": 8}
NOISES = {"num_noise": 2, "local_sigma": 0.1, "sigma": 0.25, "classifier_size": 8}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "classifier": classifier,
    "lenet": lambda: network("lenet"),
    "timm_vit": lambda: timm_model("test_vit"),
    "timm_convnext": lambda: timm_model("test_convnext"),
    "timm_mixer": lambda: timm_model("test_mambaout"),
    "ensemble": lambda: Ensemble([classifier(), classifier(1.0), classifier(2.0)]),
    "dds": lambda: DDS(*parts(), sigma=0.25, classifier_size=8),
    "densepure": lambda: DensePure(*parts(), **RUNS),
    "diffsmooth": lambda: DiffSmooth(*parts(), **NOISES),
    "public_dds": lambda: DDS(public_denoiser(), classifier(), sigma=0.25, classifier_size=8),
}


def varied(value: object) -> object:
    """Another value, of the same type if possible."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case list() | tuple():
            return [*value, 0]
        case dict():
            return value | {"more": 0}
        case torch.Tensor():
            return value + 1
    return "another thing"


def places(model: nn.Module) -> list[tuple[object, str]]:
    """One instance of each attribute of each type of module in `model`, and all weights and buffers."""
    found = {}
    for module in model.modules():
        own = vars(module)
        names = {name: own for name in own if name not in OWN or name == "training"}
        names |= {name: own[kind] for kind in ("_parameters", "_buffers") for name in own[kind]}
        for name, place in names.items():
            found.setdefault((type(module), name), (place, name))
    return list(found.values())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.thorough) if "_" in k else k for k in BUILDERS])
def test_every_attribute_and_every_weight_of_every_kind_of_model_counts(kind):
    """Attributes that nothing reads count too, since nobody can know that."""
    model = BUILDERS[kind]().eval()
    before, attributes = described(model), places(model)
    assert before == described(BUILDERS[kind]().eval()) and len(attributes) > 10
    seen = {before}
    for place, name in attributes:
        value, place[name] = place[name], varied(place[name])
        seen.add(described(model))
        place[name] = value
    assert len(seen) == 1 + len(attributes) and described(model) == before


def program_of(*layers: nn.Module, weight: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), *layers)
    nn.init.constant_(model[1].weight, weight), nn.init.zeros_(model[1].bias)
    sizes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (torch.zeros(2, 1, 2, 2),), dynamic_shapes=sizes).module()


def test_a_program_of_torch_export_is_described_by_its_graph_and_its_tensors():
    """It holds functions that belong to no module and hold what cannot be described."""
    described_as = described(program_of())
    assert described_as == described(program_of())
    assert len({described_as, described(program_of(weight=2.0)), described(program_of(nn.ReLU()))}) == 3
    hooked = program_of()
    hooked.register_forward_hook(lambda module, inputs, output: -output)
    assert described(hooked) != described_as


MODELS = {
    "t": lambda: classifier(2.0),
    "num_heads": lambda: classifier(num_heads=4),
    "norm_eps": lambda: classifier(block=BlockOptions(norm_eps=1e-3)),
    "members": BUILDERS["ensemble"],
    "dds": BUILDERS["dds"],
    "dds of another sigma": lambda: DDS(*parts(), sigma=1.0, classifier_size=8),
    "densepure": BUILDERS["densepure"],
    "runs": lambda: DensePure(*parts(), **RUNS | {"runs": 4}),
    "steps": lambda: DensePure(*parts(), **RUNS | {"steps": 3}),
    "diffsmooth": BUILDERS["diffsmooth"],
    "num_noise": lambda: DiffSmooth(*parts(), **NOISES | {"num_noise": 3}),
    "local_sigma": lambda: DiffSmooth(*parts(), **NOISES | {"local_sigma": 0.2}),
    "public denoiser": BUILDERS["public_dds"],
    "timm": lambda: timm_model("vit_tiny_patch16_224", depth=1),
    "timm of another name": lambda: timm_model("deit_tiny_patch16_224", depth=1),
    "activation": lambda: timm_model("vit_tiny_patch16_224", depth=1, act_layer=nn.ReLU),
    "activation with a setting": lambda: timm_model(
        "vit_tiny_patch16_224", depth=1, act_layer=partial(nn.GELU, approximate="tanh")
    ),
    "norm": lambda: timm_model("vit_tiny_patch16_224", depth=1, norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "dropout": lambda: timm_model("vit_tiny_patch16_224", depth=1, proj_drop_rate=0.1),
    "heads": lambda: timm_model("vit_tiny_patch16_224", depth=1, num_heads=6),
}


@pytest.mark.slow
def test_models_that_differ_in_no_weight_differ():
    """They have the same seed, and many have equal state dicts."""
    found = [described(build()) for build in (classifier, *MODELS.values())]
    assert len(set(found)) == len(found) and found == [described(build()) for build in (classifier, *MODELS.values())]


OBJECTIVES = {name: getattr(build, "func", build) for name, build in (FINETUNING | PRETRAINING).items()}


def test_every_attribute_of_every_objective_counts():
    def objective(kind: type, **attributes: object) -> object:
        made = object.__new__(kind)
        vars(made).update(attributes)
        return made

    kinds = set(OBJECTIVES.values())
    found = {described(objective(kind, a=a, b=b)) for kind in kinds for a in (1, 2) for b in ([0.5], [0.5, 1])}
    assert len(found) == 4 * len(kinds) > 40


@pytest.mark.parametrize("rule", [fixed_sample, group_sequential])
def test_stopping_rules_with_other_boundaries_have_other_descriptions(rule):
    assert described(rule(0.5, n=1000)) == described(rule(0.5, n=1000))
    assert len({described(rule(0.5, n=n, alpha=alpha)) for n in (1000, 1001) for alpha in (0.001, 0.01)}) == 4


# --- any object -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    scale = 2.0

    def __init__(self, **attributes: object):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Net2(Net):
    """Another subclass in the same module."""


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a: object):
        self.a = a


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Hiding(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def __getstate__(self) -> dict:
        return {}


def made(factor: int) -> nn.Module:
    """An object whose class always has the same name and source, but closes over another variable."""

    class Made(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return factor * x

    return Made()


def patched(name: str, value: object) -> nn.Module:
    kind = type("Net", (Net,), {"__module__": __name__, name: value})
    return kind()


def with_buffer(persistent: bool, value: float = 1.0) -> nn.Module:
    net = Net()
    net.register_buffer("b", torch.tensor(value), persistent=persistent)
    return net


def pointing(value: float) -> nn.Module:
    net = Net(a=value)
    net.me, net.weak = [net], weakref.ref(net)
    return net


def quantized(scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), scale, 0, torch.quint8)


def scripted(bias: float) -> torch.jit.ScriptModule:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, 1.0)
    nn.init.constant_(layer.bias, bias)
    return torch.jit.script(layer)


def exported(bias: float) -> nn.Module:
    layer = nn.Sequential(nn.Linear(2, 2))
    nn.init.constant_(layer[0].weight, 1.0)
    nn.init.constant_(layer[0].bias, bias)
    return torch.fx.symbolic_trace(layer)


ALIKE: dict[str, list[Callable[[], object]]] = {  # each case: objects that look alike and differ
    "class": [Net, Net2, lambda: nn.Identity(), lambda: made(1), lambda: made(2)],
    "method": [Net, lambda: patched("forward", lambda self, x: x), lambda: patched("forward", lambda self, x: x + 1)],
    "class attribute": [lambda: patched("scale", 2.0), lambda: patched("scale", 3.0)],
    "property": [lambda: patched("p", property(lambda self: 1)), lambda: patched("p", property(lambda self: 2))],
    "static method": [lambda: patched("f", staticmethod(lambda: 1)), lambda: patched("f", staticmethod(lambda: 2))],
    "method of an object": [lambda: Net(forward=torch.sigmoid), lambda: Net(forward=torch.tanh)],
    "number": [lambda: Net(a=1), lambda: Net(a=1.0), lambda: Net(a=True), lambda: Net(a=None), lambda: Net(a="1")],
    "last bit": [lambda: Net(a=0.1 + 0.2), lambda: Net(a=0.3), lambda: Net(a=-0.0), lambda: Net(a=0.0)],
    "container": [lambda: [1, 2], lambda: (1, 2), lambda: [2, 1], lambda: [[1, 2]], lambda: {1, 2}, lambda: {1: 2}],
    "order": [lambda: nn.Sequential(nn.ReLU(), nn.GELU()), lambda: nn.Sequential(nn.GELU(), nn.ReLU())],
    "names": [lambda: nn.ModuleDict({"a": nn.ReLU()}), lambda: nn.ModuleDict({"b": nn.ReLU()})],
    "function": [lambda: Net(f=F.relu), lambda: Net(f=F.gelu), lambda: Net(f=torch.relu), lambda: Net(f=np.add)],
    "partial": [lambda: partial(F.gelu, approximate="none"), lambda: partial(F.gelu, approximate="tanh")],
    "default": [lambda: lambda x=1: x, lambda: lambda x=2: x],
    "activation": [nn.ReLU, nn.SiLU, lambda: nn.GELU("tanh"), lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2)],
    "dropout": [lambda: nn.Dropout(0.1), lambda: nn.Dropout(0.2), lambda: nn.Dropout2d(0.1)],
    "eps": [lambda: nn.BatchNorm2d(3), lambda: nn.BatchNorm2d(3, 1e-3), lambda: nn.BatchNorm2d(3, momentum=0.2)],
    "buffer": [lambda: with_buffer(True), lambda: with_buffer(False), lambda: with_buffer(False, 2.0), Net],
    "tensor": [
        lambda: Net(a=torch.ones(2, 3)),
        lambda: Net(a=torch.ones(3, 2)),
        lambda: Net(a=torch.ones(2, 3).half()),
    ],
    "layout": [lambda: torch.ones(1, 2, 2, 2), lambda: torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last)],
    "sparse": [lambda: torch.eye(2).to_sparse(), lambda: (2 * torch.eye(2)).to_sparse(), lambda: torch.eye(2)],
    "quantized": [lambda: quantized(0.1), lambda: quantized(0.2)],
    "array": [lambda: np.ones(3), lambda: np.zeros(3), lambda: np.float32(1), lambda: np.random.default_rng(0)],
    "hidden": [lambda: Hiding(1.0), lambda: Hiding(2.0)],
    "slot": [lambda: Slotted(1), lambda: Slotted(2)],
    "enum": [lambda: Net(a=Colour.RED), lambda: Net(a=Colour.BLUE)],
    "cycle": [lambda: pointing(1.0), lambda: pointing(2.0)],
    "program": [lambda: scripted(0.0), lambda: scripted(1.0)],
    "graph": [lambda: exported(0.0), lambda: exported(1.0)],
    "dtype": [lambda: torch.float32, lambda: torch.bfloat16, lambda: torch.strided, lambda: torch.Size([1])],
    "module": [lambda: Net(a=F), lambda: Net(a=np)],
    "recurrent": [lambda: nn.LSTM(2, 2), lambda: nn.LSTM(2, 2, bidirectional=True)],
}


@pytest.mark.filterwarnings("ignore")  # about features that torch will remove
@pytest.mark.parametrize("case", ALIKE)
def test_objects_that_look_alike_and_differ_have_different_descriptions(case):
    def describe_all() -> list[str]:
        torch.manual_seed(0)
        return [described(build()) for build in ALIKE[case]]

    found = describe_all()
    assert found == describe_all() and len(set(found)) == len(found)


def test_hooks_count():
    found = [described(Net())]
    for factor in (1, 2):
        net = Net()
        hook = net.register_forward_hook(lambda module, inputs, output, factor=factor: factor * output)
        found.append(described(net))
        hook.remove()
        found.append(described(net))
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    "hidden", [(n for n in range(3)), sys.stdout, threading.Lock()], ids=["generator", "file", "lock"]
)
def test_what_cannot_be_described_is_refused_in_one_line(hidden):
    net = nn.Sequential(Net(a={"deep": [hidden]}))
    with pytest.raises(RRCMError, match=r"^_modules\.0\.a\.deep: .* cannot be described .*") as caught:
        Description().of(net)
    assert "\n" not in str(caught.value)


SCRIPT = """
import sys, json
sys.path.insert(0, "tests/utils")
from test_describe import ALIKE, BUILDERS, MODELS, described
from rrcm.utils.resume import fingerprint
import torch
texts = {name: described(build()) for name, build in (BUILDERS | MODELS).items()}
for name, builds in ALIKE.items():
    torch.manual_seed(0)
    texts[name] = [described(build()) for build in builds]
texts["set"] = described({"a", "b", "c", torch.float32, torch.nn.ReLU, torch.nn.GELU, torch.relu, ("d", "e")})
print(json.dumps([texts, fingerprint({}, {}, "rrcm.certification.certify", BUILDERS["dds"]())]))
"""


@pytest.mark.thorough
def test_descriptions_are_the_same_in_every_process():
    """Addresses and the order of sets differ from process to process; code is compiled, or read from a cache."""
    Path(cache_from_source(__file__)).unlink(missing_ok=True)  # the first process compiles the code, the other reads it
    answers = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests"}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
        answers.append(subprocess.check_output(command, cwd=REPOSITORY, env=environment, text=True))
    assert answers[0] == answers[1] and len(json.loads(answers[0])[1]) == 16
