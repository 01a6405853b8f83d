"""The cascade as a classifier: certificates against votes counted again, and one answer for any batches and kills."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import beta
from test_margin import Wedges
from torch import nn

import rrcm
from rrcm.certification import cascade
from rrcm.certification.cascade import CascadedClassifier, scaled_quantiles, soften
from rrcm.certification.cascade_radii import cascade_answer
from rrcm.certification.cascade_rules import (
    ABOVE,
    BELOW,
    CERTIFICATES,
    MULTI_SCALE,
    make_cascade_rule,
)
from rrcm.certification.cascade_states import cascade_certificate, is_possible_cascade_state, replay
from rrcm.certification.journal import append_states, open_journal, restore_states
from rrcm.certification.margin import BINARY, PAIR, TWO_BOUNDS
from rrcm.certification.noise import ESTIMATE, SELECT
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.certification.stopping import ABSTAIN, ALL_SAMPLES, FUTILE, WHOLE_GRID, WRONG_CLASS
from rrcm.utils.errors import RRCMError

SIGMAS, CLASSES = (0.1, 0.25, 0.5), 4
IMAGES = torch.rand(16, 1, 2, 2, generator=torch.Generator().manual_seed(5))
SETTINGS = {"n0": 50, "n": 500, "alpha": 0.01, "radius_step": 0.03}
THRESHOLDS = [(0.0, 0.0), (-0.1, -0.15), (0.2, 0.05)]


class Turned(Wedges):
    """Sectors of the plane that begin at another angle, so that sigmas disagree. Some of them may say "pass"."""

    def __init__(self, classes: int, turn: float = 0.0, passes: bool = False):
        super().__init__(classes)
        self.turn, self.passes = turn, passes

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        angle = torch.atan2(noisy[:, 0, 0, 0] - 0.5, noisy[:, 0, 0, 1] - 0.5) / (2 * math.pi) + 0.5 + self.turn
        sector = (angle % 1 * 4 * self.classes).long().clamp(0, 4 * self.classes - 1)
        voted = torch.where(sector % 4 == 3, self.classes, sector // 4) if self.passes else sector // 4
        return nn.functional.one_hot(voted, self.classes + self.passes).float()


def make(thresholds: Sequence[float] = (0.0, 0.0), passes: bool = False, **options: object) -> CascadedClassifier:
    models = [Turned(CLASSES, turn, passes and turn > 0) for turn in (0.0, 0.03, 0.06)]
    return CascadedClassifier(models, SIGMAS, thresholds, CLASSES, can_pass=passes, **{"batch_size": 250} | options)


def logits_net(seed: int, outputs: int = CLASSES) -> nn.Module:
    """A smooth network, for gradients."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs))


# Certificates


@pytest.mark.parametrize("stopping", ["sequential", "fixed"])
def test_a_cascade_of_one_sigma_is_the_smoothed_classifier(stopping: str):
    one = CascadedClassifier(Wedges(CLASSES), [0.25], [], CLASSES, batch_size=250)
    alone = SmoothedClassifier(Wedges(CLASSES), 0.25, CLASSES, batch_size=250)
    labels = [0, 1] * 8
    for options in ({}, {"labels": labels}):
        pair = (each.certify(IMAGES, stopping=stopping, **options, **SETTINGS) for each in (one, alone))
        for mine, theirs in zip(*pair, strict=True):
            assert (mine.prediction, mine.radius, mine.samples, mine.stop_reason) == (
                theirs.prediction,
                theirs.radius,
                theirs.samples,
                theirs.stop_reason,
            )


