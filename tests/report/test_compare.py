"""Comparing certificate files: the numbers in the table, the figure, and the errors for bad input."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from rrcm.report.compare import compare, parse_files, parse_radii
from rrcm.utils.errors import RRCMError

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
ROWS = ["0\t3\t3\t0.5\t1\t0:00:17.5", "20\t7\t1\t0.9\t0\t0:00:17", "40\t8\t-1\t0.0\t0\t1", "60\t0\t0\t0.25\t1\t1"]
ONE = [HEADER, *ROWS]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two files of the same images. The second has an extra column and CRLF line ends."""
    monkeypatch.chdir(tmp_path)
    Path("one.tsv").write_text("\n".join(ONE))
    other = [f"{line}\t{'sigma' if line == HEADER else 0.5}" for line in ONE]
    other[1] = other[1].replace("0.5\t1", "1.0\t1")
    Path("other.txt").write_bytes("\r\n".join([*other, "", ""]).encode())
    return tmp_path


def test_table_picture_and_no_note(files: Path, capsys: pytest.CaptureFixture):
    compare(["ours=one.tsv", "Cohen et al. 2019=other.txt"], "0,0.25,0.5,0.75", Path("compare.png"))
    shown = capsys.readouterr()
    assert [" ".join(line.split()) for line in shown.out.splitlines() if "-" not in line] == [
        "images r = 0 r = 0.25 r = 0.5 r = 0.75 ACR",
        "ours 4 50.0 50.0 25.0 0.0 0.188",
        "Cohen et al. 2019 4 50.0 50.0 25.0 25.0 0.312",
    ]
    assert shown.err == ""
    with Image.open("compare.png") as image:
        assert len(image.getcolors(2**24)) > 50


def test_svg_is_the_same_twice_and_names_are_taken_literally(files: Path):
    odd = "_50 % $\\frac$=one.tsv"
    for name in ("a.svg", "b.svg"):
        compare([odd, "other=other.txt"], "0,1", Path(name))
    ET.parse("a.svg")
    assert Path("a.svg").read_bytes() == Path("b.svg").read_bytes()


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda rows: [*rows, "80\t1\t1\t0.1\t1\t0"], "ours 4, more 5; 4 in all of them"),
        (lambda rows: rows[:2], "ours 4, more 1; 1 in all of them"),
        (lambda rows: [*rows[:-1], "60\t1\t0\t0.25\t0\t1"], "ours 4, more 4; 3 in all of them"),  # another label
    ],
)
def test_different_images_give_a_note(files: Path, capsys: pytest.CaptureFixture, change, counts: str):
    Path("more.tsv").write_text("\n".join(change(ONE)))
    compare(["ours=one.tsv", "more=more.tsv"], "0,1", Path("compare.png"))
    assert capsys.readouterr().err == f"note: the files have different images ({counts}); compare shares only\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one.tsv"], "'one.tsv': must be NAME=FILE"),
        (["=one.tsv"], "must be NAME=FILE"),
        (["ours="], "must be NAME=FILE"),
        (["a=one.tsv", "a=other.txt"], "'a=other.txt': the name 'a' is taken by one.tsv"),
        (["a=none.tsv"], "none.tsv: no such file"),
        (["a=one.tsv", "b=bad.tsv"], "bad.tsv, line 2: has 1 tab-separated fields, must have 6"),
        (["a=one.tsv", "--radii", "0,far"], "--radii 0,far: must be numbers >= 0"),
        (["a=one.tsv", "--radii", "0,-1"], "must be numbers >= 0"),
        (["a=one.tsv", "--output", "compare.jpg"], "--output compare.jpg: must end in .png or .svg"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_the_picture(files: Path, capsys, arguments, message: str):
    from rrcm.cli import app

    Path("compare.png").write_text("as it was")
    Path("bad.tsv").write_text(f"{HEADER}\n17\n")
    with pytest.raises(SystemExit) as end:
        app(["compare", *arguments])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert Path("compare.png").read_text() == "as it was"


def test_arguments():
    assert parse_files(["a b=x/y=z.tsv", "c=d"]) == {"a b": "x/y=z.tsv", "c": "d"}
    assert parse_radii("0, .25,1e0") == [0, 0.25, 1]
    for text in ("", "nan", "inf", "0,,1"):
        with pytest.raises(RRCMError, match="must be numbers"):
            parse_radii(text)


def test_comparing_does_not_import_torch():
    code = "import sys, rrcm.report.compare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
