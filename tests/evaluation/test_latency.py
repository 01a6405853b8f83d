"""Latency: passes are compared with counted calls, and times with a clock that the network advances."""

from pathlib import Path

import pytest
import torch
from conftest import change
from torch import nn

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.evaluation import latency
from rrcm.evaluation.latency import (
    count_passes,
    fastest_batch,
    measure_latency,
    networks,
    new_cascade_record,
    seconds_to_vote,
    time_cascade,
)
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.denoised import DDS, DensePure, DiffSmooth, write_denoised
from rrcm.models.denoiser import Denoiser, EDMDenoiser, PixelViT, save_denoiser
from rrcm.models.ensembles import Ensemble
from rrcm.models.folders import part_of
from rrcm.models.vit import NoiseConditionedViT, parameter_count
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

K, SIGMA = 3, 0.5
IMAGES = torch.full((4, 1, 8, 8), 0.5)


class CountingDenoiser(Denoiser):
    image_size, channels = 8, 1

    def __init__(self):
        super().__init__()
        self.gain, self.seen = nn.Parameter(torch.ones(2)), 0

    def forward(self, noisy, t):
        self.seen += len(noisy)
        return noisy * self.gain[0]


class CountingClassifier(BaseClassifier):
    """Random linear logits. Each batch advances the clock by `cost` seconds per row plus `overhead` seconds."""

    num_classes, keeps_float32_input = K, True

    def __init__(self, seed: int = 0, clock: list[float] | None = None, cost: float = 0.0, overhead: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, K, generator=torch.Generator().manual_seed(seed)))
        self.seen, self.clock, self.cost, self.overhead = 0, clock, cost, overhead

    def forward(self, noisy, draw=None):
        self.seen += len(noisy)
        if self.clock is not None:
            self.clock[0] += self.cost * len(noisy) + self.overhead
        return noisy.flatten(1) @ self.weight


def parts() -> tuple:
    return CountingDenoiser(), CountingClassifier(), SIGMA, 8


def seen(smoothed: SmoothedClassifier) -> dict[str, int]:
    """The rows that the networks of each kind have counted themselves."""
    return {kind: sum(each.seen for each in same) for kind, same in networks(smoothed.model).items()}


