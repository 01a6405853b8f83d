"""Forks Python stages from a process that has already imported PyTorch and the modules of the stages.

A new Python process spends 2 to 3 seconds of a core on these imports. In the default run, with 42 stages on two cores,
they add up to about a minute. On runs whose stages take minutes, they do not matter.

To switch this off, let repro.py import `Scheduler` from rrcm.utils.scheduler instead of this module, and delete this
file and tests/test_warm.py. Every stage then starts in a new process, as with `dvc repro`.

The price: it replaces a private function of DVC, `dvc.stage.run._run`, in the scheduler's process and its children.
"""

import gc
import importlib
import logging
import os
import re
import runpy
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import dvc.stage.run
from dvc.stage.exceptions import StageCmdFailedError

from rrcm.utils.app import other_checkout
from rrcm.utils.scheduler import Scheduler

# Everything that the stages import, at the top of their modules or later.
MODULES = ["torch._dynamo", "dvclive", "rrcm.training.pretrain", "rrcm.training.denoised", "rrcm.certification.certify"]
MODULES += ["rrcm.certification.certify_cascade", "rrcm.evaluation.latency", "rrcm.data.sharding", "webdataset"]
MODULES += ["rrcm.evaluation.clean", "rrcm.report.build"]
MIN_STAGES = 3  # with fewer Python stages to run, importing everything takes longer than it saves


class WarmScheduler(Scheduler):
    """A scheduler whose Python stages start with their imports done."""

    def run(self) -> None:
        """As `Scheduler.run`. If enough Python stages have to run, do the imports first."""
        changed = [stage for stage in self.stages.values() if stage.changed and is_python(stage.command)]
        if len(changed) >= MIN_STAGES:
            dvc.stage.run._run = partial(run_forked, import_modules(), dvc.stage.run._run)
        super().run()


def is_python(command: str) -> bool:
    """Whether a stage's command only runs a Python script of stages/, such as `python stages/certify.py rrcm 0.5`."""
    return re.fullmatch(r"python stages/\w+\.py[\w. -]*", command) is not None


def import_modules() -> dict[Path, int]:
    """Import what the stages need, and return the sources from before. This starts no thread and touches no GPU."""
    sources = own_sources()  # a file may change during the imports
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children share these pages
    return sources


def own_sources() -> dict[Path, int]:
    """Modification times of the source files of rrcm."""
    package = Path(__file__).resolve().parent.parent / "rrcm"
    return {path: path.stat().st_mtime_ns for path in package.rglob("*.py")}


def run_forked(
    imported: dict[Path, int], cold: Callable, executable: str, command: str, *, cwd: str, env: dict, **options: object
) -> None:
    """Stands in for DVC's function `cold`, which runs a stage's command: forks this process instead of starting Python.

    DVC's own function still runs a command that is no Python script of stages/, any command in another checkout, and
    every command once the source files differ from those that were `imported`.
    """
    in_place = is_python(command) and other_checkout([Path(cwd)]) is None
    if not in_place or own_sources() != imported:
        cold(executable, command, cwd=cwd, env=env, **options)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_script(shlex.split(command)[1:], cwd, env)
    _, status = os.waitpid(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise StageCmdFailedError(command, code)


def _become_script(arguments: list[str], cwd: str, env: dict) -> NoReturn:
    """In a new child process: do what `python ARGUMENTS` does, and exit."""
    status = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signo in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(signo, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        logging.root.handlers.clear()  # DVC's
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, int | None):
            status = int(end.code or 0)
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
