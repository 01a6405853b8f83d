"""Comparing certificate files gives a table and a figure, and one line for bad input."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from rrcm.evaluation.metrics import acr_difference
from rrcm.report.compare import check_same_images, compare, parse_files, parse_radii
from rrcm.utils.errors import RRCMError, printable

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


def test_differences_to_a_reference_use_the_common_images(files: Path, capsys: pytest.CaptureFixture):
    """Certified radii are 0.5, 0, 0, 0.25 in one file and 1, 0, 0 in the other, which lacks the fourth image."""
    Path("other.txt").write_text("\n".join(Path("other.txt").read_text().splitlines()[:4]))
    compare(["ours=one.tsv", "theirs=other.txt"], "0,0.75", Path("a.png"), reference="theirs")
    shown = capsys.readouterr()
    line = shown.out.splitlines()[-1]
    assert line.split()[:2] == ["ours", "3"]
    acr = acr_difference(*(pd.DataFrame({"radius": radii, "correct": 1}) for radii in ([0.5, 0, 0], [1.0, 0, 0])))
    assert line.endswith(f"-0.167 ({acr.low:+.3f} to {acr.high:+.3f})") and acr.value == pytest.approx(-0.5 / 3)
    assert "+0.0 (" in line and "-33.3 (" in line and "3 in all of them" in shown.err


@pytest.mark.parametrize(
    ("reference", "message"),
    [("him", "must be one of the names 'ours', 'far'"), ("far", "no image in common with 'ours'")],
)
def test_an_impossible_reference_is_refused(files: Path, reference: str, message: str):
    Path("far.tsv").write_text("\n".join([HEADER, "7\t1\t1\t0.1\t1\t0"]))
    with pytest.raises(RRCMError, match=message):
        compare(["ours=one.tsv", "far=far.tsv"], "0", Path("a.png"), reference)


def test_svg_is_reproducible_and_names_are_literal(files: Path):
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
    assert (
        capsys.readouterr().err
        == f"note: the files have different images, or number them differently ({counts}); compare shares only\n"
    )


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
    assert "(\\x1b 1, a 1; 0 in all of them)" in check_same_images(frames)


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


def test_compare_reads_files_of_the_rrcm_authors(files: Path, capsys: pytest.CaptureFixture):
    Path("certify_result_0.5.txt").write_text("".join(f"{row.split(chr(9), 1)[1]}\n" for row in ROWS))
    compare(["ours=one.tsv", "theirs=certify_result_0.5.txt"], "0,0.5", Path("compare.png"))
    shown = capsys.readouterr()
    ours, theirs = (line.split() for line in shown.out.splitlines()[2:])
    assert ours[1:] == theirs[1:]
    assumed, different = shown.err.splitlines()
    assert assumed.startswith("note: certify_result_0.5.txt: no header, so the columns are label, predict, radius,")
    assert different == (
        "note: the files have different images, or number them differently "
        "(ours 4, theirs 4; 1 in all of them); compare shares only"
    )


def test_parsing_of_files_and_radii():
    assert parse_files(["a b=x/y=z.tsv", "c=d"]) == {"a b": "x/y=z.tsv", "c": "d"}
    assert parse_radii("0, .25,1e0") == [0, 0.25, 1]
    for text in ("", "nan", "inf", "0,,1"):
        with pytest.raises(RRCMError, match="must be numbers"):
            parse_radii(text)


def test_comparing_does_not_import_torch():
    code = "import sys, rrcm.report.compare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
