"""Tables of HTML pages: texts, and which columns are numbers."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import pandas as pd

NUMBER = re.compile(r"[-+]?\d[\d.,]*")


class Cell(NamedTuple):
    """A heading or a cell of a table."""

    text: str
    is_number: bool = False  # it belongs to a column of numbers, which is aligned to the right


class PageTable(NamedTuple):
    """A table of a page: headings and rows of text. The first column names the rows."""

    head: list[Cell]
    rows: list[list[Cell]]


def make_table(head: Sequence[str], rows: Sequence[Sequence[str]], names: Collection[str] = ()) -> PageTable:
    """A table from its texts.

    A column has numbers if each of its cells is empty or begins with a number, unless its heading is in `names`.
    """
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(head)
    numeric = [
        i > 0 and heading not in names and all(not cell or NUMBER.match(cell) for cell in column)
        for i, (heading, column) in enumerate(zip(head, columns, strict=True))
    ]
    cells = [[Cell(text, number) for text, number in zip(row, numeric, strict=True)] for row in [head, *rows]]
    return PageTable(cells[0], cells[1:])


def table_of(frame: pd.DataFrame, names: Collection[str] = ()) -> PageTable:
    """A table from a frame of text, such as the field `text` of `rrcm.report.tables.Table`."""
    return make_table([str(name) for name in frame.columns], frame.astype(str).values.tolist(), names)
