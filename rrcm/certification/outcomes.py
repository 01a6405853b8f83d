"""Whether a stopping rule can lead to the certificates and sample counts in a file.

In a file that was damaged, edited or made with other settings, the class and the radius of a row are often possible by
themselves, but not together with the other columns and the rule.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.special import ndtri

from rrcm.certification.stopping import (
    ABSTAIN,
    ALL_SAMPLES,
    WHOLE_GRID,
    WRONG_CLASS,
    FixedSample,
    GroupSequential,
    StoppingRule,
    clopper_pearson_lower,
    smallest_count,
)

BOUND_COLUMNS = [("binary", "binary_samples"), ("margin", "samples")]  # a bound, and the column with its samples
ROUNDING = 1e-7  # relative; radii of neighbouring counts differ by more


def find_impossible(frame: pd.DataFrame, rule: StoppingRule, num_classes: int) -> str | None:
    """The problem of the first image that `rule` cannot lead to, such as "image 3: samples 7, ...", or None.

    `frame` has the columns of a certificate frame and of its samples file. All images are labelled.
    """
    checks = [*_about_samples(frame, rule), *_about_classes(frame, rule, num_classes), *_about_radii(frame, rule)]
    for possible, problem in checks:
        if not np.all(possible):
            row = frame[~np.asarray(possible)].iloc[0].to_dict()
            return f"image {row['idx']}: {problem.format(**row)}"
    return None


def _about_samples(frame: pd.DataFrame, rule: StoppingRule) -> Iterator[tuple[np.ndarray, str]]:
    """Sampling ends at a look, or with the selection samples if they have chosen a wrong class."""
    ends, reason, samples = rule.n0 + np.array(rule.looks), frame["stop_reason"], frame["samples"]
    wrong = reason == WRONG_CLASS
    for name in ("samples", "binary_samples"):
        must = f"must be n0 = {rule.n0}" + (" and the samples of a look" if len(ends) > 1 else f" and {rule.looks[0]}")
        yield (frame[name] == rule.n0) | ~wrong, f"{name} {{{name}}} after a wrong class: must be n0 = {rule.n0}"
        yield frame[name].isin(ends) | wrong, f"{name} {{{name}}}: {must}"
    if rule.bound == "binary":
        yield samples == frame["binary_samples"], "samples {samples} and binary_samples {binary_samples}: must be equal"
    fits = (reason == ALL_SAMPLES) == (samples == ends[-1])
    if rule.stops_early:
        fits |= wrong | (reason == WHOLE_GRID)
    yield fits, "stop_reason '{stop_reason}' does not fit samples {samples}"


def _about_classes(frame: pd.DataFrame, rule: StoppingRule, num_classes: int) -> Iterator[tuple[np.ndarray, str]]:
    """Both bounds have the same class. A rule that stops early certifies no class other than the label."""
    binary, margin, label = frame["binary_predict"], frame["margin_predict"], frame["label"]
    both = "binary_predict {binary_predict}, margin_predict {margin_predict}"
    yield (binary < num_classes) & (margin < num_classes), f"{both}: there are {num_classes} classes"
    yield (binary == margin) | (binary == ABSTAIN) | (margin == ABSTAIN), f"{both}: must be one class, or -1"
    if rule.stops_early:
        wrong = frame["stop_reason"] == WRONG_CLASS
        for predict in (binary, margin):
            fits = np.where(wrong, (predict >= 0) & (predict != label), predict.isin([ABSTAIN]) | (predict == label))
            yield fits, f"{both} do not fit label {{label}} and stop_reason '{{stop_reason}}'"


def _about_radii(frame: pd.DataFrame, rule: StoppingRule) -> Iterator[tuple[np.ndarray, str]]:
    """The samples can certify the radius, which is on the grid or follows from a count of votes."""
    for bound, used in BOUND_COLUMNS:
        radius, predict = frame[f"{bound}_radius"], frame[f"{bound}_predict"]
        problem = f"{bound}_radius {{{bound}_radius}}"
        if not rule.radii:
            fits = radius <= rule.sigma * ndtri(clopper_pearson_lower(rule.n, rule.n, rule.alpha)) * (1 + ROUNDING)
            yield fits, f"{problem}: is more than n = {rule.n} votes can certify"
            if bound == "binary":
                yield (predict == ABSTAIN) | _is_of_a_count(radius.to_numpy(), rule), f"{problem}: no count has it"
            continue
        yield radius.isin(rule.radii), f"{problem}: is no radius of the grid up to {rule.radii[-1]:g}"
        most = _certifiable(rule)[np.searchsorted(rule.looks, frame[used] - rule.n0).clip(max=len(rule.looks) - 1)]
        yield (predict == ABSTAIN) | (radius <= most), f"{problem}: is more than {used} {{{used}}} can certify"
        wrong = frame["stop_reason"] == WRONG_CLASS
        yield ~wrong | (radius == 0), f"{problem} of a wrong class: must be 0"
        if bound == rule.bound:
            whole = ~wrong & (predict != ABSTAIN) & (radius == rule.radii[-1])
            fits = whole == (frame["stop_reason"] == WHOLE_GRID)
            yield fits, f"{problem} does not fit stop_reason '{{stop_reason}}'"


def _certifiable(rule: GroupSequential) -> np.ndarray:
    """The largest radius that is certified at each look if all votes agree: (J,), 0 where there is none.

    The margin bound certifies no more. If no other class has a vote, its tests waste a part of alpha.
    """
    reached = (rule.efficacy_counts <= np.array(rule.looks)[:, None]).sum(1)
    return np.array(rule.radii)[np.maximum.accumulate(reached).clip(min=1) - 1]


def _is_of_a_count(radius: np.ndarray, rule: FixedSample) -> np.ndarray:
    """Whether some count of votes has the radius: (N,) bool."""

    def radius_of(count: np.ndarray) -> np.ndarray:
        return rule.sigma * ndtri(clopper_pearson_lower(count, rule.n, rule.alpha))

    least = radius[:, None] * (1 - ROUNDING) - ROUNDING * rule.sigma
    count = smallest_count(lambda k: radius_of(k) >= least, np.full((len(radius), 1), rule.n), 1)[:, 0]
    return np.isclose(radius_of(count.clip(max=rule.n)), radius, rtol=2 * ROUNDING, atol=2 * ROUNDING * rule.sigma)
