"""Read certificate files of other groups, whose copies of certify.py print them in many formats.

A format is read if its meaning is clear. A note on stderr lists the assumptions, and an unclear file is refused. The
table in external/README.md lists the supported formats.
"""

import codecs
import csv
import gzip
import io
import math
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from rrcm.certification.results import COLUMNS, parse_certificate
from rrcm.utils.errors import RRCMError, one_line, printable

REQUIRED = ["label", "predict", "radius"]
LAYOUTS = {6: COLUMNS, 5: COLUMNS[1:]}  # without a header: Cohen et al.'s columns, and the rRCM authors'
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas", None: "blanks"}  # with semicolons, commas are decimal
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf|nan", re.ASCII | re.IGNORECASE)
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file
MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "none", "null"}  # what libraries write for no number
MAX_BYTES = 2**28  # of an unpacked file: 5 million rows, more than any test set; a packed one could fill the memory
ABOUT_COLUMNS = "the first line must name the columns: label, predict, radius and, where there are, idx, correct, time"


class _Table(NamedTuple):
    """The rows of a file as text, with the assumptions made to find them."""

    columns: list[str]
    rows: list[tuple[int, list[str]]]  # line number, one cell per column
    assumed: list[str]


def read_external_certificates(path: Path | str) -> pd.DataFrame:
    """Read another group's certificates as a frame like `read_certificates`. Prints a note that names its assumptions.

    Without a column `idx`, the rows are numbered in the order of the file. Without a column `time`, times are NaN.
    Raises `RRCMError` with the file, the line, the problem and what to do.
    """
    table = _find_rows(path, _read_lines(path))
    rows, assumed = _interpret(path, table)
    if assumed := table.assumed + assumed:
        print(f"note: {printable(str(path))}: {'; '.join(assumed)}", file=sys.stderr)
    return pd.DataFrame(rows, columns=COLUMNS)


