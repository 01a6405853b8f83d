"""Which files of a folder are images, in which order, with which labels and pixels."""

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image, PngImagePlugin

from rrcm.data.images import (
    LISTED,
    SUFFIXES,
    class_level,
    class_name,
    decode_image,
    describe_left_out,
    label_of,
    list_images,
    natural_order,
    read_image,
)
from rrcm.utils.errors import RRCMError

GREYS = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(content: bytes) -> np.ndarray:
    picture = decode_image(content)
    assert picture.mode in ("L", "RGB")
    assert np.array_equal(np.asarray(decode_image(encoded(picture))), np.asarray(picture))  # decoding again is safe
    return np.asarray(picture)


def complaint(content: bytes) -> str:
    with pytest.raises(ValueError) as error:
        decode_image(content)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "JPEG"])
def test_formats(kind: str):
    options = {
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "JPEG": {"quality": 100, "subsampling": 0},
    }
    found = pixels(encoded(COLOURS, kind, **options.get(kind, {})))
    assert found.shape == COLOURS.shape
    assert np.abs(found.astype(int) - COLOURS).max() <= {"AVIF": 12, "JPEG": 4}.get(kind, 0)


def test_transparent_pixels_are_white_whatever_colour_they_hide():
    hidden = np.zeros((2, 2, 4), np.uint8)
    hidden[0] = (200, 100, 50, 255)
    hidden[1, 0] = (200, 100, 50, 0)
    hidden[1, 1] = (0, 0, 0, 128)
    found = pixels(encoded(hidden))
    assert found.tolist() == [[[200, 100, 50]] * 2, [[255] * 3, [127] * 3]]
    assert pixels(encoded(Image.new("LA", (1, 1), (0, 51)))).tolist() == [[204]]
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert pixels(encoded(palette)).tolist() == [[[0, 0, 255]]]
    assert pixels(encoded(palette, transparency=1)).tolist() == [[[255] * 3]]
    assert pixels(encoded(np.full((1, 1), 7, np.uint8), transparency=7)).tolist() == [[255]]


def test_sixteen_bits_become_eight_in_every_byte_order():
    values = np.round(GREYS.astype(np.uint16) * 257)
    assert np.array_equal(pixels(encoded(values)), GREYS)
    for order in ("<", ">"):
        assert np.array_equal(pixels(encoded(values.astype(f"{order}u2"), "TIFF")), GREYS)
    assert np.array_equal(pixels(encoded(values.astype(np.int32), "TIFF")), GREYS)
    assert pixels(encoded(np.zeros((2, 2), np.uint16))).max() == 0  # really black


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed little-endian TIFF of one grey channel, written by hand since Pillow writes no 12 bits."""
    height, width = values.shape
    data = values.astype("<u2").tobytes()
    if tags["BitsPerSample"] == 12:
        flat = values.reshape(-1, 2).astype(int)
        data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in flat)
    numbers = {"BitsPerSample": 258, "PhotometricInterpretation": 262, "MaxSampleValue": 281}
    entries = {256: width, 257: height, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries |= {numbers[name]: value for name, value in tags.items()}
    rows = b"".join(
        np.array([tag, 3], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
        for tag, value in sorted(entries.items())
    )
    directory = np.array([len(entries)], "<u2").tobytes() + rows + b"\0\0\0\0"
    return b"II*\0" + np.array([8 + len(data)], "<u4").tobytes() + data + directory


def test_twelve_bits_are_not_black():
    values = np.arange(0, 4096, 273, dtype=np.uint16).reshape(4, 4)  # 0 to 4095
    expected = np.round(values / 4095 * 255)
    assert np.array_equal(pixels(tiff(values, BitsPerSample=12)), expected)
    assert np.array_equal(pixels(tiff(values, BitsPerSample=16, MaxSampleValue=4095)), expected)
    for content in (encoded(values), tiff(values, BitsPerSample=16)):
        assert "no value reaches 4,096 of 65,535, so it would be black" in complaint(content)


def test_a_scan_of_a_magnetic_resonance_tomograph():
    """The only real 16-bit image among our dependencies: matplotlib's sample of a head, 256 x 256 pixels."""
    with get_sample_data("s1045.ima.gz") as file:
        scan = np.frombuffer(file.read(), "<u2").reshape(256, 256)
    expected = np.round(scan / 65535 * 255)
    for content in (encoded(scan), encoded(scan, "TIFF"), tiff(scan >> 4, BitsPerSample=12)):
        picture = pixels(content)
        assert np.abs(picture - expected).max() <= 1 and picture.max() == 214 and picture.std() > 50


