"""Files of other groups: which habits are read, with which note, and what is refused, with what to do."""

import gzip
import io
import math
import re
from contextlib import redirect_stderr
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rrcm.certification.external import read_external_certificates
from rrcm.certification.results import COLUMNS, read_certificates
from rrcm.utils.errors import RRCMError

HEADER = "\t".join(COLUMNS)
ROWS = [
    "0\t3\t3\t0.536\t1\t0:00:17.540437",
    "20\t7\t1\t0.244\t0\t0:00:17.112",
    "40\t8\t-1\t0.0\t0\t1 day, 1:00:02",
    "60\t0\t0\t0.25\t1\t0:00:17.5",
]
COHEN = [HEADER, *ROWS]


def having(**columns: list[str]) -> list[str]:
    """A file whose columns have other values."""
    cells = dict(zip(COLUMNS, zip(*(row.split("\t") for row in ROWS), strict=True), strict=True)) | columns
    return [HEADER, *("\t".join(row) for row in zip(*cells.values(), strict=True))]


def without(columns: str, lines: list[str] = COHEN) -> list[str]:
    """The lines without some columns."""
    kept = [i for i, name in enumerate(COLUMNS) if name not in columns.split()]
    return ["\t".join(line.split("\t")[i] for i in kept) for line in lines]


def each(change, lines: list[str] = ROWS) -> list[str]:
    return [change(line) for line in lines]


HABITS = {  # lines, what the note says ("": no note)
    "as published": (COHEN, ""),
    "windows": ([*each(lambda line: f"{line}\r", COHEN), "\r", "\r"], ""),
    "blank lines between": ("\n\n".join(COHEN).split("\n"), ""),
    "byte order mark": (["\ufeff" + HEADER, *ROWS], ""),
    "more columns": ([f"method\t{HEADER}\tpA", *each(lambda row: f"a b\t{row}\t")], ""),
    "capitals": ([HEADER.title(), *ROWS], ""),
    "two tabs": (each(lambda line: line.replace("\t", "\t\t"), COHEN), ""),
    "header with blanks": ([HEADER.replace("\t", " "), *ROWS], ""),
    "true and false": (having(correct=["True", "False", "False", "True"]), ""),
    "tensors": (having(label=["tensor([3])", "tensor(7)", "tensor([8], device='cuda:0')", "0"]), ""),
    "whole floats": (having(label=["3.000e+00", "7.", "8", "0.0"], correct=["1.0", "0.0", "0.0", "1.0"]), ""),
    "commas": (each(lambda line: line.replace("\t", ","), COHEN[:3]), "columns are separated by commas"),
    "semicolons": (each(lambda line: line.replace("\t", ";"), COHEN), "columns are separated by semicolons"),
    "pandas": (
        ["," + HEADER.replace("\t", ","), *(f"{i},{row}".replace("\t", ",") for i, row in enumerate(ROWS[:2]))],
        "columns are separated by commas",
    ),
    "blanks": (each(lambda line: line.replace("\t", "  "), COHEN[:3]), "columns are separated by blanks"),
    "the rRCM authors": (
        without("idx", ROWS),
        "no header, so the columns are label, predict, radius, correct, time; "
        "no column idx, so rows are numbered 0, 1, 2, ... in the order of the file",
    ),
    "second process": (ROWS, "no header, so the columns are idx, label, predict, radius, correct, time"),
    "second process first": ([*ROWS[:2], HEADER, *ROWS[2:]], ""),
    "no time": (without("time"), "no column time, so times are unknown"),
    "another time": ([HEADER.replace("time", "time_forward"), *ROWS], "no column time, so times are unknown"),
    "no correct": (
        without("correct"),
        "no column correct, so an image is correct where predict is its label",
    ),
    "running total": (
        having(correct=["1", "1", "1", "2"]),
        "correct counts the correct images so far, so an image is correct where predict is its label",
    ),
    "radius -1": (
        having(radius=["0.536", "0.244", "-1.0", "0.25"]),
        "a radius of -1, nan or nothing is 0 (1 of 4 images, all wrong or abstained)",
    ),
    "radius nan": (
        having(predict=["3", "-1", "-1", "0"], radius=["0.536", "nan", "nan", "0.25"]),
        "a radius of -1, nan or nothing is 0 (2 of 4 images, all wrong or abstained)",
    ),
    "radius empty": (
        having(predict=["3", "-1", "-1", "0"], radius=["0.536", "", "<NA>", "0.25"]),
        "a radius of -1, nan or nothing is 0 (2 of 4 images, all wrong or abstained)",
    ),
    "decimal commas": (
        each(lambda line: line.replace("\t", ";").replace(".", ","), COHEN),
        "columns are separated by semicolons; numbers have decimal commas",
    ),
    "decimal commas and tabs": (each(lambda line: line.replace(".", ","), COHEN), "numbers have decimal commas"),
    "quoted decimal commas": (
        ['"' + line.replace("\t", '","').replace(".", ",") + '"' for line in COHEN],
        "columns are separated by commas; numbers have decimal commas",
    ),
    "quoted": (
        ['"' + line.replace("\t", '";"') + '"' for line in COHEN],
        "columns are separated by semicolons",
    ),
    "quoted tensors": (
        [",".join(COLUMNS), "0,\"tensor([3], device='cuda:0')\",3,0.536,1,0:00:17.540437"],
        "columns are separated by commas",
    ),
    "separators at the end of rows": ([HEADER, *each(lambda row: f"{row}\t\t")], ""),
    "separators at the end": (
        each(lambda line: f"{line};".replace("\t", ";"), COHEN),
        "columns are separated by semicolons",
    ),
    "sep of a spreadsheet": (
        ["sep=;", *each(lambda line: line.replace("\t", ";"), COHEN)],
        "columns are separated by semicolons; left out: line 1, 'sep=;'",
    ),
    "joined files with marks": (
        ["\ufeff" + HEADER, *ROWS[:2], "\ufeff" + HEADER, *ROWS[2:]],
        "2 headers, so the file joins parts of one run",
    ),
    "summary": (
        [*COHEN, "===Certification Summary===", "total time=3, loss=0.5%", "Radius: 0.0  Number: 2  Acc: 50.0%"],
        "3 lines that are not rows were left out, the first is line 6, '===Certification Summary==='",
    ),
    "summary in columns": (
        [*COHEN, " ", "ACR", "0.25\t0.5"],
        "2 lines that are not rows were left out, the first is line 7, 'ACR'",
    ),
    "settings": (["sigma: 0.5 | n: 100", *COHEN], "left out: line 1, 'sigma: 0.5 | n: 100'"),
    "parts of a run": (
        [*COHEN[:3], " ", "correct: 1 of 2", HEADER, *ROWS[2:]],
        "2 headers, so the file joins parts of one run; left out: line 5, 'correct: 1 of 2'",
    ),
}


