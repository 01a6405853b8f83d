"""Certificates of any groups side by side: a table and a figure of files in the field's format."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from rrcm.certification.results import read_certificates
from rrcm.evaluation.metrics import summary
from rrcm.report import figures
from rrcm.utils.errors import RRCMError


def compare(files: Sequence[str], radii: str, output: Path) -> None:
    """Print ACR and certified accuracy at `radii` ("0,0.25,...", pixel units) of `files` (NAME=FILE, each in the
    field's format) and draw their exact curves as `output`, .png or .svg. Raises `RRCMError` for bad input."""
    at, paths = parse_radii(radii), parse_files(files)
    if output.suffix not in figures.FORMATS:
        raise RRCMError(f"--output {output}: must end in {' or '.join(figures.FORMATS)}")
    certificates = {name: read_certificates(path) for name, path in paths.items()}
    figures.save(figures.draw_comparison(certificates), output)
    print(comparison_table(certificates, at))
    if note := other_images(certificates):
        print(f"note: {note}", file=sys.stderr)


def parse_files(files: Sequence[str]) -> dict[str, str]:
    """NAME=FILE, NAME=FILE ... as a mapping; the first = of each divides it. Raises `RRCMError`."""
    paths: dict[str, str] = {}
    for text in files:
        name, _, path = text.partition("=")
        if not (name and path):
            raise RRCMError(f"{text!r}: must be NAME=FILE, a name for the legend and a file of certificates")
        if name in paths:
            raise RRCMError(f"{text!r}: {name!r} names {paths[name]} already; give it another name")
        paths[name] = path
    return paths


def parse_radii(text: str) -> list[float]:
    """0,0.25,... as numbers, in pixel units. Raises `RRCMError`."""
    try:
        radii = [float(part) for part in text.split(",")]
    except ValueError:
        radii = []
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise RRCMError(f"--radii {text}: must be numbers of at least 0 with commas between, as 0,0.25,0.5")
    return radii


def comparison_table(certificates: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> str:
    """A line a name: images, ACR, and certified accuracy in % at each radius."""
    rows = []
    for name, frame in certificates.items():
        acr, *shares = summary(frame, radii).values()
        rows.append([name, f"{len(frame):,}", f"{acr:.3f}", *(f"{100 * share:.1f}" for share in shares)])
    headers = ["", "images", "ACR", *(f"r = {radius:g}" for radius in dict.fromkeys(radii))]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="simple", colalign=align, disable_numparse=True)


def other_images(certificates: Mapping[str, pd.DataFrame]) -> str:
    """What to know when the files are not all of the same images with the same labels; "" when they are."""
    images = {name: set(zip(frame["idx"], frame["label"], strict=True)) for name, frame in certificates.items()}
    common = set.intersection(*images.values())
    if all(each == common for each in images.values()):
        return ""
    counts = ", ".join(f"{name} {len(each):,}" for name, each in images.items())
    return f"the files are of different images ({counts}; {len(common):,} in all of them): compare shares only"
