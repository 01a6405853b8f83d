"""Read folders of image files: which files are read, in which order, and their labels and pixels.

Training (sharding.py, shards.py) and `rrcm certify` both use these functions, so they get the same images with the
same labels. README.md lists the supported formats.
"""

import contextlib
import io
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rrcm.utils.errors import RRCMError, one_line, printable

# Only these decoders of Pillow are used, whatever a file is called. Others start programs (EPS) or are untested.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo"}
SUFFIXES |= {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
# Folders that operating systems and network drives fill with thumbnails and copies.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"}
SPLIT_NAMES = {
    "train",
    "training",
    "test",
    "testing",
    "val",
    "valid",
    "validation",
    "eval",
}  # names of splits, and of classes only among others
LISTED = "links to what is listed already"
DARKEST = 4096  # a 16-bit image without values of at least this probably has fewer bits, and the wrong scale


def decode_image(content: bytes) -> Image.Image:
    """Decode an image file's bytes to mode L or RGB, as a viewer with a white background would show it.

    The orientation in the EXIF data is applied, transparent pixels are laid on white, 16 bits per channel become 8, and
    only the first of several frames is read. Colour profiles are ignored. An L or RGB image that is saved without loss
    and decoded again is unchanged.

    Raises ValueError, which says why the file cannot be decoded or why its white level is unknown.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()  # completely, because a truncated file opens without an error
            deep = _bits_per_channel(image, content) > 8
            with contextlib.suppress(Exception):  # unreadable EXIF data counts as no orientation
                ImageOps.exif_transpose(image, in_place=True)
            picture = _flattened(image)
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise ValueError(f"has more than the {limit:.0f} million pixels that are read; shrink it") from None
    except UnidentifiedImageError:
        raise ValueError("is not an image of a kind that is read") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(one_line(error)) from None
    if deep and picture.mode == "RGB" and 0 < np.asarray(picture).max() < DARKEST // 256:
        raise ValueError(_too_dark(DARKEST))
    return picture


def read_image(path: Path, channels: int) -> Image.Image:
    """`decode_image` of a file, in mode L (channels 1) or RGB (3). Raises `RRCMError` naming the file."""
    try:
        return to_channels(decode_image(path.read_bytes()), channels)
    except (OSError, ValueError) as error:
        raise RRCMError(f"{printable(path)}: cannot be decoded ({one_line(error)})") from None


def to_channels(picture: Image.Image, channels: int) -> Image.Image:
    """The picture in mode L (channels 1: the luma of ITU-R BT.601) or RGB (3)."""
    return picture.convert("L" if channels == 1 else "RGB")


def _bits_per_channel(image: Image.Image, content: bytes) -> int:
    """The bits per channel in the file, or 8 where Pillow has scaled them already."""
    if image.format == "PNG":
        return content[24]  # in the IHDR chunk, which always comes first
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,)))  # BitsPerSample
    return 8


def _flattened(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB, with 8 bits per channel and transparent pixels laid on white."""
    if image.mode.startswith("I"):
        return _eight_bits(image)
    if image.mode == "F":
        raise ValueError("pixels of mode F have no known white; convert it to 8 bits per channel")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("L" if grey else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of 9 to 16 bits to 8 bits. White is the maximum that the file states, or can store."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    white = 2 ** min(tags.get(258, (16,))[0], 16) - 1  # BitsPerSample
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"pixels of mode {image.mode} outside 0..{white} have no known white; convert it to 8 bits")
    named = tags.get(281, (0,))[0]  # MaxSampleValue
    if 0 < named < white and values.max() <= named:
        white = named
    if tags.get(262) == 0:  # PhotometricInterpretation: 0 is white
        values = white - values
    if white > DARKEST and 0 < values.max() < DARKEST:
        raise ValueError(_too_dark(values.max() + 1))
    return Image.fromarray(np.round(values / white * 255).astype(np.uint8))


def _too_dark(bound: int) -> str:
    return (
        f"16 bits per channel, but no value reaches {bound:,} of 65,535, so it would be black; "
        "if it stores fewer bits, scale them to 16 or convert it to 8"
    )


@dataclass
class Listing:
    """The image files of a folder and what was left out of it."""

    folder: Path
    files: list[Path] = field(default_factory=list)  # relative to `folder`, in natural order
    left_out: Counter[str] = field(default_factory=Counter)  # number of files by reason
    links: list[tuple[Path, Path]] = field(default_factory=list)  # links that are left out as LISTED, and their targets


def list_images(folder: Path) -> Listing:
    """The image files in `folder` and below, in natural order: img2 before img10.

    Image files have one of SUFFIXES, in upper or lower case. Links are followed, but each file and folder is read only
    once: under its own path if that is below `folder`, otherwise under the first link. Links to a file that lies
    directly in `folder` take precedence over the file, because their folders may name its class. Hidden files and
    SYSTEM_FOLDERS are left out. Raises `RRCMError` if the folder does not exist.
    """
    if not folder.is_dir():
        raise RRCMError(f"{printable(folder)}: no such folder; give one with images")
    listing = Listing(folder)
    read: dict[str, Path] = {}  # folders by their real paths
    images: list[tuple[bool, Path, object]] = []  # whether it is a link, its path, its identity
    waiting, links = [Path()], []
    while waiting:
        relative = waiting.pop()
        real = os.path.realpath(folder / relative)
        if real in read:
            listing.links.append((relative, read[real]))
        else:
            read[real] = relative
            for entry in _open_folder(listing, relative):
                path = relative / entry.name
                if reason := _reason_to_leave_out(entry):
                    listing.left_out[reason] += _count_files(entry)
                elif is_folder(entry):
                    (links if entry.is_symlink() else waiting).append(path)
                else:
                    images.append((entry.is_symlink(), path, _identity(entry, real)))
        if not waiting:  # every folder that is reachable without a further link has been read
            waiting, links = sorted(links, key=natural_order, reverse=True), []
    images.sort(key=lambda image: natural_order(image[1]))
    first: dict[object, Path] = {}
    for _, path, identity in sorted(images, key=lambda image: (image[1].parent == Path(), image[0])):
        first.setdefault(identity, path)
    for _, path, identity in images:
        if first[identity] == path:
            listing.files.append(path)
        else:
            listing.links.append((path, first[identity]))
    if listing.links:
        listing.left_out[LISTED] = len(listing.links)
    return listing


def _open_folder(listing: Listing, relative: Path) -> list[os.DirEntry]:
    """The entries of a folder. If it cannot be opened, the listing counts it as left out."""
    try:
        return list(os.scandir(listing.folder / relative))
    except OSError as error:
        listing.left_out[f"folders that cannot be opened ({error.strerror})"] += 1
        return []


def _identity(entry: os.DirEntry, real_folder: str) -> object:
    """The identity of a file, whatever path leads to it: its inode if it has hard links, otherwise its real path.

    Some file systems have no inodes, so the inode of a file without hard links is not used.
    """
    status = entry.stat()
    if status.st_nlink > 1:
        return status.st_dev, status.st_ino
    return os.path.realpath(entry.path) if entry.is_symlink() else str(Path(real_folder, entry.name))


def _reason_to_leave_out(entry: os.DirEntry) -> str | None:
    """Why an entry is left out; None for an image file and for a folder that is read."""
    suffix = Path(entry.name).suffix.lower()
    if is_left_out(entry.name):
        return f"files in {entry.name}" if entry.name in SYSTEM_FOLDERS else "hidden files"
    is_file = _answer(entry.is_file)
    if is_folder(entry) or (suffix in SUFFIXES and is_file):
        return None
    if is_file:
        return f"{printable(suffix)} files" if suffix else "files without an extension"
    return "links that lead nowhere" if entry.is_symlink() else "special files"


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one."""
    return _answer(entry.is_dir)


def _answer(question: Callable[[], bool]) -> bool:
    """The answer to a question about an entry; False for circular links and for folders that we may not open."""
    try:
        return question()
    except OSError:
        return False


def is_left_out(name: str) -> bool:
    """Whether files and folders of this name are never read: hidden ones and SYSTEM_FOLDERS."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _count_files(entry: os.DirEntry) -> int:
    """The number of files in a folder and below, without following links; 1 for a file."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return sum(len(files) for _, _, files in os.walk(entry.path))


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """One line that says what was left out, sorted by count: `hidden files (12), .txt files (3)`."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} ({count:,})" for reason, count in ordered if count)


