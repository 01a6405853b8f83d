"""The cascade F of smoothed classifiers: its answer and its radius, from probabilities. Pure functions.

A cascade has K scales, sigma_1 < ... < sigma_K, each with a base classifier. p_k(c) is the probability that the base
classifier of scale k gives a copy of the image with noise of sigma_k the class c, and R_k(c) = sigma_k Phi^-1(p_k(c)).
F starts at the largest sigma. Scale k accepts its likeliest class c* if R_k(c*) >= tau_k, its threshold, which may be
negative; otherwise it passes the image on to scale k - 1. Scale 1 always accepts: tau_1 = -inf. Of classes that are
equally likely c* is the smallest. A base classifier may also have an output that is no class, "pass". Its probability
counts for no class, so the p_k(c) then sum to less than 1.

Let Q_k(c) = -max of R_k(c') over the other classes, M_k(c) = (R_k(c) + Q_k(c)) / 2, and

    A_k = min(R_k(c) - tau_k, M_k(c))    closer than this, scale k accepts c
    B_k = max(Q_k(c) + tau_k, M_k(c))    closer than this, scale k accepts no other class.

Path j of the cascade has the radius min(A_j, B_{j+1}, ..., B_K). F answers c at every point closer than the radius of
any path. Proof: Each R_k is 1-Lipschitz in L2 (Salman et al. 2019, lemma 2). At distance r, R_k(c) has therefore fallen
by at most r, and every R_k(c') has risen by at most r. If r < A_k, then R_k(c) is still at least tau_k and the largest,
so scale k accepts c. If r < B_k, then each R_k(c') is either below tau_k or below R_k(c), so scale k accepts c or
passes the image on. Along path j, the scales above j accept c or pass, and scale j accepts c. The inequalities are
strict, so equally likely classes play no role.

Jeong & Shin (NeurIPS 2023) certify the same F. Their radius belongs to the path that ends at the scale which accepts
the image itself, with Q_k(c) + tau_k in place of B_k.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri


def with_first_threshold(thresholds: Sequence[float]) -> np.ndarray:
    """The thresholds of all K scales, for `thresholds` (K - 1,) of scales 2 to K: (K,) float64, the first -inf."""
    return np.array([-np.inf, *thresholds])


def accepting_scale(p: np.ndarray, sigmas: Sequence[float], thresholds: Sequence[float]) -> np.ndarray:
    """The index of the scale that accepts: (...) int64, 0 for sigma_1.

    `p` (..., K, C) are the p_k(c), `sigmas` (K,) increasing, and `thresholds` (K - 1,) for scales 2 to K, both in
    pixel units.
    """
    largest = np.asarray(sigmas) * ndtri(np.max(p, axis=-1))
    accepts = largest >= with_first_threshold(thresholds)
    return len(sigmas) - 1 - accepts[..., ::-1].argmax(-1)


def cascade_answer(p: np.ndarray, sigmas: Sequence[float], thresholds: Sequence[float]) -> np.ndarray:
    """The class that F answers: (...) int64. It takes the arguments of `accepting_scale`."""
    scale = accepting_scale(p, sigmas, thresholds)
    return np.take_along_axis(np.argmax(p, axis=-1), scale[..., None], -1)[..., 0]


def acceptance_radii(
    p: np.ndarray, sigmas: Sequence[float], thresholds: Sequence[float], c: int | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A_k and B_k of the class `c` (...), each (..., K) float64. It takes the arguments of `accepting_scale`."""
    p = np.asarray(p, float)
    is_c = np.arange(p.shape[-1]) == np.asarray(c)[..., None, None]
    sigmas, tau = np.asarray(sigmas, float), with_first_threshold(thresholds)
    r = sigmas * ndtri(np.where(is_c, p, 0).sum(-1))
    q = -sigmas * ndtri(np.where(is_c, 0, p).max(-1))
    with np.errstate(invalid="ignore"):  # no class has votes: R is -inf, Q is inf
        m = np.nan_to_num((r + q) / 2, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        return np.fmin(r - tau, m), np.fmax(q + tau, m)


def path_radii(accept: np.ndarray, keep_out: np.ndarray) -> np.ndarray:
    """The radius of each path, (..., K), from the A_k and B_k: path j has min(A_j, B_{j+1}, ..., B_K)."""
    above = np.minimum.accumulate(keep_out[..., ::-1], axis=-1)[..., ::-1]
    above = np.concatenate([above[..., 1:], np.full_like(above[..., :1], np.inf)], axis=-1)
    return np.minimum(accept, above)


def cascade_radius(
    p: np.ndarray, sigmas: Sequence[float], thresholds: Sequence[float], c: int | np.ndarray
) -> np.ndarray:
    """F answers `c` (...) at every point closer than this: (...) float64, pixel units; negative where it does not.

    It takes the arguments of `accepting_scale`.
    """
    return path_radii(*acceptance_radii(p, sigmas, thresholds, c)).max(-1)


def multi_scale_radius(
    p: np.ndarray, sigmas: Sequence[float], thresholds: Sequence[float], c: int | np.ndarray
) -> np.ndarray:
    """The radius of Jeong & Shin for `c` (...), the answer of F: (...) float64. Arguments as for `accepting_scale`."""
    p, sigmas = np.asarray(p, float), np.asarray(sigmas, float)
    is_c = np.arange(p.shape[-1]) == np.asarray(c)[..., None, None]
    others_below = with_first_threshold(thresholds) - sigmas * ndtri(np.where(is_c, 0, p).max(-1))
    paths = path_radii(acceptance_radii(p, sigmas, thresholds, c)[0], others_below)
    return np.take_along_axis(paths, accepting_scale(p, sigmas, thresholds)[..., None], -1)[..., 0]
