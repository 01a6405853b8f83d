"""This run against published certificates, image by image: certified accuracy and ACR, with paired differences.

All figures are about the images that every compared method here and every published file has. A subset of the test
images may be easier than the rest, so it cannot be compared with a published table of all images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rrcm.evaluation.common_images import have_same_images
from rrcm.evaluation.metrics import (
    Certificates,
    accuracy_difference,
    acr_difference,
    average_certified_radius,
    certified_accuracy,
)
from rrcm.methods import CASCADE
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.deployment import BEST
from rrcm.report.tables import Table, interval_text, method_labels

Frames = Mapping[float, pd.DataFrame]  # certificates by sigma; the best sigma is chosen at each radius
ONE = 0.0  # stands for the sigma of a cascade, which has no single one


@dataclass(frozen=True)
class Against:
    """Certificates on common images. All frames have the same images in the same order."""

    ours: Mapping[str, Frames]  # by method
    cascades: Mapping[str, pd.DataFrame]  # by method
    published: Mapping[str, Frames]  # by label
    images: int
    fewer: list[str]  # methods that are left out, as they certify fewer images than others
    others: list[str]  # labels of files that are left out, as they have other images or other labels


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a classifier, or several of which the best is taken at each radius."""

    name: str  # method, or label of the published file
    deployed: str  # a sigma, "best" or "cascade"
    frames: Frames

    def at(self, radius: float) -> pd.DataFrame:
        """The certificates with the highest certified accuracy at this radius, of the smaller sigma on ties."""
        return max(self.frames.values(), key=lambda frame: certified_accuracy(frame, [radius])[0])

    @property
    def alone(self) -> pd.DataFrame | None:
        """The certificates if there is a single classifier, which has an ACR. Otherwise None."""
        return next(iter(self.frames.values())) if self.deployed != BEST else None


def match_published(
    certificates: Certificates, cascades: Mapping[str, Cascade], external: Certificates
) -> Against | None:
    """The certificates that can be compared. None if no published file has the images of this run.

    `certificates` use the binary bound, like published ones. Cascades that use the margin bound are left out.
    """
    most = max(len(frame) for frame in certificates.values())
    own = {run: frame for run, frame in certificates.items() if len(frame) == most}
    labels = next(iter(own.values())).set_index("idx")["label"]
    same = {run: frame for run, frame in external.items() if have_same_images(labels, frame.set_index("idx")["label"])}
    if not same:
        return None
    deployed = {(name, ONE): each.label_aware for name, each in cascades.items() if each.record.bound == "binary"}
    together = [*own.values(), *same.values(), *deployed.values()]
    common = sorted(set.intersection(*(set(frame["idx"]) for frame in together)))

    def by_name(frames: Certificates) -> dict[str, dict[float, pd.DataFrame]]:
        grouped: dict[str, dict[float, pd.DataFrame]] = {}
        for (name, sigma), frame in sorted(frames.items(), key=lambda run: run[0][1]):
            grouped.setdefault(name, {})[sigma] = frame.set_index("idx").loc[common].reset_index()
        return {name: grouped[name] for name in dict.fromkeys(name for name, _ in frames)}

    return Against(
        ours=by_name(own),
        cascades={name: frames[ONE] for name, frames in by_name(deployed).items()},
        published=by_name(same),
        images=len(common),
        fewer=list(dict.fromkeys(run[0] for run in certificates if run not in own)),
        others=[f"{label} at σ = {sigma:g}" for label, sigma in external if (label, sigma) not in same],
    )


def our_sides(against: Against) -> list[Side]:
    """Each method with its best sigma at each radius, and each cascade."""
    sides = [Side(name, BEST, frames) for name, frames in against.ours.items()]
    return sides + [Side(name, CASCADE, {ONE: frame}) for name, frame in against.cascades.items()]


def _alone(name: str, frames: Frames) -> list[Side]:
    return [Side(name, f"{sigma:g}", {sigma: frame}) for sigma, frame in frames.items()]


def pairs(against: Against) -> Iterator[tuple[Side, Side]]:
    """The pairs to compare: both with their best sigma, both with the same sigma, and a cascade with each of these."""
    for side in our_sides(against):
        for label, frames in against.published.items():
            yield side, Side(label, BEST, frames)
            singles = _alone(label, frames)
            if side.deployed == CASCADE:
                yield from ((side, single) for single in singles)
            else:
                own = {each.deployed: each for each in _alone(side.name, side.frames)}
                yield from ((own[single.deployed], single) for single in singles if single.deployed in own)


