"""Folders of drawn pictures: shapes in random colours, as JPEG and PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "square", "triangle")


def draw_shape(shape: str, side: int, rng: np.random.Generator) -> Image.Image:
    """One shape of a random colour, size and place on a random background of the other brightness."""
    dark, light = rng.integers(0, 90, 3), rng.integers(165, 256, 3)
    back, ink = (dark, light) if rng.random() < 0.5 else (light, dark)
    width, height = side, int(side * rng.uniform(1, 1.4))
    picture = Image.new("RGB", (width, height), tuple(back.tolist()))
    draw, radius = ImageDraw.Draw(picture), side * rng.uniform(0.25, 0.4)
    x, y = rng.uniform(radius, width - radius), height / 2 + rng.uniform(-0.1, 0.1) * side
    box, ink = (x - radius, y - radius, x + radius, y + radius), tuple(ink.tolist())
    if shape == "circle":
        draw.ellipse(box, fill=ink)
    elif shape == "square":
        draw.rectangle(box, fill=ink)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=ink)
    else:
        draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill=ink)
        draw.rectangle((x - radius / 3, y - radius, x + radius / 3, y + radius), fill=ink)
    return picture


def write_pictures(folder: Path, counts: tuple[int, ...], side: int = 96) -> Path:
    """Write a class folder for each of `counts`, with so many pictures; returns `folder`."""
    rng = np.random.default_rng(0)
    for shape, count in zip(SHAPES, counts, strict=False):
        (folder / shape).mkdir(parents=True)
        for number in range(count):
            ending = "png" if number % 2 else "jpg"
            draw_shape(shape, side, rng).save(folder / shape / f"{number}.{ending}")
    return folder
