"""The certificates of a folder's images for people to read: a table, a summary, and a gallery of the images."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tabulate import tabulate

from rrcm.certification.cascade_rules import CascadeRule
from rrcm.certification.certify_images import FolderCertificates, read_square
from rrcm.certification.results import ABSTAIN, UNKNOWN
from rrcm.certification.stopping import StoppingRule
from rrcm.data.shards import evenly_spaced
from rrcm.models.load import LoadedClassifier
from rrcm.report.gallery import Thumbnail, draw_certified_images, rounded_down, verdict
from rrcm.utils.errors import printable

GALLERY_IMAGES = 48


def kind_of_answer(predict: int, label: int, radius: float) -> str:
    """The key of STYLES for an answer. A radius that is shown as 0.000 is not ticked: it covers no changed image."""
    if predict != ABSTAIN and label in (UNKNOWN, predict) and shows_no_radius(radius):
        return "no radius"
    return "certified" if label == UNKNOWN and predict != ABSTAIN else verdict(predict, label)


def shows_no_radius(radius: float) -> bool:
    """Whether a radius is shown as 0.000."""
    return float(rounded_down(radius)) == 0


def certificate_table(frame: pd.DataFrame) -> str:
    """One line per image: file, class, radius, samples, and in a cascade the accepting sigma and the path."""
    columns = {
        "file": frame["file"].map(printable),
        "class": frame["class"].replace("", "-").map(printable),
        "radius": np.where(frame["predict"] == ABSTAIN, "abstains", frame["radius"].map(rounded_down)),
        "samples": frame["samples"].map("{:,}".format),
    }
    alignment = ["left", "left", "right", "right"]
    if "path" in frame:
        columns["accepted at"], columns["path"] = frame["path"].map(lambda path: path.partition(" ")[0]), frame["path"]
        alignment += ["right", "left"]
    return tabulate(columns, headers="keys", disable_numparse=True, colalign=alignment)


def certificate_summary(certified: FolderCertificates, rule: StoppingRule | CascadeRule) -> str:
    """One line with the numbers of certified, correct and abstained images, the time and the error probability."""
    frame = certified.frame
    labelled, abstained = frame[frame["label"] != UNKNOWN], (frame["predict"] == ABSTAIN).sum()
    correct = f" ({labelled['correct'].sum():,} of {len(labelled):,} labelled ones correct)" if len(labelled) else ""
    zero = frame.loc[frame["predict"] != ABSTAIN, "radius"].map(shows_no_radius).sum()
    correct += f", {zero:,} of them at radius 0.000" if zero else ""
    return (
        f"{len(frame) - abstained:,} certified{correct}, {abstained:,} abstained; {certified.seconds:.1f} s, "
        f"{frame['samples'].sum() / certified.seconds:,.0f} samples/s; each certificate is wrong with "
        f"probability at most {rule.alpha:g}"
    )


def note_on_labels(frame: pd.DataFrame) -> str | None:
    """One line about images in folders that are named after no class, if other images have a label."""
    folders = frame.loc[frame["label"] == UNKNOWN, "file"].map(lambda file: Path(file).parent)
    others = sorted({str(folder) for folder in folders} - {"."})
    if not others or len(folders) == len(frame):
        return None
    names = ", ".join(others[:5]) + (" and others" if len(others) > 5 else "")
    return f"{len(folders):,} of {len(frame):,} images have no label; no class of the model is called {names}"


def draw_gallery(certified: FolderCertificates, loaded: LoadedClassifier, rule: StoppingRule | CascadeRule) -> Figure:
    """At most GALLERY_IMAGES images, evenly spaced over the folder, with their classes and radii."""
    count = len(certified.paths)
    thumbnails = []
    for i in evenly_spaced(count, GALLERY_IMAGES):
        path, row = certified.paths[i], certified.frame.iloc[i]
        kind = kind_of_answer(row["predict"], row["label"], row["radius"])
        pixels = read_square(path, loaded).transpose(1, 2, 0) / 255
        thumbnails.append(Thumbnail(pixels, row["file"], row["class"], row["radius"], kind))
    part = f", {GALLERY_IMAGES} of {count:,} images" if count > GALLERY_IMAGES else ""
    sigmas = rule.sigmas if isinstance(rule, CascadeRule) else [rule.sigma]
    noise = f"σ = {', '.join(f'{sigma:g}' for sigma in sigmas)}"
    return draw_certified_images(thumbnails, f"{noise}, n = {rule.looks[-1]:,}, α = {rule.alpha:g}{part}")