def exact_radius(claim: str, sigma: float, threshold: float, votes: list[int], c: int, m: int, alpha: float) -> float:
    """What a claim says, from its definition, with scipy's beta distribution."""

    def lower(k: int, n: int, a: float) -> float:
        return float(beta.ppf(a, k, n - k + 1)) if k else 0.0

    radii = []
    for other, count in enumerate(votes[:CLASSES]):
        if other == c:
            continue
        if claim == ABOVE:
            radii.append(sigma * ndtri(lower(votes[c], m, alpha)) - threshold)
        elif claim == BELOW:
            radii.append(threshold - sigma * ndtri(1 - lower(m - count, m, alpha)))
        elif claim == BINARY:
            radii.append(sigma * ndtri(lower(votes[c], m, alpha)))
        elif claim == TWO_BOUNDS:
            p_a = lower(votes[c], m, alpha / 2)
            p_c = min(1 - lower(m - count, m, alpha / 2), 1 - p_a)
            radii.append(sigma / 2 * (ndtri(p_a) - ndtri(p_c)) if p_a > 0 else -math.inf)
        else:
            assert claim == PAIR
            s, q = lower(votes[c] + count, m, alpha / 10), lower(votes[c], votes[c] + count, 0.9 * alpha)
            radii.append(sigma / 2 * (ndtri(s * q) - ndtri(s * (1 - q))) if q > 0 else -math.inf)
    return min(radii)


def check_path(path: Sequence[tuple[float, str]], thresholds: Sequence[float]) -> None:
    """A path accepts at one sigma and keeps other classes out at each larger one."""
    first = SIGMAS.index(path[0][0])
    at_first = [claim for sigma, claim in path if sigma == path[0][0]]
    threshold = -math.inf if first == 0 else thresholds[first - 1]
    if threshold >= 0:
        assert at_first == [ABOVE]
    else:
        assert at_first in [[BINARY], [ABOVE, TWO_BOUNDS], [ABOVE, PAIR], [TWO_BOUNDS], [PAIR]]
        assert (len(at_first) == 2) == (first > 0 and at_first != [BINARY])
    others = [(sigma, claim) for sigma, claim in path if sigma != path[0][0]]
    assert [sigma for sigma, _ in others] == list(SIGMAS[first + 1 :])
    assert all(claim in (BELOW, BINARY, TWO_BOUNDS, PAIR) for _, claim in others)


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_fixed_certificates_agree_with_votes_counted_again(thresholds: tuple[float, float], passes: bool):
    classifier = make(thresholds, passes)
    certificates = classifier.certify(IMAGES, stopping="fixed", bound="margin", **SETTINGS)
    n, alpha = SETTINGS["n"], SETTINGS["alpha"]
    assert len({certificate.accepting_sigma for certificate in certificates} - {None}) >= 1 + (max(thresholds) < 0)
    for index, (image, found) in enumerate(zip(IMAGES, certificates, strict=True)):
        assert found.samples == sum(found.samples_by_sigma)
        if found.prediction == ABSTAIN:
            assert (found.radius, found.path, found.accepting_sigma) == (0, (), None)
            continue
        check_path(found.path, thresholds)
        radii = []
        for sigma, claim in found.path:
            k = SIGMAS.index(sigma)
            (votes,) = classifier.scales[k].count_votes([SampleRequest(image, index, ESTIMATE, 0, n)])
            assert found.samples_by_sigma[k] == SETTINGS["n0"] + n
            threshold = (None, *thresholds)[k]
            radii.append(exact_radius(claim, sigma, threshold, votes.tolist(), found.prediction, n, alpha))
        assert found.radius == pytest.approx(min(radii), abs=1e-9)
        assert found.stop_reason == ALL_SAMPLES


@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_the_class_is_what_the_cascade_answers_for_the_selection_votes(thresholds: tuple[float, float]):
    classifier, n0 = make(thresholds), SETTINGS["n0"]
    for index, (image, found) in enumerate(zip(IMAGES, classifier.certify(IMAGES, **SETTINGS), strict=True)):
        votes = [each.count_votes([SampleRequest(image, index, SELECT, 0, n0)])[0] for each in classifier.scales]
        answer = cascade_answer((np.array(votes) + 0.5) / (n0 + 1), SIGMAS, thresholds)
        assert found.prediction in (ABSTAIN, answer)


