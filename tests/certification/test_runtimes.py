"""Certificates by OpenVINO: their votes, their records, their audits, and torch in its place where it cannot run.

Without the package, a program of torch that rounds to float16 stands for the compiled one.
"""

import importlib.util
import json
import threading
from pathlib import Path

import pytest
import torch
from conftest import change
from small_networks import CLASSES, ConvNet, conv_net, noise_conditioned
from test_cli import SMALL, images, in_a_folder, refused, rrcm, saved  # noqa: F401 (fixtures)
from torch import nn
from typer.testing import CliRunner

from rrcm.certification import runtimes
from rrcm.certification.certify import certify_split
from rrcm.certification.certify_cascade import certify_cascade_split
from rrcm.certification.certify_model import certify_model
from rrcm.certification.record import read_record, record_bytes
from rrcm.certification.revote import Inputs, Settings, same_computation, smooth_again
from rrcm.certification.runtimes import CompiledProgram, OpenVINOClassifier, in_runtime, runtime_of
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.cli import app
from rrcm.config import load_config
from rrcm.derived import certification_settings
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.cnn import NoiseConditionedCNN
from rrcm.models.denoised import DDS, DenoisedClassifier, DensePure, DiffSmooth
from rrcm.models.denoiser import PixelViT
from rrcm.models.ensembles import Ensemble
from rrcm.models.load import LoadedClassifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.describe import Description
from rrcm.utils.errors import RRCMError

has_openvino = importlib.util.find_spec("openvino") is not None
needs_openvino = [pytest.mark.thorough, pytest.mark.skipif(not has_openvino, reason="needs rrcm[openvino]")]
OUTPUTS = ("certificates.tsv", "certificates.samples.tsv", "certificates.files.tsv", "certificates.json")


MADE: list["Rounded"] = []  # the latest programs


