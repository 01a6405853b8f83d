"""What one deployment certifies: a cascade beside its sigmas, each alone and the best at each radius.

The best sigma at each radius takes one deployed classifier for each sigma, since nobody knows the radius in advance. It
is what published tables show. All certificates of a method are of the same base classifiers and the same images.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from rrcm.certification.cascade_rules import LABEL_AWARE, MULTI_SCALE
from rrcm.certification.cascade_votes import CASCADE_FILES
from rrcm.certification.record import CascadeRecord
from rrcm.evaluation.metrics import (
    Certificates,
    accuracy_columns,
    accuracy_difference,
    acr_difference,
    average_certified_radius,
    best_sigma_table,
    certified_accuracy,
    mean_samples,
    summary,
)
from rrcm.methods import CASCADE
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.tables import Table, differences_text, method_labels, with_images

BEST = "best"  # the best sigma at each radius; the other deployments are CASCADE, MULTI_SCALE and each sigma
NUMERALS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


class Shortfall(NamedTuple):
    """How far the certified accuracy of a cascade falls below the best sigma at each radius, and its ACR."""

    label: str  # of the method
    deployments: str  # that the best sigma takes, as a word
    points: float  # the largest shortfall at any radius, percentage points, rounded up; 0 if there is none
    radius: float  # where it is
    acr: float
    best_acr: float  # of a single sigma
    best_sigma: float
    can_pass: bool  # whether the single sigmas lose votes to "pass"


def numeral(count: int) -> str:
    """A number as a word if it is small, and otherwise in digits."""
    return NUMERALS.get(count, str(count))


def single_sigmas(method: str, cascade: Cascade, certificates: Certificates) -> dict[tuple[str, float], pd.DataFrame]:
    """The certificates of the cascade's base classifiers at each of its sigmas alone, by increasing sigma."""
    return {(method, sigma): certificates[method, sigma] for sigma in cascade.record.sigmas}


def deployment(
    cascades: Mapping[str, Cascade], certificates: Certificates, bound: str, radii: Sequence[float]
) -> Table:
    """Certified accuracy, ACR and samples of every deployment, all certified by `bound`, also the `certificates`.

    One row per method and deployment: "cascade", "multi-scale", each sigma, and "best". A cascade that was certified by
    the other bound has no row. `deployments` is the number of classifiers to deploy. `samples_ratio` is relative to the
    largest sigma alone. The best sigma at each radius is no classifier, so it has neither an ACR nor samples.
    """
    rows = []
    for method, cascade in cascades.items():
        singles = single_sigmas(method, cascade, certificates)
        frames = cascade.frames if cascade.record.bound == bound else {}
        frames |= {f"{sigma:g}": frame for (_, sigma), frame in singles.items()}
        largest = mean_samples(singles[method, cascade.record.sigmas[-1]])
        row = {"method": method, "bound": bound, "images": len(cascade.label_aware)}
        for name, frame in frames.items():
            measured = {"samples": mean_samples(frame), "samples_ratio": mean_samples(frame) / largest}
            rows.append(row | {"deployment": name, "deployments": 1} | measured | summary(frame, radii))
        best = accuracy_columns(best_sigma_table(singles, radii)["certified_accuracy"], radii, row["images"])
        rows.append(row | {"deployment": BEST, "deployments": len(singles)} | best)
    numbers = pd.DataFrame(rows)
    return Table(numbers, with_images(_deployment_text(numbers, radii), numbers["images"].tolist()))


def _deployment_text(numbers: pd.DataFrame, radii: Sequence[float]) -> pd.DataFrame:
    text = pd.DataFrame({"method": method_labels(numbers["method"])})
    text["deployed"] = [deployment_label(row.deployment, row.deployments) for row in numbers.itertuples()]
    for radius in radii:
        text[f"r = {radius:g}"] = [f"{100 * share:.1f}" for share in numbers[f"r_{radius:g}"]]
    text["ACR"] = [
        "" if np.isnan(row.acr) else f"{row.acr:.3f} ± {row.acr_se:.3f}"
        for row in numbers[["acr", "acr_se"]].itertuples()
    ]
    text["samples per image"] = ["" if np.isnan(mean) else f"{mean:,.0f}" for mean in numbers["samples"]]
    text["ratio"] = ["" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in numbers["samples_ratio"]]
    return text


