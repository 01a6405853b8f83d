"""Turn a function into a command that starts fast and reports bad input in one line.

Import this module before torch. It switches the garbage collector off until `resume_gc`: garbage collection during
imports and at exit costs 40 % of a stage's start-up time. It also gives an unnamed user a name and a home.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import os
import pwd
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

gc.disable()


def name_user() -> None:
    """Set LOGNAME and HOME for a user without a passwd entry, as in many containers. Other libraries fail without them.

    The home becomes /, as in Docker. An empty variable counts as absent.
    """
    defaults = {"HOME": "/", "LOGNAME": str(os.getuid())}
    missing = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    for name in missing:
        os.environ.pop(name, None)
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.update(missing)


name_user()
try:
    Path.cwd()
except FileNotFoundError:
    sys.exit("error: the working directory was deleted; change to another one")

import typer  # noqa: E402

from rrcm.utils.errors import Interrupted, RRCMError, printable  # noqa: E402

USAGE_ERROR = typer.BadParameter.__base__  # click's UsageError; newer versions of Typer have their own copy of click
INTERRUPTED = 130  # exit status after Ctrl-C, as in shells
TERMINATED = 143  # exit status after SIGTERM
REFUSED = dict.fromkeys(  # system errors that the user can fix, and the advice that is printed
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT), "check permissions and disk"
) | dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "give another path")


def other_checkout(folders: Iterable[Path]) -> Path | None:
    """The first of `folders` that contains this package, or None if that is the imported copy or there is none."""
    checkout = next((folder for folder in folders if (folder / "rrcm/utils/app.py").is_file()), None)
    return None if checkout is None or checkout.samefile(Path(__file__).parents[2]) else checkout


def refuse_other_checkout(script: str) -> None:
    """Exit with a one-line error if `script` belongs to another checkout than the imported package."""
    if folder := other_checkout([Path(script).resolve().parent.parent]):
        sys.exit(
            f"error: {printable(script)}: rrcm was imported from {printable(Path(__file__).parents[2])}; "
            f"activate the environment of {printable(folder)} (`make install` makes it)"
        )


if script := getattr(sys.modules["__main__"], "__file__", None):
    refuse_other_checkout(script)  # for commands that do not import stages/environment.py, such as benchmarks


def make_app(*, completion: bool = False) -> typer.Typer:
    """A Typer application with plain tracebacks. With `completion`, a shell can be taught to complete its arguments."""
    return typer.Typer(add_completion=completion, pretty_exceptions_enable=False)


def exit_on_error(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap `command` so that it exits without a traceback.

    An `RRCMError` is printed on stderr in one line, and the exit status is 1. The same happens when the system refuses
    to read or write a file. The exit status is 130 after Ctrl-C and 143 after `Interrupted`.
    """

    @functools.wraps(command)
    def guard(*args: object, **options: object) -> None:
        try:
            command(*args, **options)
            sys.stdout.flush()  # a full disk can still be reported here
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            raise typer.Exit(TERMINATED) from None
        except RRCMError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            line = f"{error.filename or 'standard output'}: {error.strerror}; {REFUSED[error.errno]}"
            print(f"error: {printable(RRCMError(line))}", file=sys.stderr)
            if error.filename is None:
                sys.stdout = open_nothing("w")  # otherwise Python flushes it again at exit, with a traceback
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interruption:
            print(f"interrupted{interruption}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return guard


def resume_gc() -> None:
    """Switch garbage collection on. Call it after all imports: objects that they created are never scanned again."""
    gc.freeze()
    gc.enable()


def run_app(app: typer.Typer) -> None:
    """Run the application with this process's arguments, and exit."""
    keep_freed_memory()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by `>&-`: the next file to be opened would get its descriptor
            setattr(sys, name, open_nothing(mode))
    warnings.filterwarnings("ignore", module="PIL")  # about large pictures and odd metadata
    sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr; some file names cannot be printed otherwise
    try:
        sys.exit(app(standalone_mode=False))
    except USAGE_ERROR as error:
        print(f"error: {usage_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        gc.freeze()  # no collection at exit


def usage_line(error: Exception) -> str:
    """What is wrong with a command line, and which command's help to read, in one line."""
    message = " ".join(printable(error.format_message()).split()).rstrip(".")
    if error.ctx is None:
        return message
    command = error.ctx.command_path
    return f"{command}: {message[:1].lower()}{message[1:]}; see `{command} --help`"


def open_nothing(mode: str) -> TextIO:
    """A stream to replace one that cannot be used: it is empty, and discards what is written to it."""
    return Path(os.devnull).open(mode, encoding="utf-8")


def run_command(command: Callable[..., None]) -> None:
    """Run `command` with this process's arguments, and exit. Call it after all imports."""
    resume_gc()
    app = make_app()
    app.command()(exit_on_error(command))
    run_app(app)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning it to the kernel.

    Otherwise each large tensor on a CPU causes new page faults, and networks run up to three times slower. The process
    keeps the most memory it has ever used at once. Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)
