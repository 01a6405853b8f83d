"""Runtimes of the network that votes: PyTorch, or on a CPU OpenVINO (`pip install 'rrcm[openvino]'`).

The noise, the votes and the statistics stay as they are. Another runtime rounds differently, as another machine does,
so a few votes that are nearly tied flip. The certificates apply to the network as the runtime computes it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

import torch
from torch import nn

from rrcm.certification.networks import in_batches
from rrcm.certification.programs import Comparison, compare, export_program, make_program
from rrcm.certification.smoothing import SmoothedClassifier, is_stochastic
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.quiet import quiet

RUNTIMES = ("torch", "openvino")
NAMES = {"fp32": "f32", "bf16": "bf16"}  # of precisions in OpenVINO


class CompiledProgram:
    """A classifier compiled by OpenVINO, with the weights that it has now, for batches of one shape (B, C, H, W).

    Raises `RRCMError` if this CPU has no instructions for the precision, and all kinds of exceptions for classifiers
    that cannot be exported or compiled.
    """

    def __init__(self, classifier: nn.Module, shape: Sequence[int], precision: str, threads: int):
        openvino = import_openvino()
        self.made_from = classifier, tuple(shape), precision, threads
        exported = export_program(make_program(classifier), torch.zeros(*shape))
        with quiet():
            model = openvino.convert_model(exported)
        model.reshape(list(shape))
        options = {"INFERENCE_PRECISION_HINT": NAMES[precision], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        compiled = openvino.Core().compile_model(model, "CPU", options | {"ENABLE_CPU_PINNING": False})
        computes_in = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if computes_in != NAMES[precision]:
            raise RRCMError(f"on this CPU it has no {precision} and computes in {computes_in}; take another precision")
        self.request = compiled.create_infer_request()

    def __call__(self, noisy: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 -> (B, K) float32."""
        return torch.from_numpy(self.request.infer([noisy.contiguous().numpy()], share_inputs=True)[0])

    def __reduce__(self) -> tuple[type, tuple]:
        """A program of OpenVINO. It is pickled and described (describe.py) by what it was compiled from."""
        return CompiledProgram, self.made_from

    def __deepcopy__(self, memo: dict) -> "CompiledProgram":
        """The program itself, because it never changes."""
        return self


def import_openvino() -> ModuleType:
    """The package openvino without openvino_telemetry, which reports each import and each conversion to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # openvino takes it for not installed
    return importlib.import_module("openvino")


class OpenVINOClassifier(nn.Module):
    """`classifier` run by OpenVINO, in batches of one size, the last one padded."""

    keeps_float32_input = True  # in bfloat16 the program converts its input itself

    def __init__(self, classifier: nn.Module, shape: Sequence[int], precision: str, threads: int):
        super().__init__()
        self.runtime = f"openvino {version('openvino')}"
        self.program, self.size = CompiledProgram(classifier, shape, precision, threads), shape[0]

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 -> (B, K) float32, without gradients."""
        return in_batches(self.program, noisy, (self.size, self.size))


def check_runtime(name: str) -> None:
    """Raise `RRCMError` for a name that is not in RUNTIMES."""
    if name not in RUNTIMES:
        raise RRCMError(f"runtime = {name!r}: must be {' or '.join(RUNTIMES)}")


def runtime_of(smoothed: SmoothedClassifier) -> str | None:
    """The runtime that votes and its version, as records have them. None: torch."""
    return smoothed.model.runtime if isinstance(smoothed.model, OpenVINOClassifier) else None


def in_runtime(
    runtime: str, scales: Sequence[SmoothedClassifier], image: torch.Tensor
) -> tuple[list[SmoothedClassifier], str | None]:
    """The smoothed classifiers with their networks run by a runtime, and a note in one line.

    `image` stands for the images that they will get. The note says how many votes differ from torch's. If the runtime
    cannot run all networks, the smoothed classifiers stay as they are, and the note says why. The runtime computes with
    as many threads as torch.
    """
    if runtime == "torch":
        return list(scales), None
    try:
        _check_possible(scales)
        changed, compared = zip(*(_in_openvino(smoothed, image) for smoothed in scales), strict=True)
    except Exception as error:  # exporters and runtimes raise all kinds of exceptions
        return list(scales), f"runtime openvino: {one_line(error)}; torch runs instead"
    votes = sum(each.images for each in compared)
    flips = sum(round(each.images * (1 - each.equal)) for each in compared)
    rate = f"{flips:,} of {votes:,} votes on random noisy images differ from torch's in fp32"
    return list(changed), f"{runtime_of(changed[0])} votes in {changed[0].precision}: {rate}"


def _check_possible(scales: Sequence[SmoothedClassifier]) -> None:
    if importlib.util.find_spec("openvino") is None:
        raise RRCMError("needs the package openvino: pip install 'rrcm[openvino]'")
    if scales[0].device.type != "cpu":
        raise RRCMError(f"is for CPUs, and the model is on {scales[0].device}")
    if any(is_stochastic(smoothed.model) for smoothed in scales):
        raise RRCMError("the model draws random numbers of its own, which no program can have")


def _in_openvino(smoothed: SmoothedClassifier, image: torch.Tensor) -> tuple[SmoothedClassifier, Comparison]:
    """The same smoothed classifier with its network run by OpenVINO, and the comparison with torch in fp32."""
    size, precision = smoothed.find_batch_size(image), smoothed.precision
    shape = (size, *image.shape)
    network = OpenVINOClassifier(smoothed.model, shape, precision, torch.get_num_threads())
    compared = compare(make_program(smoothed.model), network, image[None], smoothed.sigma, (size,))
    if not compared.is_the_model(precision):
        raise RRCMError(f"its program is not the model: {compared}")
    options = {"seed": smoothed.seed, "num_noise": smoothed.num_noise, "precision": precision, "batch_size": size}
    return SmoothedClassifier(network, smoothed.sigma, smoothed.num_classes, **options), compared