CLASSIFIERS = {  # with the passes of a denoiser and of a classifier per sample
    "rrcm": (CountingClassifier, 0, 1),
    "dds": (lambda: DDS(*parts()), 1, 1),
    "densepure": (lambda: DensePure(*parts(), runs=3, steps=2), 3 * 2, 3),
    "diffsmooth": (lambda: DiffSmooth(*parts(), num_noise=5, local_sigma=0.25), 1, 5),
    "ensemble": (lambda: Ensemble([CountingClassifier(seed) for seed in range(4)]), 0, 4),
    "ensemble of dds": (lambda: Ensemble([DDS(*parts()), DDS(*parts()), CountingClassifier()]), 2, 3),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_passes_agree_with_the_formulas_and_with_counting_networks(name):
    build, denoiser, classifier = CLASSIFIERS[name]
    smoothed = SmoothedClassifier(build(), SIGMA, K, batch_size=8)
    smoothed.count_votes(latency._requests(IMAGES, 8))  # checks the model with samples of its own
    before, expected = seen(smoothed), {"denoiser": denoiser, "classifier": classifier}
    assert count_passes(smoothed, IMAGES, 16) == expected
    assert {kind: (count - before[kind]) / 16 for kind, count in seen(smoothed).items()} == expected
    every = [network for each in networks(smoothed.model).values() for network in each]
    assert sum(map(parameter_count, every)) == parameter_count(smoothed.model)


@pytest.mark.slow
@pytest.mark.parametrize("n", [500, 2_500, 12_500])
def test_time_to_certify_is_proportional_to_the_samples(monkeypatch, n):
    """The fixed procedure takes n0 + n times the time of a sample in a full batch, since it draws no other samples."""
    clock = [0.0]
    monkeypatch.setattr(latency, "perf_counter", lambda: clock[0])
    model = CountingClassifier(clock=clock, cost=1e-4, overhead=2e-3)
    smoothed = SmoothedClassifier(model, SIGMA, K, batch_size=50)
    smoothed.count_votes(latency._requests(IMAGES, 1))
    per_sample = seconds_to_vote(smoothed, IMAGES, 100) / 100
    assert per_sample == pytest.approx(1e-4 + 2e-3 / 50)
    start = clock[0]
    smoothed.certify(IMAGES, stopping="fixed", n0=100, n=n)
    assert (clock[0] - start) / len(IMAGES) == pytest.approx((100 + n) * per_sample)


def test_a_cascade_is_timed_at_each_sigma_and_when_it_predicts(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(latency, "perf_counter", lambda: clock[0])
    models = [CountingClassifier(clock=clock, cost=cost) for cost in (1e-4, 3e-4)]
    cascade = CascadedClassifier(models, [0.25, 0.5], [-9.0], K, batch_size=50)  # sigma 0.5 always accepts
    for scale in cascade.scales:
        scale.count_votes(latency._requests(IMAGES, 1))
    record = new_cascade_record(cascade)
    for _ in range(2):
        time_cascade(cascade, cascade.scales[0], 100, IMAGES, record)
    assert record["seconds_per_sample"] == {
        "sigma_0.25": pytest.approx([1e-4, 1e-4]),
        "sigma_0.5": pytest.approx([3e-4, 3e-4]),
    }
    fewest = 200 * 3e-4  # the selection and the first look of the largest sigma, if it suffices
    assert min(record["predict_seconds"]) >= fewest * (1 - 1e-9)
    assert record["single_predict_seconds"] == pytest.approx([1000 * 1e-4] * 2)


def test_a_slow_start_does_not_decide_the_batch_size(monkeypatch):
    """All sizes are equally fast, but the machine is slow for the first three measurements."""
    calls = []

    def seconds(smoothed, images, samples):
        calls.append(samples)
        return samples * (10.0 if len(calls) <= 3 else 1.0)

    monkeypatch.setattr(latency, "seconds_to_vote", seconds)
    model = CountingClassifier()
    largest = SmoothedClassifier(model, SIGMA, K).find_batch_size(IMAGES[0])
    assert fastest_batch(SmoothedClassifier(model, SIGMA, K), IMAGES) == (largest, 1.0)


def test_the_fastest_batch_size_is_found(monkeypatch):
    """One network is slow with large batches, and the other with small ones."""
    clock = [0.0]
    monkeypatch.setattr(latency, "perf_counter", lambda: clock[0])

    class Crowded(CountingClassifier):
        def forward(self, noisy, draw=None):
            self.clock[0] += 1e-6 * len(noisy) ** 2
            return super().forward(noisy)

    for model, wanted in (
        (Crowded(clock=clock, cost=1e-4, overhead=2e-2), 128),  # 1e-6 size + 2e-2 / size is smallest there
        (CountingClassifier(clock=clock, cost=1e-4, overhead=2e-2), 1024),
    ):
        size, rate = fastest_batch(SmoothedClassifier(model, SIGMA, K), IMAGES)
        assert size == wanted
        assert 1 / rate == pytest.approx(1e-4 + 2e-2 / size + 1e-6 * size * isinstance(model, Crowded))


@pytest.fixture
def models(project) -> Path:
    """Random weights for gaussian and dds at sigma 0.5, in a project of these two methods."""
    change(project, methods=["gaussian", "dds"], sigmas=[0.5], pretrain__objectives=[], latency__rounds=3)
    change(project, latency__seconds=0.001, certify__precision="fp32")
    torch.manual_seed(0)
    folder = project / "models"
    trunks = [NoiseConditionedViT(8, 1, 4, embed_dim=16, depth=1, num_heads=2) for _ in range(2)]
    names = [str(number) for number in range(10)]
    save_model(folder / "gaussian/sigma_0.5", NoiseConditionedClassifier(trunks[0], 10, t=1.0), class_names=names)
    save_denoiser(folder / "denoiser", EDMDenoiser(PixelViT(trunks[1])))
    paths = {"denoiser": "../../denoiser", "classifier": "../../gaussian/sigma_0.5"}
    dds = folder / "dds/sigma_0.5"
    dds.mkdir(parents=True)
    hashed = {name: part_of(dds, path) for name, path in paths.items()}
    write_denoised(dds, "dds", hashed, names, sigma=0.5, settings={})
    return folder


def test_methods_are_timed_alternately(project, models, monkeypatch):
    order, real = [], latency.seconds_to_vote

    def logged(smoothed, images, samples):
        order.append((type(smoothed.model), samples))
        return real(smoothed, images, samples)

    monkeypatch.setattr(latency, "seconds_to_vote", logged)
    config = load_config(project / "params.yaml")
    measure_latency(config, project / "data/shards", models, project / "timings/latency.json")
    record = read_json(project / "timings/latency.json")
    gaussian, dds = record["methods"]["gaussian"], record["methods"]["dds"]
    assert order[-6:] == 3 * [(NoiseConditionedClassifier, gaussian["samples"]), (DDS, dds["samples"])]
    assert (record["device"], record["dtype"], record["sigma"]) == ("cpu", "fp32", 0.5)
    assert "hardware" in record["environment"]
    assert gaussian["passes"] == {"denoiser": 0, "classifier": 1} and dds["passes"] == {"denoiser": 1, "classifier": 1}
    assert gaussian["parameters"]["classifier"] == dds["parameters"]["classifier"] > 0
    assert (gaussian["parameters"]["denoiser"], dds["parameters"]["denoiser"] > 0) == (0, True)
    for each in (gaussian, dds):
        assert len(each["seconds_per_sample"]) == 3 and min(each["seconds_per_sample"]) > 0
        assert each["samples"] % each["batch_size"] == 0 and each["samples"] >= each["batch_size"]


def test_a_missing_model_is_named(project):
    with pytest.raises(RRCMError, match=r"models/rrcm/sigma_0\.25"):
        config = load_config(project / "params.yaml")
        measure_latency(config, project / "data/shards", project / "models", project / "timings/latency.json")
