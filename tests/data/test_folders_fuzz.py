"""Training and certification read the same images and labels from any folder, or print one line.

`pytest tests/data/test_folders_fuzz.py --hypothesis-profile=thorough` tries 1,000 folders.
"""

import contextlib
import io
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_with_test
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from rrcm.certification.certify_images import certify_folder, find_images, read_square, smooth
from rrcm.certification.rules import make_stopping_rule
from rrcm.config import Data
from rrcm.data import shards
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset
from rrcm.models.load import LoadedClassifier
from rrcm.utils.errors import RRCMError

pytestmark = pytest.mark.thorough  # hundreds of folders

FOLDERS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SIZE = 6
PLAIN = ["cat", "dog", "1", "2", "10", "01", "a b", "caf\u00e9", "cafe\u0301", "x$y$", "<b>|`", "test", "val"]
ODD = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
BYTES = st.binary(min_size=1, max_size=6).map(lambda raw: os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_")))
NAMES = st.one_of(*[st.sampled_from(PLAIN)] * 8, ODD, BYTES).filter(lambda name: name not in (".", ".."))
CLASSES = st.one_of(*[NAMES.filter(str.isprintable)] * 40, NAMES)
MODES = ["1", "L", "LA", "P", "P+clear", "RGB", "RGBA", "CMYK", "I;16", "I"]
REFUSED = ["I;16 dark", "F", "cut", "empty", "text"]
SIZES = st.one_of(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.sampled_from([(1, 700), (900, 2), (6, 6)]))
SUFFIXES = [".png", ".PNG", ".jpg", ".JPEG", ".tif", ".bmp", ".gif", ".webp", ".ppm"]
ENDINGS = [*SUFFIXES, ".txt", ".heic", ".db", ""]


@st.composite
def pictures(draw: st.DrawFn, modes: list[str], first: int) -> bytes:
    """The bytes of an image file in one of the modes, or damaged, with one of the hundred seeds from `first`."""
    mode, (width, height), seed = draw(st.sampled_from(modes)), draw(SIZES), first + draw(st.integers(0, 99))
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    grey = values[:, :, 0]
    grey[0, 0] = 255  # 16 bits without high values are refused
    match mode:
        case "I;16":
            image = Image.fromarray(grey.astype(np.uint16) * 257)
        case "I;16 dark":
            image = Image.fromarray(grey.astype(np.uint16) * 16)
        case "I":
            image = Image.fromarray(grey.astype(np.int32) * 257)
        case "F":
            image = Image.fromarray(grey.astype(np.float32))
        case "P" | "P+clear":
            image = Image.fromarray(values[:, :, :3]).quantize(8)
            if mode == "P+clear":
                image.info["transparency"] = 0
        case "CMYK":
            image = Image.fromarray(values, "CMYK")
        case _:
            image = Image.fromarray(values).convert(mode if mode in MODES else "RGB")
    exif = Image.Exif()
    exif[0x112] = draw(st.integers(0, 9))
    buffer = io.BytesIO()
    for kind in draw(st.permutations(["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM"])):
        try:
            image.save(buffer, kind, exif=exif)
            break
        except (OSError, ValueError, KeyError):  # this format has no such mode
            buffer = io.BytesIO()
    content = buffer.getvalue()
    return {"cut": content[: len(content) // 2], "empty": b"", "text": b"not an image"}.get(mode, content)


@st.composite
def class_folder(draw: st.DrawFn, first: int) -> dict[str, object]:
    """Paths below a class folder, with the bytes of a file or a tuple (link, its target)."""
    good = draw(st.sampled_from([2, 2, 2, 2, 2, 2, 2, 3, 4, 0]))
    found: dict[str, object] = {f"{i}.png": draw(pictures(MODES, first)) for i in range(good)}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(NAMES) + draw(st.sampled_from(ENDINGS))
        modes = draw(st.sampled_from([MODES, MODES, MODES, MODES, REFUSED]))
        found["/".join([*draw(st.lists(NAMES, max_size=2)), name])] = draw(pictures(modes, first))
    if draw(st.integers(0, 3)) == 0:
        found[draw(NAMES)] = ("link", draw(st.sampled_from(["..", ".", "nowhere", "../..", "../cat", "1.png"])))
    if draw(st.integers(0, 4)) == 0:
        found[draw(st.sampled_from(["@eaDir/1.png", ".hidden/1.png", "__MACOSX/._1.png", "Thumbs.db"]))] = b"junk"
    return found


TREES, TEST_TREES = (st.dictionaries(CLASSES, class_folder(first), min_size=1, max_size=4) for first in (0, 100))


def build(root: Path, tree: dict[str, dict[str, object]]) -> None:
    """Write a tree. Entries that conflict with existing ones are left out."""
    for folder, entries in tree.items():
        with contextlib.suppress(OSError):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in entries.items():
            with contextlib.suppress(OSError):
                path = root / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, tuple):
                    path.symlink_to(content[1])
                elif not path.is_symlink():
                    path.write_bytes(content)


class Brightness(nn.Module):
    """Class 0 is dark, class 1 bright."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((1, 2, 3))
        return nn.functional.pad(torch.stack([1 - mean, mean], dim=1), (0, self.num_classes - 2))


def one_line(error: RRCMError) -> str:
    text = str(error)
    assert text and "\n" not in text and "\r" not in text, text
    return text


def seen_in_training(data: Data, output: Path) -> tuple[list[str], dict[Path, tuple[int, bytes]]]:
    """Class names, and the label and pixels of each image file in any split."""
    raw, seen = read_with_test(data), {}
    write_shards(data, 0, output)
    for name, split in (("train", raw.train), ("val", raw.train), ("test", raw.test)):
        if len(split.labels):
            images = ShardedDataset(output, name)
            pixels = shards.read_pixels(images, SIZE, range(len(images)))
            for i in range(len(images)):
                _, label, key = images.read(i)
                seen[split.images[int(key)]] = (label, pixels[i].numpy().tobytes())
    return raw.classes, seen


def seen_in_certification(root: Path, loaded: LoadedClassifier, output: Path) -> dict[Path, tuple[int, bytes]]:
    """Label and pixels of each image file of a known class."""
    found = find_images(root)
    rule = make_stopping_rule("fixed", 0.5, n0=1, n=2, alpha=0.3, radius_step=0.25)
    smoothed = smooth(loaded, rule.sigma, "auto", batch_size=16)
    certified = certify_folder(found, loaded, smoothed, rule, output)
    certified.run.finish()
    pixels = [read_square(path, loaded).tobytes() for path in certified.paths]
    each = zip(certified.paths, certified.frame["label"], pixels, strict=True)
    return {path: (label, content) for path, label, content in each if label >= 0}


def remove_unreadable(root: Path, channels: int) -> int:
    """Remove the image files that certification cannot read; returns their number."""
    loaded, removed = LoadedClassifier(Brightness(2), SIZE, channels, ["a", "b"]), 0
    for file in find_images(root).files:
        try:
            read_square(root / file, loaded)
        except RRCMError as error:
            one_line(error)
            (root / file).unlink(missing_ok=True)
            removed += 1
    return removed


outcomes: Counter[str] = Counter()


@FOLDERS
@given(tree=TREES, tests=st.one_of(st.none(), TEST_TREES), channels=st.sampled_from([1, 3]), loose=st.booleans())
def compare(tree, tests, channels, loose):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        root, output = Path(folder, "photos"), Path(folder, "shards")
        build(root if tests is None else root / "train", tree)
        if tests is not None:  # of the same classes
            build(root / "test", dict(zip(tree, tests.values(), strict=False)))
        if loose:
            Image.new("L", (3, 3)).save(root / "loose.png")
        sizes = {"image_size": SIZE, "channels": channels, "val_fraction": 0.2, "shard_size": 4, "workers": 0}
        data = Data(source="imagefolder", root=str(root), labels_per_class=None, **sizes)
        while True:
            try:
                classes, seen = seen_in_training(data, output)
                break
            except RRCMError as error:
                assert not output.exists()
                if "cannot be read, named above" not in one_line(error):
                    outcomes["refused"] += 1
                    return
                assert one_line(error).startswith(f"{said.getvalue().count(': cannot be decoded (')} of ")
                assert remove_unreadable(root, channels)  # certification cannot read them either
                said.truncate(said.seek(0))
        loaded = LoadedClassifier(Brightness(len(classes)), SIZE, channels, classes)
        roots = [root] if tests is None else [root / "train", root / "test"]
        certified = {}
        for each in roots:
            certified |= seen_in_certification(each, loaded, Path(folder, "certificates.tsv"))
        assert seen.items() <= certified.items()
        left_out, trained_on = certified.keys() - seen.keys(), {pixels for _, pixels in seen.values()}
        assert tests is not None or not left_out
        assert {certified[path][1] for path in left_out} <= trained_on
        outcomes["with test images left out"] += bool(left_out)
        outcomes["compared"] += 1


def test_training_and_certification_see_the_same():
    compare()
    total = outcomes["refused"] + outcomes["compared"]
    print(f"\n{total} folders, the others refused in one line: {dict(outcomes)}")
    assert outcomes["compared"] > total / 3
