"""What no stopping rule can have ended with is found, and everything that the engine ends with is possible."""

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rrcm.certification.outcomes import find_impossible
from rrcm.certification.rules import make_stopping_rule
from rrcm.certification.smoothing import ImageState, SampleRequest, SmoothedClassifier
from rrcm.certification.stopping import StoppingRule
from rrcm.certification.votes import certificate_frame


class DrawnVotes(SmoothedClassifier):
    """Votes of every image are multinomial with its own probabilities."""

    def __init__(self, num_classes: int, images: int):
        super().__init__(nn.Identity(), 0.5, num_classes, batch_size=64)
        self.rng = np.random.default_rng(0)
        alphas = np.exp(self.rng.uniform(-5, 2, images))
        self.chances = np.array([self.rng.dirichlet([alpha] * num_classes) for alpha in alphas])
        self.chances[: images // 5] = np.eye(num_classes)[0]  # these reach the whole grid

    def count_votes(self, requests: Sequence[SampleRequest]) -> np.ndarray:
        return np.array([self.rng.multinomial(each.stop - each.start, self.chances[each.index]) for each in requests])


@functools.cache
def rule_of(stopping: str) -> StoppingRule:
    return make_stopping_rule(stopping, 0.5, n0=100, n=1000, alpha=0.001, radius_step=0.01)


@functools.cache
def outcomes_of(stopping: str) -> pd.DataFrame:
    return outcomes(rule_of(stopping), 10)


def outcomes(rule: StoppingRule, num_classes: int, images: int = 200) -> pd.DataFrame:
    """The engine's output for this many images, most of which have the class that gets most of their votes."""
    smoothed = DrawnVotes(num_classes, images)
    labels = np.where(np.arange(images) % 4 == 3, 1, smoothed.chances.argmax(1)).tolist()
    states = [ImageState(index, torch.zeros(1, 2, 2), label) for index, label in enumerate(labels)]
    for _ in smoothed.certify_stream(states, rule):
        pass
    return certificate_frame(states, rule, num_classes)


SETTINGS = [
    {"stopping": stopping, "bound": bound, **other}
    for stopping in ("sequential", "fixed")
    for bound in ("binary", "margin")
    for other in (
        {"n0": 100, "n": 1000, "alpha": 0.001, "radius_step": 0.01},
        {"n0": 7, "n": 95, "alpha": 0.1, "radius_step": 0.3},
        {"n0": 10, "n": 20_000, "alpha": 1e-6, "radius_step": 0.25},
    )
]


@pytest.mark.thorough
@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: "-".join(map(str, each.values())))
def test_every_outcome_of_the_engine_is_possible(settings: dict, num_classes: int):
    rule = make_stopping_rule(sigma=0.5, **settings)
    frame = outcomes(rule, num_classes)
    assert frame["stop_reason"].nunique() == (1 if settings["stopping"] == "fixed" else 4 if rule.n0 > 7 else 3)
    assert find_impossible(frame, rule, num_classes) is None


def row(frame: pd.DataFrame, reason: str, **changes: object) -> pd.DataFrame:
    """`frame` with other values in the first row that stopped for `reason`."""
    frame = frame.copy()
    place = frame.index[(frame["stop_reason"] == reason) & (frame["binary_predict"] != -1)][0]
    for name, value in changes.items():
        frame[name] = frame[name].astype(object if isinstance(value, str) else type(value))
        frame.loc[place, name] = value
    return frame


SEQUENTIAL = {  # the stop reason of the image that is changed, its other values, what is said
    "more than all samples": (
        "all samples",
        {"samples": 1101, "binary_samples": 1101},
        "samples 1101: must be n0 = 100",
    ),
    "between looks": ("all samples", {"samples": 350, "binary_samples": 350}, "samples 350: must be n0"),
    "stopped before the end": ("all samples", {"samples": 348, "binary_samples": 348}, "does not fit samples 348"),
    "binary alone": ("all samples", {"binary_samples": 348}, "must be equal"),
    "futile at the end": ("all samples", {"stop_reason": "futile"}, "'futile' does not fit samples 1100"),
    "a wrong class later": ("wrong class", {"samples": 348, "binary_samples": 348}, "after a wrong class: must be n0"),
    "a certified wrong class": ("wrong class", {"margin_radius": 0.5}, "of a wrong class: must be 0"),
    "a wrong class that is right": ("all samples", {"stop_reason": "wrong class"}, "after a wrong class"),
    "a class that is not there": ("wrong class", {"binary_predict": 10, "margin_predict": 10}, "there are 10 classes"),
    "two classes": ("all samples", {"margin_predict": 7}, "must be one class, or -1"),
    "off the grid": ("all samples", {"binary_radius": 0.105}, "binary_radius 0.105: is no radius of the grid up to"),
    "a margin off the grid": ("all samples", {"margin_radius": 0.3100001}, "margin_radius 0.3100001: is no radius"),
    "above the grid": ("all samples", {"margin_radius": 8.0}, "margin_radius 8.0: is no radius of the grid up to 1.23"),
    "not the whole grid": ("whole grid", {"binary_radius": 0.1}, "binary_radius 0.1 does not fit stop_reason"),
    "the whole grid unsaid": ("all samples", {"binary_radius": 1.23}, "does not fit stop_reason 'all samples'"),
}


@pytest.mark.parametrize("change", SEQUENTIAL)
def test_an_impossible_outcome_is_described(change: str):
    reason, values, said = SEQUENTIAL[change]
    problem = find_impossible(row(outcomes_of("sequential"), reason, **values), rule_of("sequential"), 10)
    assert problem.startswith("image ") and said in problem and "\n" not in problem


def test_a_radius_needs_its_samples():
    """A hundred votes of 100 cannot certify what needs a thousand."""
    frame = outcomes_of("sequential").copy()
    early = frame["stop_reason"] == "futile"
    frame.loc[early, ["samples", "binary_samples"]] = 200
    frame.loc[early, ["binary_predict", "margin_predict"]] = frame["label"]
    frame.loc[early, "binary_radius"] = 1.1
    assert "binary_radius 1.1: is more than binary_samples 200 can certify" in find_impossible(
        frame, rule_of("sequential"), 10
    )


FIXED = {
    "another n": ({"samples": 1000, "binary_samples": 1000}, "samples 1000: must be n0 = 100 and 1000"),
    "stopped early": ({"stop_reason": "futile"}, "'futile' does not fit samples 1100"),
    "no count": ({"binary_radius": 0.5}, "binary_radius 0.5: no count has it"),
    "too large": ({"margin_radius": 1.3}, "margin_radius 1.3: is more than n = 1000 votes can certify"),
}


@pytest.mark.parametrize("change", FIXED)
def test_a_fixed_sample_has_one_end(change: str):
    values, said = FIXED[change]
    assert said in find_impossible(row(outcomes_of("fixed"), "all samples", **values), rule_of("fixed"), 10)