@pytest.mark.parametrize("certificates", CERTIFICATES)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_sequential_certificates_need_fewer_samples_for_much_the_same(thresholds, certificates: str):
    classifier, step = make(thresholds), SETTINGS["radius_step"]
    options = {"bound": "margin", "certificates": certificates} | SETTINGS
    sequential, fixed = (classifier.certify(IMAGES, stopping=name, **options) for name in ("sequential", "fixed"))
    assert {one.stop_reason for one in sequential} <= {ALL_SAMPLES, FUTILE, WHOLE_GRID}
    for one, other in zip(sequential, fixed, strict=True):
        assert one.radius == pytest.approx(step * round(one.radius / step))
        if one.path == other.path != ():
            assert one.radius <= other.radius + step and other.radius <= one.radius + 3 * step
            assert one.samples <= other.samples + 2 * SETTINGS["n0"]  # a sigma more may have been asked
    assert sum(one.radius for one in sequential) > 0.6 * sum(other.radius for other in fixed)
    assert sum(one.samples for one in sequential) < 0.9 * sum(other.samples for other in fixed)


@pytest.mark.thorough
def test_label_aware_certificates_are_not_below_those_of_multiple_scales():
    for thresholds in THRESHOLDS:
        classifier, options = make(thresholds), {"stopping": "fixed", "bound": "margin"} | SETTINGS | {"n": 3000}
        ours = classifier.certify(IMAGES, **options)
        theirs = classifier.certify(IMAGES, certificates=MULTI_SCALE, **options)
        assert sum(one.radius for one in ours) > sum(one.radius for one in theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.prediction == other.prediction or ABSTAIN in (one.prediction, other.prediction)


def test_a_sure_large_sigma_needs_no_other():
    models = [Wedges(CLASSES), Wedges(CLASSES), nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))]
    nn.init.zeros_(models[2][1].weight)
    nn.init.constant_(models[2][1].bias, 0)
    models[2][1].bias.data[2] = 1
    classifier = CascadedClassifier(models, SIGMAS, [0, 0], CLASSES, batch_size=250)
    for found in classifier.certify(IMAGES, **SETTINGS):
        assert (found.prediction, found.accepting_sigma, found.stop_reason) == (2, 0.5, WHOLE_GRID)
        assert found.samples_by_sigma[:2] == (0, 0)
        assert found.path == ((0.5, ABOVE),)


def test_labels_only_end_it_sooner():
    classifier = make()
    plain = classifier.certify(IMAGES, **SETTINGS)
    labels = [found.prediction if index % 2 else (found.prediction + 1) % CLASSES for index, found in enumerate(plain)]
    labels = [max(0, label) for label in labels]
    for label, found, before in zip(labels, classifier.certify(IMAGES, labels, **SETTINGS), plain, strict=True):
        if found.stop_reason == WRONG_CLASS:
            assert found.prediction != label and before.prediction in (ABSTAIN, found.prediction)
            assert (found.radius, found.path) == (0, ()) and found.samples <= 3 * SETTINGS["n0"]
        else:
            assert found == before and found.prediction in (ABSTAIN, label)


# One answer


@pytest.mark.thorough
def test_an_image_has_one_answer():
    """Whatever the batch size, the company and the order, and however many images are in progress."""
    expected = make().certify(IMAGES, **SETTINGS)
    indices = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0)).tolist()
    for size in (31, 1001):
        found = make(batch_size=size).certify(IMAGES[indices], indices=indices, **SETTINGS)
        assert [found[indices.index(k)] for k in range(len(IMAGES))] == expected
    assert make().certify(IMAGES[3:4], indices=[3], **SETTINGS) == expected[3:4]
    classifier, rule = make(), make_cascade_rule("sequential", SIGMAS, (0.0, 0.0), bound="binary", **SETTINGS)
    states = classifier.image_states(IMAGES, None, None, rule)
    assert all(len(changed) <= 2 for changed in classifier.certify_stream(states, rule, at_once=2))
    assert [cascade_certificate(state, rule, CLASSES) for state in states] == expected
    assert make(seed=1).certify(IMAGES, **SETTINGS) != expected