def deployment_label(name: str, count: int) -> str:
    """What a reader calls a `deployment` that consists of `count` classifiers."""
    labels = {
        CASCADE: "one cascade",
        MULTI_SCALE: "one cascade, multi-scale rule",
        BEST: f"best σ at each radius ({numeral(count)} deployments)",
    }
    return labels.get(name, f"σ = {name} alone")


def deployed_frames(certificates: Certificates, cascades: Mapping[str, Cascade]) -> dict[tuple[str, str], pd.DataFrame]:
    """The certificates of all classifiers that can be deployed, by method and deployment: a sigma or `CASCADE`."""
    single = {(method, f"{sigma:g}"): frame for (method, sigma), frame in certificates.items()}
    return single | {(method, CASCADE): cascade.label_aware for method, cascade in cascades.items()}


def deployment_differences(
    cascades: Mapping[str, Cascade], certificates: Certificates, radii: Sequence[float], seed: int
) -> Table:
    """Each cascade minus the single sigmas by the same bound, on the same images, as `tables.differences` has it.

    In certified accuracy the difference is to the best sigma at each radius, in ACR to each sigma alone. `value` is of
    the cascade. `certificates` are by the bound of the cascades.
    """
    rows = []
    for method, cascade in cascades.items():
        singles, frame = single_sigmas(method, cascade, certificates), cascade.label_aware
        best = best_sigma_table(singles, radii).set_index("radius")["sigma"]
        for radius, share in zip(radii, certified_accuracy(frame, radii), strict=True):
            difference = accuracy_difference(frame, singles[method, best[radius]], radius)
            rows.append((seed, method, "certified_accuracy", radius, share, *difference, len(frame)))
        acr = average_certified_radius(frame)
        for (_, sigma), single in singles.items():
            rows.append((seed, method, "acr", sigma, acr, *acr_difference(frame, single), len(frame)))
    columns = ["seed", "method", "measure", "at", "value", "difference", "low", "high", "images"]
    numbers = pd.DataFrame(rows, columns=columns)
    images = numbers.groupby("method", sort=False)["images"].first()
    return Table(numbers, with_images(differences_text(numbers, "difference"), images.tolist()))


def largest_shortfall(frame: pd.DataFrame, singles: Sequence[pd.DataFrame]) -> tuple[float, float]:
    """The largest shortfall of `frame` below the best of `singles` at any radius, and the first radius that has it.

    All have the same images, so the share is exact up to rounding. It is negative if `frame` is ahead everywhere.
    """
    reached = [each.loc[each["correct"] == 1, "radius"] for each in (frame, *singles)]
    radii = np.unique(np.concatenate([[0.0], *reached]))  # certified accuracy falls only after these
    best = np.max([certified_accuracy(single, radii) for single in singles], axis=0)
    shortfall = np.round(best - certified_accuracy(frame, radii), 9)
    worst = int(np.argmax(shortfall))
    return float(shortfall[worst]), float(radii[worst])


def shortfalls(cascades: Mapping[str, Cascade], certificates: Certificates) -> list[Shortfall]:
    """A `Shortfall` for each method. `certificates` are by the bound of the cascades."""
    compared = []
    for method, cascade in cascades.items():
        singles = single_sigmas(method, cascade, certificates)
        share, radius = largest_shortfall(cascade.label_aware, list(singles.values()))
        acr = {sigma: average_certified_radius(frame) for (_, sigma), frame in singles.items()}
        best = max(acr, key=lambda sigma: acr[sigma])
        compared.append(
            Shortfall(
                label=method_labels([method])[0],
                deployments=numeral(len(singles)),
                points=max(math.ceil(1000 * share - 1e-6) / 10, 0.0),  # "at no radius more than" must be true
                radius=radius,
                acr=average_certified_radius(cascade.label_aware),
                best_acr=acr[best],
                best_sigma=best,
                can_pass=cascade.record.can_pass,
            )
        )
    return compared


