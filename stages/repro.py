"""Run the pipeline with independent stages side by side: `make repro`. This is no DVC stage itself.

The graph is DVC's own. Each stage that is ready runs as `dvc --wait-for-lock repro --single-item STAGE`, so DVC alone
decides whether to run it, restore it from its cache or skip it, and records it in dvc.lock. `dvc repro` does the same,
one stage after another. stages/README.md says how this works.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

import contextlib
import ctypes
import gc
import importlib
import io
import json
import logging
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, NoReturn

import dvc.stage.run
import psutil
import typer
import yaml
from dvc.cli import main as dvc_main
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException, ReproductionError
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro
from dvc.scm import SCMError
from dvc.stage.exceptions import StageCmdFailedError
from dvc.utils.serialize import modify_yaml

from rrcm.utils.app import other_checkout
from rrcm.utils.errors import Interrupted, RRCMError, one_line
from rrcm.utils.files import atomic_path, has_locks, lock_file, write_json, writing
from rrcm.utils.progress import can_redraw
from rrcm.utils.provenance import available_cores

GRACE = 60  # seconds that a stage has to save its state after SIGTERM
REFRESH = 0.5  # seconds between two drawings on a terminal
LOG_EVERY = 10.0  # seconds between two reports elsewhere
TAIL = 15  # lines of a failed stage's log to show
RAN, RESTORED, UNCHANGED = "ran", "restored from the cache", "up to date"
# Imported once here, so that a stage that is a plain Python script is forked in no time instead of importing them anew.
WARM = ["torch._dynamo", "dvclive", "rrcm.training.pretrain", "rrcm.training.denoised", "rrcm.certification.certify"]
WARM += ["rrcm.evaluation.latency", "rrcm.data.sharding", "webdataset", "rrcm.report.build"]
MIN_WARM = 3  # stages from which on the imports here pay
LAUNCHERS = re.compile(r"\b(torchrun|torch\.distributed|srun|mpirun)\b")  # they take every GPU themselves
FIRST = "fingerprint"  # what it writes decides which of the others have changed
ALONE = {"latency"}  # it measures time, so nothing else runs beside it
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SIGNALS = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM}
USED_BY_DVC = """dvc.cachemgr dvc.cli.parser dvc.data_cloud dvc.dirs dvc.parsing.interpolate dvc.repo.artifacts
    dvc.repo.datasets dvc.repo.metrics dvc.repo.open_repo dvc.repo.params dvc.repo.plots dvc.repo.stage dvc.rwlock
    dvc.stage.run dvc.utils.strictyaml dvc_data.hashfile.db.local dvc_data.hashfile.status dulwich.ignore dulwich.index
    ruamel.yaml scmrepo.git scmrepo.noscm"""


@dataclass
class Stage:
    """A stage of DVC's graph, and the process that runs it."""

    name: str
    command: str
    upstream: list[str]
    changed: bool  # when the run began; DVC looks again when a stage above it has run
    outcome: str = ""
    pid: int = 0
    slots: list[int] = field(default_factory=list)
    started: float = 0.0


def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="Stages to make up to date; default: all.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Stages at once; default: one per GPU or core.")] = None,
) -> None:
    """Bring TARGETS and all they depend on up to date. Continues where a killed run stopped."""
    start = time.monotonic()
    logs = Path(os.environ.get("RRCM_RUNS") or "runs").absolute() / "logs"
    with writing(logs, "or set RRCM_RUNS to another folder"):
        logs.mkdir(parents=True, exist_ok=True)
    with _only_run(logs / "lock"):
        _restore_lockfile(logs / "dvc.lock")
        for module in USED_BY_DVC.split():
            with contextlib.suppress(ImportError):
                importlib.import_module(module)  # once here, and not again in the child of each stage
        if Path("dvc.lock").exists():
            with atomic_path(logs / "dvc.lock") as copy:
                shutil.copyfile("dvc.lock", copy)
        else:
            (logs / "dvc.lock").write_bytes(b"")
        stages = [Stage(*each) for each in _in_child(read_graph, targets or [])]
        gpus = visible_gpus()
        jobs = jobs or default_jobs(gpus)
        print(f"{len(stages)} stages, {jobs} at once; their output goes to {_relative(logs)}/", file=sys.stderr)
        if sum(stage.changed and is_python(stage.command) for stage in stages) >= MIN_WARM:
            warm_up()
        scheduler = Scheduler(stages, jobs, gpus, logs)
        scheduler.run()
        if not targets:  # though nothing ran: an earlier run may have been killed just before this
            _in_child(sort_lockfile, [stage.name for stage in stages])
        (logs / "dvc.lock").unlink(missing_ok=True)
    counts = [f"{sum(stage.outcome == kind for stage in stages)} {kind}" for kind in (RAN, RESTORED, UNCHANGED)]
    if not targets:
        _print_results()
    print(f"done in {time.monotonic() - start:.0f} s: {', '.join(counts)}", file=sys.stderr)


