"""What `make repro` needs of DVC: its graph of stages, its locks, the file dvc.lock, and the command that runs a stage.

Not a command: repro.py imports it.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml
from dvc.cli import main as dvc_main
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException, ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.scm import SCMError
from dvc.utils.serialize import modify_yaml

from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import atomic_path, has_locks
from rrcm.utils.processes import end_with_parent
from rrcm.utils.scheduler import RAN, RESTORED, UNCHANGED, Stage

LOCKFILE = Path("dvc.lock")
FIRST = "fingerprint"  # its outputs decide which other stages have changed
LAUNCHERS = re.compile(r"\b(torchrun|torch\.distributed|srun|mpirun)\b")  # commands that use every GPU themselves
MEASURES_TIME = {"latency"}  # so nothing else may run at the same time


# Run a stage


def run_stage(name: str) -> int:
    """Turn this process into the command `dvc --wait-for-lock repro --single-item NAME`; returns its exit status."""
    arguments = ["--wait-for-lock", "repro", "--single-item", name]
    sys.argv = ["dvc", *arguments]
    return dvc_main(arguments)


def read_outcome(log: str) -> str:
    """Whether DVC ran a stage, restored its outputs or left it alone, according to its output."""
    if "Running stage '" in log:
        return RAN
    return RESTORED if "is cached - skipping run" in log else UNCHANGED


# Read the graph


def read_graph(targets: list[str]) -> list[Stage]:
    """The targets (default: all stages) and the stages they depend on, in DVC's topological order.

    The stage FIRST is brought up to date before the others are checked, so that they are compared with today's code.
    Waits while another DVC command holds the lock. Raises `RRCMError` if DVC cannot read the repository.
    """
    return _in_child(_read_graph, targets)


def _read_graph(targets: list[str]) -> list[Stage]:
    repo, announced = Repo(), False
    while True:
        try:
            with repo.lock:
                _delete_damaged(Path(repo.tmp_dir) / "rwlock")
                first = next((stage for stage in repo.index.stages if stage.addressing == FIRST), None)
                renew = first is not None and first.changed()
            if renew:
                _renew_fingerprints(repo)
            with repo.lock:
                graph = get_active_graph(repo.index.graph)
                steps = plan_repro(graph, collect_stages(repo, targets or ["dvc.yaml"]))
                return [_make_stage(step, graph[step]) for step in steps]
        except LockError as error:
            if not announced:
                hint = _check_dvc_locks(repo)
                print(f"another DVC command is at work here; waiting for it{hint} ({one_line(error)})", file=sys.stderr)
                announced = True
            time.sleep(1)


def _make_stage(step: object, upstream: object) -> Stage:
    """The scheduler's view of a stage of DVC."""
    name, command = step.addressing, step.cmd or ""
    deferred = name in MEASURES_TIME
    exclusive = deferred or LAUNCHERS.search(command) is not None
    return Stage(name, command, [above.addressing for above in upstream], step.changed(), exclusive, deferred)


def _renew_fingerprints(repo: Repo) -> None:
    """Run the stage FIRST. Raises `LockError` while stages of a killed run still read its outputs."""
    logging.getLogger("dvc").setLevel(logging.WARNING)  # no hints about git; this is a child process
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            repo.reproduce(FIRST, single_item=True)
    except ReproductionError as error:
        if isinstance(error.__cause__, LockError):
            raise error.__cause__ from None
        raise


def _check_dvc_locks(repo: Repo) -> str:
    """Raise `RRCMError` if the file system has no locks, which DVC reports as a lock held by another process.

    With DVC's other kind of lock, returns a hint: a killed process may have left the lock behind.
    """
    path = Path(repo.tmp_dir) / "lock"
    if repo.config["core"].get("hardlink_lock"):
        return f"; if none is, delete {path}"
    with path.open("a") as file:
        if not has_locks(file):
            other_kind = f"rm -f {os.path.relpath(path.parent)}/*lock; dvc config --local core.hardlink_lock true"
            raise RRCMError(f"{repo.tmp_dir}: has no file locks, which DVC needs; run `{other_kind}`")
    return ""


