"""The page of `rrcm certify`: settings, a summary, the certified accuracy, every image, and a gallery."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from rrcm.certification.certify_images import read_square
from rrcm.certification.results import ABSTAIN, UNKNOWN
from rrcm.certification.stopping import WRONG_CLASS
from rrcm.data.shards import evenly_spaced
from rrcm.models.kinds import LoadedClassifier
from rrcm.report.accuracy_figures import draw_comparison
from rrcm.report.certified_images import kind_of_answer, shows_no_radius
from rrcm.report.gallery import rounded_down
from rrcm.report.html import render_page
from rrcm.report.html_figures import PageFigure, make_figure
from rrcm.report.html_tables import PageTable, table_of
from rrcm.report.thumbnails import Card, Thumbnails, make_answer, make_card
from rrcm.utils.errors import printable

GALLERY_IMAGES = 240
MOST_TEXT = 900_000  # characters of the table of images: a page stays below 2 MB
ROW_TAGS = 60  # characters of a row besides its texts
SETTINGS = ("sigma", "sigmas", "thresholds", "bound", "stopping", "n", "n0", "alpha", "radius_step")
SETTINGS += ("seed", "precision", "runtime", "batch_size", "device", "image_size")


class CertifiedFiles(Protocol):
    """Certificates of image files, such as a `FolderCertificates`."""

    frame: pd.DataFrame  # as of a `FolderCertificates`
    paths: list[Path]  # of the images, in the order of the rows


def render_certified_page(
    certified: CertifiedFiles, loaded: LoadedClassifier, models: Sequence[str], record: Mapping, record_text: str
) -> str:
    """The text of the page. `models` are as the command names them, and `record` is the record of the certificates.

    Equal certificates give the same text: it does not have the time that they took.
    """
    frame, names = certified.frame, loaded.class_names
    labelled, wrong = frame[frame["label"] != UNKNOWN], stopped_as_wrong(frame)
    has_certificate = (frame["predict"] != ABSTAIN) & ~wrong
    table = table_of(image_table(frame, names), ["class", "true class"])
    return render_page(
        "certified.html.jinja",
        figures=_figures(labelled),
        folder=_common_folder(certified),
        total=len(frame),
        certified=int(has_certificate.sum()),
        abstained=int((frame["predict"] == ABSTAIN).sum()),
        wrong=int(wrong.sum()),
        zero=int(frame.loc[has_certificate, "radius"].map(shows_no_radius).sum()),
        labelled=len(labelled),
        correct=int(labelled["correct"].sum()),
        radii=[rounded_down(float(each)) for each in frame.loc[has_certificate, "radius"].quantile([0.5, 1])],
        models=models,
        settings={name.replace("_", " "): _text(record[name]) for name in SETTINGS if name in record},
        alpha=record["alpha"],
        table=shorten(table),
        thumbnails=_thumbnails(certified, loaded),
        record=record_text.strip(),
    )


def stopped_as_wrong(frame: pd.DataFrame) -> pd.Series:
    """Whether nothing was certified because the likeliest class is not the known label, for each image: bool."""
    return frame["stop_reason"] == WRONG_CLASS


def _common_folder(certified: CertifiedFiles) -> str:
    """The name of the folder of images."""
    depth = len(certified.frame["file"][0].split("/"))
    return certified.paths[0].absolute().parents[depth - 1].name or "images"


def _text(value: object) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def image_table(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row of texts per image, in the order of `frame`."""
    abstains = frame["predict"] == ABSTAIN
    columns = {"file": frame["file"], "class": np.where(abstains, "abstains", frame["class"])}
    columns["radius"] = np.where(abstains | stopped_as_wrong(frame), "", frame["radius"].map(rounded_down))
    if (frame["label"] != UNKNOWN).any():
        columns["true class"] = ["" if label == UNKNOWN else names[label] for label in frame["label"]]
        columns["answer"] = [
            kind_of_answer(*row) for row in frame[["predict", "label", "radius"]].itertuples(index=False)
        ]
    columns["samples"] = frame["samples"].map("{:,}".format)
    if "path" in frame:
        columns["accepted at σ"] = frame["path"].map(lambda path: f"{float(path.partition(' ')[0]):g}" if path else "")
    return pd.DataFrame(columns).map(printable)


def shorten(table: PageTable) -> PageTable:
    """A table with as many rows, evenly spaced, as fit into MOST_TEXT characters."""
    sizes = [ROW_TAGS + sum(len(cell.text) for cell in row) for row in table.rows]
    most = max(int(len(sizes) * MOST_TEXT / max(sum(sizes), MOST_TEXT)), 1)
    return table._replace(rows=[table.rows[i] for i in evenly_spaced(len(sizes), most)])


def _figures(labelled: pd.DataFrame) -> dict[str, PageFigure]:
    """The certified accuracy of the images with a known class, if there are any."""
    if labelled.empty:
        return {}
    description = "Certified accuracy against L2 radius, of the images whose class is known."
    drawn = draw_comparison({"certified accuracy": labelled})
    return {"accuracy": make_figure(drawn, "accuracy", "Certified accuracy", description)}


def _thumbnails(certified: CertifiedFiles, loaded: LoadedClassifier) -> Thumbnails:
    """At most GALLERY_IMAGES images, evenly spaced over the folder."""
    count, cards = len(certified.paths), list[Card]()
    for i in evenly_spaced(count, GALLERY_IMAGES):
        row = certified.frame.iloc[i]
        label = "" if row["label"] == UNKNOWN else loaded.class_names[row["label"]]
        answer = make_answer(kind_of_answer(row["predict"], row["label"], row["radius"]), row["class"], row["radius"])
        pixels = read_square(certified.paths[i], loaded).transpose(1, 2, 0)
        cards.append(make_card(pixels, label, row["file"], [answer]))
    return Thumbnails(["this classifier"], cards, count)