class Scheduler:
    """Starts stages as their upstream stages finish, the longest chain of work first, at most `jobs` at once.

    Raises `RRCMError` when a stage fails and `Interrupted` or `KeyboardInterrupt` on a signal, after stopping the rest.
    """

    def __init__(self, stages: list[Stage], jobs: int, gpus: list[str], logs: Path):
        self.stages = {stage.name: stage for stage in stages}  # every stage after its upstream stages
        self.jobs, self.gpus, self.logs = jobs, gpus, logs
        self.free = list(range(jobs))
        self.waiting_said: set[str] = set()
        self.seconds = self._read_seconds()
        self.display = Display()

    def run(self) -> None:
        """Run until every stage has an outcome."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # processes that a stage leaves behind become ours to wait for
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            while not all(stage.outcome for stage in self.stages.values()):
                self._start_ready()
                self.display.show(self._status_lines)
                received = signal.sigtimedwait(SIGNALS, REFRESH)
                for stage, status in self._reap():
                    self._finish(stage, status)
                if received is not None and received.si_signo != signal.SIGCHLD:
                    self._interrupt(received.si_signo)
        finally:
            self._stop()
            self.display.clear()
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    @property
    def running(self) -> list[Stage]:
        return [stage for stage in self.stages.values() if stage.pid]

    def _start_ready(self) -> None:
        ready = []
        for stage in self.stages.values():
            above = [self.stages[name].outcome for name in stage.upstream]
            if stage.outcome or stage.pid or not all(above):
                continue
            if stage.changed or set(above) & {RAN, RESTORED}:
                ready.append(stage)
            else:
                stage.outcome = UNCHANGED
        chains = self._chains()
        for stage in sorted(ready, key=lambda stage: (stage.name in ALONE, -chains[stage.name])):
            wanted = self.jobs if LAUNCHERS.search(stage.command) or stage.name in ALONE else 1
            if len(self.free) < wanted:
                return
            self._start(stage, wanted)

    def _start(self, stage: Stage, wanted: int) -> None:
        with writing(self._log(stage)):
            log = self._log(stage).open("ab")
        if not lock_file(log):  # held by all who have this log open: the stage's processes
            if stage.name not in self.waiting_said:
                self.display.say(f"{stage.name}: still runs since an earlier start that was killed; waiting for it")
                self.waiting_said.add(stage.name)
            log.close()
            return
        log.truncate(0)
        stage.slots, self.free = self.free[:wanted], self.free[wanted:]
        stage.started = time.monotonic()
        gpu = self.gpus[stage.slots[0] % len(self.gpus)] if self.gpus and wanted == 1 else None
        scheduler = os.getpid()
        stage.pid = os.fork()
        if stage.pid == 0:
            _become_dvc(stage.name, log, gpu, scheduler)
        log.close()

    def _reap(self) -> Iterator[tuple[Stage, int]]:
        """Stages whose process has ended, with its exit status; negative: the signal that ended it."""
        by_pid = {stage.pid: stage for stage in self.running}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in by_pid:
                    yield by_pid[ended[0]], os.waitstatus_to_exitcode(ended[1])

    def _finish(self, stage: Stage, status: int) -> None:
        stage.pid, pid = 0, stage.pid
        self.free += stage.slots
        text = self._log(stage).read_text(encoding="utf-8", errors="replace")
        if status != 0:
            _signal_group(pid, signal.SIGKILL)
            self._fail(stage, status, text)
        stage.outcome = (
            RAN if "Running stage '" in text else RESTORED if "is cached - skipping run" in text else UNCHANGED
        )
        seconds = time.monotonic() - stage.started
        if stage.outcome == RAN:
            self.seconds[stage.name] = round(seconds, 1)
            write_json(self.logs / "seconds.json", self.seconds)
        self.display.say(f"{stage.name}: {stage.outcome}, {seconds:.1f} s")

    def _fail(self, stage: Stage, status: int, text: str) -> NoReturn:
        self.display.clear()
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
        print(*(f"  {line}" for line in lines[-TAIL:]), sep="\n", file=sys.stderr)
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else "failed"
        raise RRCMError(
            f"stage {stage.name} {how}; its last lines are above, all of them in {_relative(self._log(stage))}"
        )

    def _interrupt(self, signo: int) -> NoReturn:
        if signo == signal.SIGINT:
            raise KeyboardInterrupt("; run it again to continue")
        raise Interrupted("stopped by SIGTERM; run it again to continue")

    def _stop(self) -> None:
        """Ask the stages that still run to save and end. After `GRACE` seconds, or another Ctrl-C, kill them."""
        groups = {stage.pid: stage.name for stage in self.running}
        if groups:
            self.display.say(f"stopping {', '.join(groups.values())}: at most {GRACE} s to save, or Ctrl-C to kill")
        for pid in groups:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)  # the child passes it on to the command
        deadline = time.monotonic() + GRACE + 5  # the child itself kills its command after GRACE
        while groups:
            received = signal.sigtimedwait(SIGNALS, 0.1)
            killed = received is not None and received.si_signo != signal.SIGCHLD
            for _ in self._reap():
                pass
            for pid in list(groups):
                if killed or time.monotonic() > deadline:
                    _signal_group(pid, signal.SIGKILL)
                if not _signal_group(pid, 0):
                    del groups[pid]

    def _chains(self) -> dict[str, float]:
        """Seconds of the longest chain of work that begins with each stage."""
        chains = dict.fromkeys(self.stages, 0.0)
        for stage in reversed(self.stages.values()):  # downstream stages first
            chains[stage.name] += self._left(stage)
            for name in stage.upstream:
                chains[name] = max(chains[name], chains[stage.name])
        return chains

    def _expected(self, stage: Stage) -> float | None:
        """Seconds this stage took last time, else the mean of its group (DVC names group@item), else unknown."""
        if stage.name in self.seconds:
            return self.seconds[stage.name]
        group = stage.name.partition("@")[0]
        known = [seconds for name, seconds in self.seconds.items() if name.partition("@")[0] == group]
        return sum(known) / len(known) if known else None

    def _left(self, stage: Stage) -> float:
        if stage.outcome:
            return 0.0
        expected = self._expected(stage)
        if not stage.pid:
            return 1.0 if expected is None else expected
        if found := re.search(r", (\d+) s left", self._progress(stage)):
            return float(found[1])
        return max(1.0, (expected or 0.0) - (time.monotonic() - stage.started))

    def _status_lines(self) -> list[str]:
        now = time.monotonic()
        lines = [f"{stage.name}, {now - stage.started:.0f} s: {self._progress(stage)}" for stage in self.running]
        pending = [stage for stage in self.stages.values() if not stage.outcome]
        left = max(max(self._chains().values()), sum(map(self._left, pending)) / self.jobs)
        vague = "at least " if any(self._expected(stage) is None for stage in pending) else "about "
        done = len(self.stages) - len(pending)
        return [*lines, f"{done}/{len(self.stages)} stages done, {vague}{left:.0f} s left"]

    def _progress(self, stage: Stage) -> str:
        """What the stage has said last: how much is done, at which rate."""
        with self._log(stage).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            text = file.read().decode(errors="replace")
        counts = re.findall(r"\b\d+/\d+ .*", text)
        return counts[-1] if counts else "starting"

    def _log(self, stage: Stage) -> Path:
        return self.logs / f"{re.sub(r'[/:]', '_', stage.name)}.log"

    def _read_seconds(self) -> dict[str, float]:
        try:
            return json.loads((self.logs / "seconds.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}


class Display:
    """Lines on stderr: on a terminal the status is drawn anew in place, elsewhere it is printed now and then."""

    def __init__(self) -> None:
        self.live = can_redraw()
        self.drawn = 0
        self.last = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(line, file=sys.stderr, flush=True)
        self.last = 0.0 if self.live else self.last  # draw the status again at once

    def show(self, status: Callable[[], list[str]]) -> None:
        """Show the lines of `status` if it is time to."""
        now = time.monotonic()
        if now - self.last < (REFRESH if self.live else LOG_EVERY):
            return
        self.last = now
        lines = status()
        if self.live:
            self.clear()
            width = shutil.get_terminal_size().columns - 1
            lines = [line[:width] for line in lines]
            self.drawn = len(lines)
        print(*lines, sep="\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Remove the status from the terminal."""
        if self.drawn:
            sys.stderr.write(f"\x1b[{self.drawn}A\x1b[J")
            self.drawn = 0


