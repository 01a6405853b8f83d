"""Certificates in int8: their calibration, their records, their audits, and fp32 in its place where it cannot run.

Without the packages, a program of torch with rounded weights stands for the quantized one.
"""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change
from small_networks import noise_conditioned
from test_cli import in_a_folder, saved  # noqa: F401 (fixtures)
from test_runtimes import KINDS, Rounded, has_openvino
from torch import nn

from rrcm.certification import quantization, runtimes
from rrcm.certification.audit import audit_file
from rrcm.certification.certify import certify_split
from rrcm.certification.noise import ESTIMATE, counter_normal
from rrcm.certification.quantization import Calibration, Quantized, quantize, read_calibration
from rrcm.certification.record import read_record
from rrcm.certification.revote import Settings
from rrcm.certification.runtimes import OpenVINOClassifier, in_runtime, precision_of, runtime_entries
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.publication.freeze import publish
from rrcm.utils.describe import Description
from rrcm.utils.errors import RRCMError

has_nncf = has_openvino and importlib.util.find_spec("nncf") is not None
needs_nncf = [pytest.mark.thorough, pytest.mark.skipif(not has_nncf, reason="needs rrcm[int8]")]


def stand_in_for(classifier: nn.Module, noisy: torch.Tensor) -> Quantized:
    """A program whose bytes depend on the calibration."""
    return Quantized(noisy.contiguous().view(torch.uint8).flatten()[:64].clone(), torch.zeros(1, dtype=torch.uint8))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    here = {"openvino": "json", "nncf": "json"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find(here.get(name, name)))
    monkeypatch.setattr(runtimes, "CompiledProgram", Rounded)
    for module in (runtimes, quantization):
        monkeypatch.setattr(module, "version", lambda name: "1.2.3")
    monkeypatch.setattr(quantization, "_quantize", stand_in_for)
    monkeypatch.setattr("rrcm.certification.audit.SAMPLES_HERE", 400)
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "runs"))


def calibration(count: int = 40) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    return Calibration(torch.rand(count, 3, 8, 8, generator=generator), list(range(count)), 0)


def test_the_noise_of_the_calibration_has_its_sigma_and_is_in_no_certificate(tiny_shards: Path):
    read = read_calibration(tiny_shards, 8, seed=3)
    assert read.seed == 3 and read.images.shape[1:] == (1, 8, 8) and read.images.max() <= 1
    half, whole = (read.noisy(sigma) - read.images for sigma in (0.25, 0.5))
    torch.testing.assert_close(2 * half, whole, atol=1e-5, rtol=0)
    assert abs(whole.std() - 0.5) < 0.02 and torch.equal(read.noisy(0.5), read.noisy(0.5))
    rows = torch.tensor([read.indices, read.indices])
    for purpose in range(ESTIMATE + 1):
        noise = counter_normal((1, 8, 8), 3, torch.full_like(rows[0], purpose), rows[0], torch.zeros_like(rows[0]))
        assert abs(np.corrcoef(noise.flatten(), whole.flatten())[0, 1]) < 0.05
    assert not torch.equal(read._replace(seed=4).noisy(0.5), read.noisy(0.5))