def _read_lines(path: Path | str) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 as PowerShell writes it. Other bytes are escaped.

    The file may be packed by gzip, whatever its name is.
    """
    try:
        # /dev/zero never ends; a pipe does, as in rrcm compare A=<(unzip -p ...)
        if Path(path).is_char_device() or Path(path).is_block_device():
            raise RRCMError(f"{path}: is a device; give a file of certificates")
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file") from None
    except OSError as error:
        raise RRCMError(f"{path}: cannot be read ({one_line(error)}); give a file of certificates") from None
    if data.startswith(GZIP):
        data = _unpack(path, data)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in data and not wide:
        raise RRCMError(f"{path}: is not a text file; export it as text, where {ABOUT_COLUMNS}")
    text = data.decode("utf-16" if wide else "utf-8-sig", errors="backslashreplace")
    return text.replace("\ufeff", "").splitlines()  # each part of a joined file begins with a byte order mark


def _unpack(path: Path | str, data: bytes) -> bytes:
    """The content of a gzip file. Raises `RRCMError` for a damaged file, and for a content above MAX_BYTES."""
    try:
        with gzip.open(io.BytesIO(data)) as packed:
            content = packed.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RRCMError(f"{path}: is damaged gzip ({one_line(error)}); download it again") from None
    if len(content) > MAX_BYTES:
        raise RRCMError(f"{path}: has more than {MAX_BYTES >> 20} MiB when unpacked; give a file of certificates")
    return content


def _find_rows(path: Path | str, lines: Sequence[str]) -> _Table:
    """Find the header and the rows of a file.

    The header may be repeated, as in files that were joined. Lines of text may precede a header or end the file, but
    they may not stand between rows, where they could hide a row.
    """
    separator = _separator(lines)
    columns: list[str] = []
    rows: list[tuple[int, list[str]]] = []
    headers, texts = [], []
    start, text_after_rows = 0, 0  # the first row under the last header, and the line of text that ended its rows
    for number, line in enumerate(lines, start=1):
        cells = _drop_empty(_split(line, separator), len(columns))
        if _is_header(line):
            names = _check_header(path, number, line, separator)
            if columns and names != columns:
                raise RRCMError(f"{path}, line {number}: names other columns than the rows above; split the file here")
            columns, start, text_after_rows = names, len(rows), 0
            headers.append(number)
        elif line.strip() and not columns and _is_number(cells[0]):
            columns = _layout(path, number, cells)
            rows.append((number, cells))
        elif columns and _is_row(line, separator, columns, bool(text_after_rows)):
            if text_after_rows:
                problem = f"a row after text, which is in line {text_after_rows}"
                raise RRCMError(f"{path}, line {number}: {problem}; remove the text if it is no part of the results")
            rows.append((number, cells))
        elif line.strip():
            texts.append((number, line))
            text_after_rows = number if len(rows) > start else 0
    if not rows:
        raise RRCMError(f"{path}: has no rows of certificates; each is a line, and {ABOUT_COLUMNS}")
    rows, decimal_commas = _with_decimal_points(path, columns, rows)
    assumed = list(_assumed(columns, separator, headers, texts))
    return _Table(columns, rows, assumed + ["numbers have decimal commas"] * decimal_commas)


def _assumed(
    columns: Sequence[str], separator: str | None, headers: Sequence[int], texts: Sequence[tuple[int, str]]
) -> Iterator[str]:
    """The assumptions about the format of a file."""
    if separator != "\t":
        yield f"columns are separated by {SEPARATORS[separator]}"
    if not headers:
        yield f"no header, so the columns are {', '.join(columns)}"
    if len(headers) > 1:
        yield f"{len(headers)} headers, so the file joins parts of one run"
    if "idx" not in columns:
        yield "no column idx, so rows are numbered 0, 1, 2, ... in the order of the file"
    if "time" not in columns:
        yield "no column time, so times are unknown"
    if texts:
        count = f"{len(texts)} lines that are not rows were left out, the first is" if len(texts) > 1 else "left out:"
        yield f"{count} line {texts[0][0]}, {texts[0][1].strip()[:60]!r}"


def _separator(lines: Sequence[str]) -> str | None:
    """The separator of the columns in the first row. None stands for blanks."""
    after_header = next((number for number, line in enumerate(lines, start=1) if _is_header(line)), 0)
    for line in lines[after_header:]:
        if line.strip() and (after_header or _is_number(re.split(r"[\t,;\s]", line.strip())[0])):
            return next((sign for sign in SEPARATORS if sign and sign in line), None)
    return "\t"


def _split(line: str, separator: str | None) -> list[str]:
    quoted = separator and '"' in line and line.count('"') % 2 == 0 and len(line) < csv.field_size_limit()
    # a separator may stand between quotes
    cells = next(csv.reader([line], delimiter=separator)) if quoted else line.split(separator)
    return [cell.strip().strip('"') for cell in cells] or [""]


def _drop_empty(cells: list[str], width: int) -> list[str]:
    """`cells` without the empty ones beyond `width` > 0 that spreadsheets add at the end of a row."""
    return cells[:width] if width and not any(cells[width:]) else cells


def _with_decimal_points(
    path: Path | str, columns: Sequence[str], rows: list[tuple[int, list[str]]]
) -> tuple[list[tuple[int, list[str]]], bool]:
    """The rows with decimal points in place of decimal commas, and whether there were any in the radii.

    Raises `RRCMError` if there is a point as well, because it may separate thousands.
    """
    column = columns.index("radius")
    if not any(re.fullmatch(r"-?\d+,\d+", "".join(cells[column : column + 1])) for _, cells in rows):
        return rows, False
    for number, cells in rows:
        for name, cell in zip(columns, cells, strict=False):
            if name in COLUMNS and _is_number(cell) and "." in cell:
                problem = f"{name} {cell!r}: has a point, while radii of the file have decimal commas"
                raise RRCMError(f"{path}, line {number}: {problem}; write all numbers in one way")
    decimals = {columns.index(name) for name in ("radius", "time") if name in columns}  # whole numbers have no commas
    pointed = [
        [re.sub(r"(?<=\d),(?=\d)", ".", c) if i in decimals else c for i, c in enumerate(cells)] for _, cells in rows
    ]
    return [(number, cells) for (number, _), cells in zip(rows, pointed, strict=True)], True


def _is_header(line: str) -> bool:
    """Whether a line has the names of at least three of our columns."""
    return len(set(COLUMNS) & set(re.split(r'[\t,;\s"]+', line.lower()))) >= 3


def _check_header(path: Path | str, number: int, line: str, separator: str | None) -> list[str]:
    """The column names in a header, which blanks may separate even if other signs separate the rows.

    Raises `RRCMError` for a missing or repeated name.
    """
    names = [name.lower() for name in _split(line, separator if separator and separator in line else None)]
    for name in COLUMNS:
        if names.count(name) > 1:
            raise RRCMError(f"{path}, line {number}: names the column {name} twice; rename one")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise RRCMError(f"{path}, line {number}: no column {' '.join(missing)}; {ABOUT_COLUMNS}")
    return names


def _layout(path: Path | str, number: int, cells: Sequence[str]) -> list[str]:
    """The columns of a file without a header. Raises `RRCMError` if they are not certain."""
    if len(cells) not in LAYOUTS or (len(cells) == 5 and ":" not in cells[-1]):
        known = "6, or 5 of which the last is a time such as 0:00:17.5"
        raise RRCMError(f"{path}, line {number}: no header and {len(cells)} columns, not {known}; {ABOUT_COLUMNS}")
    return list(LAYOUTS[len(cells)])


def _is_row(line: str, separator: str | None, columns: Sequence[str], after_text: bool) -> bool:
    """Whether a line is a row, possibly a broken one. In doubt it is, because a row must not be taken for text."""
    cells = _drop_empty(_split(line, separator), len(columns))
    others = re.split(r'[;,\s"]+', line.strip(' "'))  # its separators may differ from the other rows'
    numbers = sum(map(_is_number, others))
    if len(cells) != len(columns):
        broken = _is_number(cells[0]) or (_is_number(others[0]) and numbers >= len(REQUIRED))
        return (broken and not after_text) or (len(others) == len(columns) and numbers >= len(REQUIRED))
    return any(_is_number(cells[columns.index(name)]) for name in REQUIRED)


def _is_number(text: str) -> bool:
    """Whether a text is a plain number. Python's `float` also reads 1_000 and digits of other scripts."""
    return NUMBER.fullmatch(_plain(text)) is not None


