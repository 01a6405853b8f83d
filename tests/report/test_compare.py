"""Comparing certificate files gives a table and a figure, and one line for bad input."""

import gzip
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from rrcm.evaluation.metrics import acr_difference
from rrcm.report.compare import compare, notes_on_images, parse_files, parse_radii
from rrcm.utils.errors import RRCMError, printable

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
ROWS = ["0\t3\t3\t0.5\t1\t0:00:17.5", "20\t7\t1\t0.9\t0\t0:00:17", "40\t8\t-1\t0.0\t0\t1", "60\t0\t0\t0.25\t1\t1"]
ONE = [HEADER, *ROWS]
PI = [int(digit) for digit in "314159265358979323846264338327950288419716939937510582097494459230781640628620899"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two files of the same images. The second has an extra column and CRLF line ends."""
    monkeypatch.chdir(tmp_path)
    Path("one.tsv").write_text("\n".join(ONE))
    other = [f"{line}\t{'sigma' if line == HEADER else 0.5}" for line in ONE]
    other[1] = other[1].replace("0.5\t1", "1.0\t1")
    Path("other.txt").write_bytes("\r\n".join([*other, "", ""]).encode())
    return tmp_path


def test_compare_prints_a_table_and_draws_a_figure(files: Path, capsys: pytest.CaptureFixture):
    compare(["ours=one.tsv", "Cohen et al. 2019=other.txt"], "0,0.25,0.5,0.75", Path("compare.png"))
    shown = capsys.readouterr()
    assert [" ".join(line.split()) for line in shown.out.splitlines() if "-" not in line] == [
        "images r = 0 r = 0.25 r = 0.5 r = 0.75 ACR",
        "ours 4 50.0 50.0 25.0 0.0 0.188 ± 0.120",
        "Cohen et al. 2019 4 50.0 50.0 25.0 25.0 0.312 ± 0.237",
    ]
    assert shown.err == ""
    with Image.open("compare.png") as image:
        assert len(image.getcolors(2**24)) > 50


def test_the_page_has_the_printed_tables(files: Path, capsys: pytest.CaptureFixture):
    arguments = ["ours=one.tsv", "<theirs>=other.txt"], "0,0.75", Path("compare.png"), "ours"
    compare(*arguments, page=Path("compare.html"))
    printed, page = capsys.readouterr().out, Path("compare.html").read_text()
    for line in printed.splitlines()[2:4] + printed.splitlines()[-1:]:
        name, *cells = re.split(r"  +", line)
        row = page.split(f'<tr><th scope="row">{escape(name)}<td')[-1 if line == printed.splitlines()[-1] else 1]
        assert all(cell in re.sub(r"<[^>]*>", "", row) for cell in cells)
    assert page.count('data-series="file-1"') >= 2 and "<theirs>" not in page
    compare(*arguments, page=Path("again.html"))
    assert Path("again.html").read_text() == page
    with pytest.raises(RRCMError, match=r"--page compare.htm: must end in \.html"):
        compare(*arguments, page=Path("compare.htm"))


def write_rows(path: str, numbers: Sequence[int], radius: float = 0.5, shift: int = 0) -> str:
    """A file of right answers for these image numbers, whose labels are the digits of pi from the digit `shift` on."""
    rows = [f"{i}\t{(label := PI[i + shift])}\t{label}\t{radius + i / 100}\t1\t0" for i in numbers]
    Path(path).write_text("\n".join([HEADER, *rows]))
    return path


def test_files_are_compared_on_their_common_images(files: Path, capsys: pytest.CaptureFixture):
    """Radii are 0.5, 0.51, ... in one file, and 0.7, 0.72, ... in the other, which has every second image."""
    write_rows("all.tsv", range(20))
    write_rows("second.tsv", range(0, 20, 2), 0.7)
    compare(["ours=all.tsv", "theirs=second.tsv"], "0,0.65", Path("a.png"), reference="theirs")
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert [line[:5] for line in lines[2:4]] == [
        ["ours", "10", "100.0", "20.0", "0.590"],
        ["theirs", "10", "100.0", "100.0", "0.790"],
    ]
    assert lines[-1][:2] == ["ours", "10"] and "-80.0" in lines[-1]
    radii = ([least + i / 100 for i in range(0, 20, 2)] for least in (0.5, 0.7))
    acr = acr_difference(*(pd.DataFrame({"radius": each, "correct": 1}) for each in radii))
    assert shown.out.splitlines()[-1].endswith(f"-0.200 ({acr.low:+.3f} to {acr.high:+.3f})")
    assert shown.err == "note: compared on the 10 images that are in all files (ours has 20, theirs has 10)\n"


def test_an_impossible_reference_is_refused(files: Path):
    with pytest.raises(RRCMError, match="must be one of the names 'ours', 'far'"):
        compare(["ours=one.tsv", "far=other.txt"], "0", Path("a.png"), "him")


@pytest.mark.parametrize(
    ("numbers", "shift", "message"),
    [
        (range(20), 1, "have two labels, such as image 0 has label 3 in one and 1 in the other: they are of"),
        (range(30, 50), 0, "no image is in all files"),
        (range(18, 50), 0, "only 2 images are in all files, and other labels would agree with probability 0.01"),
    ],
)
def test_files_of_other_images_are_refused_in_one_line(files: Path, numbers, shift: int, message: str):
    write_rows("all.tsv", range(20))
    write_rows("far.tsv", numbers, shift=shift)
    with pytest.raises(RRCMError, match=f"^'ours' and 'far': .*{message}.*; compare files of ") as caught:
        compare(["ours=all.tsv", "far=far.tsv"], "0", Path("a.png"))
    assert "\n" not in str(caught.value) and not Path("a.png").exists()


def test_sorted_labels_are_little_evidence(files: Path):
    """The first 50 images of two data sets that are sorted by class have one label: a single chance match."""
    for path, count in (("a.tsv", 50), ("b.tsv", 500)):
        rows = [f"{i}\t{i // 50}\t0\t0.0\t{int(i < 50)}\t0" for i in range(count)]
        Path(path).write_text("\n".join([HEADER, *rows]))
    with pytest.raises(RRCMError, match=r"only 50 images are in all files, .* with probability 0\.1;"):
        compare(["a=a.tsv", "b=b.tsv"], "0", Path("a.png"))


def test_packed_files_are_compared(files: Path, capsys: pytest.CaptureFixture):
    Path("one.tsv.gz").write_bytes(gzip.compress(Path("one.tsv").read_bytes()))
    compare(["plain=one.tsv", "packed=one.tsv.gz"], "0", Path("a.png"))
    shown = capsys.readouterr()
    plain, packed = (line.split()[1:] for line in shown.out.splitlines()[2:])
    assert plain == packed and shown.err == ""


def test_svg_is_reproducible_and_names_are_literal(files: Path):
    odd = "_50 % $\\frac$=one.tsv"
    for name in ("a.svg", "b.svg"):
        compare([odd, "other=other.txt"], "0,1", Path(name))
    ET.parse("a.svg")
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.tsv"], "'one.tsv': must be NAME=FILE"),
        (["=one.tsv"], "must be NAME=FILE"),
        ([" =one.tsv"], "must be NAME=FILE"),
        (["ours="], "must be NAME=FILE"),
        (
            ["a=one.tsv", "a=other.txt"],
            "'a=other.txt': the name 'a' is taken by one.tsv; choose another, or join the files",
        ),
        (["a=none.tsv"], "none.tsv: no such file"),
        (["a=one.tsv", "b=bad.tsv"], "bad.tsv, line 2: has 1 columns, must have 6"),
        (["a=one.tsv", "--radii", "0,far"], "--radii 0,far: must be numbers >= 0"),
        (["a=one.tsv", "--radii", "0,-1"], "must be numbers >= 0"),
        (["a=one.tsv", "--output", "compare.jpg"], "--output compare.jpg: must end in .png, .svg or .pdf"),
        (["a=one.tsv", "--output", "pipe.png"], "pipe.png: no file can be written there"),
        (["a=one.tsv", "--output", "bad.tsv/a.png"], "a.png: no file can be written there"),
        (["a=/dev/zero"], "/dev/zero: is a device; give a file of certificates"),
        (["a=long.tsv"], "x ... (200,0"),
        (["a=long.tsv"], "x': must be a whole number; correct it"),
    ],
)
def test_bad_input_gives_one_line_and_keeps_the_old_figure(files: Path, capsys, arguments, message: str):
    from rrcm.cli import app

    Path("compare.png").write_text("as it was")
    Path("bad.tsv").write_text(f"{HEADER}\n17\n")
    Path("long.tsv").write_text(f"{HEADER}\n0\t{'x' * 200_000}\t1\t0.5\t1\t0\n")
    os.mkfifo("pipe.png")
    with pytest.raises(SystemExit) as end:
        app(["compare", *arguments])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and len(error) < 1100
    assert Path("compare.png").read_text() == "as it was"


HOSTILE = ["<b>|`$", "two\nlines", "\x1b[2J\x07", "\u202egnp", "日本 \U0001f600", "bad\udcff", "\x01", "n" * 300]


def test_compare_accepts_any_names(files: Path, capsys: pytest.CaptureFixture):
    compare([*(f"{name}=one.tsv" for name in HOSTILE)], "0,1", Path("compare.svg"))
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [printable(name) for name in HOSTILE]
    assert all(printable(line) == line for line in lines)
    assert all(line.startswith("note: no font here has ") for line in shown.err.splitlines())
    ET.parse("compare.svg")
    frames = {name: pd.DataFrame({"idx": [i], "label": [0]}) for i, name in enumerate(("\x1b", "a"))}
    assert "(\\x1b has 1, a has 1)" in next(notes_on_images(frames, {}))


def test_errors_with_any_file_name_are_one_line(files: Path, capsys: pytest.CaptureFixture):
    from rrcm.cli import app

    with pytest.raises(SystemExit):
        app(["compare", "a=no\n\x1b[2J\u202e.tsv"])
    assert capsys.readouterr().err == "error: no\\n\\x1b[2J\\u202e.tsv: no such file\n"


def test_compare_in_a_terminal_without_unicode(files: Path):
    command = [sys.executable, "-m", "rrcm.cli", "compare", "σ=one.tsv", "--radii", "0"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u03c3" in done.stdout


def test_files_of_the_rrcm_authors_get_the_numbers_of_the_same_images(files: Path, capsys: pytest.CaptureFixture):
    """Their files have no idx. The labels in their order show that the images are those of our file."""
    write_rows("ours.tsv", range(0, 50, 2))
    lines = Path("ours.tsv").read_text().splitlines()[1:]
    theirs = [line.split("\t", 1)[1][:-1] + "0:00:17.5" for line in lines]
    Path("certify_result_0.5.txt").write_text("\n".join(theirs))
    compare(["ours=ours.tsv", "theirs=certify_result_0.5.txt"], "0,0.5", Path("compare.png"))
    shown = capsys.readouterr()
    ours, rows = (line.split() for line in shown.out.splitlines()[2:])
    assert ours[1:] == rows[1:] and ours[1] == "25"
    assumed, numbered = shown.err.splitlines()
    assert assumed.startswith("note: certify_result_0.5.txt: no header, so the columns are label, predict, radius,")
    assert numbered.startswith("note: theirs: rows are numbered 0, 1, 2, ...; they are taken for the images of ours")
    Path("certify_result_0.5.txt").write_text("\n".join(theirs[:-1]))
    with pytest.raises(RRCMError, match="have two labels"):
        compare(["ours=ours.tsv", "theirs=certify_result_0.5.txt"], "0,0.5", Path("compare.png"))


def test_parsing_of_files_and_radii():
    assert parse_files(["a b=x/y=z.tsv", "c=d"]) == {"a b": "x/y=z.tsv", "c": "d"}
    assert parse_radii("0, .25,1e0") == [0, 0.25, 1]
    for text in ("", "nan", "inf", "0,,1"):
        with pytest.raises(RRCMError, match="must be numbers"):
            parse_radii(text)


def test_comparing_does_not_import_torch():
    code = "import sys, rrcm.report.compare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
