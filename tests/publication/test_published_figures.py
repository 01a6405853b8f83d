"""The figures of a run are compared with the published ones of the same settings."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import change, write_certificates
from scipy.stats import norm

from rrcm.certification.results import read_certificates
from rrcm.config import load_config
from rrcm.evaluation.metrics import NORMAL_95, accuracy_difference, acr_difference
from rrcm.publication.compare import compare_with_published, find_differences
from rrcm.utils.errors import RRCMError

NAME = "certificates/rrcm/sigma_0.5.tsv"


def test_the_published_run_equals_itself(honest):
    message = "Every certificate equals the one in results/tiny/seed_0, published with the same settings."
    assert compare_with_published(honest) == message


@pytest.mark.parametrize("settings", [{"device": "cpu"}, {"report__radii": [0.0]}, {"data__workers": 3}])
def test_settings_without_effect_on_certificates_may_differ(repository, settings):
    change(repository, **settings)
    assert compare_with_published(repository).startswith("Every certificate equals the one in results/tiny/seed_0")


@pytest.mark.parametrize("settings", [{"seed": 1}, {"certify__n": 2000}, {"finetune__epochs": 7}])
def test_runs_with_other_settings_are_not_compared(repository, settings):
    change(repository, **settings)
    assert compare_with_published(repository) is None


def test_differences_are_listed_with_their_intervals(repository):
    frame = read_certificates(repository / NAME)
    lower = frame["radius"].where(frame.index != frame["radius"].idxmax(), 0.01)
    write_certificates(repository / NAME, frame.assign(radius=lower))
    text = compare_with_published(repository)
    assert "figures differ from results/tiny/seed_0, published with the same settings; none significantly" in text
    assert all(line.endswith(": not significant") for line in text.splitlines()[1:])
    write_certificates(repository / NAME, frame.assign(radius=1.0, correct=1, predict=frame["label"]))
    text = compare_with_published(repository)
    first = text.splitlines()[1]
    assert first.startswith("  rRCM, accuracy (%) at r = 0: 100.0, published ") and first.endswith(": significant")


def test_the_intervals_share_the_level_by_bonferroni(repository):
    """Each interval is the paired interval of metrics.py, widened for the number of figures."""
    config = load_config(repository / "params.yaml")
    published = {("rrcm", 0.5): read_certificates(repository / NAME)}
    draw = np.random.default_rng(0).random(len(published["rrcm", 0.5])) < 0.5
    here = {key: frame.assign(radius=np.where(draw, 0.0, frame["radius"])) for key, frame in published.items()}
    differences, count = find_differences(config, here, published)
    assert count == len(config.report.radii) + 1 and 0 < len(differences) <= count
    frames = here["rrcm", 0.5], published["rrcm", 0.5]
    for each in differences:
        radius = each.figure.rpartition(" r = ")[2]
        narrow = acr_difference(*frames) if "ACR" in each.figure else accuracy_difference(*frames, float(radius))
        scale = 1 if "ACR" in each.figure else 100
        assert each.here - each.published == pytest.approx(scale * narrow.value)
        wide, half = each.interval.high - each.interval.low, scale * (narrow.high - narrow.low)
        assert wide / half == pytest.approx(norm.isf(0.025 / count) / NORMAL_95)


def test_a_comparison_imports_no_torch(honest):
    code = (
        "import sys; from pathlib import Path; from rrcm.publication.compare import compare_with_published;"
        "print(compare_with_published(Path())); sys.exit('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=honest, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.startswith("Every certificate"), answer.stderr


def test_a_run_of_other_images_is_refused(honest):
    config = load_config(honest / "params.yaml")
    frame = read_certificates(honest / NAME)
    moved = pd.DataFrame(frame.assign(idx=frame["idx"] + 1))
    with pytest.raises(RRCMError, match=r"rrcm/0\.5: certifies other images than the published run"):
        find_differences(config, {("rrcm", 0.5): moved}, {("rrcm", 0.5): frame})
