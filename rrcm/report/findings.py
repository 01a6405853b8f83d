"""The numbers with which the page of a report begins. templates/report.html.jinja has the sentences."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rrcm.config import Config
from rrcm.evaluation.metrics import (
    Certificates,
    Interval,
    acr_difference,
    average_certified_radius,
    best_sigma_table,
    certified_accuracy,
    mean_samples,
    on_common_images,
)
from rrcm.methods import expert_of
from rrcm.report.deployment import Shortfall, shortfalls, single_sigmas
from rrcm.report.inputs import Inputs
from rrcm.report.tables import method_labels, reference_method

LEAST_ACCURACY = 0.1  # radii are named at which some method has this certified accuracy


class AtRadius(NamedTuple):
    """Certified accuracies (%) at a radius."""

    radius: float
    accuracy: float  # of one deployment
    best: float  # of the best sigma at this radius


class Deployed(NamedTuple):
    """What one deployment certifies, and how far it is from the best of several."""

    label: str  # of the method
    sigma: float | None  # a single one; None for a cascade
    at: list[AtRadius]  # one or two radii
    acr: float
    shortfall: Shortfall | None  # of a cascade
    samples: float  # mean per image
    ratio: float | None  # of the samples to those of the smallest sigma alone


class Ahead(NamedTuple):
    """The two best methods, in ACR at the sigma at which the first has the highest."""

    group: str  # the costs that are equal, or "any cost"
    first: str
    second: str
    sigma: float
    difference: Interval

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.difference.low > 0


class Cost(NamedTuple):
    """Seconds to certify one image."""

    label: str  # of the reference method
    seconds: float
    n: int
    device: str
    slowest: str  # the method that takes longest; "" if there is only one
    ratio: float  # of its time to that of the reference


class Findings(NamedTuple):
    """The numbers of the first sentences."""

    deployed: Deployed
    ahead: Ahead | None
    cost: Cost | None


def find(config: Config, inputs: Inputs, groups: Mapping[str, Sequence[str]]) -> Findings:
    """The findings. `groups` are the methods that are compared, by the costs that are equal, the first one first."""
    certificates = inputs.by_bound(config.certify.bound)
    name = next(iter(groups), None)
    return Findings(
        deployed=_deployed(config, inputs, certificates),
        ahead=None if name is None else _ahead(name, groups[name], inputs.certificates),
        cost=_cost(config, inputs.latency) if inputs.latency else None,
    )


def _deployed(config: Config, inputs: Inputs, certificates: Certificates) -> Deployed:
    """Of the first cascade, or else of the model with the highest ACR."""
    if inputs.cascades:
        method, cascade = next(iter(inputs.cascades.items()))
        frame, sigma, singles = cascade.label_aware, None, single_sigmas(method, cascade, certificates)
        shortfall = shortfalls({method: cascade}, certificates)[0]
        ratio = mean_samples(frame) / mean_samples(next(iter(singles.values())))
    else:
        method, sigma = max(certificates, key=lambda run: average_certified_radius(certificates[run]))
        frame, shortfall, ratio = certificates[method, sigma], None, None
        singles = {run: each for run, each in certificates.items() if run[0] == method}
    best = best_sigma_table(singles, config.report.radii).set_index("radius")["certified_accuracy"]
    often = [radius for radius in config.report.radii if radius > 0 and best[radius] >= LEAST_ACCURACY]
    radii = list(dict.fromkeys([often[0], often[-1]])) if often else config.report.radii[:1]
    shares = certified_accuracy(frame, radii)
    at = [
        AtRadius(radius, 100 * float(own), 100 * float(best[radius])) for radius, own in zip(radii, shares, strict=True)
    ]
    samples = mean_samples(frame)
    return Deployed(method_labels([method])[0], sigma, at, average_certified_radius(frame), shortfall, samples, ratio)


def _ahead(group: str, methods: Sequence[str], certificates: Certificates) -> Ahead:
    """A joint network and its own experts count as one method, of which the better one is named."""
    shared = on_common_images({run: frame for run, frame in certificates.items() if run[0] in methods})
    acr = {run: average_certified_radius(frame) for run, frame in shared.items()}
    first = max(acr, key=acr.get)
    others = [run for run in acr if run[1] == first[1] and expert_of(run[0]) != expert_of(first[0])]
    second = max(others, key=acr.get)
    labels = method_labels([first[0], second[0]])
    return Ahead(group, *labels, first[1], acr_difference(shared[first], shared[second]))


def _cost(config: Config, record: Mapping) -> Cost:
    """By the medians over the rounds of the latency stage."""
    methods, n = record["methods"], config.latency.n[0]
    reference = reference_method(methods)
    per_sample = {name: np.array(each["seconds_per_sample"]) for name, each in methods.items()}
    ratios = {name: float(np.median(each / per_sample[reference])) for name, each in per_sample.items()}
    slowest = max(ratios, key=ratios.get)
    seconds = float(np.median(per_sample[reference])) * (config.certify.n0 + n)
    labels = method_labels([reference, slowest])
    return Cost(labels[0], seconds, n, record["device"], "" if slowest == reference else labels[1], ratios[slowest])
