"""Galleries of HTML pages: small pictures of images with the answers of smoothed classifiers."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from rrcm.report.gallery import STYLES, rounded_down

SIDE = 64  # pixels of a thumbnail at most
SMALL = 40  # pixels of an image that is shown pixel by pixel, and kept without loss


class Answer(NamedTuple):
    """The answer of a classifier."""

    verdict: str  # a key of `rrcm.report.gallery.STYLES`
    text: str  # the predicted class with a sign; the verdict of an abstention
    radius: str  # certified, rounded down; "" if nothing is certified

    @property
    def value(self) -> str:
        """The radius as a number."""
        return self.radius or "0"


class Card(NamedTuple):
    """An image of a gallery."""

    source: str  # data URL
    is_small: bool
    label: str  # the true class; "" if it is unknown
    name: str  # of the file, or its number
    answers: list[Answer]  # one for each of the gallery's `deployed`


class Thumbnails(NamedTuple):
    """A gallery."""

    deployed: list[str]  # the classifiers that answer
    cards: list[Card]
    total: int  # images from which those of the cards are evenly spaced

    @property
    def classes(self) -> list[str]:
        """The true classes that are shown, in the order of the images' first appearance."""
        return list(dict.fromkeys(card.label for card in self.cards if card.label))

    @property
    def largest(self) -> float:
        """The largest radius, or 0."""
        return max((float(answer.value) for card in self.cards for answer in card.answers), default=0.0)


def make_answer(verdict: str, predict: str, radius: float) -> Answer:
    """An answer from its verdict, the predicted class ("" for an abstention) and the radius."""
    certified = verdict in ("correct", "certified", "no radius") or (verdict == "wrong" and radius > 0)
    return Answer(
        verdict, f"{STYLES[verdict][0]} {predict or verdict}".strip(), rounded_down(radius) if certified else ""
    )


def make_card(pixels: np.ndarray, label: str, name: str, answers: Sequence[Answer]) -> Card:
    """A card of an image (H, W) or (H, W, C), uint8."""
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels)
    small, file = max(image.size) <= SMALL, io.BytesIO()
    if small:
        image.save(file, "PNG", optimize=True)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        image.save(file, "JPEG", quality=80)
    kind = "png" if small else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return Card(source, small, label, name, list(answers))
