"""Write fingerprints of the code of each stage, which DVC compares: fingerprints/STAGE/ITEM.txt."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.fingerprints import write_fingerprints


def fingerprint(params: Path = Path("params.yaml"), output: Path = Path("fingerprints")) -> None:
    """Write a fingerprint of the code that each stage runs, for each of its items."""
    write_fingerprints(load_config(params), output)


if __name__ == "__main__":
    run_command(fingerprint)
