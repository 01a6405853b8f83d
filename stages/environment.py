"""Every command here imports this module first. It puts the package of its own checkout first on Python's path.

A command therefore runs the code beside it, even if the active environment was installed from another clone, another
worktree, or the workspace from which DVC queued an experiment. If the environment is not active, the command ends with
an error of one line instead of a traceback from its imports.
"""

import sys
from pathlib import Path

HINT = "activate the environment with `source .venv/bin/activate`, or make it with `make install`"
VERSION = ".".join(map(str, sys.version_info[:3]))

if sys.version_info < (3, 11):  # noqa: UP036 (any version of Python may run this)
    sys.exit(f"error: this is Python {VERSION}, rrcm needs 3.11 or newer; {HINT}")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    from rrcm.utils.app import refuse_other_checkout, run_command
except ImportError as error:
    sys.exit(f"error: {sys.executable}: {error}; {HINT}")
refuse_other_checkout(__file__)  # Python may have imported another one when it started

__all__ = ["run_command"]
