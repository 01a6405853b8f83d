"""Certified accuracy, ACR, envelopes, confidence intervals and the paper's tables, computed from certificate frames.

A certificate frame has the columns of `rrcm.certification.results`. All functions are pure.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy.special import stdtrit

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

Certificates = Mapping[tuple[str, float], pd.DataFrame]  # (method, sigma) -> frame
Name = TypeVar("Name", bound=Hashable)  # of a frame


class Interval(NamedTuple):
    """An estimate with its confidence interval, which is a 95 % one unless stated otherwise."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Interval":
        """The interval in another unit, such as 100 times as large in percent."""
        return Interval(*(factor * bound for bound in self))

    def cut(self, least: float, most: float) -> "Interval":
        """The part of the interval between the smallest and the largest possible value of the estimated quantity.

        It covers the quantity whenever the whole interval does, so it has the same confidence.
        """
        return Interval(self.value, *np.clip(self[1:], least, most).tolist())


def certified_accuracy(frame: pd.DataFrame, radii: Sequence[float] | np.ndarray) -> np.ndarray:
    """Share of images that are correct with radius >= r, for each r in `radii` (R,). An abstention counts as wrong."""
    certified = np.sort(frame["radius"].to_numpy()[frame["correct"].to_numpy() == 1])
    return (len(certified) - np.searchsorted(certified, radii)) / len(frame)


def certified_at(frame: pd.DataFrame, radius: float) -> np.ndarray:
    """(N,) int64: 1 for each image that is correct with at least this radius, else 0."""
    return (frame["correct"] * (frame["radius"] >= radius)).to_numpy()


def certified_radii(frame: pd.DataFrame) -> np.ndarray:
    """(N,) float64: the radius of each correct image, and 0 for the others. The mean is the ACR."""
    return (frame["radius"] * frame["correct"]).to_numpy()


def average_certified_radius(frame: pd.DataFrame) -> float:
    """ACR (Zhai et al. 2020), in pixel units."""
    return float(certified_radii(frame).mean())


def acr_standard_error(frame: pd.DataFrame) -> float:
    """The standard error of the ACR over the test images, in pixel units. NaN for a single image."""
    return float(certified_radii(frame).std(ddof=1) / math.sqrt(len(frame))) if len(frame) > 1 else math.nan


def acr_difference(one: pd.DataFrame, other: pd.DataFrame, quantile: float = NORMAL_95) -> Interval:
    """Difference of the ACRs of `one` and `other`, with the normal interval of the mean difference.

    Their rows are the same images. `quantile` is the two-sided quantile of the normal distribution.
    """
    differences = certified_radii(one) - certified_radii(other)
    spread = differences.std(ddof=1) if len(differences) > 1 else math.inf
    mean, half_width = float(differences.mean()), float(quantile * spread / math.sqrt(len(differences)))
    return Interval(mean, mean - half_width, mean + half_width)


def accuracy_difference(one: pd.DataFrame, other: pd.DataFrame, radius: float, quantile: float = NORMAL_95) -> Interval:
    """Difference of the certified accuracies (shares) of `one` and `other` at `radius`, on the same images in each row.

    The interval is the adjusted Wald interval for paired proportions (Bonett & Price 2012, eq. 4). It adds one image
    that only the first classifier gets right and one that only the second gets right, so it has a width even if the two
    classifiers agree on all images. It is cut at -1 and 1, as it reaches beyond them with a few images. `quantile` is
    the two-sided quantile of the normal distribution.
    """
    first, second = certified_at(one, radius), certified_at(other, radius)
    gained, lost, count = int((first > second).sum()), int((first < second).sum()), len(first)
    more, less = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    centre, half_width = more - less, quantile * math.sqrt((more + less - (more - less) ** 2) / (count + 2))
    return Interval((gained - lost) / count, centre - half_width, centre + half_width).cut(-1.0, 1.0)


def mean_over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of one value per seed with its t interval, which is infinite for a single seed."""
    count = len(values)
    if count < 2:
        return Interval(float(np.mean(values)), -math.inf, math.inf)
    mean, half_width = np.mean(values), stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count)
    return Interval(float(mean), float(mean - half_width), float(mean + half_width))


def wilson_interval(share: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % confidence interval of a proportion observed as `share` of `count` images: (lower, upper)."""
    z2 = NORMAL_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return centre - half, centre + half


def certified_share(frame: pd.DataFrame, radius: float) -> Interval:
    """Certified accuracy at `radius` with its 95 % Wilson interval."""
    share = certified_accuracy(frame, [radius])
    return Interval(*(float(bound[0]) for bound in (share, *wilson_interval(share, len(frame)))))


def envelope(frames: Iterable[pd.DataFrame]) -> tuple[np.ndarray, np.ndarray]:
    """The highest certified accuracy of several models at each radius, as an exact step curve.

    Returns (radii, accuracy), both (K,). accuracy[k] holds on the half-open interval (radii[k-1], radii[k]], so the
    curve is drawn with steps before the points ("pre"). It starts at r = 0 and ends with the drop to 0.
    """
    frames = list(frames)
    radii = np.unique(np.concatenate([[0.0], *(frame.loc[frame["correct"] == 1, "radius"] for frame in frames)]))
    accuracy = np.max([certified_accuracy(frame, radii) for frame in frames], axis=0)
    return np.append(radii, radii[-1]), np.append(accuracy, 0.0)


