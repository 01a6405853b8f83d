"""Thresholds of a cascade, chosen on validation images by the certificates that they lead to.

They define the deployed classifier, so they must be chosen before any image is certified that is reported.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rrcm.certification.cascade_radii import path_radii, with_first_threshold
from rrcm.certification.cascade_rules import ABOVE, BELOW, MARGIN_TESTS, check_scales, claim_radius
from rrcm.certification.margin import BINARY
from rrcm.utils.errors import RRCMError

CANDIDATES = tuple(round(0.1 * k, 1) for k in range(-20, 21))  # thresholds that are tried, relative to sigma


def choose_thresholds(
    votes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    sigmas: Sequence[float],
    *,
    n: int = 100_000,
    alpha: float = 0.001,
    bound: str = "binary",
    weights: Mapping[float, float] | None = None,
) -> tuple[tuple[float, ...], float]:
    """The thresholds (K - 1,) in pixel units with the largest score, and that score.

    `votes` (N, K, C) count equally many samples of validation images at each sigma (`CascadedClassifier.votes`), and
    `labels` (N,) are their classes. The score is the average certified radius, or with `weights` the sum of the
    certified accuracies at its radii, each times its weight. A certificate is what n votes per sigma would give if they
    fell as `votes` did.

    The thresholds start at 0. Then each in turn is set to the best of CANDIDATES, until no change raises the score.
    Raises `RRCMError` if there are no images, or if sigmas do not increase.

    >>> votes = [[[900, 100], [550, 450]], [[200, 800], [580, 420]]]  # of two images at two sigmas, for two classes
    >>> thresholds, score = rrcm.choose_thresholds(votes, labels=[0, 1], sigmas=[0.25, 0.5], n=1000)
    >>> thresholds[0] > 0  # the second image is better left to the smaller sigma
    True
    """
    votes = np.asarray(votes)
    sigmas, thresholds = check_scales(sigmas, [0.0] * (len(sigmas) - 1))
    if votes.ndim != 3 or votes.shape[:2] != (len(labels), len(sigmas)) or not len(labels):
        raise RRCMError(f"votes have shape {votes.shape}: must be ({len(labels)}, {len(sigmas)}, classes), not empty")
    bounds = claim_bounds(votes, labels, sigmas, n, alpha, bound)

    def score(candidate: Sequence[float]) -> float:
        radii = certified_radii(*bounds, candidate)
        if weights is None:
            return float(np.mean(np.maximum(radii, 0)))
        return float(sum(weight * np.mean(radii >= radius) for radius, weight in weights.items()))

    thresholds, best, improved = list(thresholds), score(thresholds), True
    while improved:
        improved = False
        for k, sigma in enumerate(sigmas[1:]):
            for share in CANDIDATES:
                candidate = [*thresholds[:k], float(f"{share * sigma:.12g}"), *thresholds[k + 1 :]]
                if (reached := score(candidate)) > best:
                    thresholds, best, improved = candidate, reached, True
    return tuple(thresholds), best


def claim_bounds(
    votes: np.ndarray, labels: Sequence[int] | np.ndarray, sigmas: Sequence[float], n: int, alpha: float, bound: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower bounds on R_k, Q_k and M_k of the labels, three (N, K) float64. Arguments as for `choose_thresholds`."""
    samples = votes[:, :1].sum(-1, keepdims=True)  # no votes are for "pass" at the smallest sigma
    share = (votes + 0.5) / (samples + 1)  # no class has probability 0 or 1
    is_label = np.arange(share.shape[-1]) == np.asarray(labels)[:, None, None]
    top, other = n * np.where(is_label, share, 0).max(-1), n * np.where(is_label, 0, share).max(-1)
    tests = (BINARY, *(MARGIN_TESTS if bound == "margin" else ()))
    r, q, m = np.empty(top.shape), np.empty(top.shape), np.empty(top.shape)
    for k, sigma in enumerate(sigmas):
        at_k = sigma, 0.0, top[:, k], other[:, k, None], n, alpha
        r[:, k], q[:, k] = claim_radius(ABOVE, *at_k), claim_radius(BELOW, *at_k)
        m[:, k] = np.max([claim_radius(test, *at_k) for test in tests], axis=0)
    return r, q, m


def certified_radii(r: np.ndarray, q: np.ndarray, m: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The radius of the best path, (N,), for the bounds of `claim_bounds`; negative where nothing is certified."""
    tau = with_first_threshold(thresholds)
    return path_radii(np.minimum(r - tau, m), np.maximum(q + tau, m)).max(-1)
