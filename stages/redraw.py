"""Bring published results up to date with the code, without training: `make redraw`. This is not a DVC stage."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
import yaml
from compose import compose_text

from rrcm.publication.readme import missing_results, write_readme
from rrcm.publication.redraw import check_committed, finish_killed, redraw
from rrcm.publication.result import Result, find_results
from rrcm.publication.settings import Update
from rrcm.utils.errors import RRCMError, printable


def redraw_results(
    names: Annotated[list[str] | None, typer.Argument(help="Published results; default: all.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "-S", metavar="NAME=VALUE", help="The value that a new setting had in the run, such as finetune.mixup=0.0."
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Keep only the networks of these methods, such as rrcm,dds.")
    ] = None,
) -> None:
    """Bring the settings of published results up to date with the code, and draw their reports again."""
    root, settings = Path(), settings or []
    check_committed(root)
    finish_killed(root)
    results = find_results(root, names or [])
    if not results:
        raise RRCMError("results/: nothing is published here; publish a run with `make publish`")

    @cache
    def compose_today(profile: str) -> Mapping:
        return yaml.safe_load(compose_text([f"profile={profile}", *settings]))

    confirmed = [each.partition("=")[0] for each in settings]
    changed = refused = 0
    for result in results:
        try:
            update = redraw(result, compose_today, confirmed, None if models is None else models.split(","))
        except RRCMError as error:
            reason = str(error) if str(error).startswith(result.label) else f"{result.label}: {error}"
            print(f"NOT redrawn: {printable(reason)}", file=sys.stderr, flush=True)
            refused += 1
            continue
        changed += update is not None
        print(f"up to date: {result.label}" if update is None else describe(result, update), flush=True)
    if changed and not missing_results(root):
        write_readme(root)
    if changed:
        print("now run: git add results artifacts README.md && git commit, and then `make verify`")
    if refused:
        raise typer.Exit(1)


def describe(result: Result, update: Update) -> str:
    """A line that says which settings are new or gone, with their values."""
    parts = [f"redrawn: {result.label}"]
    for kind, values in (("new", update.added), ("gone", update.removed)):
        if values:
            parts.append(f"{kind}: {', '.join(f'{name} = {value!r}' for name, value in values.items())}")
    return ", ".join(parts)


if __name__ == "__main__":
    run_command(redraw_results)