class Rounded(CompiledProgram):
    """Stands for a program of OpenVINO: the classifier with logits in float16."""

    def __init__(
        self, classifier: nn.Module, shape: tuple[int, ...], precision: str, threads: int, int8: object = None
    ):
        self.made_from, self.shape = (classifier, shape, precision, threads, int8), shape
        self.request = threading.Lock()  # cannot be copied or described either
        self.batches = 0
        MADE.append(self)

    def __call__(self, noisy: torch.Tensor) -> torch.Tensor:
        assert noisy.shape == self.shape
        self.batches += 1
        return self.made_from[0](noisy).half().float()


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gallery, and few votes that measure the flip rate of this machine."""
    monkeypatch.setattr("rrcm.report.certified_images.draw_gallery", lambda *_: None)
    monkeypatch.setattr("rrcm.report.figures.encode", lambda *_: b"")
    monkeypatch.setattr("rrcm.certification.audit.SAMPLES_HERE", 400)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find("json" if name == "openvino" else name))
    monkeypatch.setattr(runtimes, "CompiledProgram", Rounded)
    monkeypatch.setattr(runtimes, "version", lambda name: "1.2.3")


def certify(*options: str) -> tuple[str, dict[str, bytes]]:
    """What a run says about its runtime, and its files."""
    answer = rrcm("images", "--model", "model", *SMALL, "--limit", "2", *options)
    assert answer.exit_code == 0, answer.output
    notes = [line for line in answer.stderr.splitlines() if "openvino" in line]
    return "\n".join(notes), {name: Path(name).read_bytes() for name in OUTPUTS}


def verdict(*options: str) -> str:
    answer = CliRunner().invoke(app, ["audit", "certificates.tsv", "--images", "images", "--all", *options])
    return answer.stdout.splitlines()[-1]


@pytest.mark.usefixtures("saved", "images")
def test_torch_runs_where_openvino_is_missing(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else find(name))
    said, files = certify()
    assert said == "" and b"runtime" not in files["certificates.json"]
    missing = "note: runtime openvino: needs the package openvino: pip install 'rrcm[openvino]'; torch runs instead"
    assert certify("--runtime", "openvino") == (missing, files)
    refused(rrcm("images", "--model", "model", "--runtime", "onnx"), "runtime = 'onnx': must be torch or openvino")
    in_int8 = ["--runtime", "openvino", "--precision", "int8"]
    refused(rrcm("images", "--model", "model", *in_int8), "precision = 'int8': needs the validation images of a run")


@pytest.mark.usefixtures("images", "stand_in")
def test_a_record_names_the_runtime_and_torch_audits_it(saved: nn.Module, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    said, files = certify("--runtime", "openvino")
    assert said.startswith("note: openvino 1.2.3 votes in fp32: ") and " of 512 votes on random noisy" in said
    record = read_record(Path("certificates.json"))
    assert record.runtime == "openvino 1.2.3" and record_bytes(record) == files["certificates.json"]
    found = verdict("--model", "model")
    assert found.startswith("verified: ") and "2 voted again in fp32, batch 64, by torch: " in found
    inputs = Inputs([LoadedClassifier(saved, 8, 1, ["a", "b", "c"])], {})
    (smoothed,) = smooth_again(record, inputs, Settings(runtime="openvino"))
    assert runtime_of(smoothed) == "openvino 1.2.3" and same_computation(record, smoothed)
    (smoothed,) = smooth_again(record, inputs)
    assert runtime_of(smoothed) is None and not same_computation(record, smoothed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RRCMError, match=r"by openvino 1\.2\.3, which does not run here \(runtime openvino: needs the"):
        smooth_again(record, inputs, Settings(runtime="openvino"))


@pytest.mark.usefixtures("images", "stand_in")
def test_a_cascade_votes_by_one_runtime(saved: nn.Module):  # noqa: F811
    saved.t, saved.sigma = 1.0, 0.5
    save_model("other", saved)
    scales = ["--model", "other", "--cascade", "--sigma", "0.25", "--sigma", "0.5", "--threshold", "0"]
    said, _ = certify(*scales, "--runtime", "openvino")
    assert " of 1,024 votes on random noisy" in said
    assert json.loads(Path("certificates.json").read_text())["runtime"] == "openvino 1.2.3"
    assert verdict("--model", "model", "--model", "other").startswith("verified: ")


@pytest.mark.usefixtures("stand_in", "in_a_folder")
def test_the_stages_follow_the_setting(
    saved: nn.Module,  # noqa: F811
    project: Path,
    capsys: pytest.CaptureFixture,
):
    change(project, certify__runtime="openvino", certify__max_images=1, certify__n=100, cascade__thresholds=[9.0])
    change(project, cascade__multi_scale=False, certify__compile=True)
    with pytest.raises(RRCMError, match=r"certify\.compile = True: is for torch, not for"):
        load_config(project / "params.yaml")
    change(project, certify__compile=False)
    config = load_config(project / "params.yaml")
    MADE.clear()
    folders = [project / name for name in ("low", "high")]
    for folder, sigma in zip(folders, config.cascade_sigmas, strict=True):
        classifier = NoiseConditionedClassifier(saved.encoder, 10, 2 * sigma)
        nn.init.normal_(classifier.head.weight)
        save_model(folder, classifier)
    shards = project / "data/shards"
    certify_split(config, config.cascade_sigmas[1], shards, folders[1], Path("one.tsv"), Path("one.timing"))
    certify_cascade_split(config, shards, folders, Path("both"), Path("both.timing"))
    certify_model(config, str(folders[0]), config.cascade_sigmas[0], Path("model.tsv"), shards=shards)
    notes = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("note: openvino 1.2.3 votes in ") for line in notes) == 3
    for record in ("one.json", "both/cascade.json", "model.json"):
        assert read_record(Path(record)).runtime == "openvino 1.2.3"
    compared = 3 + 2  # batches that compare it with torch, and that show its independence of the rest of the batch
    assert len(MADE) == 4 and all(each.batches > compared for each in MADE)


DRAWS = "the model draws random numbers of its own, which no program can have"
STOCHASTIC = {DensePure: {"runs": 2, "steps": 2}, DiffSmooth: {"num_noise": 2, "local_sigma": 0.25}}


class Wrong(Rounded):
    def __call__(self, noisy: torch.Tensor) -> torch.Tensor:
        return -super().__call__(noisy)


@pytest.mark.usefixtures("stand_in")
def test_torch_runs_what_has_no_program_or_another_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtimes, "CompiledProgram", Wrong)
    image = torch.zeros(3, 8, 8)
    for classifier, reason in (
        *((denoised(kind, **given), DRAWS) for kind, given in STOCHASTIC.items()),
        (noise_conditioned(), "its program is not the model: "),
    ):
        scales = [SmoothedClassifier(classifier, 0.5, classifier.num_classes, batch_size=8)]
        same, note = in_runtime("openvino", scales, image)
        assert same == scales and runtime_of(same[0]) is None
        assert note.startswith(f"runtime openvino: {reason}") and note.endswith("; torch runs instead")


def test_a_program_is_described_by_what_it_was_made_from(monkeypatch: pytest.MonkeyPatch):
    """So a stopped run is continued with the same weights, runtime and precision only."""
    monkeypatch.setattr(runtimes, "CompiledProgram", Rounded)
    described = []
    same = ("1", "fp32", 0)
    for version, precision, head in (same, same, ("2", "fp32", 0), ("1", "bf16", 0), ("1", "fp32", 1)):
        monkeypatch.setattr(runtimes, "version", lambda name, version=version: version)
        classifier = noise_conditioned()
        nn.init.constant_(classifier.head.bias, head)
        described.append(str(Description().of(OpenVINOClassifier(classifier, (8, 3, 8, 8), precision, 1))))
    assert described[0] == described[1] and len(set(described)) == 4


def test_a_program_is_not_compiled_again_for_bfloat16(stand_in: None):
    smoothed = SmoothedClassifier(noise_conditioned(), 0.5, CLASSES, batch_size=8, precision="bf16")
    (other,), _ = in_runtime("openvino", [smoothed], torch.zeros(3, 8, 8))
    assert runtime_of(other) == "openvino 1.2.3" and other.network.program is other.model.program
    assert other.count_samples(torch.rand(1, 3, 8, 8), [0], 0, 10).sum() == 10


def test_settings_of_torch_have_the_hashes_that_they_had():
    known = {"n": 100, "compile": False}
    torch_runs, openvino_runs = (known | {"runtime": name} for name in ("torch", "openvino"))
    before, same, other = (certification_settings("rrcm", each, {}) for each in (known, torch_runs, openvino_runs))
    assert before == same != other


def cnn() -> NoiseConditionedClassifier:
    torch.manual_seed(1)
    classifier = NoiseConditionedClassifier(NoiseConditionedCNN(8, 3, 4, embed_dim=32), CLASSES, 1.0)
    nn.init.normal_(classifier.head.weight)
    return classifier


def denoised(kind: type[DenoisedClassifier] = DDS, **options: float) -> DenoisedClassifier:
    torch.manual_seed(1)
    denoiser = PixelViT(NoiseConditionedViT(8, 3, 4, embed_dim=32, depth=1, num_heads=2))
    return kind(denoiser, noise_conditioned(), sigma=0.5, classifier_size=8, **options)


def of_timm() -> nn.Module:
    import timm  # takes seconds

    torch.manual_seed(1)
    return timm.create_model("resnet10t", num_classes=CLASSES)


def exported() -> nn.Module:
    """As `torch.export.load` returns it, for a `--model` of this kind."""
    sizes = ({0: torch.export.Dim("batch", max=1024)},)
    return torch.export.export(cnn().eval(), (torch.zeros(4, 3, 8, 8),), dynamic_shapes=sizes).module()


# Whatever the runtime can run. Joint networks, with "pass" or not, are a vit or a cnn at one t. Own code is plain.
# Programs of TorchScript and classifiers that draw (STOCHASTIC) are left to torch.
KINDS = {
    "vit": noise_conditioned,
    "cnn": cnn,
    "ensemble": lambda: Ensemble([noise_conditioned(), cnn()]),
    "dds": denoised,
    "plain": lambda: conv_net(ConvNet).eval(),
    "timm": of_timm,
    "exported": exported,
}


@pytest.mark.parametrize("kind", [pytest.param(name, marks=needs_openvino) for name in KINDS])
def test_openvino_votes_as_torch_does(kind: str):
    smoothed = SmoothedClassifier(KINDS[kind](), 0.5, CLASSES, batch_size=100)
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (other,), note = in_runtime("openvino", [smoothed], pixels[0])
    assert note.startswith(runtime_of(other) or "openvino"), note
    options = {"n": 1000, "n0": 50, "radius_step": 0.1}
    for image in pixels:
        before, after = (each.certify(image[None], **options)[0] for each in (smoothed, other))
        assert before.prediction == after.prediction and abs(before.radius - after.radius) <= 0.101
    votes = [each.count_samples(pixels, range(3), 0, 1050) for each in (smoothed, other, other)]
    assert (votes[1] == votes[2]).all() and abs(votes[0] - votes[1]).sum() <= 6
    torch.testing.assert_close(other(pixels), smoothed(pixels).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("saved", "images")
@pytest.mark.parametrize("precision", [pytest.param(name, marks=needs_openvino) for name in ("fp32", "bf16")])
def test_the_command_certifies_by_openvino(precision: str):
    """A CPU without instructions for bfloat16 cannot: torch runs there."""
    said, _ = certify("--runtime", "openvino", "--precision", precision)
    record = read_record(Path("certificates.json"))
    assert record.precision == precision
    if record.runtime is None:
        assert precision == "bf16" and "on this CPU it has no bf16 and computes in f32; take another precision" in said
    else:
        assert said.startswith(f"note: {record.runtime} votes in {precision}: ")
    assert verdict("--model", "model").startswith("verified: ")
