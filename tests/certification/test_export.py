"""`rrcm export`: programs that vote like the model, a README.md whose code runs, and bad input in one line."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of
from PIL import Image
from test_cli import images, in_a_folder, refused, saved  # noqa: F401 (fixtures)
from torch import nn
from typer.testing import CliRunner, Result

from rrcm.certification.export import FORMATS, NEEDED, OnnxProgram, export_model
from rrcm.certification.runtimes import import_openvino
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.cli import app
from rrcm.data.augment import centre_crop
from rrcm.data.images import read_image as read_rrcm_image
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.models.kinds import LoadedClassifier
from rrcm.utils.errors import RRCMError

has_onnx = all(importlib.util.find_spec(name) for name in NEEDED)
ONNX = pytest.param("onnx", marks=[pytest.mark.thorough, pytest.mark.skipif(not has_onnx, reason="needs rrcm[onnx]")])


def export(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


EXPORTED = pytest.param("torch-export", marks=pytest.mark.thorough)


@pytest.mark.parametrize("kind", ["torchscript", EXPORTED, ONNX])
def test_a_program_votes_like_the_model_and_its_readme_runs(
    saved: nn.Module,  # noqa: F811
    images: torch.Tensor,  # noqa: F811
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
):
    answer = export("model", "--output", "out", "--format", kind, "--check", "images")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("100.00 % of 576 votes on random noisy images are equal; the logits are at most ")
    assert "4 of 4 certificates agree in class and radius\nwritten: out\n" in answer.stdout
    assert set(files_of(Path("out"))) == {"README.md", "classes.txt", FORMATS[kind]}
    if kind == "torch-export":
        program = ["certify", "images", "--model", f"out/{FORMATS[kind]}", "--sigma", "0.25", "--n", "100"]
        answer = CliRunner().invoke(app, program)
        assert answer.exit_code == 0 and "written: certificates.tsv" in answer.stdout, answer.output
    readme = Path("out/README.md").read_text()
    assert "images (B, 1, 8, 8)" in readme and "noise of sigma 0.25 added" in readme and "576 votes" in readme
    monkeypatch.chdir("out")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    run: dict = {}
    exec(code, run)
    for image in images:
        noisy = image[None] + 0.25 * torch.randn(3, 1, 8, 8)
        np.testing.assert_allclose(run["logits_of"](noisy.numpy()), saved(noisy).detach(), atol=1e-5)
    assert run["count_votes"](images[0].numpy(), 100).sum() == 100
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 4), np.uint8), "RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    photo.save("photo.png", exif=turned)
    own = np.asarray(centre_crop(read_rrcm_image(Path("photo.png"), 1), 8), np.float32) / 255
    np.testing.assert_array_equal(run["read_image"]("photo.png"), own[None])
    smoothed = SmoothedClassifier(saved, 0.25, 3, batch_size=64)
    for image, certificate in zip(images[:2], smoothed.certify(images[:2], n=1000, stopping="fixed"), strict=True):
        top, radius = run["certify"](image.numpy(), n=1000)
        assert abs(radius - certificate.radius) < 0.15
        if certificate.radius > 0.05:
            assert top == run["predict"](image.numpy()) == certificate.prediction


class OpenVINOProgram(nn.Module):
    """A file of ONNX, run by OpenVINO."""

    def __init__(self, path: Path):
        super().__init__()
        core = import_openvino().Core()
        self.run = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.run([noisy.numpy()])[0])


has_openvino = importlib.util.find_spec("openvino") is not None
RUNTIMES = {"onnxruntime": OnnxProgram, "openvino": OpenVINOProgram}


@pytest.mark.thorough
@pytest.mark.skipif(not has_onnx, reason="needs rrcm[onnx]")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_of_an_exported_program_certify_what_torch_certifies(
    saved: nn.Module,  # noqa: F811
    images: torch.Tensor,  # noqa: F811
    runtime: str,
):
    """Votes are equal on 99.9 % of 10,000 noisy images, and radii within one step of their grid."""
    if runtime == "openvino" and not has_openvino:
        pytest.skip("needs rrcm[openvino]")
    export_model(LoadedClassifier(saved, 8, 1, ["a", "b", "c"]), 0.25, "onnx", Path("out"))
    program = RUNTIMES[runtime](Path("out", FORMATS["onnx"]))
    noisy = images.repeat(2500, 1, 1, 1) + 0.25 * torch.randn(10_000, 1, 8, 8, generator=torch.manual_seed(0))
    equal = [(program(each).argmax(1) == saved(each).argmax(1)).sum().item() for each in noisy.split(100)]
    print(f"{runtime}: {sum(equal):,} of 10,000 votes are equal")
    assert sum(equal) >= 9990
    smoothed = (SmoothedClassifier(each, 0.25, 3, batch_size=100) for each in (saved, program))
    for a, b in zip(*(each.certify(images, n=10_000, radius_step=0.05) for each in smoothed), strict=True):
        assert a.prediction == b.prediction and abs(a.radius - b.radius) < 0.051


class OneBatchSize(BaseClassifier):
    """Remembers the size of the batch as a number when it is traced."""

    num_classes = 2

    def forward(self, noisy: torch.Tensor, draw: object = None) -> torch.Tensor:
        return torch.zeros(len(noisy), 2) + noisy.mean((1, 2, 3))[:, None]


class Other(OneBatchSize):
    """Answers otherwise once it is traced."""

    def forward(self, noisy: torch.Tensor, draw: object = None) -> torch.Tensor:
        return noisy.flatten(1)[:, :2] * (-1 if torch.jit.is_tracing() else 1)


class Random(OneBatchSize):
    stochastic = True


@pytest.mark.parametrize(
    ("classifier", "said"),
    [
        (OneBatchSize(), "--format torchscript: the model cannot be exported ("),
        (Other(), "--format torchscript: the program is not the model: "),
        (Random(), "the model draws random numbers of its own, which no program can have"),
    ],
)
def test_a_program_that_is_not_the_model_is_not_written(classifier: nn.Module, said: str):
    loaded = LoadedClassifier(classifier, 8, 1, ["a", "b"])
    with pytest.raises(RRCMError) as error:
        export_model(loaded, 0.5, "torchscript", Path("out"))
    assert str(error.value).startswith(said) and "\n" not in str(error.value) and not files_of(Path())


@pytest.mark.usefixtures("images", "saved")
def test_bad_input_ends_in_one_line(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in NEEDED[:2] else find(name))
    before = files_of(Path())
    new = ["--output", "out", "--format"]
    refused(export("model", *new, "onnx"), "--format onnx: needs onnx, onnxscript", "pip install 'rrcm[onnx]'")
    refused(export("model", *new, "tflite"), "--format tflite: must be onnx, torch-export or torchscript")
    refused(export("model", "--output", "images", "--format", "torchscript"), "images: exists already; give a new")
    refused(export("none", *new, "torchscript"), "none: no such folder or file")
    refused(export("model", *new, "torchscript", "--sigma", -1), "sigma = -1.0: must be above 0")
    refused(export("model", *new, "torchscript", "--check", "nowhere"), "nowhere: no such folder")
    assert files_of(Path()) == before
