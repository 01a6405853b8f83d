"""Static quantization of a network to int8 by NNCF, calibrated on noisy validation images (`pip install 'rrcm[int8]'`).

A quantized network is another network than the one it was made from. It has its own certificates, and their record has
its hash. Its ranges come from validation images with the noise of its sigma, so it is fixed before it sees a test
image, as the theorem needs.
"""

import hashlib
import importlib.util
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from rrcm.certification.noise import counter_normal
from rrcm.certification.programs import export_program, make_program
from rrcm.certification.smoothing import LARGEST_BATCH
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, claimed
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.quiet import quiet
from rrcm.utils.resume import fingerprint, runs_directory

if TYPE_CHECKING:
    from types import ModuleType

    import openvino

IMAGES = 300  # at most, as is usual for NNCF. With 50 of the digits' 143, half as many votes again flip
FILES = ("model.xml", "model.bin", "sha256")  # of a quantized program: its graph, its weights, the hash of both
RUNNING_NAMES = re.compile(rb'\s*<attribute name="fused_names"[^>]*/>')  # in graphs; they count up within a process


class Calibration(NamedTuple):
    """The validation images that ranges are measured on, and the seed of their noise."""

    images: torch.Tensor  # (N, C, H, W) float32 in [0, 1]
    indices: list[int]  # of the images in their split
    seed: int

    def noisy(self, sigma: float) -> torch.Tensor:
        """Each image once, with noise that no certificate has: (N, C, H, W) float32. `sigma` is in pixel units."""
        rows = torch.tensor([[0] * len(self.indices), self.indices, [0] * len(self.indices)])
        noise = counter_normal(self.images.shape[1:], self.seed, *rows, stream=("calibration",))
        return self.images + sigma * noise


class Quantized(NamedTuple):
    """A quantized program, in the two files of OpenVINO's format. It can be reshaped for batches of any size."""

    graph: torch.Tensor  # uint8
    weights: torch.Tensor  # uint8

    @property
    def contents(self) -> tuple[bytes, bytes]:
        """The contents of both files."""
        return self.graph.numpy().tobytes(), self.weights.numpy().tobytes()

    @property
    def sha256(self) -> str:
        """SHA-256 of both files. It is equal wherever the same ranges were measured."""
        return hashlib.sha256(b"".join(self.contents)).hexdigest()

    @property
    def by(self) -> str:
        """The package that quantized, and its version."""
        return f"nncf {version('nncf')}"


def read_calibration(shard_folder: Path | str, size: int, seed: int) -> Calibration:
    """At most IMAGES validation images of a folder of shards, evenly spaced. Raises `RRCMError` if it has none."""
    pixels, _, indices = read_split(ShardedDataset(shard_folder, "val"), size, limit=IMAGES)
    return Calibration(to_unit_range(pixels), indices, seed)


def quantize(classifier: nn.Module, calibration: Calibration, sigma: float) -> Quantized:
    """`classifier` in int8, for noise `sigma` (pixel units). It is made once, and kept in the folder of runs.

    Processes that need the same program wait for the first one. Raises `RRCMError` where NNCF is missing, and all kinds
    of exceptions for classifiers that cannot be exported or quantized.
    """
    if importlib.util.find_spec("nncf") is None:
        raise RRCMError("needs the package nncf: pip install 'rrcm[int8]'")
    noisy = calibration.noisy(sigma)
    versions = [version(name) for name in ("openvino", "nncf")]
    folder = runs_directory() / f"int8-{fingerprint(versions, {}, __name__, classifier, noisy)}"
    with claimed(folder, wait=True):
        if (known := _read(folder)) is not None:
            return known
        quantized = _quantize(classifier, noisy)
        with atomic_directory(folder) as scratch:
            for name, content in zip(FILES, (*quantized.contents, quantized.sha256.encode()), strict=True):
                (scratch / name).write_bytes(content)
    return quantized


def _read(folder: Path) -> Quantized | None:
    """The program that is kept in a folder, or None if it is missing or damaged."""
    try:
        graph, weights, expected = ((folder / name).read_bytes() for name in FILES)
    except OSError:
        return None
    found = _from_files(graph, weights)
    return found if found.sha256.encode() == expected else None


def _quantize(classifier: nn.Module, noisy: torch.Tensor) -> Quantized:
    """Make the program.

    Ranges hold all that was measured, image by image. So they do not depend on a batch size, and fewer votes flip than
    with the means of the images' ranges. They are symmetric, since mixed ones flipped as many votes and are slower.
    Weights take 7 of their 8 bits: on a CPU without VNNI, sums of larger products overflow, which more than doubles the
    flips and makes another network than on a CPU with it. The settings for transformers made no difference in the CNN
    of Fashion-MNIST.
    """
    openvino = import_openvino()
    size = torch.export.Dim("batch", max=LARGEST_BATCH)
    exported = export_program(make_program(classifier), noisy[:4], dynamic_shapes=({0: size},))
    with _silence():
        import nncf
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        model = openvino.convert_model(exported)
        model.reshape([1, *noisy.shape[1:]])  # the CPU cannot run all layers in batches of unknown size
        model = nncf.quantize(
            model,
            nncf.Dataset([image.numpy() for image in noisy.split(1)]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(noisy),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE,
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            ),
        )
    return _serialize(model)


def _serialize(model: "openvino.Model") -> Quantized:
    """The files of a model, with names that do not change from run to run."""
    openvino = import_openvino()
    for number, node in enumerate(model.get_ordered_ops()):
        node.set_friendly_name(str(number))
        for output in node.outputs():
            output.get_tensor().set_names(set())
    model.set_friendly_name("model")
    with tempfile.TemporaryDirectory(prefix="rrcm_") as scratch:
        paths = [Path(scratch) / name for name in FILES[:2]]
        openvino.serialize(model, *paths)
        graph, weights = (path.read_bytes() for path in paths)
    return _from_files(RUNNING_NAMES.sub(b"", graph), weights)


def _from_files(*contents: bytes) -> Quantized:
    return Quantized(*(torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents))


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, no logger prints, and neither do NNCF's bars."""
    with quiet(), redirect_stdout(io.StringIO()):
        yield


def import_openvino() -> "ModuleType":
    """The package openvino without openvino_telemetry, which reports each import and each conversion to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # openvino and nncf take it for not installed
    return importlib.import_module("openvino")
