"""Imported first by every command here: outside the environment it ends in one line, and not deep in its imports."""

import sys

HINT = "activate the environment with `source .venv/bin/activate`, or make it with `make install`"
VERSION = ".".join(map(str, sys.version_info[:3]))

if sys.version_info < (3, 11):  # noqa: UP036 (any Python may run this)
    sys.exit(f"error: this is Python {VERSION}, rrcm needs 3.11 or newer; {HINT}")
try:
    from rrcm.utils.app import run_command
except ImportError as error:
    sys.exit(f"error: {sys.executable}: {error}; {HINT}")

__all__ = ["run_command"]
