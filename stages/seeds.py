"""Compare reports of the same methods with different training seeds. This is not a DVC stage."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.report.seeds import seeds_text


def seeds(folders: list[Path]) -> None:
    """Print means over seeds and mean differences from rRCM, with 95 % intervals.

    FOLDERS are published results such as results/digits, which include all their seeds, or single reports such as
    reports/digits.
    """
    print(seeds_text(folders))


if __name__ == "__main__":
    run_command(seeds)
