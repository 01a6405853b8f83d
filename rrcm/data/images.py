"""Image files as people have them: which files of a folder are read, in which order, with which labels and pixels.

Training (sharding.py, shards.py) and `rrcm certify` both use these functions, so they see the same pictures with the
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

# Only these decoders of Pillow are used, whatever a file is called: some others start programs (EPS) or are untested.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".mpo"}
SUFFIXES |= {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
# Folders that operating systems and network drives fill with thumbnails and copies.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"}
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation", "eval"}  # never classes alone
LISTED = "links to what is listed already"
DARKEST = 4096  # a 16-bit image below this in all pixels is taken for one of fewer bits in the wrong scale


def decode_image(content: bytes) -> Image.Image:
    """The picture in an image file's bytes, in mode L or RGB, as a viewer on a white page shows it.

    The orientation in its EXIF data is applied, transparent pixels are put on white, 16 bits per channel become 8, and
    of several frames the first is taken. Colour profiles are ignored. A decoded L or RGB image, saved without loss and
    decoded again, is unchanged.

    Raises ValueError that says why the file cannot be decoded, or has no known white.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()  # all of it: a truncated file opens without an error
            deep = _bits_per_channel(image, content) > 8
            with contextlib.suppress(Exception):  # EXIF data that cannot be read has no orientation
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
    """Bits that the file stores per channel; 8 where Pillow has scaled them already."""
    if image.format == "PNG":
        return content[24]  # of the IHDR chunk, which is always the first
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (8,)))  # BitsPerSample
    return 8


def _flattened(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB: 8 bits per channel, transparency on white."""
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
    """A grey image of 9 to 16 bits in 8 bits. Its white is the largest value that its file can store or names."""
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
    links: list[tuple[Path, Path]] = field(default_factory=list)  # those left out as LISTED, with what they lead to


def list_images(folder: Path) -> Listing:
    """The image files in `folder` and below, in natural order: img2 before img10.

    An image file has a suffix of SUFFIXES, in any case. Links are followed, but each file and each folder is read once,
    however many ways lead to it: by its own path, if that is below `folder`, else by the first link. Only a file of
    `folder` itself counts after links to it, since their folders may tell its class. Hidden files and SYSTEM_FOLDERS
    are left out. Raises `RRCMError` if there is no such folder.
    """
    if not folder.is_dir():
        raise RRCMError(f"{printable(folder)}: no such folder; give one with images")
    found = Listing(folder)
    read: dict[str, Path] = {}  # folders by their real paths
    images: list[tuple[bool, Path, object]] = []  # whether it is a link, its path, its identity
    waiting, links = [Path()], []
    while waiting:
        relative = waiting.pop()
        real = os.path.realpath(folder / relative)
        if real in read:
            found.links.append((relative, read[real]))
        else:
            read[real] = relative
            for entry in _open_folder(found, relative):
                path = relative / entry.name
                if reason := _reason_to_leave_out(entry):
                    found.left_out[reason] += _count_files(entry)
                elif is_folder(entry):
                    (links if entry.is_symlink() else waiting).append(path)
                else:
                    images.append((entry.is_symlink(), path, _identity(entry, real)))
        if not waiting:  # all folders are read that need no further link
            waiting, links = sorted(links, key=natural_order, reverse=True), []
    images.sort(key=lambda image: natural_order(image[1]))
    first: dict[object, Path] = {}
    for _, path, identity in sorted(images, key=lambda image: (image[1].parent == Path(), image[0])):
        first.setdefault(identity, path)
    for _, path, identity in images:
        if first[identity] == path:
            found.files.append(path)
        else:
            found.links.append((path, first[identity]))
    if found.links:
        found.left_out[LISTED] = len(found.links)
    return found


def _open_folder(found: Listing, relative: Path) -> list[os.DirEntry]:
    """The entries of a folder below that of the listing; none, and counted there, if it cannot be opened."""
    try:
        return list(os.scandir(found.folder / relative))
    except OSError as error:
        found.left_out[f"folders that cannot be opened ({error.strerror})"] += 1
        return []


def _identity(entry: os.DirEntry, real_folder: str) -> object:
    """What all ways to a file share: the file's number if it has hard links, else its real path.

    Some file systems have no numbers, so those of files without hard links do not count.
    """
    status = entry.stat()
    if status.st_nlink > 1:
        return status.st_dev, status.st_ino
    return os.path.realpath(entry.path) if entry.is_symlink() else str(Path(real_folder, entry.name))


def _reason_to_leave_out(entry: os.DirEntry) -> str | None:
    """None for an image file and for a folder that is read."""
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
    """The answer about an entry; False about a link in a circle, or into a folder that is closed to us."""
    try:
        return question()
    except OSError:
        return False


def is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is never read: hidden ones and SYSTEM_FOLDERS."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _count_files(entry: os.DirEntry) -> int:
    """Number of files in a folder and below, links not followed; 1 for a file."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return sum(len(files) for _, _, files in os.walk(entry.path))


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """One line that says what was left out, most files first: `hidden files (12), .txt files (3)`."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} ({count:,})" for reason, count in ordered if count)


def natural_order(path: Path | str) -> tuple:
    """Sort key: numbers inside names by value, else as text without case. The path itself decides between 1 and 01."""
    parts = [re.split(r"(\d+)", part.casefold()) for part in Path(path).parts]
    return [[int(s) if i % 2 else s for i, s in enumerate(part)] for part in parts], str(path)


def class_name(folder_name: str) -> str:
    """The class that a folder is named after: its name, with composed characters (Unicode NFC; macOS decomposes them).

    Raises ValueError for a name that is not printable text.
    """
    name = unicodedata.normalize("NFC", folder_name)
    if not (name.isprintable() and name.strip()):
        raise ValueError("is not printable text, so it cannot name a class; rename it")
    return name


def class_level(files: Iterable[Path], names: Iterable[str]) -> int | None:
    """The level of folders at which the classes lie: 0 in cat/1.jpg, 1 in train/cat/1.jpg. None if no class is found.

    It is the level at which most of the `files` (relative paths) lie in folders named after a class. Of equal ones the
    first counts that is no level of SPLIT_NAMES, or else the last: test/train/1.jpg shows a train.
    """
    names = {unicodedata.normalize("NFC", name) for name in names}
    counts, found = Counter(), defaultdict(set)
    for file in files:
        for level, folder in enumerate(file.parts[:-1]):
            if unicodedata.normalize("NFC", folder) in names:
                counts[level] += 1
                found[level].add(folder.casefold())
    levels = [level for level in sorted(counts) if counts[level] == max(counts.values())]
    return next((level for level in levels if not found[level] <= SPLIT_NAMES), levels[-1] if levels else None)


def label_of(file: Path, classes: Mapping[str, int], level: int = 0) -> int | None:
    """The label of an image file by the folder at one level of its path below the data set's folder.

    None if there is no such folder, or it is not named after a class. `classes` maps class names to labels.
    """
    folders = file.parts[:-1]
    return classes.get(unicodedata.normalize("NFC", folders[level])) if level < len(folders) else None


def refuse_unreadable(problems: Sequence[str], total: int, advice: str) -> NoReturn:
    """Print one line per file that cannot be read. Raises `RRCMError` that counts them and says what to do."""
    print(*problems, sep="\n", file=sys.stderr)
    raise RRCMError(f"{len(problems):,} of {total:,} images cannot be read, named above; {advice}")
