"""Imported first by every command here: it puts the package beside it in front of any other on Python's path.

So a command runs the code of its own checkout, whichever checkout the active environment was installed from: another
clone, another worktree, or the workspace from which DVC queued an experiment. Outside the environment it ends in one
line, and not deep in its imports.
"""

import sys
from pathlib import Path

HINT = "activate the environment with `source .venv/bin/activate`, or make it with `make install`"
VERSION = ".".join(map(str, sys.version_info[:3]))

if sys.version_info < (3, 11):  # noqa: UP036 (any Python may run this)
    sys.exit(f"error: this is Python {VERSION}, rrcm needs 3.11 or newer; {HINT}")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from rrcm.utils.app import refuse_other_checkout, run_command
except ImportError as error:
    sys.exit(f"error: {sys.executable}: {error}; {HINT}")
refuse_other_checkout(__file__)  # another one may have been imported before, at the start of Python

__all__ = ["run_command"]