def natural_order(path: Path | str) -> tuple:
    """Sort key that compares numbers by value and text regardless of case. The path itself decides between 1 and 01."""
    parts = [re.split(r"(\d+)", part.casefold()) for part in Path(path).parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], str(path)


def class_name(folder_name: str) -> str:
    """The class that a folder is named after: its name in Unicode NFC, since macOS decomposes characters.

    Raises ValueError for a name that is not printable text.
    """
    name = unicodedata.normalize("NFC", folder_name)
    if not (name.isprintable() and name.strip()):
        raise ValueError("is not printable text, so it cannot name a class; rename it")
    return name


def class_level(files: Iterable[Path], names: Iterable[str]) -> int | None:
    """The level of folders that are named after classes: 0 in cat/1.jpg, 1 in train/cat/1.jpg. None without classes.

    This is the level at which most of the `files` (relative paths) lie in folders named after a class. If several are
    equal, it is the first one that has other names than SPLIT_NAMES, or else the last: test/train/1.jpg shows a train.
    """
    names = {unicodedata.normalize("NFC", name) for name in names}
    counts, named = Counter(), defaultdict(set)
    for file in files:
        for level, folder in enumerate(file.parts[:-1]):
            if unicodedata.normalize("NFC", folder) in names:
                counts[level] += 1
                named[level].add(folder.casefold())
    levels = [level for level in sorted(counts) if counts[level] == max(counts.values())]
    return next((level for level in levels if not named[level] <= SPLIT_NAMES), levels[-1] if levels else None)


def label_of(file: Path, classes: Mapping[str, int], level: int = 0) -> int | None:
    """The label of an image file, from the folder at this level of its path below the data set's folder.

    None if there is no such folder, or if it is not named after a class. `classes` maps class names to labels.
    """
    folders = file.parts[:-1]
    return classes.get(unicodedata.normalize("NFC", folders[level])) if level < len(folders) else None


def refuse_unreadable(problems: Sequence[str], total: int, advice: str) -> NoReturn:
    """Print one line per unreadable file. Raises an `RRCMError` that counts them and says what to do."""
    print(*problems, sep="\n", file=sys.stderr)
    raise RRCMError(f"{len(problems):,} of {total:,} images cannot be read, named above; {advice}")