def read_graph(targets: list[str]) -> list[tuple[str, str, list[str], bool]]:
    """(name, command, upstream names, changed) of the targets (default: all) and all they need, in DVC's order.

    The stage FIRST is brought up to date before, so that the others are compared with what the code does now.
    """
    repo, said = Repo(), False
    while True:
        try:
            with repo.lock:
                _drop_damaged(Path(repo.tmp_dir) / "rwlock")
                first = next((stage for stage in repo.index.stages if stage.addressing == FIRST), None)
                renew = first is not None and first.changed()
            if renew:
                _renew_fingerprints(repo)
            with repo.lock:
                graph = get_active_graph(repo.index.graph)
                steps = plan_repro(graph, collect_stages(repo, targets or ["dvc.yaml"]))
                return [
                    (stage.addressing, stage.cmd or "", [above.addressing for above in graph[stage]], stage.changed())
                    for stage in steps
                ]
        except LockError as error:
            if not said:
                hint = _check_dvc_locks(repo)
                print(f"another DVC command is at work here; waiting for it{hint} ({one_line(error)})", file=sys.stderr)
                said = True
            time.sleep(1)


def _renew_fingerprints(repo: Repo) -> None:
    """Run the stage FIRST. Raises `LockError` while stages of a run that was killed still read what it wrote."""
    logging.getLogger("dvc").setLevel(logging.WARNING)  # of this child: no hints for git
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            repo.reproduce(FIRST, single_item=True)
    except ReproductionError as error:
        if isinstance(error.__cause__, LockError):
            raise error.__cause__ from None
        raise


