"""Compare reports of the same methods with different training seeds. This is no DVC stage."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.report.seeds import seeds_text


def seeds(folders: list[Path]) -> None:
    """Print means over seeds, and mean differences to rRCM, with 95 % intervals.

    FOLDERS: published results such as results/digits, with all their seeds, or reports such as reports/digits.
    """
    print(seeds_text(folders))


if __name__ == "__main__":
    run_command(seeds)
