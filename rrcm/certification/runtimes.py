"""Runtimes of the network that votes: PyTorch, or on a CPU OpenVINO (`pip install 'rrcm[openvino]'`).

The noise, the votes and the statistics stay as they are. Another runtime rounds differently, as another machine does,
so a few votes that are nearly tied flip. The certificates apply to the network as the runtime computes it.
"""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import nn

from rrcm.certification.networks import in_batches
from rrcm.certification.programs import compare, export_program, make_program
from rrcm.certification.quantization import Calibration, Quantized, import_openvino, quantize
from rrcm.certification.smoothing import SmoothedClassifier, is_stochastic
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.quiet import quiet

RUNTIMES = ("torch", "openvino")
NAMES = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of precisions in OpenVINO; of layers that are not quantized
LEAST_EQUAL = 0.9  # share of votes in int8 that must be torch's; a network that differs more has lost too much


class CompiledProgram:
    """A classifier compiled by OpenVINO, with the weights that it has now, for batches of one shape (B, C, H, W).

    In int8, the program `int8` was made from the classifier before. Raises `RRCMError` if this CPU has no
    instructions for the precision, and all kinds of exceptions for classifiers that cannot be exported or compiled.
    """

    def __init__(
        self, classifier: nn.Module, shape: Sequence[int], precision: str, threads: int, int8: Quantized | None = None
    ):
        openvino = import_openvino()
        self.made_from = classifier, tuple(shape), precision, threads, int8
        if int8 is None:
            exported = export_program(make_program(classifier), torch.zeros(*shape))
            with quiet():
                model = openvino.convert_model(exported)
        else:
            model = openvino.Core().read_model(*int8.contents)
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


class OpenVINOClassifier(nn.Module):
    """`classifier` run by OpenVINO, in batches of one size, the last one padded."""

    keeps_float32_input = True  # in bfloat16 the program converts its input itself

    def __init__(
        self, classifier: nn.Module, shape: Sequence[int], precision: str, threads: int, int8: Quantized | None = None
    ):
        super().__init__()
        self.runtime, self.precision, self.quantized = f"openvino {version('openvino')}", precision, int8
        self.program, self.size = CompiledProgram(classifier, shape, precision, threads, int8), shape[0]

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 -> (B, K) float32, without gradients."""
        return in_batches(self.program, noisy, (self.size, self.size))


def check_runtime(name: str, precision: str) -> None:
    """Raise `RRCMError` for a name that is not in RUNTIMES, and for int8, as a folder of images has no calibration."""
    if name not in RUNTIMES:
        raise RRCMError(f"runtime = {name!r}: must be {' or '.join(RUNTIMES)}")
    if precision == "int8":
        raise RRCMError(
            "precision = 'int8': needs the validation images of a run, which a folder does not have; take fp32 or "
            "bf16, or in the pipeline certify.precision=int8"
        )


def runtime_of(smoothed: SmoothedClassifier) -> str | None:
    """The runtime that votes and its version, as records have them. None: torch."""
    return smoothed.model.runtime if isinstance(smoothed.model, OpenVINOClassifier) else None


def precision_of(smoothed: SmoothedClassifier) -> str:
    """The precision of the network that votes, as records have it."""
    return smoothed.model.precision if isinstance(smoothed.model, OpenVINOClassifier) else smoothed.precision


def runtime_entries(scales: Sequence[SmoothedClassifier]) -> dict[str, object]:
    """The entries of a record about the runtime. In int8, it has the hash of the quantized program of each scale."""
    entries, first = {"runtime": runtime_of(scales[0])}, scales[0].model
    if precision_of(scales[0]) == "int8":
        programs = [smoothed.model.quantized.sha256 for smoothed in scales]
        entries |= {"precision": "int8", "quantized": {"by": first.quantized.by, "sha256": programs}}
    return entries


def in_runtime(
    runtime: str, scales: Sequence[SmoothedClassifier], image: torch.Tensor, calibration: Calibration | None = None
) -> tuple[list[SmoothedClassifier], str | None]:
    """The smoothed classifiers with their networks run by a runtime, and a note in one line.

    `image` stands for the images that they will get. With a `calibration`, the networks are quantized to int8. The note
    says how many votes differ from torch's. If the networks cannot be quantized, they stay in their precision. If the
    runtime cannot run all networks, the smoothed classifiers stay as they are. The note says why. The runtime computes
    with as many threads as torch.
    """
    if runtime == "torch":
        return list(scales), None
    failed = ""
    try:
        _check_possible(scales)
        if calibration is not None:
            try:
                return _in_openvino(scales, image, calibration)
            except Exception as error:  # quantizers as well
                failed = f"precision int8: {one_line(error)}; {scales[0].precision} instead. "
        changed, note = _in_openvino(scales, image)
    except Exception as error:  # exporters and runtimes raise all kinds of exceptions
        return list(scales), f"{failed}runtime openvino: {one_line(error)}; torch runs instead"
    return changed, failed + note


def _check_possible(scales: Sequence[SmoothedClassifier]) -> None:
    if importlib.util.find_spec("openvino") is None:
        raise RRCMError("needs the package openvino: pip install 'rrcm[openvino]'")
    if scales[0].device.type != "cpu":
        raise RRCMError(f"is for CPUs, and the model is on {scales[0].device}")
    if any(is_stochastic(smoothed.model) for smoothed in scales):
        raise RRCMError("the model draws random numbers of its own, which no program can have")


def _in_openvino(
    scales: Sequence[SmoothedClassifier], image: torch.Tensor, calibration: Calibration | None = None
) -> tuple[list[SmoothedClassifier], str]:
    """The same smoothed classifiers, run by OpenVINO, and how many votes differ from torch's in fp32."""
    changed, votes, flips = [], 0, 0
    for smoothed in scales:
        if calibration is None:
            each, size, differ = _as_program(smoothed, image)
        else:
            each, size, differ = _as_int8(smoothed, image, calibration)
        changed.append(each)
        votes, flips = votes + size, flips + differ
    first, of = changed[0], "random noisy images" if calibration is None else "noisy validation images"
    rate = f"{flips:,} of {votes:,} votes on {of} differ from torch's in fp32"
    return changed, f"{runtime_of(first)} votes in {precision_of(first)}: {rate}"


