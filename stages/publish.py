"""Publish the finished run of the working copy: `make publish NAME=digits`. This is not a DVC stage."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path
from typing import Annotated

import typer

from rrcm.publication.freeze import publish as publish_run
from rrcm.publication.readme import ROWS, missing_results, write_readme


def publish(
    name: Annotated[str | None, typer.Argument(help="Name of the result; default: the name of the report.")] = None,
    models: Annotated[str | None, typer.Option(help="Methods whose networks to include, such as rrcm,dds.")] = None,
    replace: Annotated[bool, typer.Option(help="Replace a published result of this name and seed.")] = False,
    dirty: Annotated[bool, typer.Option(help="Publish uncommitted code; verify refuses the result.")] = False,
) -> None:
    """Freeze the run as results/NAME/seed_SEED, add it to DVC, and update the table in README.md."""
    root = Path()
    methods = None if models is None else models.split(",")
    result = publish_run(root, name, methods, replace=replace, dirty=dirty)
    if waiting := missing_results(root):
        print(f"note: README.md stays as it is until {', '.join(waiting)} of {ROWS} are published", file=sys.stderr)
    else:
        write_readme(root)
    print(f"published: {result.label}; now run: git add results artifacts README.md && git commit")


if __name__ == "__main__":
    run_command(publish)