@pytest.mark.parametrize("stopping", ["sequential", "fixed"])
@pytest.mark.parametrize("passes", [False, True])
def test_a_killed_run_continues_from_its_journal(tmp_path: Path, passes: bool, stopping: str):
    """Killed after each round, with half a line written; the counts in the journal lead to the same bytes."""
    classifier = make((0.1, -0.1), passes, batch_size=40)
    rule = make_cascade_rule(stopping, SIGMAS, (0.1, -0.1), bound="margin", **SETTINGS)
    whole = classifier.image_states(IMAGES[:4], None, None, rule)
    for _ in classifier.certify_stream(whole, rule):
        pass
    runs = drawn = 0
    while True:
        states = classifier.image_states(IMAGES[:4], None, None, rule)
        restore_states(states, tmp_path, lambda saved: is_possible_cascade_state(saved, rule, CLASSES))
        assert sum(state.samples for state in states) == drawn  # nothing that was counted is lost
        changed = next(classifier.certify_stream(states, rule), None)
        if changed is None:
            break
        with open_journal(tmp_path) as journal:
            append_states(journal, changed)
            journal.write('1234abcd {"index": 0, "sam')
        before, drawn = drawn, sum(state.samples for state in states)
        assert drawn > before
        runs += 1
    assert runs >= 5
    for state, expected in zip(states, whole, strict=True):
        assert vars(state) | {"image": 0, "seconds": 0} == vars(expected) | {"image": 0, "seconds": 0}


@cache
def finished_states(passes: bool = False) -> tuple:
    rule = make_cascade_rule("sequential", SIGMAS, (0.1, -0.1), bound="margin", **SETTINGS)
    classifier = make((0.1, -0.1), passes)
    states = classifier.image_states(IMAGES, None, None, rule)
    for changed in classifier.certify_stream(states, rule):
        for state in changed:  # every state on the way is possible
            saved = json.loads(json.dumps({name: value for name, value in vars(state).items() if name != "image"}))
            assert is_possible_cascade_state(saved, rule, CLASSES)
    return states, rule


@pytest.mark.parametrize("passes", [False, True])
def test_kept_votes_give_the_certificate_again(passes: bool):
    states, rule = finished_states(passes)
    for state in states:
        again = replay(state.selection, state.votes, state.label, rule, CLASSES)
        assert (again.samples, again.drawn) == (state.samples, state.drawn)  # with the looks that decided nothing
        assert cascade_certificate(again, rule, CLASSES) == cascade_certificate(state, rule, CLASSES)