def _delete_damaged(rwlock: Path) -> None:
    """Delete DVC's list of the paths that its processes read and write, if a killed process left it half-written.

    DVC would refuse to work. Hold DVC's lock when calling this; every process that writes the list holds it.
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(rwlock.read_bytes())
        except ValueError:
            print(f"{os.path.relpath(rwlock)} is half-written, as a killed run left it; deleting it", file=sys.stderr)
            rwlock.unlink()


# Keep dvc.lock whole and sorted


@contextlib.contextmanager
def lockfile_copied(copy: Path) -> Iterator[None]:
    """Keep a copy of dvc.lock while stages run, and delete it when all have succeeded.

    DVC may be killed while it writes the file, so a half-written dvc.lock is first replaced by the copy that the killed
    run kept. DVC's run cache still has the stages that have finished since.
    """
    _restore_lockfile(copy)
    if LOCKFILE.exists():
        _copy_file(LOCKFILE, copy)
    else:
        copy.write_bytes(b"")  # says that there was none
    yield
    copy.unlink(missing_ok=True)


def _restore_lockfile(copy: Path) -> None:
    if not copy.exists() or not LOCKFILE.exists() or _is_complete(LOCKFILE.read_bytes()):
        return
    print("dvc.lock is half-written, as a killed run left it; taking its copy from before that run", file=sys.stderr)
    if copy.stat().st_size:
        _copy_file(copy, LOCKFILE)
        copy.unlink()
    else:
        LOCKFILE.unlink()


def _copy_file(source: Path, target: Path) -> None:
    with atomic_path(target) as scratch:  # the two may be on different file systems
        shutil.copyfile(source, scratch)


def _is_complete(lock: bytes) -> bool:
    """Whether this is the whole content of a dvc.lock: DVC can read it, and it ends with a newline."""
    try:
        Lockfile.validate(_load_yaml(lock))
    except (yaml.YAMLError, DvcException):
        return False
    return lock.endswith(b"\n")


def sort_lockfile(stages: list[Stage]) -> None:
    """Sort the entries of dvc.lock as a serial `dvc repro` writes them, no matter which stage finished first."""
    _in_child(_sort_lockfile, [stage.name for stage in stages])


def _sort_lockfile(order: list[str]) -> None:
    with contextlib.suppress(LockError, FileNotFoundError), Repo().lock:
        names = list(_load_yaml(LOCKFILE.read_bytes()).get("stages", {}))
        wanted = [name for name in order if name in names] + [name for name in names if name not in order]
        if names != wanted:
            with modify_yaml(LOCKFILE) as data:
                for name in wanted:
                    data["stages"][name] = data["stages"].pop(name)


def _load_yaml(content: bytes) -> object:
    return yaml.load(content, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


# DVC in a child process


def _in_child(function: Callable, argument: object) -> object:
    """Call a function that uses DVC in a child process, so that this process, which forks, has none of DVC's state.

    A fork would copy its locks and databases, and its threads would be missing.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
        end_with_parent()
        try:
            sender.send((function(argument), None))
        except RRCMError as error:
            sender.send((None, str(error)))
        except (DvcException, OSError) as error:
            cause = f" {error.__cause__}" if error.__cause__ else ""
            hint = "; `make install` tells DVC to do without git" if isinstance(error, SCMError) else ""
            sender.send((None, one_line(RRCMError(f"{error}{cause}{hint}"))))

    process = fork.Process(target=work)
    process.start()
    sender.close()
    try:
        result, problem = receiver.recv()
    except EOFError:
        raise RRCMError("DVC could not read this repository; what it says is above") from None
    finally:
        process.join()
    if problem:
        raise RRCMError(problem)
    return result
