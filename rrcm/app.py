"""How a stage becomes a command: it starts fast, and bad input ends in one line on stderr and a non-zero exit status.

Stages import this module first. The garbage collector is off until `run`: it would walk the growing pile of torch's
modules again and again while they load, and once more at exit, which is two fifths of the start-up of a stage.
"""

import functools
import gc
import sys
from collections.abc import Callable

gc.disable()

import typer  # noqa: E402

from rrcm.environment import keep_freed_memory  # noqa: E402
from rrcm.errors import RRCMError  # noqa: E402


def run(command: Callable[..., None]) -> None:
    """Run `command` as a Typer application. An `RRCMError` is printed without a traceback; exit status 1."""
    keep_freed_memory()
    gc.freeze()  # what is imported stays: never walk it again
    gc.enable()

    @functools.wraps(command)
    def guarded(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except RRCMError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded)
    try:
        app()
    finally:
        gc.freeze()  # nor at exit
