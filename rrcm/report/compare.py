"""Compare certificates from any source in a table and a figure. certification/external.py has the file formats."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from rrcm.certification.external import read_external_certificates
from rrcm.evaluation.metrics import accuracy_difference, acr_difference, certified_accuracy
from rrcm.report.accuracy_figures import draw_comparison
from rrcm.report.figures import ENDINGS, FORMATS, save
from rrcm.report.fonts import note_on_letters
from rrcm.report.tables import acr_text, aligned_text, interval_text
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import check_output


def compare(files: Sequence[str], radii: str, output: Path, reference: str | None = None) -> None:
    """Print ACR and certified accuracy, and draw the exact curves as `output` (.png, .svg or .pdf).

    `files` are NAME=FILE and `radii` is "0,0.25,..." in pixel units. If `reference` is one of the names, this also
    prints the differences to its certificates on common images. Raises `RRCMError` for bad input.
    """
    numbers, paths = parse_radii(radii), parse_files(files)
    if reference is not None and reference not in paths:
        raise RRCMError(f"--reference {reference!r}: must be one of the names {', '.join(map(repr, paths))}")
    if output.suffix not in FORMATS:
        raise RRCMError(f"--output {output}: must end in {ENDINGS}")
    check_output(output)
    certificates = {name: read_external_certificates(path) for name, path in paths.items()}
    save(draw_comparison(certificates), output)
    print(comparison_table(certificates, numbers))
    if reference is not None:
        print(f"\n{differences_to(reference, certificates, numbers)}")
    for note in (check_same_images(certificates), note_on_letters(certificates)):
        if note:
            print(f"note: {note}", file=sys.stderr)


def parse_files(files: Sequence[str]) -> dict[str, str]:
    """Parse NAME=FILE arguments into a mapping. The first = is the separator. Raises `RRCMError`."""
    paths: dict[str, str] = {}
    for text in files:
        name, _, path = text.partition("=")
        if not (name.strip() and path):
            raise RRCMError(f"{text!r}: must be NAME=FILE, a name for the legend and a file of certificates")
        if name in paths:
            raise RRCMError(f"{text!r}: the name {name!r} is taken by {paths[name]}; choose another, or join the files")
        paths[name] = path
    return paths


def parse_radii(text: str) -> list[float]:
    """Parse "0,0.25,..." into radii in pixel units. Raises `RRCMError`."""
    try:
        radii = [float(part) for part in text.split(",")]
    except ValueError:
        radii = []
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise RRCMError(f"--radii {text}: must be numbers >= 0 separated by commas, such as 0,0.25,0.5")
    return radii


def comparison_table(certificates: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> str:
    """One line per name: number of images, certified accuracy (%) at each radius, and ACR with its standard error."""
    rows = []
    for name, frame in certificates.items():
        shares = [f"{100 * share:.1f}" for share in certified_accuracy(frame, list(dict.fromkeys(radii)))]
        rows.append([printable(name), f"{len(frame):,}", *shares, acr_text(frame)])
    return _tabulate(rows, "", radii)


def differences_to(reference: str, certificates: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> str:
    """One line per other name: its differences to `reference` on the images of both, with 95 % intervals.

    Raises `RRCMError` for a name that has no image in common with `reference`.
    """
    rows, keys = [], ["idx", "label"]
    for name, frame in certificates.items():
        if name == reference:
            continue
        both = frame.merge(certificates[reference], on=keys, suffixes=("", " of reference"))
        if both.empty:
            raise RRCMError(f"--reference {reference!r}: has no image in common with {name!r}")
        other = both[[f"{column} of reference" for column in ("radius", "correct")]].set_axis(
            ["radius", "correct"], axis=1
        )
        shares = (accuracy_difference(both, other, radius).times(100) for radius in dict.fromkeys(radii))
        texts = [interval_text(share, "+.1f") for share in shares]
        acr = interval_text(acr_difference(both, other), "+.3f")
        rows.append([printable(name), f"{len(both):,}", *texts, acr])
    return _tabulate(rows, f"minus {printable(reference)}", radii)


def _tabulate(rows: list[list[str]], corner: str, radii: Sequence[float]) -> str:
    headers = [corner, "images", *(f"r = {radius:g}" for radius in dict.fromkeys(radii)), "ACR"]
    return aligned_text(pd.DataFrame(rows, columns=headers), "simple")


def check_same_images(certificates: Mapping[str, pd.DataFrame]) -> str | None:
    """A note if the files differ in their image numbers or in the labels of these, else None."""
    images = {name: set(zip(frame["idx"], frame["label"], strict=True)) for name, frame in certificates.items()}
    common = set.intersection(*images.values())
    if all(each == common for each in images.values()):
        return None
    counts = ", ".join(f"{printable(name)} {len(each):,}" for name, each in images.items())
    same = f"{len(common):,} in all of them"
    return f"the files have different images, or number them differently ({counts}; {same}); compare shares only"
