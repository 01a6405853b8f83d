"""Verify published results without training: `make verify`. This is not a DVC stage, and it changes no tracked file.

It prints a verdict of one line for each result. The exit status is 0 only if all results are verified.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

import secrets
from pathlib import Path
from typing import Annotated

import typer

from rrcm.publication.result import find_results
from rrcm.publication.verify import check_repository, verify_result
from rrcm.utils.errors import RRCMError, printable


def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Published results; default: all.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Certificates of each result to vote on again.")] = 24,
    every: Annotated[bool, typer.Option("--all", help="Vote again on all certificates.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Chooses the certificates; default: random.")] = None,
) -> None:
    """Compare hashes, redraw the report, recompute every radius from its votes, and vote again on random rows."""
    root, seed = Path(), secrets.randbelow(2**31) if seed is None else seed
    results = find_results(root, names or [])
    if not results:
        raise RRCMError("results/: nothing is published here; publish a run with `make publish`")
    shared, verified = check_repository(root), True
    for result in results:
        verdict = verify_result(result, None if every else rows, seed, shared)
        for problem in verdict.problems:
            print(f"  {printable(problem)}", file=sys.stderr, flush=True)
        print(verdict, flush=True)
        verified &= not verdict.problems
    if not verified:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_command(verify)
