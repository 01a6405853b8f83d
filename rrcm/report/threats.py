"""The table of what L2 certificates say about other changes of an image (rrcm/evaluation/threats.py)."""

import math
from collections.abc import Mapping

import pandas as pd

from rrcm.evaluation.metrics import Certificates, certified_share
from rrcm.evaluation.threats import GREY_LEVELS, Threat, l1, linf, pixels
from rrcm.methods import CASCADE
from rrcm.report.cascade_inputs import Cascade
from rrcm.report.deployment import deployed_frames, deployment_label
from rrcm.report.tables import Table, method_labels, with_images

L1_NORMS = (0.25, 0.5, 1.0, 2.0)  # pixel units
GREY_LEVEL_CHANGES = (1, 2, 4, 8, 16)  # of every value
PIXELS = (1, 2, 3, 4, 9)


def listed_threats(image_size: int, channels: int) -> list[Threat]:
    """The threats of the table, for square images."""
    values = image_size**2 * channels
    by_kind = ([l1(norm) for norm in L1_NORMS], [linf(levels, values) for levels in GREY_LEVEL_CHANGES])
    return [*by_kind[0], *by_kind[1], *(pixels(count, channels) for count in PIXELS)]


def threats(
    certificates: Certificates, cascades: Mapping[str, Cascade], bound: str, image_size: int, channels: int
) -> Table:
    """Certified accuracy within each listed threat, of every method and sigma and of the cascades.

    All certificates are by `bound`. The numbers have one row per method, deployment ("cascade" or a sigma) and threat,
    with the largest L2 norm in the threat, which a certified radius must exceed, and a 95 % Wilson interval. The text
    has each method with its best sigma for each threat, and the cascades. It ends each kind of threat with the first
    one that nothing certifies.
    """
    rows = []
    for (method, deployment), frame in deployed_frames(certificates, cascades).items():
        for threat in listed_threats(image_size, channels):
            share = certified_share(frame, threat.radius)._asdict()
            share["certified_accuracy"] = share.pop("value")
            row = {"method": method, "deployment": deployment, "bound": bound, "images": len(frame)}
            row |= {"threat": threat.kind, "size": threat.size, "l2_norm": math.sqrt(threat.squared)}
            rows.append(row | share)
    numbers = pd.DataFrame(rows)
    return Table(numbers, _text(numbers))


def _text(numbers: pd.DataFrame) -> pd.DataFrame:
    best = numbers.assign(single=numbers["deployment"] != CASCADE)
    rows = []
    for (method, single), group in best.groupby(["method", "single"], sort=False):
        deployed = "best σ for each" if single else deployment_label(CASCADE, 1)
        row = {"method": method_labels([method])[0], "deployed": deployed}
        for (kind, size), of_threat in group.groupby(["threat", "size"], sort=False):
            row[_heading(kind, size)] = f"{100 * of_threat['certified_accuracy'].max():.1f}"
        rows.append(row | {"images": group["images"].iloc[0]})
    text = pd.DataFrame(rows)
    images = text.pop("images").tolist()
    return with_images(text.drop(columns=_beyond_reach(numbers)), images)


def _beyond_reach(numbers: pd.DataFrame) -> list[str]:
    """The headings of threats of which a smaller one of the same kind has certified accuracy 0 everywhere."""
    highest = numbers.groupby(["threat", "size"], sort=False)["certified_accuracy"].max()
    return [
        _heading(kind, size)
        for kind, size in highest.index
        if any(highest[kind][smaller] == 0 for smaller in highest[kind].index if smaller < size)
    ]


def _heading(kind: str, size: float) -> str:
    if kind == "l1":
        return f"L1 ≤ {size:g}"
    if kind == "linf":
        return f"L∞ ≤ {size:g}/{GREY_LEVELS}"
    side = round(size**0.5)
    patch = f", or {side} × {side} patch" if side > 1 and side**2 == size else ""
    return f"any {size:g} pixels{patch}" if size > 1 else "any pixel"