CHANGES = {  # each makes a state impossible
    "a level more": lambda s: s["levels"].__setitem__(0, s["levels"][0] + 1),
    "another class": lambda s: s.update(top_class=(s["top_class"] + 1) % CLASSES),
    "a claim less": lambda s: s["claims"].pop(),
    "a selection vote more": lambda s: s["selection"][2].update({"0": s["selection"][2].get("0", 0) + 1}),
    "a vote more": lambda s: s["counts"][s["claims"][0][0]].update({"1": 10**6}),
    "a class there is not": lambda s: s["counts"][0].update({str(CLASSES + 1): 1}),
    "a vote of half": lambda s: s["counts"][s["claims"][0][0]].update({"1": 0.5}),
    "samples of another number": lambda s: s.update(samples=s["samples"] + 1),
    "another reason": lambda s: s.update(stop_reason="" if s["stop_reason"] else FUTILE),
    "kept votes in another order": lambda s: s["votes"].append(s["votes"][0]),
    "kept votes forgotten": lambda s: s.update(votes=[]),
    "no lists": lambda s: s.update(counts=None),
    "negative seconds": lambda s: s.update(seconds=-1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_impossible_states_are_not_taken_from_a_journal(change: str):
    states, rule = finished_states()
    tried = 0
    for state in states:
        saved = json.loads(json.dumps({name: value for name, value in vars(state).items() if name != "image"}))
        if saved["votes"]:
            CHANGES[change](saved)
            assert not is_possible_cascade_state(saved, rule, CLASSES)
            tried += 1
    assert tried > 3


# PREDICT


@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_predict_returns_the_answer_of_the_cascade_or_abstains(thresholds: tuple[float, float]):
    classifier = make(thresholds)
    answers = votes_answers(classifier, IMAGES)
    predictions, answers = np.array(classifier.predict(IMAGES, n=2000, alpha=0.0005)), np.array(answers)
    assert set(predictions[predictions != answers]) <= {ABSTAIN}
    assert (predictions == answers).mean() > 0.6


@pytest.mark.slow
def test_predict_stops_as_soon_as_it_knows():
    counted = []
    classifier = make()
    for scale in classifier.scales:
        count = scale.count_votes
        scale.count_votes = lambda requests, count=count: (
            counted.append(sum(r.stop - r.start for r in requests)) or (count(requests))
        )
    classifier.predict(IMAGES, n=100_000)
    assert sum(counted) < 0.05 * 3 * 100_000 * len(IMAGES)


def test_predict_refuses_what_always_abstains():
    with pytest.raises(RRCMError, match=r"^n = 9: certifies nothing at alpha = 0.001, .*$"):
        make().predict(IMAGES, n=9)


# Gradients


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_the_largest_output_is_the_answer_of_the_cascade(thresholds: tuple[float, float], passes: bool):
    models = [logits_net(k, CLASSES + (passes and k > 0)) for k in range(3)]
    classifier = CascadedClassifier(models, SIGMAS, thresholds, CLASSES, can_pass=passes)
    with torch.no_grad():
        outputs = classifier(IMAGES)
        p = [scale(IMAGES).exp()[:, :CLASSES].double().numpy() for scale in classifier.scales]
    assert outputs.shape == (len(IMAGES), CLASSES) and outputs.dtype == torch.float32
    answers = cascade_answer(np.stack(p, 1), SIGMAS, thresholds)
    assert outputs.argmax(1).tolist() == answers.tolist()
    assert passes or torch.allclose(outputs.exp().sum(1), torch.ones(len(IMAGES)), atol=1e-5)


def test_the_softened_cascade_becomes_the_cascade(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    log_p = [torch.randn(200, CLASSES, generator=generator, dtype=torch.float64).log_softmax(1) for _ in SIGMAS]
    thresholds = (-math.inf, 0.02, -0.1)
    expected = cascade_answer(torch.stack(log_p, 1).exp().numpy(), SIGMAS, thresholds[1:])
    soft = soften(log_p, SIGMAS, thresholds, CLASSES)
    torch.testing.assert_close(soft.exp().sum(1), torch.ones(200, dtype=torch.float64))
    assert (soft.argmax(1).numpy() == expected).mean() > 0.8
    monkeypatch.setattr(cascade, "SOFTNESS", 1e-4)
    hard = soften(log_p, SIGMAS, thresholds, CLASSES).exp()
    assert (hard.argmax(1).numpy() == expected).mean() > 0.99
    assert hard.amax(1).mean() > 0.99


def test_gradients_reach_every_base_classifier_and_the_images():
    models, images = [logits_net(k) for k in range(3)], IMAGES.clone().requires_grad_()
    CascadedClassifier(models, SIGMAS, [0.0, 0.0], CLASSES)(images)[:, 0].sum().backward()
    for model in models:
        assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in model.parameters())
    assert images.grad.isfinite().all() and images.grad.flatten(1).any(1).all()


def test_gradients_survive_certainty():
    """A network that is all but sure has a probability of 1 in float32."""
    sharp = logits_net(0)
    sharp[3].bias.data[2] += 200
    images = IMAGES.clone().requires_grad_()
    outputs = CascadedClassifier(sharp, SIGMAS, [0.0, 0.0], CLASSES)(images)
    assert (outputs.amax(1) == 0).any()
    nn.functional.cross_entropy(outputs, outputs.argmin(1)).backward()
    assert images.grad.isfinite().all() and images.grad.flatten(1).any(1).all()


def test_scaled_quantiles_keep_their_digits():
    log_p = torch.tensor([[math.log1p(-1e-20), math.log(1e-20)], [math.log(0.3), math.log(0.7)]], dtype=torch.float64)
    expected = 0.5 * ndtri(np.array([[np.nan, 1e-20], [0.3, 0.7]]))
    expected[0, 0] = -expected[0, 1]
    np.testing.assert_allclose(scaled_quantiles(log_p, 0.5).numpy(), expected, rtol=1e-9)


def attack(
    classifier: CascadedClassifier, images: torch.Tensor, labels: list[int], radii: torch.Tensor
) -> torch.Tensor:
    """PGD in the balls of the radii (B,): (B, C, H, W). It may leave [0, 1], where certificates hold as well."""
    offset, radii = torch.zeros_like(images), radii[:, None, None, None]

    def norm(each: torch.Tensor) -> torch.Tensor:
        return each.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-30)

    for _ in range(15):
        offset.requires_grad_()
        loss = nn.functional.cross_entropy(classifier(images + offset), torch.tensor(labels), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, offset)
        offset = offset.detach() + 0.3 * radii * gradient / norm(gradient)
        offset *= (radii / norm(offset)).clamp(max=1)
    return images + offset


def test_attacks_inside_the_radius_fail_and_far_outside_they_succeed():
    models = [logits_net(k) for k in (7, 7, 8)]
    for model in models:
        model[3].weight.data *= 5
    images = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    classifier = CascadedClassifier(models, SIGMAS, [0.02, 0.02], CLASSES)
    certificates = classifier.certify(images, n=2000, radius_step=0.02, bound="margin")
    assert len({found.accepting_sigma for found in certificates} - {None}) >= 2
    certified = [k for k, found in enumerate(certificates) if found.radius > 0]
    labels = [certificates[k].prediction for k in certified]
    radii = torch.tensor([0.999 * certificates[k].radius for k in certified])
    inside, outside = (
        votes_answers(classifier, attack(classifier, images[certified], labels, each))
        for each in (radii, torch.full_like(radii, 2.0))
    )
    assert len(certified) >= 25
    assert inside == labels
    assert sum(answer != label for answer, label in zip(outside, labels, strict=True)) > len(labels) / 2


def votes_answers(classifier: CascadedClassifier, images: torch.Tensor) -> list[int]:
    """What F answers for 4,000 votes at each sigma; the images may be outside of [0, 1]."""
    requests = [SampleRequest(image, index, ESTIMATE, 0, 4000) for index, image in enumerate(images)]
    votes = np.stack([each.count_votes(requests) for each in classifier.scales], 1)
    return cascade_answer(votes / 4000, classifier.sigmas, classifier.thresholds).tolist()


# Arguments


def test_one_network_for_all_sigmas():
    classifier = rrcm.CascadedClassifier(Wedges(CLASSES), np.array(SIGMAS), torch.zeros(2).tolist(), CLASSES)
    assert len({id(scale.model) for scale in classifier.scales}) == 1
    assert classifier.sigmas == SIGMAS and classifier.thresholds == (0.0, 0.0)
    assert not classifier.train().scales[0].training


class Trained(Wedges):
    def __init__(self, sigma: float | None):
        super().__init__(CLASSES)
        self.sigma = sigma


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sigmas": [0.25, 0.25, 0.5]}, r"sigmas = \[0.25, 0.25, 0.5\]: must increase, .*"),
        ({"sigmas": [0.5, 0.25, 0.1]}, r"sigmas = .*: must increase, .*"),
        ({"sigmas": []}, r"sigmas = \[\]: must increase, .*"),
        ({"sigmas": [0.1, 0.2, math.nan]}, r"sigmas = .*: must increase, .*"),
        ({"sigmas": 0.5}, r"sigmas = 0.5: must be a sequence of numbers, .*"),
        ({"sigmas": [0.1, "0.2", 0.3]}, r"sigmas\[1\] = '0.2': must be a number"),
        ({"thresholds": [0.0]}, r"thresholds: 1 for 3 sigmas; must be 2, one for each sigma but the smallest"),
        ({"thresholds": [0.0, math.inf]}, r"thresholds = .*: must be finite, .*"),
        ({"thresholds": "00"}, r"thresholds = '00': must be a sequence .*"),
        ({"models": [Wedges(CLASSES)] * 2}, r"models: 2 for 3 sigmas; must be one, or one for each sigma"),
        ({"models": "rrcm"}, r"models is a str: must be .*"),
        ({"models": [Wedges(CLASSES), None, Wedges(CLASSES)]}, r"model is a NoneType: must be a torch.nn.Module"),
        ({"models": Trained(0.25)}, r"models: the one for sigma 0.1 was trained for 0.25; give .*"),
        ({"models": [Trained(s) for s in (0.25, 0.1, 0.5)]}, r"models: the one for sigma 0.1 was trained for 0.25; .*"),
        ({"num_classes": 1}, r"num_classes = 1: must be at least 2; .*"),
        ({"num_classes": "4"}, r"num_classes = '4': must be a whole number"),
        ({"can_pass": 1}, r"can_pass = 1: must be True or False"),
    ],
)
def test_impossible_cascades_are_refused(change: dict, problem: str):
    arguments = {"models": Wedges(CLASSES), "sigmas": SIGMAS, "thresholds": [0, 0], "num_classes": CLASSES} | change
    with pytest.raises(RRCMError, match=rf"^{problem}$"):
        CascadedClassifier(**arguments)


