"""Compare the figures of a run with the published ones of the same settings, which may come from another machine.

CPUs of other types round differently, so they train other networks. The comparison lists the figures that differ, and
whether the choice of test images explains each difference. It imports no torch, so that it takes no time at the end of
a run.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.special import ndtri

from rrcm.certification.results import read_certificates
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
from rrcm.publication.result import Result, certificate_files, find_results
from rrcm.utils.errors import RRCMError

LEVEL = 0.05  # probability that any difference of an equally good run is called significant
# settings that have no effect on certificates
NO_RESULT = dict.fromkeys(
    ["device", "launcher", "plugin", "plugin_path", "derived", "attack", "latency", "report"], True
)
NO_RESULT |= {"data": {"root", "workers"}}


class Difference(NamedTuple):
    """A figure that may differ between this run and the published one."""

    figure: str
    here: float
    published: float
    interval: Interval  # of the difference, at a level that all figures share
    digits: str

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.interval.low <= 0 <= self.interval.high

    def __str__(self) -> str:
        values = [format(value, self.digits) for value in (self.here, self.published)]
        low, high = (format(bound, f"+{self.digits}") for bound in self.interval[1:])
        verdict = "significant" if self.is_significant else "not significant"
        return f"  {self.figure}: {values[0]}, published {values[1]}, difference {low} to {high}: {verdict}"


def compare_with_published(root: Path) -> str | None:
    """Where the figures of the run in `root` differ from the published ones of the same settings and seed.

    None if no result with these settings is published, or if its files are not on this machine. Raises `RRCMError` for
    files that cannot be read.
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
        return f"Every certificate equals the one in {result.label}, published with the same settings."
    differences, count = find_differences(config, here, published)
    significant = sum(each.is_significant for each in differences)
    head = f"{len(differences)} of {count} figures differ from {result.label}, published with the same settings; "
    head += f"{significant or 'none'} significantly"
    if not differences:
        return f"{head}."
    kind = f"paired intervals over the test images, {100 * (1 - LEVEL):.0f} % for all {count} together"
    return "\n".join([f"{head} ({kind}):", *map(str, differences)])


def find_same_settings(config: Config, root: Path) -> Result | None:
    """The first published result with the settings of `config`, except for those without an effect on certificates."""
    wanted = config.model_dump(exclude=NO_RESULT)
    for result in find_results(root):
        try:
            published = load_config(result.folder / "params.yaml")
        except RRCMError:  # written by an older version of the settings; `make verify` gives the details
            continue
        if published.model_dump(exclude=NO_RESULT) == wanted:
            return result
    return None


def read_all_certificates(config: Config, root: Path) -> Certificates:
    """The certificates of all models and cascades of a run, by the keys of their files."""
    return {file.key: read_certificates(root / file.path) for file in certificate_files(config, config.methods)}


def find_differences(config: Config, here: Certificates, published: Certificates) -> tuple[list[Difference], int]:
    """The figures that differ, and the number of all figures.

    Each method has its certified accuracy (%) at each radius and its ACR, with the best sigma in each of the two runs.
    Each certificate file of a cascade has the same figures. The intervals share `LEVEL` (Bonferroni).
    """
    for key, frame in here.items():
        if not frame["idx"].equals(published[key]["idx"]):
            raise RRCMError(f"{'/'.join(map(str, key))}: certifies other images than the published run; certify again")
    deployed = {METHODS[name].label: [(name, sigma) for sigma in config.sigmas] for name in config.methods}
    deployed |= {f"{METHODS[key[0]].label}, {key[1]}": [key] for key in here if isinstance(key[1], str)}
    count = len(deployed) * (len(config.report.radii) + 1)
    quantile = float(-ndtri(LEVEL / count / 2))
    figures = []
    for label, keys in deployed.items():
        runs = [{key: each[key] for key in keys} for each in (here, published)]
        figures += _figures(label, runs, config.report.radii, quantile)
    return [figure for figure in figures if figure.here != figure.published], count


def _figures(label: str, runs: Sequence[Certificates], radii: Sequence[float], quantile: float) -> Iterator[Difference]:
    """The figures of a method or of a cascade, for its certificates in this run and in the published one."""
    best = [best_sigma_table(run, radii)[["method", "sigma"]] for run in runs]
    for i, radius in enumerate(radii):
        frames = [run[tuple(keys.iloc[i])] for run, keys in zip(runs, best, strict=True)]
        values = [100 * float(certified_accuracy(frame, [radius])[0]) for frame in frames]
        interval = accuracy_difference(*frames, radius, quantile).times(100)
        yield Difference(f"{label}, accuracy (%) at r = {radius:g}", *values, interval, ".1f")
    frames = [max(run.values(), key=average_certified_radius) for run in runs]
    values = [average_certified_radius(frame) for frame in frames]
    yield Difference(f"{label}, ACR", *values, acr_difference(*frames, quantile), ".3f")