def write(path: Path, lines: list[str]) -> Path:
    path.write_bytes("\n".join(lines).encode())
    return path


@pytest.mark.parametrize("habit", HABITS)
def test_a_supported_format_is_read_with_one_note(tmp_path: Path, capsys: pytest.CaptureFixture, habit: str):
    lines, note = HABITS[habit]
    path = write(tmp_path / "theirs", lines)
    frame = read_external_certificates(path)
    assert capsys.readouterr().err == (f"note: {path}: {note}\n" if note else "")
    expected = read_certificates(write(tmp_path / "cohen", COHEN)).iloc[: len(frame)]
    assert len(frame) == (4 if len(lines) > 3 else len(lines) - 1)
    if "no column idx" in note:
        expected["idx"] = range(4)
    if habit in ("radius nan", "radius empty"):
        expected.loc[1, ["predict", "radius"]] = [-1, 0]
    if "times are unknown" in note:
        expected["time"] = math.nan
    pd.testing.assert_frame_equal(frame, expected, check_exact=True)


def test_utf16_and_other_encodings(tmp_path: Path, capsys: pytest.CaptureFixture):
    expected = read_certificates(write(tmp_path / "cohen", COHEN))
    (tmp_path / "powershell").write_bytes("\r\n".join(COHEN).encode("utf-16"))
    pd.testing.assert_frame_equal(read_external_certificates(tmp_path / "powershell"), expected)
    assert capsys.readouterr().err == ""
    (tmp_path / "latin").write_bytes("\n".join([*COHEN, "genauigkeit über alles: 50 %"]).encode("latin-1"))
    pd.testing.assert_frame_equal(read_external_certificates(tmp_path / "latin"), expected)
    assert "left out: line 6, 'genauigkeit" in capsys.readouterr().err


