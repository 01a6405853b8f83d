"""The page of a report, index.html: the contents of report.md with its figures, findings and a gallery."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from rrcm.certification.results import ABSTAIN
from rrcm.config import Config
from rrcm.evaluation.metrics import Certificates
from rrcm.methods import METHODS
from rrcm.report.deployment import deployment_label
from rrcm.report.findings import find
from rrcm.report.gallery import Thumbnail, verdict
from rrcm.report.html import render_page, slug
from rrcm.report.html_figures import PageFigure, make_figure
from rrcm.report.inputs import Inputs
from rrcm.report.page import compared_methods
from rrcm.report.prose import Picture, Section, read_sections
from rrcm.report.thumbnails import Card, Thumbnails, make_answer, make_card

GALLERY_IMAGES = 96
DEPLOYMENT = "One deployment"  # section of report.md
FIRST, PROVENANCE = "Certified accuracy", "Provenance"


class Galleries(NamedTuple):
    """The images of the page."""

    thumbnails: Thumbnails
    noisy: list[tuple[str, list[Card]]]  # `noisy_cards`
    method: str  # whose answers the noisy ones have


def render_report_page(
    config: Config,
    inputs: Inputs,
    values: Mapping[str, object],
    markdown: str,
    drawn: Mapping[str, Figure],
    galleries: Galleries,
) -> str:
    """The text of index.html.

    `values` are the `report_values` from which `markdown`, the text of report.md, was made. `drawn` are its figures.
    """
    sections = arrange(read_sections(markdown.partition("\n## Provenance\n")[0]))
    pictures = [block for section in sections for block in section.blocks if isinstance(block, Picture)]
    figures = {each.name: page_figure(each, drawn[each.name]) for each in pictures if each.name != "gallery"}
    return render_page(
        "report.html.jinja",
        figures=figures,
        **{name: values[name] for name in ("config", "images", "parameters", "hashes", "environments", "num_records")},
        name=config.report.name,
        findings=find(config, inputs, compared_methods(config, inputs)),
        sections=sections,
        links=[(section.title, slug(section.title)) for section in sections] + [(PROVENANCE, slug(PROVENANCE))],
        galleries=galleries,
    )


def arrange(sections: Sequence[Section]) -> list[Section]:
    """The sections of report.md in the order of the page: first the one on one deployment, with its figure."""
    first, *others = sections
    ordered = [Section(FIRST, first.blocks), *others]
    deployment = next((section for section in ordered if section.title == DEPLOYMENT), None)
    if deployment is None:
        return ordered
    figures = [block for section in ordered for block in section.blocks if isinstance(block, Picture)]
    moved = [block for block in figures if block.name == "deployment"]
    rest = [
        Section(section.title, [block for block in section.blocks if block not in moved])
        for section in ordered
        if section is not deployment
    ]
    return [Section(DEPLOYMENT, [*moved, *deployment.blocks]), *rest]


def page_figure(picture: Picture, figure: Figure) -> PageFigure:
    """The figure of a picture of report.md, with the caption as its description."""
    title = picture.name.replace("_", " ")
    return make_figure(figure, picture.name, title[0].upper() + title[1:], picture.text)


def noisy_cards(
    clean: Sequence[np.ndarray], noisy: Mapping[float, Sequence[Thumbnail]]
) -> list[tuple[str, list[Card]]]:
    """Rows of images, each with a heading: clean ones with their classes, and noisy ones with the answers.

    Images are (H, W) or (H, W, C), in [0, 1].
    """
    labels = [thumbnail.label for thumbnail in next(iter(noisy.values()))]
    rows = [("clean", [make_card(_bytes(each), label, "clean", []) for each, label in zip(clean, labels, strict=True)])]
    for sigma, thumbnails in sorted(noisy.items()):
        cards = []
        for pixels, label, predict, radius, kind in thumbnails:
            cards.append(make_card(_bytes(pixels), label, f"σ = {sigma:g}", [make_answer(kind, predict, radius)]))
        rows.append((f"σ = {sigma:g}", cards))
    return rows


def _bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] as uint8."""
    return (255 * pixels).round().astype(np.uint8)


def read_thumbnails(config: Config, root: Path, inputs: Inputs) -> Thumbnails:
    """At most GALLERY_IMAGES of the images of the first method, evenly spaced, with its answers at each sigma.

    If there are cascades, the first of them answers first. It may belong to another method, on the same images.
    """
    from rrcm.data.augment import centre_crop  # these modules import torch, which takes seconds
    from rrcm.data.shards import ShardedDataset

    images, frames = ShardedDataset(root / "data/shards", "test"), _answering(config, inputs)
    common = sorted(set.intersection(*(set(frame["idx"]) for frame in frames.values())))
    chosen = np.linspace(0, len(common) - 1, min(GALLERY_IMAGES, len(common))).round().astype(int)
    indexed = [frame.set_index("idx") for frame in frames.values()]
    cards: list[Card] = []
    for idx in (common[i] for i in chosen):
        image, label, _ = images.read(idx)
        answers = []
        for frame in indexed:
            predict, radius = frame.loc[idx, ["predict", "radius"]]
            name = "" if predict == ABSTAIN else images.classes[int(predict)]
            answers.append(make_answer(verdict(predict, label), name, radius))
        pixels = np.asarray(centre_crop(image, config.data.image_size))
        cards.append(make_card(pixels, images.classes[label], f"test image {idx}", answers))
    return Thumbnails(list(frames), cards, len(common))


def _answering(config: Config, inputs: Inputs) -> Certificates:
    """The certificates of the classifiers that answer in the gallery, by what a reader calls them."""
    frames, method = {}, config.methods[0]
    for name, cascade in list(inputs.cascades.items())[:1]:
        frames[f"{METHODS[name].label}, {deployment_label('cascade', 1)}"] = cascade.label_aware
    for sigma in config.sigmas:
        frames[f"{METHODS[method].label}, σ = {sigma:g}"] = inputs.certificates[method, sigma]
    return frames
