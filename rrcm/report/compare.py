"""Compare certificates from any source in a table and a figure. certification/external.py has the file formats."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from rrcm.certification.external import read_external_certificates
from rrcm.evaluation.common_images import adopt_numbers, on_same_images
from rrcm.evaluation.metrics import accuracy_difference, acr_difference, certified_accuracy
from rrcm.report.accuracy_figures import draw_comparison
from rrcm.report.comparison_page import render_comparison_page
from rrcm.report.figures import ENDINGS, FORMATS, save
from rrcm.report.fonts import note_on_letters
from rrcm.report.html import check_page
from rrcm.report.tables import acr_text, aligned_text, interval_text
from rrcm.utils.errors import RRCMError, printable
from rrcm.utils.files import check_output, write_text


def compare(
    files: Sequence[str], radii: str, output: Path, reference: str | None = None, page: Path | None = None
) -> None:
    """Print ACR and certified accuracy, draw the exact curves as `output`, and write `page` (.html).

    All are on the images that all files have. `files` are NAME=FILE and `radii` is "0,0.25,..." in pixel units. If
    `reference` is one of the names, this also prints the differences to its certificates. Raises `RRCMError` for bad
    input, and for files of different data sets.
    """
    numbers, paths = parse_radii(radii), parse_files(files)
    if reference is not None and reference not in paths:
        raise RRCMError(f"--reference {reference!r}: must be one of the names {', '.join(map(repr, paths))}")
    if output.suffix not in FORMATS:
        raise RRCMError(f"--output {output}: must end in {ENDINGS}")
    check_output(output)
    if page is not None:
        check_page(page)
    read, sources = adopt_numbers({name: read_external_certificates(path) for name, path in paths.items()})
    certificates, notes = on_same_images(read), list(notes_on_images(read, sources))
    tables = [comparison_table(certificates, numbers)]
    if reference is not None:
        tables.append(differences_to(reference, certificates, numbers))
    save(draw_comparison(certificates), output)
    if page is not None:
        write_text(page, render_comparison_page(certificates, paths, tables, reference, notes))
    print("\n\n".join(aligned_text(table, "simple") for table in tables))
    for note in (*notes, note_on_letters(certificates)):
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


def comparison_table(certificates: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """One row of texts per name: number of images, certified accuracy (%) at each radius, and ACR with its standard
    error.
    """
    rows = []
    for name, frame in certificates.items():
        shares = [f"{100 * share:.1f}" for share in certified_accuracy(frame, list(dict.fromkeys(radii)))]
        rows.append([printable(name), f"{len(frame):,}", *shares, acr_text(frame)])
    return _make_table(rows, "", radii)


def differences_to(reference: str, certificates: Mapping[str, pd.DataFrame], radii: Sequence[float]) -> pd.DataFrame:
    """One row of texts per other name: its differences to `reference`, with 95 % intervals. The images are the same."""
    rows, other = [], certificates[reference]
    for name, frame in certificates.items():
        if name != reference:
            shares = (accuracy_difference(frame, other, radius).times(100) for radius in dict.fromkeys(radii))
            texts = [interval_text(share, "+.1f") for share in shares]
            acr = interval_text(acr_difference(frame, other), "+.3f")
            rows.append([printable(name), f"{len(frame):,}", *texts, acr])
    return _make_table(rows, f"minus {printable(reference)}", radii)


def _make_table(rows: list[list[str]], corner: str, radii: Sequence[float]) -> pd.DataFrame:
    headers = [corner, "images", *(f"r = {radius:g}" for radius in dict.fromkeys(radii)), "ACR"]
    return pd.DataFrame(rows, columns=headers)


def notes_on_images(frames: Mapping[str, pd.DataFrame], sources: Mapping[str, str]) -> Iterator[str]:
    """Which files got the image numbers of another one (`sources`), and which images of `frames` are left out."""
    for name, other in sources.items():
        same = f"the images of {printable(other)}, which has the same labels in the same order"
        yield f"{printable(name)}: rows are numbered 0, 1, 2, ...; they are taken for {same}"
    images = [set(frame["idx"]) for frame in frames.values()]
    common = len(set.intersection(*images))
    if any(len(each) > common for each in images):
        counts = ", ".join(f"{printable(name)} has {len(each):,}" for name, each in zip(frames, images, strict=True))
        yield f"compared on the {common:,} images that are in all files ({counts})"