def test_networks_trained_for_their_sigmas_are_accepted():
    CascadedClassifier([Trained(sigma) for sigma in (0.1, None, 0.5)], SIGMAS, [0, 0], CLASSES)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"certificates": "best"}, r"certificates = 'best': must be label-aware or multi-scale"),
        ({"stopping": "soon"}, r"stopping = 'soon': must be .*"),
        ({"bound": "triple"}, r"bound = 'triple': must be .*"),
        ({"n": 3}, r"n = 3: certifies nothing at alpha = 0.01, .*"),
        ({"labels": [9] * 16}, r"labels from 9 to 9: must be in \[0, 4\)"),
        ({"indices": [0]}, r"indices: 1 for 16 images; .*"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, problem: str):
    with pytest.raises(RRCMError, match=rf"^{problem}$"):
        make().certify(IMAGES, **SETTINGS | settings)


def test_a_rule_of_another_cascade_is_refused():
    rule = make_cascade_rule("sequential", SIGMAS, (0.0, 0.1), bound="binary", **SETTINGS)
    with pytest.raises(RRCMError, match=r"^the stopping rule has other sigmas or thresholds than the cascade; .*$"):
        next(make().certify_stream([], rule))


def test_a_model_without_pass_is_refused_where_it_should_have_it():
    classifier = CascadedClassifier(Wedges(CLASSES), SIGMAS, [0, 0], CLASSES, can_pass=True)
    with pytest.raises(RRCMError, match=r"^the model returns \(\d+, 4\) for a batch of \d+: must be a tensor .*$"):
        classifier.certify(IMAGES, **SETTINGS)


def test_all_sigmas_vote_in_batches_of_one_size():
    models = [logits_net(0), nn.Sequential(nn.Flatten(), nn.Linear(4, 10**6), nn.Linear(10**6, CLASSES))]
    classifier = CascadedClassifier(models, SIGMAS[:2], [0.0], CLASSES)
    sizes = [scale.find_batch_size(IMAGES[0]) for scale in classifier.scales]
    assert classifier.share_batch_size(IMAGES[0]) == min(sizes) < max(sizes)
    assert [scale.batch_size for scale in classifier.scales] == [min(sizes)] * 2
