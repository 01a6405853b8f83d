"""Export a base classifier as a program that runs without this package: ONNX, torch.export or TorchScript.

The program maps images (B, C, H, W) float32 in [0, 1], with noise added, to logits. It contains the noise level and the
normalization of the images. It is compared with the original before anything is written.
"""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rrcm.certification.certify_images import find_images, read_square
from rrcm.certification.export_readme import export_readme
from rrcm.certification.programs import BATCHES, Comparison, Program, compare, export_program, make_program
from rrcm.certification.smoothing import SmoothedClassifier, is_stochastic
from rrcm.data.shards import evenly_spaced
from rrcm.models.load import LoadedClassifier
from rrcm.utils.errors import RRCMError, one_line, printable
from rrcm.utils.files import atomic_directory, check_output, write_text
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.quiet import quiet

FORMATS = {"onnx": "model.onnx", "torch-export": "model.pt2", "torchscript": "model.pt"}
NEEDED = ("onnx", "onnxscript", "onnxruntime")  # packages of the format onnx
LARGEST_BATCH = 2**16
CERTIFIED, N = 20, 1000  # images that are certified again, and their samples
ALPHA = 0.001


class OnnxProgram(nn.Module):
    """A file of ONNX as a torch module, run by onnxruntime on the CPU."""

    def __init__(self, path: Path):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 -> (B, K) float32."""
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])


def check_export(kind: str, folder: Path) -> None:
    """Raise `RRCMError` if nothing can be exported in this format to this folder. Call it before a model is loaded."""
    if kind not in FORMATS:
        raise RRCMError(f"--format {kind}: must be {', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None] if kind == "onnx" else []
    if missing:
        raise RRCMError(f"--format onnx: needs {', '.join(missing)}; install what is missing: pip install 'rrcm[onnx]'")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RRCMError(f"--output {printable(folder)}: exists already; give a new folder")
    check_output(folder / "README.md")


def export_model(
    loaded: LoadedClassifier, sigma: float, kind: str, folder: Path, pictures: Path | None = None
) -> Comparison:
    """Write the program for noise `sigma` (pixel units), its README.md and the class names to `folder`.

    `kind` is a key of FORMATS. Images of the folder `pictures`, if given, are certified by the program and by the
    classifier. Raises `RRCMError` if the classifier cannot be exported, or if the program votes differently.
    """
    if is_stochastic(loaded.classifier):
        raise RRCMError("the model draws random numbers of its own, which no program can have; export another model")
    images = None if pictures is None else read_pictures(pictures, loaded)
    with atomic_directory(folder) as scratch:
        path = scratch / FORMATS[kind]
        example = torch.zeros(4, loaded.channels, loaded.image_size, loaded.image_size)
        try:
            original = make_program(loaded.classifier)
            program = _write_program(original, example, kind, path)
            compared = compare(original, program, example, sigma)
        except Exception as error:  # exporters and their programs raise all kinds of exceptions
            reason = f"the model cannot be exported ({one_line(error)})"
            raise RRCMError(f"--format {kind}: {reason}; take another format") from error
        if not compared.is_the_model("fp32"):
            raise RRCMError(f"--format {kind}: the program is not the model: {compared}; take another format")
        if images is not None:
            compared = certify_again(original, program, images, sigma, loaded.num_classes, compared)
        write_text(scratch / "classes.txt", "".join(f"{name}\n" for name in loaded.class_names))
        facts = {"sigma": sigma, "channels": loaded.channels, "size": loaded.image_size, "classes": loaded.num_classes}
        write_text(scratch / "README.md", export_readme(kind, FORMATS[kind], str(compared), **facts))
    return compared


def read_pictures(folder: Path, loaded: LoadedClassifier) -> torch.Tensor:
    """At most CERTIFIED images of a folder, evenly spaced: (B, C, H, W) in [0, 1]."""
    files = find_images(folder).files
    chosen = [files[i] for i in evenly_spaced(len(files), CERTIFIED)]
    return to_unit_range(torch.from_numpy(np.stack([read_square(folder / file, loaded) for file in chosen])))


def _write_program(original: Program, example: torch.Tensor, kind: str, path: Path) -> nn.Module:
    """Write the program, read its file back, and return what was read."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), quiet():
        if kind == "torchscript":
            torch.jit.save(torch.jit.trace(original, example, check_trace=False), path)
            return torch.jit.load(path)
        sizes = ({0: torch.export.Dim("batch", max=LARGEST_BATCH)},)
        exported = export_program(original, example, dynamic_shapes=sizes)
        if kind == "torch-export":
            torch.export.save(exported, path)
            return torch.export.load(path).module()
        names = {"input_names": ["images"], "output_names": ["logits"]}
        torch.onnx.export(exported, (), dynamo=True, verbose=False, **names).save(path)
        return OnnxProgram(path)


def certify_again(
    original: nn.Module, program: nn.Module, images: torch.Tensor, sigma: float, num_classes: int, compared: Comparison
) -> Comparison:
    """`compared`, with the number of certificates on which the two agree. Both see the same noise."""
    results = []
    for network in (original, program):
        smoothed = SmoothedClassifier(network, sigma, num_classes, batch_size=BATCHES[-1])
        results.append(smoothed.certify(images, n=N, alpha=ALPHA, radius_step=sigma / 5))
    agree = sum((a.prediction, a.radius) == (b.prediction, b.radius) for a, b in zip(*results, strict=True))
    return compared._replace(certified=len(images), agree=agree)