def acceptance(cascades: Mapping[str, Cascade], certificates: Certificates) -> Table:
    """How each cascade decides: its thresholds, and the share of images whose certificate ends at each sigma.

    `settled_ratio` is the number of samples relative to the largest sigma alone, on the images that the largest sigma
    accepts. `pass` is the share of the selection votes for "pass" at a sigma, over the images for which it was asked.
    `certificates` are by the bound of the cascades.
    """
    rows, text = [], []
    for method, cascade in cascades.items():
        record, accepting = cascade.record, cascade.label_aware["accepting_sigma"]
        thresholds = dict(zip(record.sigmas[1:], record.thresholds, strict=True))
        accepts = {sigma: float((accepting == sigma).mean()) for sigma in record.sigmas}
        nothing, ratio = float(accepting.isna().mean()), settled_ratio(cascade, certificates, method)
        by_sigma = {"threshold": thresholds, "accepts": accepts, "pass": cascade.passed}
        row = {"method": method, "networks": len(record.models), "nothing_certified": nothing, "settled_ratio": ratio}
        row |= {f"{name}_seconds": seconds for name, seconds in cascade.seconds.items()}
        rows.append(row | {f"{name}_{s:g}": value for name, values in by_sigma.items() for s, value in values.items()})
        cells = {"method": method_labels([method])[0], "networks": str(len(record.models))}
        cells |= {f"τ at σ = {sigma:g}": f"{value:g}" for sigma, value in thresholds.items()}
        cells["chosen for"] = how_chosen(record)
        cells |= {f"accepted at σ = {sigma:g}": f"{100 * share:.1f}" for sigma, share in accepts.items()}
        cells["no certificate"] = f"{100 * nothing:.1f}"
        cells["ratio if settled"] = "" if np.isnan(ratio) else f"{ratio:.2f}"
        cells |= {f"{name} (s)": f"{seconds:,.1f}" for name, seconds in cascade.seconds.items()}
        cells |= {f"pass at σ = {sigma:g}": f"{100 * share:.1f}" for sigma, share in cascade.passed.items()}
        text.append(cells)
    return Table(pd.DataFrame(rows), pd.DataFrame(text).fillna(""))


def settled_ratio(cascade: Cascade, certificates: Certificates, method: str) -> float:
    """Samples of the cascade relative to the largest sigma alone, on the images that this sigma accepts; NaN if none.

    The images of both are the same, in the same order.
    """
    largest = cascade.record.sigmas[-1]
    settled = (cascade.label_aware["accepting_sigma"] == largest).to_numpy()
    both = (cascade.label_aware, certificates[method, largest])
    own, alone = (frame["samples"].to_numpy()[settled].sum() for frame in both)
    return float(own / alone) if settled.any() else math.nan


def how_chosen(record: CascadeRecord) -> str:
    """How the thresholds of a cascade were chosen."""
    chosen = record.chosen
    if chosen is None:
        return "not chosen but given"
    by = (
        "ACR"
        if chosen.by == "acr"
        else " + ".join(f"{weight:g} x accuracy at r = {float(radius):g}" for radius, weight in chosen.by.items())
    )
    return f"{by}, {chosen.images:,} validation images, n = {chosen.n:,}"


def add_metrics(values: dict, cascades: Mapping[str, Cascade], radii: Sequence[float]) -> None:
    """Add the values of cascades to `metrics`, under the names of their files in place of a sigma."""
    for method, cascade in cascades.items():
        for name, frame in cascade.frames.items():
            file = CASCADE_FILES[MULTI_SCALE if name == MULTI_SCALE else LABEL_AWARE]
            of_cascade = {"acr": average_certified_radius(frame), "samples": mean_samples(frame)}
            for radius, share in zip(radii, certified_accuracy(frame, radii).tolist(), strict=True):
                of_cascade[f"certified_r_{radius:g}".replace(".", "_")] = share
            for measure, value in of_cascade.items():
                values.setdefault(measure, {}).setdefault(method, {})[file] = round(value, 6)