def _check_dvc_locks(repo: Repo) -> str:
    """Raises `RRCMError` if DVC has no lock because its folder has none; DVC itself says that another process has it.

    Returns what else may be the reason, with DVC's other kind of locks.
    """
    path = Path(repo.tmp_dir) / "lock"
    if repo.config["core"].get("hardlink_lock"):
        return f"; if none is, delete {path}"
    with path.open("a") as file:
        if not has_locks(file):
            other_kind = f"rm -f {_relative(path.parent)}/*lock; dvc config --local core.hardlink_lock true"
            raise RRCMError(f"{repo.tmp_dir}: has no file locks, which DVC needs; run `{other_kind}`")
    return ""


def sort_lockfile(order: list[str]) -> None:
    """Put the entries of dvc.lock in DVC's order, in which a serial `dvc repro` writes them, whichever ended first."""
    path = Path("dvc.lock")
    with contextlib.suppress(LockError, FileNotFoundError), Repo().lock:
        text = path.read_text(encoding="utf-8")
        names = list(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)).get("stages", {}))
        wanted = [name for name in order if name in names] + [name for name in names if name not in order]
        if names != wanted:
            with modify_yaml(path) as data:
                for name in wanted:
                    data["stages"][name] = data["stages"].pop(name)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name on this machine, without importing torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def default_jobs(gpus: list[str]) -> int:
    """As many stages at once as there are GPUs, else as fill the cores with the threads that each uses."""
    if gpus:
        return len(gpus)
    cores = available_cores()
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP allows one number per level
    for threads in (_params().get("threads"), named):
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):  # neither is checked yet
            return max(1, cores // int(threads))
    return 1


def _params() -> dict:
    try:
        found = yaml.safe_load(Path("params.yaml").read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    return found if isinstance(found, dict) else {}


def is_python(command: str) -> bool:
    """Whether a stage's command is a Python script of stages/ and no more, as `python stages/certify.py rrcm 0.5`."""
    return re.fullmatch(r"python stages/\w+\.py[\w. -]*", command) is not None


def warm_up() -> None:
    """Import what the stages need. Nothing here computes, so no thread is started and no GPU is touched."""
    _warm_sources.update(_own_sources())  # before the imports: a file may change meanwhile
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children share these pages


_warm_sources: dict[Path, int] = {}  # what `_own_sources` was when the modules of rrcm were imported


def _own_sources() -> dict[Path, int]:
    """Modification times of the sources of rrcm."""
    package = Path(__file__).resolve().parent.parent / "rrcm"
    return {path: path.stat().st_mtime_ns for path in package.rglob("*.py")}


def _run_warm(cold: Callable, executable: str, command: str, *, cwd: str, env: dict, **options: object) -> None:
    """Stands in for DVC's function that runs a stage's command: forks this process, where the imports are done.

    Anything but a Python script of stages/ goes to `cold`, DVC's own function, and so does everything in another
    checkout, and once the code differs from what was imported.
    """
    warm = _warm_sources and is_python(command) and other_checkout([Path(cwd)]) is None
    if not warm or _own_sources() != _warm_sources:
        cold(executable, command, cwd=cwd, env=env, **options)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_stage(shlex.split(command)[1:], cwd, env)
    _, status = os.waitpid(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise StageCmdFailedError(command, code)


def _become_stage(arguments: list[str], cwd: str, env: dict) -> NoReturn:
    """In a new child: be `python ARGUMENTS`."""
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


def _become_dvc(name: str, log: BinaryIO, gpu: str | None, scheduler: int) -> NoReturn:
    """In a new child: be the command `dvc --wait-for-lock repro --single-item NAME`, in a process group of its own."""
    status = 255
    try:
        os.setpgid(0, 0)  # Ctrl-C reaches the scheduler alone
        signal.signal(signal.SIGTERM, _stop_command)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != scheduler:
            os._exit(128 + signal.SIGTERM)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        arguments = ["--wait-for-lock", "repro", "--single-item", name]
        sys.argv = ["dvc", *arguments]
        dvc.stage.run._run = partial(_run_warm, dvc.stage.run._run)
        status = dvc_main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _stop_command(*_: object) -> None:
    """SIGTERM in a child: pass it on to the stage's command, wait for that, and kill it when it takes too long.

    DVC itself goes on: it may be recording what it made. If it has not started the command yet, this comes back for it.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which the command would inherit
    if psutil.Process().children():
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        os.killpg(0, signal.SIGTERM)
    else:
        signal.signal(signal.SIGALRM, _stop_command)
        signal.setitimer(signal.ITIMER_REAL, 0.1)


def _signal_group(group: int, signo: int) -> bool:
    """Send a signal to a process group; whether there was anybody."""
    try:
        os.killpg(group, signo)
    except ProcessLookupError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux: then a killed scheduler leaves its stages running
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _in_child(function: Callable, argument: object) -> object:
    """Call a function that uses DVC in a child, so that no lock, database or thread of DVC's is there when we fork."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a traceback
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
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


@contextlib.contextmanager
def _only_run(path: Path) -> Iterator[None]:
    """Hold a lock so that one scheduler at a time works in this repository."""
    with writing(path, "or set RRCM_RUNS to another folder"):
        file = path.open("w")
    with file:
        if not lock_file(file, unprotected="start no second `make repro`, and after a kill wait for its stages to end"):
            print("another run is at work here, or just ending; waiting for it", file=sys.stderr)
            lock_file(file, wait=True)
        yield


def _restore_lockfile(copy: Path) -> None:
    """Replace a dvc.lock that DVC was killed in the middle of writing by its copy from before that run.

    An empty copy says that there was none. DVC's run cache still has the stages that finished since.
    """
    lockfile = Path("dvc.lock")
    if copy.exists() and lockfile.exists() and not _is_complete(lockfile.read_bytes()):
        print(
            "dvc.lock is half-written, as a killed run left it; taking its copy from before that run", file=sys.stderr
        )
        if copy.stat().st_size:
            with atomic_path(lockfile) as scratch:  # the copy may be on another file system
                shutil.copyfile(copy, scratch)
            copy.unlink()
        else:
            lockfile.unlink()


def _is_complete(lock: bytes) -> bool:
    """Whether DVC can read the content of a dvc.lock, which ends with a line end."""
    try:
        Lockfile.validate(yaml.load(lock, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, DvcException):
        return False
    return lock.endswith(b"\n")


def _drop_damaged(claims: Path) -> None:
    """Delete DVC's list of the paths that its processes read and write if one was killed in the middle of writing it.

    DVC would refuse to work. To be called under DVC's lock, which every process that writes the list holds.
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(claims.read_bytes())
        except ValueError:
            print(f"{_relative(claims)} is half-written, as a killed run left it; deleting it", file=sys.stderr)
            claims.unlink()


def _print_results() -> None:
    """The best-sigma table of these settings, where there is one, and how it differs from published figures."""
    from rrcm.publication.compare import compare_with_published  # imports pandas

    report = Path("reports") / str(_params().get("report", {}).get("name"))
    if not report.is_dir():
        return
    print(f"\n{(report / 'best_sigma.md').read_text(encoding='utf-8')}\nThe report: {report}/report.md")
    try:
        found = compare_with_published(Path())
    except RRCMError as error:
        found = f"note: not compared with published results ({error})"
    if found:
        print(f"\n{found}")


def _relative(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    run_command(repro)
