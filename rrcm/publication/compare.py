"""The figures of this run beside the published ones of the same settings, which another machine may have computed.

Other CPUs round differently and so train other networks. This says where figures differ, and whether by more than the
choice of test images explains. It imports no torch, so that it takes no time at the end of a run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.special import ndtri

from rrcm.certification.results import read_certificates, sigma_name
from rrcm.config import Config, load_config
from rrcm.evaluation.metrics import (
    Certificates,
    Interval,
    accuracy_difference,
    acr_difference,
    average_certified_radius,
    best_sigma_table,
    certified_accuracy,
)
from rrcm.methods import METHODS
from rrcm.publication.objects import open_local_run
from rrcm.publication.result import Result, find_results, model_runs
from rrcm.utils.errors import RRCMError

LEVEL = 0.05  # chance that any figure of an equally good run is called beyond chance
# settings that decide no certificate
NO_RESULT = dict.fromkeys(["device", "launcher", "derived", "attack", "latency", "report"], True)
NO_RESULT |= {"data": {"root", "workers"}}


class Difference(NamedTuple):
    """A figure of two runs that differs between them."""

    figure: str
    here: float
    published: float
    interval: Interval  # of the difference, at a level that all figures share
    digits: str

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.interval.low <= 0 <= self.interval.high

    def __str__(self) -> str:
        values = [format(value, self.digits) for value in (self.here, self.published)]
        low, high = (format(bound, f"+{self.digits}") for bound in self.interval[1:])
        verdict = "beyond chance" if self.beyond_chance else "may be chance"
        return f"  {self.figure}: {values[0]}, published {values[1]}, difference {low} to {high}: {verdict}"


def compare_with_published(root: Path) -> str | None:
    """Where the figures of the run in `root` differ from the published ones of the same settings and seed.

    None if nothing with these settings is published, or it is not on this machine. Raises `RRCMError` for files that
    cannot be read.
    """
    config = load_config(root / "params.yaml")
    result = find_same_settings(config, root)
    if result is None:
        return None
    with open_local_run(result, "certificates/") as run:
        if run is None:
            return None
        here, published = (read_all_certificates(config, folder) for folder in (root, run))
    if all(here[key].equals(published[key]) for key in here):
        return f"Every certificate is that of {result.label}, published with the same settings."
    found, count = find_differences(config, here, published)
    beyond = sum(each.beyond_chance for each in found)
    head = f"{len(found)} of {count} figures differ from {result.label}, published with the same settings; "
    head += f"{beyond or 'none'} beyond chance"
    if not found:
        return f"{head}."
    kind = f"paired intervals over the test images, {100 * (1 - LEVEL):.0f} % for all {count} together"
    return "\n".join([f"{head} ({kind}):", *map(str, found)])


def find_same_settings(config: Config, root: Path) -> Result | None:
    """The first published result whose settings are those of `config` in all that decides a certificate."""
    wanted = config.model_dump(exclude=NO_RESULT)
    for result in find_results(root):
        try:
            published = load_config(result.folder / "params.yaml")
        except RRCMError:  # of an older version of the settings: `make verify` says more
            continue
        if published.model_dump(exclude=NO_RESULT) == wanted:
            return result
    return None


def read_all_certificates(config: Config, root: Path) -> Certificates:
    """The certificates of all models of a run."""
    return {
        (method, sigma): read_certificates(root / f"certificates/{method}/{sigma_name(sigma)}.tsv")
        for method, sigma in model_runs(config, config.methods)
    }


def find_differences(config: Config, here: Certificates, published: Certificates) -> tuple[list[Difference], int]:
    """(figures that differ, all figures): of each method, certified accuracy (%) at each radius, and ACR.

    Each with the best sigma of its own run. The intervals share `LEVEL` (Bonferroni).
    """
    for key, frame in here.items():
        if not frame["idx"].equals(published[key]["idx"]):
            raise RRCMError(f"{'/'.join(map(str, key))}: certifies other images than the published run; certify again")
    count = len(config.methods) * (len(config.report.radii) + 1)
    quantile = float(-ndtri(LEVEL / count / 2))
    figures = [
        figure
        for method in config.methods
        for figure in _figures(method, config.sigmas, config.report.radii, here, published, quantile)
    ]
    return [figure for figure in figures if figure.here != figure.published], count


def _figures(
    method: str,
    sigmas: Sequence[float],
    radii: Sequence[float],
    here: Certificates,
    published: Certificates,
    quantile: float,
) -> Iterator[Difference]:
    label, runs = (
        METHODS[method].label,
        [{(method, sigma): each[method, sigma] for sigma in sigmas} for each in (here, published)],
    )
    best = [best_sigma_table(run, radii)["sigma"] for run in runs]
    for place, radius in enumerate(radii):
        frames = [run[method, sigma[place]] for run, sigma in zip(runs, best, strict=True)]
        values = [100 * float(certified_accuracy(frame, [radius])[0]) for frame in frames]
        interval = Interval(*(100 * bound for bound in accuracy_difference(*frames, radius, quantile)))
        yield Difference(f"{label}, accuracy (%) at r = {radius:g}", *values, interval, ".1f")
    frames = [max(run.values(), key=average_certified_radius) for run in runs]
    values = [average_certified_radius(frame) for frame in frames]
    yield Difference(f"{label}, ACR", *values, acr_difference(*frames, quantile), ".3f")