def summary(frame: pd.DataFrame, radii: Sequence[float]) -> dict:
    """The numbers of one run: `acr`, its standard error `acr_se`, and certified accuracies as `accuracy_columns`."""
    acr = {"acr": average_certified_radius(frame), "acr_se": acr_standard_error(frame)}
    return acr | accuracy_columns(certified_accuracy(frame, radii), radii, len(frame))


def accuracy_columns(shares: Sequence[float] | np.ndarray, radii: Sequence[float], count: int) -> dict[str, float]:
    """Certified accuracies `shares` (R,) of `count` images as `r_R`, and their Wilson intervals `low_r_R`, `high_r_R`.

    R is the radius, such as in `r_0.25`.
    """
    low, high = wilson_interval(np.asarray(shares), count)
    parts = {"": shares, "low_": low, "high_": high}
    return {
        f"{part}r_{r:g}": float(value) for part, values in parts.items() for r, value in zip(radii, values, strict=True)
    }


def mean_samples(frame: pd.DataFrame) -> float:
    """Mean number of noisy samples per image, or NaN if the frame does not have it."""
    return float(frame["samples"].mean()) if "samples" in frame else math.nan


def on_common_images(certificates: Mapping[Name, pd.DataFrame]) -> dict[Name, pd.DataFrame]:
    """Each frame with only the images that all frames have, in the order of `idx`."""
    first, *others = (frame["idx"].to_numpy() for frame in certificates.values())
    if (np.diff(first) > 0).all() and all(np.array_equal(first, idx) for idx in others):
        return dict(certificates)
    common = sorted(set(first).intersection(*others))
    return {run: frame.set_index("idx").loc[common].reset_index() for run, frame in certificates.items()}


def leaders(frames: Mapping[Name, pd.DataFrame], radius: float | None = None) -> set[Name]:
    """The names with the highest certified accuracy at `radius`, or the highest ACR, and those not significantly below.

    A name is not significantly below the first of the highest if the 95 % interval of their paired difference, on the
    images of both, contains 0. None leads if the highest value is 0.
    """

    def value(name: Name) -> float:
        frame = frames[name]
        return average_certified_radius(frame) if radius is None else float(certified_accuracy(frame, [radius])[0])

    highest = max(frames, key=value)
    if not value(highest):
        return set()
    names = {highest}
    for name in frames:
        one, other = on_common_images({"one": frames[highest], "other": frames[name]}).values()
        difference = acr_difference(one, other) if radius is None else accuracy_difference(one, other, radius)
        if difference.low <= 0:
            names.add(name)
    return names


def per_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """One row per method and sigma: `method`, `sigma`, `images`, `samples` (mean), and the columns of `summary`."""
    rows = [
        {"method": method, "sigma": sigma, "images": len(frame), "samples": mean_samples(frame)} | summary(frame, radii)
        for (method, sigma), frame in certificates.items()
    ]
    return pd.DataFrame(rows)


def best_sigma_table(certificates: Certificates, radii: Sequence[float]) -> pd.DataFrame:
    """The paper's Table 1, one row per method and radius.

    Columns: `method`, `radius`, `sigma`, `certified_accuracy`, `at_zero`, `images`. `sigma` is the noise with the
    highest certified accuracy at that radius, and the smaller one on ties. `at_zero` is the certified accuracy of the
    same model at r = 0.
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
                    "images": len(of_sigma[best]),
                }
            )
    return pd.DataFrame(rows)


def differences_table(certificates: Certificates, reference: str, radii: Sequence[float]) -> pd.DataFrame:
    """Each method minus `reference`: in certified accuracy at each radius, and in ACR at each sigma.

    Certified accuracies are for the best sigma of each method. Both measures are on the images that the method and the
    reference have in common. One row per method and measure: `method`, `measure` ("certified_accuracy" or "acr"), `at`
    (radius or sigma), `value` of the method, `difference`, `low`, `high`, `images`. In the rows of the reference,
    `difference`, `low` and `high` are NaN.
    """
    methods = [reference, *(name for name in dict.fromkeys(name for name, _ in certificates) if name != reference)]
    rows = []
    for method in methods:
        pair = on_common_images({run: frame for run, frame in certificates.items() if run[0] in (method, reference)})
        best, images = best_sigma_table(pair, radii).set_index(["method", "radius"]), len(next(iter(pair.values())))
        for radius in radii:
            one, other = (pair[name, best.loc[(name, radius), "sigma"]] for name in (method, reference))
            value = best.loc[(method, radius), "certified_accuracy"]
            rows.append((method, "certified_accuracy", radius, value, *accuracy_difference(one, other, radius), images))
        for sigma in sorted({sigma for _, sigma in pair}):
            one, other = pair[method, sigma], pair[reference, sigma]
            rows.append((method, "acr", sigma, average_certified_radius(one), *acr_difference(one, other), images))
    table = pd.DataFrame(rows, columns=["method", "measure", "at", "value", "difference", "low", "high", "images"])
    table.loc[table["method"] == reference, ["difference", "low", "high"]] = np.nan
    return table