UNCLEAR = {  # lines, what the error says
    "four columns": (without("idx time", ROWS), "line 1: no header and 4 columns"),
    "seven columns": (each(lambda row: f"{row}\t1"), "line 1: no header and 7 columns"),
    "five without a time": (without("time", ROWS), "line 1: no header and 5 columns, not 6, or 5 of which the last is"),
    "a curve": (["0.0\t0.77", "0.1\t0.5"], "line 1: no header and 2 columns"),
    "predictions": (without("radius"), "line 1: no column radius; the first line must name the columns"),
    "another name": ([HEADER.replace("radius", "radius proved"), *ROWS], "line 1: no column radius"),
    "names of their own": (["image,class,answer,r", "1,2,3,0.4"], "line 2: no header and 4 columns"),
    "a name twice": ([f"{HEADER}\tradius", *each(lambda r: f"{r}\t1")], "line 1: names the column radius twice"),
    "empty": ([], "has no rows of certificates"),
    "only a header": ([HEADER], "has no rows of certificates"),
    "prose": (["The radius of", "each image is zero."], "has no rows of certificates"),
    "two runs": ([*COHEN, *COHEN], "line 7: idx 0 occurs twice, as where one file holds several runs"),
    "two tables": ([*COHEN, *without("time")], "line 6: names other columns than the rows above; split the file"),
    "text between rows": ([*COHEN[:3], "a warning", *ROWS[2:]], "line 5: a row after text, which is in line 4"),
    "cut off": ([*COHEN, "80\t3\t"], "line 6: has 3 columns, must have 6"),
    "a broken cell": ([*COHEN, "80\tcat\t3\t0.5\t1\t0"], "line 6: label 'cat': must be a whole number"),
    "half a class": ([*COHEN, "80\t3.5\t3\t0.5\t1\t0"], "line 6: label '3.5': must be a whole number"),
    "a row with blanks": (
        [*COHEN, "80 3 3 0.5 1 0:00:17"],
        "line 6: has 1 columns, must have 6, separated as in",
    ),
    "a row with blanks between": (
        [*COHEN[:3], ROWS[2].replace("\t", "  "), ROWS[3]],
        "line 4: has 1 columns, must have",
    ),
    "a row with commas": ([*COHEN, "80,3,3,0.5,1,17"], "line 6: has 1 columns, must have 6"),
    "a row with blanks after text": (
        [*COHEN, "sum: 4", "80 3 3 0.5 1 17"],
        "line 7: a row after text, which is in line 6",
    ),
    "half a row with blanks": ([*COHEN, "80 3 3 0.5"], "line 6: has 1 columns"),
    "points and commas": (
        having(radius=["0,536", "0.244", "0,0", "0,25"]),
        "line 3: radius '0.244': has a point, while",
    ),
    "thousands by points": (
        having(idx=["0", "1.000", "2.000", "3.000"], radius=["0,5", "0,2", "0,0", "0,2"]),
        "'1.000': has",
    ),
    "thousands by commas": ([*COHEN, "1,234\t3\t3\t0.5\t1\t0"], "line 6: idx '1,234': must be a whole number"),
    "underscores": ([*COHEN, "1_234\t3\t3\t0.5\t1\t0"], "line 6: idx '1_234': must be a whole number"),
    "digits of another script": ([*COHEN, "80\t٣\t3\t0.5\t1\t0"], "line 6: label '٣': must be a whole number"),
    "a label beyond all": ([*COHEN, "80\t1e30\t3\t0.5\t1\t0"], "line 6: label '1e30': must be a whole number"),
    "an empty radius of a right answer": ([*COHEN, "80\t3\t3\t\t1\t0"], "line 6: radius '': must be a number"),
    "a shard that starts again": ([*COHEN, HEADER, "0\t3\t3\t0.5\t1\t0"], "line 7: idx 0 occurs twice"),
    "joined without a line end": ([*COHEN[:4], ROWS[3] + HEADER, "80\t3\t3\t0.5\t1\t0"], "line 5: "),
    "no radius": ([*COHEN, "80\t3\t3\tnan\t1\t0"], "line 6: radius nan: must be a finite number"),
    "negative radius": ([*COHEN, "80\t3\t3\t-1\t1\t0"], "line 6: radius -1: must be a finite number >= 0"),
    "abstained with radius": ([*COHEN, "80\t3\t-1\t0.5\t0\t0"], "line 6: radius 0.5: must be"),
    "wrong mark": ([*COHEN, "80\t3\t3\t0.5\t0\t0"], "line 6: correct 0 does not fit label 3 and predict 3"),
    "wrong total": ([*COHEN, "80\t3\t3\t0.5\t4\t0"], "line 6: correct 4 does not fit"),
    "another abstention": ([*COHEN, "80\t3\t-2\t0.0\t0\t0"], "line 6: idx 80, label 3, predict -2"),
    "unlabelled": ([*COHEN, "80\t-1\t3\t0.0\t0\t0"], "line 6: label -1: the true class is unknown"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_an_unclear_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, case: str):
    lines, message = UNCLEAR[case]
    path = write(tmp_path / "theirs", lines)
    with pytest.raises(RRCMError) as error:
        read_external_certificates(path)
    assert str(error.value).startswith(f"{path}") and message in str(error.value)
    assert ";" in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "array.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00")
    places = (("array.npy", "is not a text file"), ("none", "no such file"), (".", "cannot be read"))
    for path, message in (*places, ("/dev/zero", "is a device; give a file"), ("/dev/null", "is a device")):
        with pytest.raises(RRCMError, match=message):
            read_external_certificates(tmp_path / path)