def _as_program(smoothed: SmoothedClassifier, image: torch.Tensor) -> tuple[SmoothedClassifier, int, int]:
    """The same smoothed classifier, run by OpenVINO; votes that were compared with torch's in fp32; those that differ.

    Raises `RRCMError` for a program that is not the model.
    """
    size, precision = smoothed.find_batch_size(image), smoothed.precision
    network = OpenVINOClassifier(smoothed.model, (size, *image.shape), precision, torch.get_num_threads())
    compared = compare(make_program(smoothed.model), network, image[None], smoothed.sigma, (size,))
    if not compared.is_the_model(precision):
        raise RRCMError(f"its program is not the model: {compared}")
    return _smoothed_by(network, smoothed), compared.images, round(compared.images * (1 - compared.equal))


@torch.no_grad()
def _as_int8(
    smoothed: SmoothedClassifier, image: torch.Tensor, calibration: Calibration
) -> tuple[SmoothedClassifier, int, int]:
    """`_as_program` in int8. Raises `RRCMError` for a program that votes otherwise too often."""
    shape = (smoothed.find_batch_size(image), *image.shape)
    quantized = quantize(smoothed.model, calibration, smoothed.sigma)
    network = OpenVINOClassifier(smoothed.model, shape, "int8", torch.get_num_threads(), quantized)
    noisy, original = calibration.noisy(smoothed.sigma), make_program(smoothed.model)
    differ = int((network(noisy).argmax(1) != in_batches(original, noisy, (1, shape[0])).argmax(1)).sum())
    if differ > (1 - LEAST_EQUAL) * len(noisy):
        raise RRCMError(f"{differ:,} of {len(noisy):,} votes on noisy validation images differ from torch's in fp32")
    return _smoothed_by(network, smoothed), len(noisy), differ


def _smoothed_by(network: OpenVINOClassifier, smoothed: SmoothedClassifier) -> SmoothedClassifier:
    """`smoothed` with another network, which has batches of one size."""
    options = {name: getattr(smoothed, name) for name in ("seed", "num_noise", "precision")}
    return SmoothedClassifier(network, smoothed.sigma, smoothed.num_classes, batch_size=network.size, **options)