def pairs_table(against: Against, radii: Sequence[float], seed: int) -> Table:
    """Every pair of `pairs`: the difference in certified accuracy at each radius, and of single classifiers in ACR.

    The numbers have a row for each pair and measure. The text has percentage points, with 95 % intervals.
    """
    rows, text = [], []
    for one, other in pairs(against):
        who = {"seed": seed, "method": one.name, "deployment": one.deployed}
        who |= {"published": other.name, "published_sigma": other.deployed}
        cells = dict(zip(("method", "deployed", "published", "its σ"), _names(one, other), strict=True))
        for radius in radii:
            frames = one.at(radius), other.at(radius)
            value, published = (certified_accuracy(frame, [radius])[0] for frame in frames)
            interval = accuracy_difference(*frames, radius)
            measured = {"measure": "certified_accuracy", "at": radius, "value": value, "published_value": published}
            rows.append(who | measured | {"difference": interval.value, "low": interval.low, "high": interval.high})
            cells[f"r = {radius:g}"] = interval_text(interval.times(100), "+.1f")
        if one.alone is not None and other.alone is not None:
            value, published = map(average_certified_radius, (one.alone, other.alone))
            interval = acr_difference(one.alone, other.alone)
            measured = {"measure": "acr", "at": np.nan, "value": value, "published_value": published}
            rows.append(who | measured | {"difference": interval.value, "low": interval.low, "high": interval.high})
            cells["ACR"] = interval_text(interval, "+.3f")
        text.append(cells)
    return Table(pd.DataFrame(rows).assign(images=against.images), pd.DataFrame(text).fillna(""))


def values_table(against: Against, radii: Sequence[float]) -> Table:
    """Certified accuracy at each radius, and ACR at each sigma, for everything that is compared.

    The ACR belongs to each sigma alone. A cascade has one ACR, in a column of its own.
    """
    published = [Side(label, BEST, frames) for label, frames in against.published.items()]
    sigmas = sorted({sigma for frames in (*against.ours.values(), *against.published.values()) for sigma in frames})
    rows, text = [], []
    for side in [*our_sides(against), *published]:
        values = {f"r_{radius:g}": certified_accuracy(side.at(radius), [radius])[0] for radius in radii}
        acr = {sigma: average_certified_radius(frame) for sigma, frame in side.frames.items()}
        row = {"method": side.name, "deployment": side.deployed} | values
        rows.append(row | {f"acr_{sigma:g}" if sigma else "acr_cascade": value for sigma, value in acr.items()})
        cells = {"method": _label(side), "deployed": _deployed(side)}
        cells |= {f"r = {radius:g}": f"{100 * values[f'r_{radius:g}']:.1f}" for radius in radii}
        cells |= {f"ACR, σ = {sigma:g}": f"{acr[sigma]:.3f}" if sigma in acr else "" for sigma in sigmas}
        cells["ACR, cascade"] = f"{acr[ONE]:.3f}" if ONE in acr else ""
        text.append(cells)
    return Table(pd.DataFrame(rows).assign(images=against.images), _without_empty(pd.DataFrame(text)))


def strongest_table(against: Against, radii: Sequence[float], seed: int) -> Table:
    """Each method and each cascade minus the strongest published classifier at each radius, and by ACR at each sigma.

    A cascade's ACR is compared with the highest of any published classifier. The numbers name the published one.
    """
    rows, text = [], []
    for side in our_sides(against):
        cells = {"method": _label(side), "deployed": _deployed(side)}
        for measure, at, one, other in _strongest(against, side, radii):
            if measure == "acr":
                interval, name = acr_difference(one, other.alone), f"ACR, σ = {at:g}" if at else "ACR, cascade"
                cells[name] = f"{interval_text(interval, '+.3f')} {other.name}"
            else:
                interval = accuracy_difference(one, other.at(at), at)
                cells[f"r = {at:g}"] = f"{interval_text(interval.times(100), '+.1f')} {other.name}"
            row = {"seed": seed, "method": side.name, "deployment": side.deployed, "measure": measure, "at": at}
            row |= {"published": other.name, "difference": interval.value, "low": interval.low, "high": interval.high}
            rows.append(row)
        text.append(cells)
    return Table(pd.DataFrame(rows).assign(images=against.images), _without_empty(pd.DataFrame(text).fillna("")))


def _strongest(against: Against, side: Side, radii: Sequence[float]) -> Iterator[tuple[str, float, pd.DataFrame, Side]]:
    """The measure, its radius or sigma, our certificates, and the published side that is strongest by this measure."""
    published = [Side(label, BEST, frames) for label, frames in against.published.items()]
    for radius in radii:
        strongest = max(published, key=lambda each: certified_accuracy(each.at(radius), [radius])[0])
        yield "certified_accuracy", radius, side.at(radius), strongest
    singles = [each for label, frames in against.published.items() for each in _alone(label, frames)]
    for sigma, frame in side.frames.items():
        rivals = [each for each in singles if sigma in (ONE, *each.frames)]
        if rivals:
            strongest = max(rivals, key=lambda each: average_certified_radius(each.alone))
            yield "acr", sigma, frame, strongest


def _names(one: Side, other: Side) -> tuple[str, str, str, str]:
    return _label(one), _deployed(one), other.name, _deployed(other)


def _label(side: Side) -> str:
    return method_labels([side.name])[0]


def _deployed(side: Side) -> str:
    return {BEST: "best σ", CASCADE: "one cascade"}.get(side.deployed, f"σ = {side.deployed}")


def _without_empty(text: pd.DataFrame) -> pd.DataFrame:
    """The text without columns in which all cells are empty."""
    return text[[name for name in text.columns if (text[name] != "").any()]]
