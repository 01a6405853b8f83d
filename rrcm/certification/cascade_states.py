"""An image on its way through a cascade: which votes it needs next, when it is decided, and what is certified.

Everything here follows from counts of votes, so that the votes which a state keeps give its certificate again
(`replay`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rrcm.certification.cascade_rules import CascadeRule
from rrcm.certification.cascade_selection import choose_claims, selected_class
from rrcm.certification.states import Votes
from rrcm.certification.stopping import ABSTAIN, WRONG_CLASS, FixedSample

if TYPE_CHECKING:
    import torch  # slow to import; counts do without it


@dataclass(frozen=True)
class CascadeCertificate:
    """The cascade answers `prediction` at every point closer to the image than the L2 `radius` (pixel units).

    `prediction` is a class or ABSTAIN. `path` has the claims on which the certificate rests, each with its sigma, from
    the sigma that accepts the class upwards; it is empty where nothing is certified. `Certificate` has the
    other attributes too.
    """

    prediction: int
    radius: float
    samples: int
    stop_reason: str
    path: tuple[tuple[float, str], ...] = ()
    samples_by_sigma: tuple[int, ...] = ()

    @property
    def accepting_sigma(self) -> float | None:
        """The sigma at which the path ends; None where nothing is certified."""
        return self.path[0][0] if self.path else None


@dataclass
class CascadeState:
    """An image on its way to a certificate. All but `image` is JSON-able, so a journal of it is a checkpoint.

    Lists of votes and of samples have an entry for each scale, by increasing sigma.
    """

    index: int  # selects the noise
    image: torch.Tensor = field(repr=False)  # (C, H, W) float32 in [0, 1]
    label: int | None = None  # if known, sequential sampling stops as soon as another class is chosen
    selection: list[Votes] = field(default_factory=list)  # of the n0 selection samples of each scale that was asked
    top_class: int = -1  # the chosen class
    claims: list[list] = field(default_factory=list)  # of the chosen path: scale and elementary claim
    counts: list[Votes] = field(default_factory=list)  # of the estimation samples
    drawn: list[int] = field(default_factory=list)  # estimation samples
    levels: list[int] = field(default_factory=list)  # how many radii of the grid each claim says
    reasons: list[str] = field(default_factory=list)  # why each claim has ended
    votes: list[list] = field(default_factory=list)  # scale, samples and votes at each look that decided something
    samples: int = 0  # of all scales and both purposes
    stop_reason: str = ""
    seconds: float = 0.0  # share of the computing time; not part of the result


def new_state(index: int, image: torch.Tensor | None, label: int | None, rule: CascadeRule) -> CascadeState:
    """The state of an image without any votes."""
    k = len(rule.scales)
    return CascadeState(index, image, label, [{} for _ in range(k)], counts=[{} for _ in range(k)], drawn=[0] * k)


def next_samples(state: CascadeState, rule: CascadeRule, num_classes: int) -> tuple[int, bool, int, int]:
    """What the image needs next: scale, whether for the selection, and from which sample up to which one.

    The selection asks the scales from the largest sigma down. In the estimation, the claims with the fewest certified
    radii limit the certificate. Among these, the claim with the smallest expected radius draws up to its next look: it
    is the likeliest to end without another radius, which finishes the image. The order follows from the votes that the
    state keeps.
    """
    if not state.claims:
        asked = [sum(votes.values()) for votes in state.selection]
        k = max(k for k, samples in enumerate(asked) if samples < rule.n0)
        return k, True, asked[k], rule.n0
    lowest = min(state.levels)
    held_up = [claim for claim, level in zip(state.claims, state.levels, strict=True) if level == lowest]
    k, _ = min(held_up, key=lambda claim: _expected_radius(state, rule, *claim, num_classes))
    return k, False, state.drawn[k], rule.looks[_looks_taken(state, rule, k)]


def add_votes(
    state: CascadeState, rule: CascadeRule, scale: int, selects: bool, votes: Sequence[int], num_classes: int
) -> None:
    """Add the votes (C,) of the samples that `next_samples` asked for, or of some of them, and decide what they decide.

    C is `num_classes`, or one more where the last output is "pass".
    """
    counts, drawn = (state.selection if selects else state.counts)[scale], int(sum(votes))
    for c in np.flatnonzero(votes).tolist():
        counts[str(c)] = counts.get(str(c), 0) + int(votes[c])
    state.samples += drawn
    if selects:
        if sum(counts.values()) == rule.n0:
            _choose(state, rule, num_classes)
        return
    state.drawn[scale] += drawn
    if state.drawn[scale] in rule.looks:
        _decide(state, rule, scale, num_classes)


def _expected_radius(state: CascadeState, rule: CascadeRule, scale: int, claim: str, num_classes: int) -> float:
    """The expected radius of the claim after all samples.

    They are assumed to vote in the proportions of the selection and of the last kept look.
    """
    kept = next((votes for k, _, votes in reversed(state.votes) if k == scale), {})
    counts = Counter(state.selection[scale]) + Counter(kept)
    top, others = top_and_others(counts, state.top_class, num_classes)
    n, share = rule.looks[-1], rule.looks[-1] / sum(counts.values())
    return float(rule.scales[scale].radius(claim, np.array(share * top), share * others, n, rule.last_alpha))


def _looks_taken(state: CascadeState, rule: CascadeRule, scale: int) -> int:
    return bisect_right(rule.looks, state.drawn[scale])


def _choose(state: CascadeState, rule: CascadeRule, num_classes: int) -> None:
    """Choose the class and the claims as soon as the selection samples suffice, or stop at a wrong class."""
    asked = [votes for votes in reversed(state.selection) if votes]
    votes = [np.array([counts.get(str(c), 0) for c in range(num_classes)]) for counts in asked]
    if (top_class := selected_class(rule, votes)) is None:
        return
    if state.label not in (None, top_class) and not isinstance(rule.grid, FixedSample):
        state.top_class, state.stop_reason = top_class, WRONG_CLASS
    elif claims := choose_claims(rule, votes, top_class):
        state.top_class, state.claims = top_class, [list(claim) for claim in claims]
        state.levels, state.reasons = [0] * len(claims), [""] * len(claims)


def _decide(state: CascadeState, rule: CascadeRule, scale: int, num_classes: int) -> None:
    """What the claims of a scale say after its look, and whether to stop.

    The sampling stops when a claim with the fewest certified radii has ended, as the certificate has no more. The votes
    of a look are kept if it has decided anything; the other looks change nothing.
    """
    before = list(state.levels), list(state.reasons)
    look = _looks_taken(state, rule, scale) - 1
    top, others = top_and_others(state.counts[scale], state.top_class, num_classes)
    for e, (k, claim) in enumerate(state.claims):
        if k == scale and not state.reasons[e]:
            level, reason = rule.scales[k].decide(claim, look, np.array(top), others, np.array(state.levels[e]))
            state.levels[e], state.reasons[e] = int(level), str(reason)
    lowest = min(state.levels)
    ended = [reason for level, reason in zip(state.levels, state.reasons, strict=True) if level == lowest and reason]
    state.stop_reason = ended[0] if ended else ""
    if (state.levels, state.reasons) != before:
        state.votes.append([scale, state.drawn[scale], dict(state.counts[scale])])


def top_and_others(counts: Votes, top_class: int, num_classes: int) -> tuple[int, np.ndarray]:
    """The votes for the chosen class, and each number of votes that another class has: (C,) int64."""
    others = {count for c, count in counts.items() if int(c) not in (top_class, num_classes)}
    voted_for = {c for c in counts if int(c) < num_classes} | {str(top_class)}
    return counts.get(str(top_class), 0), np.array(sorted(others | ({0} if len(voted_for) < num_classes else set())))


def cascade_certificate(state: CascadeState, rule: CascadeRule, num_classes: int) -> CascadeCertificate:
    """The certificate of an image whose sampling has stopped."""
    by_sigma = tuple(drawn + sum(votes.values()) for drawn, votes in zip(state.drawn, state.selection, strict=True))
    if state.stop_reason == WRONG_CLASS:
        return CascadeCertificate(state.top_class, 0.0, state.samples, WRONG_CLASS, samples_by_sigma=by_sigma)
    if isinstance(rule.grid, FixedSample):
        radius = min(_fixed_radius(state, rule, k, claim, num_classes) for k, claim in state.claims)
    else:
        radius = rule.grid.radii[min(state.levels) - 1] if min(state.levels) else -1.0
    if radius < 0:
        return CascadeCertificate(ABSTAIN, 0.0, state.samples, state.stop_reason, samples_by_sigma=by_sigma)
    path = tuple((rule.sigmas[k], claim) for k, claim in state.claims)
    return CascadeCertificate(state.top_class, radius, state.samples, state.stop_reason, path, by_sigma)


def _fixed_radius(state: CascadeState, rule: CascadeRule, scale: int, claim: str, num_classes: int) -> float:
    top, others = top_and_others(state.counts[scale], state.top_class, num_classes)
    return float(rule.scales[scale].radius(claim, np.array(top), others, rule.grid.n, rule.grid.alpha))


def replay(
    selection: Sequence[Votes], votes: Sequence[Sequence], label: int | None, rule: CascadeRule, num_classes: int
) -> CascadeState:
    """The state to which the selection votes of each scale and the votes of the kept looks lead.

    The arguments are as in a `CascadeState`. The numbers of samples include looks that decided nothing, because
    `next_samples` tells which looks took place. The image, its index and the seconds are unknown. Raises ValueError for
    votes to which no sampling leads.
    """
    if len(selection) != len(rule.scales):
        raise ValueError(f"selection votes of {len(selection)} sigmas: must be {len(rule.scales)}")
    state = new_state(-1, None, label, rule)
    while not (state.claims or state.stop_reason):
        k = next_samples(state, rule, num_classes)[0]
        given = _as_array(f"the selection at {_sigma(rule, k)}", selection[k], _outputs(k, num_classes))
        if given.sum() != rule.n0:
            raise ValueError(f"{given.sum()} selection votes at {_sigma(rule, k)}: must be {rule.n0}")
        add_votes(state, rule, k, True, given, num_classes)
    if state.selection != list(selection):
        raise ValueError("the selection has votes at a sigma that was not asked")
    kept = deque(votes)
    while not state.stop_reason:
        k, _, start, stop = next_samples(state, rule, num_classes)
        state.drawn[k], state.samples = stop, state.samples + stop - start
        if kept and (kept[0][0], kept[0][1]) == (k, stop):
            _replay_look(state, rule, k, kept.popleft()[2], num_classes)
        elif stop == rule.looks[-1]:
            missing = f"votes end before the stopping rule stops: {stop} samples at {_sigma(rule, k)} have none"
            raise ValueError(f"{kept_at(rule, *kept[0][:2])}: were not asked for" if kept else missing)
    if kept:
        raise ValueError(f"{kept_at(rule, *kept[0][:2])}: sampling has stopped before ({state.stop_reason})")
    return state


def kept_at(rule: CascadeRule, scale: int, drawn: int) -> str:
    """Which votes these are, for messages."""
    return f"votes at {_sigma(rule, scale)} after {drawn} samples"


def _replay_look(state: CascadeState, rule: CascadeRule, scale: int, votes: Votes, num_classes: int) -> None:
    """Decide what the votes of a kept look decide. The samples are counted already."""
    name, outputs = kept_at(rule, scale, state.drawn[scale]), _outputs(scale, num_classes)
    now, before = (_as_array(name, each, outputs) for each in (votes, state.counts[scale]))
    if now.sum() != state.drawn[scale]:
        raise ValueError(f"{name}: are {now.sum()}")
    if (now < before).any():
        raise ValueError(f"{name}: a class has fewer than at an earlier look")
    state.counts[scale], decided = dict(votes), len(state.votes)
    _decide(state, rule, scale, num_classes)
    if len(state.votes) == decided:
        raise ValueError(f"{name}: decide nothing")


def _sigma(rule: CascadeRule, scale: int) -> str:
    return f"sigma {rule.sigmas[scale]:g}"


def _outputs(scale: int, num_classes: int) -> int:
    """The number of answers that a base classifier may give. At every sigma but the smallest it may answer "pass"."""
    return num_classes + (scale > 0)


def _as_array(name: str, votes: Votes, outputs: int) -> np.ndarray:
    if not isinstance(votes, dict) or not votes.keys() <= {str(c) for c in range(outputs)}:
        raise ValueError(f"{name}: must be votes by class, for {outputs} classes at most")
    if not all(type(count) is int and count > 0 for count in votes.values()):
        raise ValueError(f"{name}: must be whole numbers above 0")
    return np.array([votes.get(str(c), 0) for c in range(outputs)])


def is_possible_cascade_state(saved: dict, rule: CascadeRule, num_classes: int) -> bool:
    """Whether sampling by `rule` can lead to these values of a `CascadeState`.

    Each has its type, and counts add up. The kept votes of a finished image must also lead to its claims and levels; of
    an unfinished one that would take too long, as a journal has many states of each image.
    """
    try:
        if not _adds_up(saved, rule, num_classes):
            return False
        if not saved["stop_reason"]:
            return saved["top_class"] == -1 or not any(
                level == min(saved["levels"]) and reason
                for level, reason in zip(saved["levels"], saved["reasons"], strict=True)
            )
        state = replay(saved["selection"], saved["votes"], saved["label"], rule, num_classes)
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    decided = ("top_class", "claims", "levels", "reasons", "stop_reason", "drawn", "samples")
    return all(saved[name] == getattr(state, name) for name in decided)


def _adds_up(saved: dict, rule: CascadeRule, num_classes: int) -> bool:
    """Raises TypeError, ValueError or AttributeError for some values of another type."""
    k, outputs = len(rule.scales), num_classes + 1
    selection, counts = (
        [_as_array("a scale", votes, outputs) for votes in saved[name]] for name in ("selection", "counts")
    )
    asked = [int(votes.sum()) for votes in selection]
    claims, levels, reasons = saved["claims"], saved["levels"], saved["reasons"]
    numbers = [saved["samples"], saved["top_class"], *saved["drawn"], *levels, *(scale for scale, _ in claims)]
    chosen = bool(claims) or saved["stop_reason"] == WRONG_CLASS
    most = 1 if isinstance(rule.grid, FixedSample) else len(rule.grid.radii)  # levels, as `ScaleRule.decide` has them
    return (
        all(type(number) is int for number in numbers)
        and all(type(text) is str for text in (saved["stop_reason"], *reasons, *(claim for _, claim in claims)))
        and type(saved["seconds"]) in (int, float)
        and 0 <= saved["seconds"] < np.inf
        and len(asked) == len(counts) == k
        and len(claims) == len(levels) == len(reasons)
        and saved["drawn"] == [int(votes.sum()) for votes in counts]
        and saved["samples"] == sum(asked) + sum(saved["drawn"])
        and max(asked) <= rule.n0
        and max(saved["drawn"]) <= rule.looks[-1]
        and not any(drawn and scale not in {at for at, _ in claims} for scale, drawn in enumerate(saved["drawn"]))
        and (0 <= saved["top_class"] < num_classes if chosen else saved["top_class"] == -1)
        and all(0 <= level <= most for level in levels)
        and all(0 <= scale < k for scale, _ in claims)
        and all(_is_kept(entry, rule, counts, outputs) for entry in saved["votes"])
    )


def _is_kept(entry: list, rule: CascadeRule, counts: list[np.ndarray], outputs: int) -> bool:
    """Whether these can be the votes of a look that decided something, for an image that now has `counts`."""
    scale, drawn, votes = entry
    kept = _as_array("a look", votes, outputs)
    return drawn in rule.looks and kept.sum() == drawn and bool((kept <= counts[scale]).all())
