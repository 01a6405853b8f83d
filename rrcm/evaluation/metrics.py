"""What is computed from certificate frames: certified accuracy, ACR, envelopes, intervals and the paper's tables.

A certificate frame has the columns of `rrcm.certification.results`. All functions are pure.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

Certificates = Mapping[tuple[str, float], pd.DataFrame]  # (method, sigma) -> frame


def certified_accuracy(frame: pd.DataFrame, radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share of images that are correct with radius >= r, for each r in `radii` (R,). Abstentions count as wrong."""
    certified = np.sort(frame.loc[frame["correct"] == 1, "radius"])
    return (len(certified) - np.searchsorted(certified, radii)) / len(frame)


def certified_at(frame: pd.DataFrame, radius: float) -> np.ndarray:
    """(N,) int64: 1 for each image that is correct with at least this radius, else 0."""
    return (frame["correct"] * (frame["radius"] >= radius)).to_numpy()


def certified_radii(frame: pd.DataFrame) -> np.ndarray:
    """(N,) the radius of each image where it is correct, else 0. Its mean is the ACR."""
    return (frame["radius"] * frame["correct"]).to_numpy()


def average_certified_radius(frame: pd.DataFrame) -> float:
    """ACR (Zhai et al. 2020), in pixel units."""
    return float(certified_radii(frame).mean())


def acr_difference(one: pd.DataFrame, other: pd.DataFrame) -> tuple[float, float]:
    """ACR of `one` less that of `other`, and the half width of its 95 % interval. Rows are the same images in order."""
    return mean_difference(certified_radii(one), certified_radii(other))


def mean_difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean of `one` - `other` and the half width of its 95 % normal interval, both (N,) with one value per image."""
    difference = one - other
    spread = difference.std(ddof=1) if len(difference) > 1 else math.inf
    return float(difference.mean()), float(NORMAL_95 * spread / math.sqrt(len(difference)))


def wilson_interval(share: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % confidence interval of a proportion observed as `share` of `count` images: (lower, upper)."""
    z2 = NORMAL_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return centre - half, centre + half


def envelope(frames: Iterable[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """The highest certified accuracy of several models as an exact step curve.

    Returns (radii, accuracy), both (K,). accuracy[k] holds on the half-open interval (radii[k-1], radii[k]], so draw it
    with steps before the point ("pre"). The curve starts at r = 0 and ends with the drop to 0.
    """
    frames = list(frames)
    radii = np.unique(np.concatenate([[0.0], *(frame.loc[frame["correct"] == 1, "radius"] for frame in frames)]))
    accuracy = np.max([certified_accuracy(frame, radii) for frame in frames], axis=0)
    return np.append(radii, radii[-1]), np.append(accuracy, 0.0)


def summary(frame: pd.DataFrame, radii: Sequence[float]) -> dict:
    """The numbers of one run: `acr`, then certified accuracy (a share) under each radius."""
    return {"acr": average_certified_radius(frame)} | dict(zip(radii, certified_accuracy(frame, radii), strict=True))


def mean_samples(frame: pd.DataFrame) -> float:
    """Mean number of noisy samples per image; NaN if the frame does not have it."""
    return float(frame["samples"].mean()) if "samples" in frame else math.nan


def per_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """One row per method and sigma: `method`, `sigma`, `images`, `samples` (mean), and the columns of `summary`."""
    rows = [
        {"method": method, "sigma": sigma, "images": len(frame), "samples": mean_samples(frame)} | summary(frame, radii)
        for (method, sigma), frame in certificates.items()
    ]
    return pd.DataFrame(rows)


def best_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """The paper's Table 1, one row per method and radius.

    Columns: `method`, `radius`, `sigma`, `certified_accuracy`, `at_zero`. `sigma` has the highest certified accuracy at
    that radius (the smaller one on ties). `at_zero` is the certified accuracy of the same model at r = 0.
    """
    rows = []
    for method in dict.fromkeys(method for method, _ in certificates):
        of_sigma = {sigma: frame for (name, sigma), frame in certificates.items() if name == method}
        for radius in radii:
            accuracy = {sigma: certified_accuracy(of_sigma[sigma], [radius])[0] for sigma in sorted(of_sigma)}
            best = max(accuracy, key=accuracy.get)  # the first of equals
            rows.append(
                {
                    "method": method,
                    "radius": radius,
                    "sigma": best,
                    "certified_accuracy": accuracy[best],
                    "at_zero": certified_accuracy(of_sigma[best], [0.0])[0],
                }
            )
    return pd.DataFrame(rows)