cells = st.sampled_from([*"0123", "-1", "0.5", "nan", "True", "0:00:17", "", "radius", "label", "x y", "é", "\x1b[0m"])


@given(st.lists(st.lists(cells, min_size=1, max_size=7), max_size=6), st.sampled_from("\t,; "), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_line_of_any_text_is_accounted_for(tmp_path_factory, lines: list, separator: str, header: bool):
    text = [separator.join(line) for line in ([COLUMNS] if header else []) + lines]
    path = write(tmp_path_factory.mktemp("any") / "theirs", text)
    note = io.StringIO()
    try:
        with redirect_stderr(note):
            frame = read_external_certificates(path)
    except RRCMError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert ((frame["predict"] == frame["label"]) == frame["correct"]).all()
    assert (frame["radius"] >= 0).all()
    left_out = re.search(r"(\d+) lines that are not rows", note.getvalue())
    left_out = int(left_out[1]) if left_out else note.getvalue().count("left out: ")
    assert len(frame) + left_out + header == sum(1 for line in text if line.strip())


def test_a_file_packed_by_gzip_is_read_whatever_its_name(tmp_path: Path):
    """Also one that `cat` made of two packed parts."""
    (tmp_path / "a.tsv").write_text("\n".join(COHEN) + "\n")
    parts = ["\n".join(COHEN[:3]) + "\n", "\n".join(COHEN[3:]) + "\n"]
    for name in ("a.tsv.gz", "a.txt"):
        (tmp_path / name).write_bytes(b"".join(gzip.compress(part.encode()) for part in parts))
        pd.testing.assert_frame_equal(
            read_external_certificates(tmp_path / name), read_external_certificates(tmp_path / "a.tsv")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed[:-9], "is damaged gzip"),
        (lambda packed: packed[:20] + b"\xff" * 20 + packed[40:], "is damaged gzip"),
        (lambda packed: gzip.compress(bytes(2000)), "has more than 0 MiB when unpacked"),
        (lambda packed: gzip.compress(bytes(20)), "is not a text file"),
    ],
)
def test_a_damaged_or_huge_packed_file_is_refused(tmp_path: Path, monkeypatch, change, message: str):
    monkeypatch.setattr("rrcm.certification.external.MAX_BYTES", 1000)
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(change(gzip.compress("\n".join(COHEN).encode())))
    with pytest.raises(RRCMError, match=message) as caught:
        read_external_certificates(path)
    assert "\n" not in str(caught.value)
