"""Compare reports of the same methods with different training seeds. This is not a DVC stage."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path
from typing import Annotated

import typer

from rrcm.report.seeds import seeds_text, write_seeds


def seeds(
    folders: list[Path],
    output: Annotated[
        Path | None, typer.Option(help="Also write the tables and a figure as a report into this folder.")
    ] = None,
) -> None:
    """Print means over seeds and mean differences from rRCM, with 95 % intervals.

    FOLDERS are published results such as results/digits, which include all their seeds, or single reports such as
    reports/digits.
    """
    print(seeds_text(folders))
    if output is not None:
        write_seeds(folders, output)


if __name__ == "__main__":
    run_command(seeds)
