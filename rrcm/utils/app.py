"""How a function becomes a command: it starts fast, and bad input ends in one line on stderr, exit status 1.

Commands import this module first. The garbage collector is off until `resume_gc`: it would walk the growing pile of
torch's modules again and again while they load, and once more at exit, which is two fifths of the start-up of a stage.
"""

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Callable

gc.disable()

import typer  # noqa: E402

from rrcm.utils.errors import Interrupted, RRCMError  # noqa: E402

INTERRUPTED = 130  # the exit status that shells give Ctrl-C
TERMINATED = 143  # and SIGTERM


def make_app() -> typer.Typer:
    """A Typer application whose tracebacks, should there be any, are Python's own."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def exit_on_error(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, but an `RRCMError` is printed without a traceback and gives exit status 1,
    Ctrl-C gives 130, and work that SIGTERM stopped 143."""

    @functools.wraps(command)
    def guard(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            raise typer.Exit(TERMINATED) from None
        except RRCMError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interruption:
            print(f"interrupted{interruption}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return guard


def resume_gc() -> None:
    """To be called when all imports are done: what is there stays, so it is never walked again."""
    gc.freeze()
    gc.enable()


def start(app: typer.Typer) -> None:
    """Run the application with the arguments of this process, and exit."""
    keep_freed_memory()
    try:
        app()
    finally:
        gc.freeze()  # nor at exit


def run(command: Callable[..., None]) -> None:
    """Run `command` as an application of its own, everything being imported."""
    resume_gc()
    app = make_app()
    app.command()(exit_on_error(command))
    start(app)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of giving it back to the kernel at once.

    Else every large tensor on a CPU is paged in anew, and networks run up to three times slower. The process holds on
    to the most it has ever used at a time. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
