"""An image on its way from votes to a certificate: the counts, the decisions at each look, and the certificate.

Everything here follows from counts of votes. So `recompute` (votes.py) derives the certificates of a file again from
the votes in the file, without the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rrcm.certification.margin import BINARY, MarginRule
from rrcm.certification.stopping import ABSTAIN, WRONG_CLASS, StoppingRule

if TYPE_CHECKING:
    import torch  # slow to import; counts do without it

Votes = dict[str, int]  # samples by the class that they chose; keys of JSON are text


@dataclass(frozen=True)
class Certificate:
    """The smoothed classifier predicts `prediction` everywhere within the L2 `radius` (pixel units) of the image.

    `prediction` is a class or ABSTAIN. `samples` is the number of noisy samples, including those that chose the class.
    `stop_reason` is a constant of stopping.py. After "wrong class" nothing is certified: `prediction` is the chosen
    class and the radius is 0.

    The same samples give a radius by each bound, None where the bound certifies nothing. `radius` is the one by the
    bound that was asked for. Each radius is wrong with probability at most alpha; this does not hold for both together.

    >>> brightest_pixel = rrcm.SmoothedClassifier(torch.nn.Flatten(), sigma=0.5, num_classes=4)
    >>> [certificate] = brightest_pixel.certify(torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]]), n=1000)
    >>> certificate.prediction, certificate.radius
    (1, 0.25)
    """

    prediction: int
    radius: float
    samples: int
    stop_reason: str
    binary_radius: float | None = None
    binary_samples: int = 0  # samples after which the binary bound alone would have stopped
    margin_radius: float | None = None


@dataclass
class ImageState:
    """An image on its way to a certificate. All fields except `image` are JSON-able, so a journal is a checkpoint."""

    index: int  # selects the noise
    image: torch.Tensor = field(repr=False)  # (C, H, W) float32 in [0, 1]
    label: int | None = None  # if known, a rule that stops early stops when another class is chosen
    selection: Votes = field(default_factory=dict)  # the n0 selection samples by class
    top_class: int = -1  # the chosen class
    test: str = ""  # of the margin bound, chosen by the selection samples
    num_drawn: int = 0  # samples of the current purpose: selection, then estimation
    counts: Votes = field(default_factory=dict)  # the estimation samples by class
    look: int = 0  # the next look
    num_certified: int = 0  # radii of the grid, by the binary bound until it stops
    binary_reason: str = ""  # why the binary bound stops
    binary_samples: int = 0  # samples after which it stopped
    margin_certified: int = 0  # radii of the grid, by the margin bound
    votes: dict[str, Votes] = field(default_factory=dict)  # the counts at each look that decided something, by samples
    samples: int = 0  # of both purposes
    stop_reason: str = ""
    seconds: float = 0.0  # share of the computing time; not part of the result


def choose_class(state: ImageState, rule: StoppingRule) -> None:
    """Choose the class and the test of the margin bound from the selection samples. Stop if the class is wrong."""
    state.top_class = min((-count, int(k)) for k, count in state.selection.items())[1]
    state.test = MarginRule(rule).choose_test({int(k): n for k, n in state.selection.items()}, state.top_class)
    state.num_drawn = 0
    if rule.stops_early and state.label not in (None, state.top_class):
        state.stop_reason = WRONG_CLASS


def decide(state: ImageState, rule: StoppingRule, num_classes: int) -> None:
    """Decide after a look what both bounds certify, and whether to stop.

    The binary bound stops by its own rule, so its certificates do not depend on the bound that is asked for. The margin
    bound uses all samples. If it is the one asked for, sampling continues until both bounds have stopped.

    The votes of a look are kept if it decides anything, that is, if one of the bounds certifies more or stops. The
    other looks change nothing, so the kept votes lead to the same certificate.
    """
    before = state.num_certified, state.margin_certified, state.binary_reason, state.stop_reason
    margin, (top, others) = MarginRule(rule), _top_and_others(state, num_classes)
    if not state.binary_reason:
        state.num_certified, state.binary_reason = rule.decide(state.look, top, state.num_certified)
        state.binary_samples = state.samples
    if state.test == BINARY:
        state.margin_certified, state.stop_reason = state.num_certified, state.binary_reason
    else:
        at_look = state.test, state.look, top, others
        state.margin_certified = int(margin.certify(*at_look, state.margin_certified))
        if rule.bound == "binary":
            state.stop_reason = state.binary_reason
        elif state.binary_reason:
            state.stop_reason = str(margin.reason_to_stop(*at_look, state.margin_certified))
    if (state.num_certified, state.margin_certified, state.binary_reason, state.stop_reason) != before:
        state.votes[str(state.num_drawn)] = dict(state.counts)
    state.look += 1


def replay(
    selection: Votes, votes: Mapping[str, Votes], label: int | None, rule: StoppingRule, num_classes: int
) -> ImageState:
    """The state that follows from the votes of the selection and of the kept looks.

    The image, its index and the seconds remain unknown. Raises ValueError for votes that no sampling leads to.
    """
    _check_votes("the selection", selection, rule.n0, num_classes)
    state = ImageState(-1, None, label, dict(selection), samples=rule.n0)
    choose_class(state, rule)
    for text, counts in votes.items():
        drawn = int(text)
        if drawn not in rule.looks or drawn <= state.num_drawn:
            raise ValueError(f"votes at {drawn}: must be at looks of the stopping rule, in order")
        if state.stop_reason:
            raise ValueError(f"votes at {drawn}: sampling has stopped before ({state.stop_reason})")
        _check_votes(f"{drawn} samples", counts, drawn, num_classes)
        if any(counts.get(k, 0) < count for k, count in state.counts.items()):
            raise ValueError(f"votes at {drawn}: a class has fewer than at an earlier look")
        state.counts, state.num_drawn, state.samples = dict(counts), drawn, rule.n0 + drawn
        state.look = rule.looks.index(drawn)
        decide(state, rule, num_classes)
        if text not in state.votes:
            raise ValueError(f"votes at {drawn}: decide nothing")
    if not state.stop_reason:
        raise ValueError(f"votes end at {state.num_drawn} samples, before the stopping rule stops")
    return state


def certificate(state: ImageState, rule: StoppingRule, num_classes: int) -> Certificate:
    """The certificate of an image whose sampling has stopped."""
    if state.stop_reason == WRONG_CLASS:
        return Certificate(state.top_class, 0.0, state.samples, WRONG_CLASS, binary_samples=state.samples)
    margin = MarginRule(rule)
    top, others = _top_and_others(state, num_classes)
    radii = {
        "binary": rule.radius(top, state.num_certified),
        "margin": margin.radius(state.test, top, others, state.margin_certified),
    }
    radius = radii[rule.bound]
    return Certificate(
        ABSTAIN if radius is None else state.top_class,
        0.0 if radius is None else radius,
        state.samples,
        state.stop_reason,
        radii["binary"],
        state.binary_samples,
        radii["margin"],
    )


def _top_and_others(state: ImageState, num_classes: int) -> tuple[int, np.ndarray]:
    """The votes for the chosen class, and the different numbers of votes of the other classes: (C,) int64."""
    others = {count for k, count in state.counts.items() if int(k) != state.top_class}
    unseen = num_classes - len(state.counts.keys() | {str(state.top_class)})
    return state.counts.get(str(state.top_class), 0), np.array(sorted(others | ({0} if unseen else set())))


def _check_votes(name: str, votes: Votes, total: int, num_classes: int) -> None:
    """Raises ValueError unless the votes are for existing classes and add up to the number of samples."""
    if votes and max(map(int, votes)) >= num_classes:
        raise ValueError(f"votes of {name} are for class {max(map(int, votes))}: there are {num_classes} classes")
    if sum(votes.values()) != total:
        raise ValueError(f"{sum(votes.values())} votes of {name}: must be {total}")