def test_white_is_zero_in_some_tiffs():
    values = np.round(GREYS.astype(np.uint16) * 257)
    assert np.array_equal(pixels(tiff(values, BitsPerSample=16, PhotometricInterpretation=0)), 255 - GREYS)


def test_twelve_bits_of_colour_are_not_black():
    """Pillow keeps the upper byte of 16 bits, so 12 bits in 16 leave values up to 15."""

    def png(value: int) -> bytes:
        rows = zlib.compress(b"\0" + struct.pack(">3H", value, value // 2, 1) * 2)
        chunks = [(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
        body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(body)

    assert pixels(png(40000)).tolist() == [[[156, 78, 0]] * 2]
    assert "would be black" in complaint(png(4095))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
def test_pictures_stand_upright(orientation: int, kind: str):
    """EXIF orientations 1 to 8, and 0 and 9, which are not defined."""
    image = Image.fromarray(np.kron(COLOURS[:, :4], np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    plain = np.asarray(Image.open(io.BytesIO(encoded(image, kind, **options))).convert("RGB"))
    turned = {
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.swapaxes(0, 1),
        6: plain.swapaxes(0, 1)[:, ::-1],
        7: plain.swapaxes(0, 1)[::-1, ::-1],
        8: plain.swapaxes(0, 1)[::-1],
    }.get(orientation, plain)
    assert np.array_equal(pixels(encoded(image, kind, exif=exif, **options)), turned)


def test_exif_data_that_cannot_be_read_turns_nothing():
    content = encoded(Image.fromarray(COLOURS), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert pixels(content).shape == COLOURS.shape


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pixels(content)[0, 0].tolist() == [255, 0, 0]


def test_bombs_and_damage():
    assert "has more than the 179 million pixels" in complaint(encoded(Image.new("1", (20000, 20000))))
    whole = encoded(COLOURS)
    complaint(whole[:-60])
    for content in (b"", b"no image"):
        assert complaint(content) == "is not an image of a kind that is read"
    assert "mode F" in complaint(encoded(np.zeros((2, 2), np.float32), "TIFF"))
    assert "outside 0..65535" in complaint(encoded(np.full((2, 2), 70000, np.int32), "TIFF"))
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2**21, zip=True)
    complaint(encoded(COLOURS, pnginfo=text))  # a bomb in a text


def test_no_decoder_that_starts_a_program_is_used(monkeypatch: pytest.MonkeyPatch):
    """Pillow gives EPS files to Ghostscript, whatever they are called."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    content = encoded(COLOURS, "EPS")
    assert Image.open(io.BytesIO(content)).format == "EPS"
    complaint(content)


def test_read_image_names_the_file(tmp_path: Path):
    path = tmp_path / "line\nend.png"
    path.write_bytes(b"no")
    with pytest.raises(RRCMError, match=r"line\\nend.png: cannot be decoded") as error:
        read_image(path, 3)
    assert "\n" not in str(error.value)
    with pytest.raises(RRCMError, match=r"none.png: cannot be decoded"):
        read_image(tmp_path / "none.png", 3)


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_order_and_kinds(tmp_path: Path):
    make(tmp_path, "10/b.PNG", "2/a10.jpg", "2/a9.jpeg", "2/x/deep/1.webp", "x.png", "1.txt", "README", "2/a.heic")
    found = list_images(tmp_path)
    assert list(map(str, found.files)) == ["2/a9.jpeg", "2/a10.jpg", "2/x/deep/1.webp", "10/b.PNG", "x.png"]
    assert found.left_out == {".txt files": 1, ".heic files": 1, "files without an extension": 1}
    assert describe_left_out(found.left_out) == ".heic files (1), .txt files (1), files without an extension (1)"
    assert all(suffix == suffix.lower() for suffix in SUFFIXES)


def test_hidden_files_system_folders_and_special_files(tmp_path: Path):
    make(tmp_path, "a/1.png", "a/._1.png", ".cache/a/1.png", ".cache/2.png", "@eaDir/a/1.png", "a/__MACOSX/1.png")
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "a/lost.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    found = list_images(tmp_path)
    assert list(map(str, found.files)) == ["a/1.png"]
    assert found.left_out == {
        "hidden files": 3,
        "files in @eaDir": 1,
        "files in __MACOSX": 1,
        "special files": 1,
        "links that lead nowhere": 1,
    }


def test_each_file_is_read_once_however_many_links_lead_to_it(tmp_path: Path):
    make(tmp_path / "elsewhere", "1.png", "more/2.png")
    root = make(tmp_path / "root", "cat/0.png", "dog/4.png")
    (root / "another").symlink_to(tmp_path / "elsewhere")
    (root / "cat/3.png").symlink_to(tmp_path / "elsewhere/1.png")
    (root / "all").symlink_to(root)
    (root / "ant").symlink_to("cat")  # before cat, but the folder itself comes first
    (root / "a.png").symlink_to("dog/4.png")
    os.link(root / "cat/0.png", root / "dog/0.png")
    (root / "dog/more").symlink_to(tmp_path / "elsewhere/more")
    (tmp_path / "elsewhere/more/back").symlink_to(tmp_path / "elsewhere")
    found = list_images(root)
    assert list(map(str, found.files)) == ["another/1.png", "another/more/2.png", "cat/0.png", "dog/4.png"]
    assert found.left_out == {LISTED: 7}
    assert {tuple(map(str, link)) for link in found.links} == {
        ("all", "."),
        ("ant", "cat"),
        ("a.png", "dog/4.png"),
        ("cat/3.png", "another/1.png"),
        ("dog/0.png", "cat/0.png"),
        ("dog/more", "another/more"),
        ("another/more/back", "another"),
    }
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert list_images(linked).files == found.files


@pytest.mark.parametrize("count", [8, 40])
def test_folders_that_are_linked_to_each_other_do_not_multiply(tmp_path: Path, count: int):
    for here in range(count):
        make(tmp_path, f"{here}/1.png")
        for other in range(count):
            (tmp_path / f"{here}/to {other}").symlink_to(f"../{other}")
    found = list_images(tmp_path)
    assert list(map(str, found.files)) == [f"{number}/1.png" for number in range(count)]
    assert found.left_out == {LISTED: count**2}


def test_links_in_a_circle_lead_nowhere(tmp_path: Path):
    make(tmp_path, "1.png")
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(name)
    found = list_images(tmp_path)
    assert list(map(str, found.files)) == ["1.png"] and found.left_out == {"links that lead nowhere": 2}


def test_very_deep_folders(tmp_path: Path):
    here, depth = Path.cwd(), 300
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            Path("d").mkdir()
            os.chdir("d")
        Path("1.png").touch()
    finally:
        os.chdir(here)
    assert len(list_images(tmp_path).files[0].parts) == depth + 1


def test_class_names_and_labels():
    assert sorted(["10", "9", "b", "A", "1", "01"], key=natural_order) == ["01", "1", "9", "10", "A", "b"]
    assert class_name("cafe\u0301") == "caf\u00e9"
    for name in ("a\nb", "\udcff", " ", "a\u202eb"):
        with pytest.raises(ValueError, match="printable"):
            class_name(name)


def test_labels_are_of_one_level():
    classes = {"cat": 0, "dog": 1, "caf\u00e9": 2}
    paths = ["cat/2021/dog/1.jpg", "test/dog/1.jpg", "cafe\u0301/1.jpg", "dog.jpg", "cats/1.jpg"]
    assert [label_of(Path(path), classes) for path in paths] == [0, None, 2, None, None]
    assert [label_of(Path(path), classes, 1) for path in paths] == [None, 1, None, None, None]


@pytest.mark.parametrize(
    ("paths", "classes", "level"),
    [
        ("cat/1 cat/2 dog/1", "cat dog", 0),
        ("train/cat/1 train/dog/1 test/cat/1", "cat dog train", 1),  # `train` is a class, but here a split
        ("train/cat/1 train/train/1 test/train/1", "cat train", 1),
        ("train/train/1 train/test/1 test/train/1 test/test/1", "train test", 1),
        ("train/1 test/1 val/1", "train test val", 0),
        ("train/2021/1 cat/1", "cat train", 0),
        ("cat/dog/1 cat/dog/2 dog/cat/1", "cat dog", 0),  # a class inside a class
        ("cat/dog/1 cat/2 dog/1", "cat dog", 0),
        ("2021/05/cat/1 2021/05/dog/1 cat/1", "cat dog", 2),
        ("cat/train/1 cat/test/1 dog/train/1", "cat dog train test", 0),
        ("Train/cat/1 Test/dog/1", "cat dog Train Test", 1),
        ("cafe\u0301/1", "caf\u00e9", 0),
        ("caf\u00e9/1", "cafe\u0301", 0),
        ("Cat/1 DOG/1", "cat dog", None),
        ("1 2", "cat dog", None),
        ("cats/1 cat.jpg/1", "cat dog", None),
        ("", "cat", None),
    ],
)
def test_the_level_at_which_the_classes_lie(paths: str, classes: str, level: int | None):
    assert class_level([Path(f"{path}.png") for path in paths.split()], classes.split()) == level