def _plain(text: str) -> str:
    """A number without the wrapping of a printed tensor: 3 from tensor([3], device='cuda:0')."""
    return re.sub(r"^tensor\(\[?([^\],]+)\]?(?:,.*)?\)$", r"\1", text)


def _interpret(path: Path | str, table: _Table) -> tuple[list[tuple], list[str]]:
    """The rows as values in the order of COLUMNS, and the assumptions about their meaning."""
    rows: dict[int, tuple] = {}
    marks, uncertified = [], 0
    for number, cells in table.rows:
        try:
            if len(cells) != len(table.columns):
                hint = ", separated as in the first row" if len(cells) == 1 else ""
                raise ValueError(f"has {len(cells)} columns, must have {len(table.columns)}{hint}")
            cell = dict(zip(table.columns, cells, strict=True))
            label, predict = _integer(cell, "label"), _integer(cell, "predict")
            radius, right = _plain(cell["radius"]), label == predict
            if not right and (radius.lower() in MISSING or (_is_number(radius) and float(radius) < 0)):
                radius, uncertified = "0", uncertified + 1
            if not _is_number(radius):
                raise ValueError(f"radius {cell['radius']!r}: must be a number")
            idx = _integer(cell, "idx") if "idx" in cell else len(rows)
            marks.append(_integer(cell, "correct") if "correct" in cell else int(right))
            fields = (str(value) for value in (idx, label, predict, radius, int(right)))
            time = cell.get("time", "")
            row = parse_certificate(*fields, "nan" if time.lower() in MISSING else time)
            if idx in rows:
                raise ValueError(f"idx {idx} occurs twice, as where one file holds several runs")
        except ValueError as error:
            raise RRCMError(f"{path}, line {number}: {error}; correct it") from None
        rows[idx] = row
    assumed = _check_correct(path, table, list(rows.values()), marks)
    if uncertified:
        assumed.append(
            f"a radius of -1, nan or nothing is 0 ({uncertified:,} of {len(rows):,} images, all wrong or abstained)"
        )
    return list(rows.values()), assumed


def _check_correct(path: Path | str, table: _Table, rows: Sequence[tuple], marks: Sequence[int]) -> list[str]:
    """The assumptions about the column `correct`. Raises `RRCMError` if it does not fit label and predict."""
    right = [correct for *_, correct, _ in rows]
    if "correct" not in table.columns:
        return ["no column correct, so an image is correct where predict is its label"]
    if marks == right:
        return []
    if marks == list(accumulate(right)):
        return ["correct counts the correct images so far, so an image is correct where predict is its label"]
    for (number, _), (_, label, predict, *_), mark in zip(table.rows, rows, marks, strict=True):
        if mark != (label == predict):
            problem = f"correct {mark} does not fit label {label} and predict {predict}"
            raise RRCMError(f"{path}, line {number}: {problem}; correct it, or remove the column")
    return []


def _integer(cell: Mapping[str, str], name: str) -> int:
    """The whole number in a column: 3, 3.0, tensor(3), True. Raises ValueError."""
    text = {"true": "1", "false": "0"}.get(cell[name].lower(), _plain(cell[name]))
    value = float(text) if _is_number(text) else math.nan
    if not (value.is_integer() and abs(value) < 2**53):
        raise ValueError(f"{name} {cell[name]!r}: must be a whole number")
    return int(value)
