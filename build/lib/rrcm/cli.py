"""How a stage becomes a command: bad input ends in one line on stderr and a non-zero exit status."""

import functools
import sys
from collections.abc import Callable

import typer

from rrcm.errors import RRCMError


def run(command: Callable[..., None]) -> None:
    """Run `command` as a Typer application. An `RRCMError` is printed without a traceback; exit status 1."""

    @functools.wraps(command)
    def guarded(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except RRCMError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded)
    app()
