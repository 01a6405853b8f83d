"""`--estimate`: the samples of played certifications, the words for times, and that nothing is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of
from test_cli import images, in_a_folder, saved  # noqa: F401 (fixtures)
from torch import nn
from typer.testing import CliRunner, Result

from rrcm import CascadedClassifier, SmoothedClassifier
from rrcm.certification.cascade_rules import make_cascade_rule
from rrcm.certification.estimate import Estimate, _play, time_text
from rrcm.certification.rules import make_stopping_rule
from rrcm.cli import app

SETTINGS = {"n0": 50, "n": 2000, "alpha": 0.001, "radius_step": 0.1, "bound": "binary"}


class Certain(nn.Module):
    """Gives every image class 1 of 3."""

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(noisy), 3)


def test_a_played_certification_draws_the_samples_of_a_real_one():
    """Where the votes are certain, both are the same; 10^9 votes leave the shares no doubt."""
    rng, votes = np.random.default_rng(0), np.array([0, 10**9, 0])
    image = torch.full((1, 1, 4, 4), 0.5)
    (certificate,) = SmoothedClassifier(Certain(), 0.5, 3, batch_size=64).certify(image, **SETTINGS)
    assert _play(make_stopping_rule("sequential", 0.5, **SETTINGS), [votes], rng) == certificate.samples
    cascade = CascadedClassifier(Certain(), (0.25, 0.5), (0.0,), 3, batch_size=64)
    (certificate,) = cascade.certify(image, **SETTINGS)
    rule = make_cascade_rule("sequential", (0.25, 0.5), (0.0,), **SETTINGS)
    assert _play(rule, [votes, votes], rng) == certificate.samples
    assert _play(1000, [votes], rng) == 1000
    tie = _play(make_stopping_rule("sequential", 0.5, **SETTINGS), [np.array([10**9, 10**9, 0])], rng)
    assert 50 < tie < 2050  # the radius 0 is out of reach before all samples are drawn


def estimated(*arguments: str) -> Result:
    before = files_of(Path())
    options = ["--model", "model", "--batch-size", "64", "--n", "200", "--estimate"]
    answer = CliRunner().invoke(app, [*arguments, *options])
    assert files_of(Path()) == before
    return answer


@pytest.mark.usefixtures("images", "saved")
def test_the_command_prints_two_lines_and_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rrcm.certification.estimate.SECONDS", 0.0)
    answer = estimated("certify", "images", "--n0", "20")
    first, second = answer.stdout.splitlines()
    assert answer.exit_code == 0 and first.startswith("about ") and " for 4 images, at most " in first
    assert second.endswith("samples per image, judging from 4 of them, and at most 220")
    answer = estimated("predict", "images", "--limit", "2")
    assert answer.exit_code == 0 and answer.stdout.splitlines()[0].endswith(" s for 2 images")
    assert answer.stdout.splitlines()[1].endswith("samples/s; 200 per image")


def test_times_in_words():
    times = {
        0.2: "1 s",
        59.2: "59 s",
        61: "1 min 1 s",
        120: "2 min",
        700: "12 min",
        5400: "1 h 30 min",
        90_000: "1 d 1 h",
    }
    assert {seconds: time_text(seconds) for seconds in times} == times


def test_the_time_to_start_counts_once():
    expected = Estimate(images=10, tried=5, speed=100.0, reading=1.0, samples=200.0, most_samples=500, start=9.0)
    assert str(expected).startswith("about 30 s for 10 images, at most 1 min\n")
    assert str(expected._replace(start=0.0)).startswith("about 21 s for 10 images, at most 51 s\n")
