"""Build a board: many certificate files, ours and others', as one page and one CSV file."""

from pathlib import Path

from rrcm.report.board_entries import read_board
from rrcm.report.board_files import FindFile, read_deployed
from rrcm.report.board_page import render_board
from rrcm.report.board_rows import board_table, group_rows
from rrcm.report.tables import csv_text
from rrcm.utils.files import check_output, write_together


def make_board(path: Path, output: Path, find: FindFile) -> None:
    """Write `output` (.html) and beside it the same numbers as .csv, from the list of entries in `path`.

    `find` gives the path at which the content of a named file lies. Raises `RRCMError` for bad input.
    """
    table = output.with_suffix(".csv")
    for written in (output, table):
        check_output(written)
    board = read_board(path)
    groups = group_rows(read_deployed(board, path.parent, find), board.radii)
    page = render_board(board.title, groups, path, output)
    write_together({output: page.encode(), table: csv_text(board_table(groups)).encode()})