def test_a_network_is_quantized_once_for_each_sigma(stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, classifier = [], noise_conditioned().eval()
    described = lambda *given: hashlib.sha256(str(Description().of(given)).encode()).hexdigest()  # noqa: E731
    monkeypatch.setattr(quantization, "fingerprint", described)  # without the code, which takes seconds to read
    monkeypatch.setattr(quantization, "_quantize", lambda *given: made.append(given) or stand_in_for(*given))
    first, again, other = (quantize(classifier, calibration(), sigma) for sigma in (0.5, 0.5, 0.25))
    assert len(made) == 2 and first.sha256 == again.sha256 != other.sha256
    scales = [SmoothedClassifier(classifier, sigma, 5, batch_size=8) for sigma in (0.25, 0.5)]
    changed, _ = in_runtime("openvino", scales, torch.zeros(3, 8, 8), calibration())
    assert runtime_entries(changed)["quantized"]["sha256"] == [other.sha256, first.sha256] and len(made) == 2
    for folder in (tmp_path / "runs").glob("int8-*"):
        (folder / "model.xml").write_bytes(b"damaged")
    assert quantize(classifier, calibration(), 0.5).sha256 == first.sha256 and len(made) == 3
    nn.init.ones_(classifier.head.bias)
    quantize(classifier, calibration(), 0.5)
    assert len(made) == 4


@pytest.mark.usefixtures("stand_in", "in_a_folder")
def test_certificates_in_int8_are_audited_by_the_same_networks(
    saved: nn.Module,  # noqa: F811
    project: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    change(project, certify__precision="int8", certify__max_images=2, certify__n=100)
    with pytest.raises(RRCMError, match=r"certify\.precision int8: is for certify\.runtime openvino; set this too"):
        load_config(project / "params.yaml")
    change(project, certify__runtime="openvino")
    with pytest.raises(RRCMError, match=r"^certify\.precision int8: cannot be published, as `make verify` has no"):
        publish(project, "int8")
    config, classifier = load_config(project / "params.yaml"), NoiseConditionedClassifier(saved.encoder, 10, 1.0)
    nn.init.normal_(classifier.head.weight)
    save_model("other", classifier)
    shards, output = project / "data/shards", Path("one.tsv")
    certify_split(config, 0.5, shards, Path("other"), output, Path("one.timing"))
    assert "note: openvino 1.2.3 votes in int8: " in capsys.readouterr().err
    record = read_record(Path("one.json"))
    calibrated = read_calibration(shards, config.data.image_size, config.seed)
    expected = quantize(classifier.eval(), calibrated, 0.5).sha256
    assert (record.precision, record.quantized.by, record.quantized.sha256) == ("int8", "nncf 1.2.3", [expected])
    audited = audit_file(output, "other", shards)
    assert audited.exact and not audited.problems
    audited = audit_file(output, "other", shards, settings=Settings(batch_size=50))
    assert audited.computation == "in int8, batch 50" and not audited.problems
    with pytest.raises(RRCMError, match=r"^precision = fp32: in int8 another network was certified; leave it out$"):
        audit_file(output, "other", shards, settings=Settings("fp32"))
    monkeypatch.setattr("rrcm.certification.revote.read_calibration", lambda *_: calibrated._replace(seed=1))
    with pytest.raises(RRCMError, match=r"^the networks in int8 have other ranges or weights here than those of nncf"):
        audit_file(output, "other", shards)
    monkeypatch.setattr("rrcm.certification.revote.read_calibration", read_calibration)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RRCMError, match=r"^the certificates are in int8, which does not run here \(.*openvino"):
        audit_file(output, "other", shards)


@pytest.mark.usefixtures("stand_in")
def test_fp32_runs_what_cannot_be_quantized(monkeypatch: pytest.MonkeyPatch):
    def changed(classifier: nn.Module) -> SmoothedClassifier:
        scales = [SmoothedClassifier(classifier, 0.5, 5, batch_size=8)]
        (other,), note = in_runtime("openvino", scales, torch.zeros(3, 8, 8), calibration())
        assert precision_of(other) == "fp32" and "quantized" not in runtime_entries([other])
        return note

    class Wrong(Rounded):
        def __call__(self, noisy: torch.Tensor) -> torch.Tensor:
            return super().__call__(noisy) * (-1 if self.made_from[2] == "int8" else 1)

    monkeypatch.setattr(runtimes, "CompiledProgram", Wrong)
    wrong = " of 40 votes on noisy validation images differ from torch's in fp32; fp32 instead. openvino 1.2.3 votes in"
    assert wrong in changed(noise_conditioned())
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else find(name))
    missing = "precision int8: needs the package nncf: pip install 'rrcm[int8]'; fp32 instead. openvino 1.2.3 votes in"
    assert changed(noise_conditioned()).startswith(missing)


def test_a_program_in_int8_is_described_by_its_ranges(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtimes, "CompiledProgram", Rounded)
    monkeypatch.setattr(runtimes, "version", lambda name: "1")
    programs = [stand_in_for(None, calibration().noisy(sigma)) for sigma in (0.5, 0.5, 0.25)]
    described = [
        str(Description().of(OpenVINOClassifier(noise_conditioned(), (8, 3, 8, 8), "int8", 1, each)))
        for each in programs
    ]
    assert described[0] == described[1] != described[2]


@pytest.mark.parametrize("kind", [pytest.param(name, marks=needs_nncf) for name in KINDS if name != "exported"])
def test_nncf_quantizes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ranges do not depend on when they are measured, nor votes on the rest of a batch. Exported programs stay in fp32,
    as torch does not export them again for batches of any size."""
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path))
    smoothed = SmoothedClassifier(KINDS[kind](), 0.5, 5, batch_size=64)
    (other,), note = in_runtime("openvino", [smoothed], torch.zeros(3, 8, 8), calibration())
    assert precision_of(other) == "int8", note
    made_again = quantization._quantize(smoothed.model, calibration().noisy(0.5))
    assert runtime_entries([other])["quantized"]["sha256"] == [made_again.sha256]
    pixels = calibration(3).images
    votes, alone = other.count_samples(pixels, range(3), 0, 200), other.count_samples(pixels[:1], [0], 0, 200)
    assert (votes[0] == alone[0]).all()
    assert abs(votes - smoothed.count_samples(pixels, range(3), 0, 200)).sum() <= 60
