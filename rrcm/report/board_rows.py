"""The rows of a board: the numbers of deployed classifiers, grouped by data set and threat."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from rrcm.evaluation.metrics import Interval
from rrcm.evaluation.runs import accuracy_over_runs, acr_over_runs
from rrcm.report.board_entries import Entry
from rrcm.report.board_files import SETTINGS, Deployed

BEST = "best"  # the best sigma at each radius, which takes one deployed classifier for each sigma


class Row(NamedTuple):
    """The numbers of a deployed classifier, or of the best of an entry's sigmas at each radius."""

    entry: Entry
    deployed: list[Deployed]  # one, or all sigmas
    acr: Interval  # of the best sigma, its ACR is the highest of any
    shares: list[Interval]  # certified accuracy, by radius
    chosen: list[Deployed]  # the deployed classifier that each share is of


class Group(NamedTuple):
    """The entries of one data set and threat. Rows are sorted by ACR, the highest first."""

    data: str
    threat: str
    radii: list[float]  # those at which some entry certifies an image, and 0
    single: list[Row]  # a deployed classifier each
    best: list[Row]  # an entry each

    @property
    def images(self) -> list[int]:
        """The different numbers of images that the files have, the largest first."""
        return sorted({len(row.deployed[0].frames[0]) for row in self.single}, reverse=True)


def group_rows(deployed: Sequence[Deployed], radii: Sequence[float]) -> list[Group]:
    """The groups in the order of their first entries."""
    groups, radii = [], list(dict.fromkeys(radii))
    for data, threat in dict.fromkeys((each.entry.data, each.entry.threat) for each in deployed):
        of_data = [each for each in deployed if (each.entry.data, each.entry.threat) == (data, threat)]
        single = [single_row(each, radii) for each in of_data]
        best = [best_row([row for row in single if row.entry is entry]) for entry in _entries(of_data)]
        kept = [i for i, r in enumerate(radii) if r == 0 or any(row.shares[i].value > 0 for row in single)]
        rows = [
            [row._replace(shares=[row.shares[i] for i in kept], chosen=[row.chosen[i] for i in kept]) for row in each]
            for each in (single, best)
        ]
        single, best = (sorted(each, key=lambda row: -row.acr.value) for each in rows)
        groups.append(Group(data, threat, [radii[i] for i in kept], single, best))
    return groups


def single_row(deployed: Deployed, radii: Sequence[float]) -> Row:
    """The numbers of one deployed classifier."""
    frames = deployed.frames
    shares = accuracy_over_runs(frames, radii)
    return Row(deployed.entry, [deployed], acr_over_runs(frames), shares, [deployed] * len(radii))


def best_row(rows: Sequence[Row]) -> Row:
    """The best sigma of an entry at each radius, and the highest ACR of any. A cascade is not among the sigmas.

    An entry without sigmas is represented by its cascade.
    """
    sigmas = [row for row in rows if row.deployed[0].sigma is not None] or list(rows)
    sigmas = sorted(sigmas, key=lambda row: row.deployed[0].sigma or 0.0)  # the smaller sigma of equals
    columns = zip(*(row.shares for row in sigmas), strict=True)
    best = [max(range(len(sigmas)), key=lambda i: column[i].value) for column in columns]
    return Row(
        rows[0].entry,
        [row.deployed[0] for row in sigmas],
        max((row.acr for row in sigmas), key=lambda acr: acr.value),
        [sigmas[i].shares[k] for k, i in enumerate(best)],
        [sigmas[i].deployed[0] for i in best],
    )


def board_table(groups: Sequence[Group]) -> pd.DataFrame:
    """Every row of the board in the order of the page: first the deployed classifiers of a group, then the best sigmas.

    Columns: `data`, `threat`, `name`, `deployed` (sigma, "cascade" or "best"), `runs`, `images`, the settings of the
    certification, `samples` and `seconds` per image, `acr`, and certified accuracies such as `r_0.5` (shares), each
    with its interval `_low` to `_high`; `files` and `sha256` by run, separated by blanks.
    """
    rows = []
    for group in groups:
        for row, name in [(row, row.deployed[0].name) for row in group.single] + [(row, BEST) for row in group.best]:
            first = row.deployed[0]
            cells = {"data": group.data, "threat": group.threat, "name": row.entry.name}
            cells |= {"deployed": name, "network": row.entry.network}
            cells |= {"runs": len(first.files), "images": len(first.frames[0])} | common_settings(row)
            cells |= {"samples": mean_cost(row, "samples"), "seconds": mean_cost(row, "seconds")}
            cells |= _interval_cells("acr", row.acr)
            for radius, share in zip(group.radii, row.shares, strict=True):
                cells |= _interval_cells(f"r_{radius:g}", share)
            files = [file for deployed in row.deployed for file in deployed.files]
            cells |= {"files": " ".join(file.name for file in files)}
            rows.append(cells | {"sha256": " ".join(file.sha256 for file in files)})
    table = pd.DataFrame(rows)
    return table[[*(name for name in table if name not in ("files", "sha256")), "files", "sha256"]]


def common_settings(row: Row) -> dict[str, object]:
    """The settings of the certification that all files of a row have in common; None for the others."""
    files = [file for deployed in row.deployed for file in deployed.files]
    values = {name: {file.settings[name] for file in files} for name in SETTINGS}
    return {name: next(iter(each)) if len(each) == 1 else None for name, each in values.items()}


def mean_cost(row: Row, name: str) -> float:
    """The mean `samples` or `seconds` per image over the runs; NaN if a file does not have them.

    The best of several sigmas has no cost, because it is another classifier at each radius.
    """
    if len(row.deployed) > 1:
        return math.nan
    costs = [getattr(file, name) for file in row.deployed[0].files]
    return sum(costs) / len(costs)


def _interval_cells(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _entries(deployed: Sequence[Deployed]) -> list[Entry]:
    return [each.entry for i, each in enumerate(deployed) if all(each.entry is not old.entry for old in deployed[:i])]
