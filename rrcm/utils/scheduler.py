"""Runs stages that depend on each other, each in its own process, and independent ones at the same time.

The scheduler does not know what a stage does. Its caller provides the function that a child process calls to run a
stage, and the function that reads the outcome from the stage's log.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from rrcm.utils.display import REDRAW_EVERY, Display
from rrcm.utils.errors import Interrupted, RRCMError
from rrcm.utils.files import lock_file, write_json, writing
from rrcm.utils.processes import GRACE, adopt_orphans, lead_group, signal_group

TAIL = 15  # lines of a failed stage's log to show
RAN, RESTORED, UNCHANGED = "ran", "restored from the cache", "up to date"  # outcomes
SIGNALS = {signal.SIGCHLD, signal.SIGINT, signal.SIGTERM}


@dataclass
class Stage:
    """A stage, the stages it depends on, and the process that runs it."""

    name: str
    command: str
    upstream: list[str]
    changed: bool  # known before the run; a stage also runs if a stage upstream of it has run
    exclusive: bool = False  # takes every slot, so nothing runs beside it
    deferred: bool = False  # starts only when no other stage is ready
    outcome: str = ""  # empty until the stage is done
    pid: int = 0  # 0 unless the stage is running
    slots: list[int] = field(default_factory=list)
    started: float = 0.0  # time.monotonic()

    @property
    def is_pending(self) -> bool:
        """Whether the stage has neither finished nor started."""
        return not self.outcome and not self.pid


# Decisions: pure functions


def skip_unchanged(stages: Mapping[str, Stage]) -> None:
    """Mark the stages that need not run: unchanged, and everything upstream is up to date.

    `stages` must be in topological order, upstream stages first.
    """
    for stage in stages.values():
        upstream = {stages[name].outcome for name in stage.upstream}
        if stage.is_pending and not stage.changed and upstream <= {UNCHANGED}:
            stage.outcome = UNCHANGED


def ready_stages(stages: Mapping[str, Stage]) -> list[Stage]:
    """The stages that can start now: all their upstream stages are done."""
    return [
        stage for stage in stages.values() if stage.is_pending and all(stages[name].outcome for name in stage.upstream)
    ]


def start_order(ready: Iterable[Stage], chains: Mapping[str, float]) -> list[Stage]:
    """The longest chain of work first, and deferred stages last."""
    return sorted(ready, key=lambda stage: (stage.deferred, -chains[stage.name]))


def chain_seconds(stages: Mapping[str, Stage], left: Mapping[str, float]) -> dict[str, float]:
    """Seconds of the longest chain of work that begins with each stage, given the seconds `left` of each.

    `stages` must be in topological order, upstream stages first.
    """
    chains = dict.fromkeys(stages, 0.0)
    for stage in reversed(stages.values()):
        chains[stage.name] += left[stage.name]
        for name in stage.upstream:
            chains[name] = max(chains[name], chains[stage.name])
    return chains


def expected_seconds(name: str, earlier: Mapping[str, float]) -> float | None:
    """Seconds that a stage took in an earlier run, else the mean of its group (`group@item`), else None."""
    if name in earlier:
        return earlier[name]
    group = name.partition("@")[0]
    known = [seconds for other, seconds in earlier.items() if other.partition("@")[0] == group]
    return sum(known) / len(known) if known else None


def last_progress(log: str) -> str:
    """The last progress report in a log, such as `200/1000 steps, 35/s, 23 s left` (rrcm.utils.progress)."""
    reports = re.findall(r"\b\d+/\d+ .*", log)
    return reports[-1] if reports else "starting"


def reported_seconds_left(progress: str) -> float | None:
    """The time left that a progress report states."""
    stated = re.search(r", (\d+) s left", progress)
    return float(stated[1]) if stated else None


def visible_gpus() -> list[str]:
    """Names of this machine's GPUs that CUDA_VISIBLE_DEVICES accepts, found without importing torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def default_jobs(gpus: list[str], cores: int, *threads: object) -> int:
    """Stages to run at once: one per GPU; without GPUs, as many as fill the cores with the threads of each stage.

    `threads` per stage is the first of the given values that is a positive number (they are unchecked user input).
    Without one, each stage uses all cores.
    """
    if gpus:
        return len(gpus)
    for value in threads:
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
            return max(1, cores // int(value))
    return 1


# Processes


class Scheduler:
    """Starts stages as their upstream stages finish, at most `jobs` at once, each with its own GPU if there are any.

    `stages` are in topological order. A child process calls `execute` with a stage's name and exits with the status it
    returns. `read_outcome` finds RAN, RESTORED or UNCHANGED in the log of a stage that succeeded. Logs and the seconds
    that each stage took go to the folder `logs`.
    """

    def __init__(
        self,
        stages: list[Stage],
        jobs: int,
        gpus: list[str],
        logs: Path,
        execute: Callable[[str], int],
        read_outcome: Callable[[str], str],
    ):
        self.stages = {stage.name: stage for stage in stages}
        self.jobs, self.gpus, self.logs = jobs, gpus, logs
        self.execute, self.read_outcome = execute, read_outcome
        self.free = list(range(jobs))  # slots
        self.announced: set[str] = set()  # stages that wait for the process of a killed run
        self.seconds = self._read_seconds()
        self.display = Display()

    def run(self) -> None:
        """Run until every stage has an outcome.

        Raises `RRCMError` if a stage fails, and `Interrupted` or `KeyboardInterrupt` on a signal. In each case it first
        stops the other stages.
        """
        adopt_orphans()  # to wait for processes that a stage leaves behind
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            while not all(stage.outcome for stage in self.stages.values()):
                self._start_ready()
                self.display.show(self._status_lines)
                received = signal.sigtimedwait(SIGNALS, REDRAW_EVERY)
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
        skip_unchanged(self.stages)
        for stage in start_order(ready_stages(self.stages), self._chains()):
            slots = self.jobs if stage.exclusive else 1
            if len(self.free) < slots:
                return  # a later stage must not take a slot that this one is waiting for
            self._start(stage, slots)

    def _start(self, stage: Stage, slots: int) -> None:
        with writing(self._log(stage)):
            log = self._log(stage).open("ab")
        if not lock_file(log):  # every process of the stage holds the lock, because it inherits the open log
            if stage.name not in self.announced:
                self.display.say(f"{stage.name}: still runs since an earlier start that was killed; waiting for it")
                self.announced.add(stage.name)
            log.close()
            return
        log.truncate(0)
        stage.slots, self.free = self.free[:slots], self.free[slots:]
        stage.started = time.monotonic()
        scheduler = os.getpid()
        stage.pid = os.fork()
        if stage.pid == 0:
            self._become(stage, log, scheduler)
        log.close()

    def _become(self, stage: Stage, log: BinaryIO, scheduler: int) -> NoReturn:
        """In a new child process: run the stage and exit."""
        status = 255
        try:
            lead_group(log, scheduler)
            if self.gpus and len(stage.slots) == 1 and not stage.exclusive:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus[stage.slots[0] % len(self.gpus)]
            status = self.execute(stage.name)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _reap(self) -> Iterator[tuple[Stage, int]]:
        """Stages whose process has ended, with its exit status. A negative status is the signal that ended it."""
        by_pid = {stage.pid: stage for stage in self.running}
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in by_pid:
                    yield by_pid[ended[0]], os.waitstatus_to_exitcode(ended[1])

    def _finish(self, stage: Stage, status: int) -> None:
        stage.pid, pid = 0, stage.pid
        self.free += stage.slots
        log = self._log(stage).read_text(encoding="utf-8", errors="replace")
        if status != 0:
            signal_group(pid, signal.SIGKILL)
            self._fail(stage, status, log)
        stage.outcome = self.read_outcome(log)
        seconds = time.monotonic() - stage.started
        if stage.outcome == RAN:
            self.seconds[stage.name] = round(seconds, 1)
            write_json(self.logs / "seconds.json", self.seconds)
        self.display.say(f"{stage.name}: {stage.outcome}, {seconds:.1f} s")

    def _fail(self, stage: Stage, status: int, log: str) -> NoReturn:
        self.display.clear()
        lines = [line for line in re.split(r"[\r\n]+", log) if line.strip()]
        print(*(f"  {line}" for line in lines[-TAIL:]), sep="\n", file=sys.stderr)
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else "failed"
        path = os.path.relpath(self._log(stage))
        raise RRCMError(f"stage {stage.name} {how}; its last lines are above, all of them in {path}")

    def _interrupt(self, signo: int) -> NoReturn:
        if signo == signal.SIGINT:
            raise KeyboardInterrupt("; run it again to continue")
        raise Interrupted("stopped by SIGTERM; run it again to continue")

    def _stop(self) -> None:
        """Ask the running stages to save and end. Kill them after `GRACE` seconds, or on another Ctrl-C."""
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
                    signal_group(pid, signal.SIGKILL)
                if not signal_group(pid, 0):
                    del groups[pid]

    def _chains(self) -> dict[str, float]:
        return chain_seconds(self.stages, {stage.name: self._seconds_left(stage) for stage in self.stages.values()})

    def _seconds_left(self, stage: Stage) -> float:
        """What the running stage reports, else an estimate from earlier runs, at least 1 s; 0 if it is done."""
        if stage.outcome:
            return 0.0
        expected = expected_seconds(stage.name, self.seconds)
        if not stage.pid:
            return 1.0 if expected is None else expected
        reported = reported_seconds_left(self._progress(stage))
        elapsed = time.monotonic() - stage.started
        return max(1.0, (expected or 0.0) - elapsed) if reported is None else reported

    def _status_lines(self) -> list[str]:
        now = time.monotonic()
        lines = [f"{stage.name}, {now - stage.started:.0f} s: {self._progress(stage)}" for stage in self.running]
        unfinished = [stage for stage in self.stages.values() if not stage.outcome]
        left = max(max(self._chains().values()), sum(map(self._seconds_left, unfinished)) / self.jobs)
        unknown = any(expected_seconds(stage.name, self.seconds) is None for stage in unfinished)
        done = len(self.stages) - len(unfinished)
        total = f"{done}/{len(self.stages)} stages done, {'at least' if unknown else 'about'} {left:.0f} s left"
        return [*lines, total]

    def _progress(self, stage: Stage) -> str:
        with self._log(stage).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return last_progress(file.read().decode(errors="replace"))

    def _log(self, stage: Stage) -> Path:
        return self.logs / f"{re.sub(r'[/:]', '_', stage.name)}.log"

    def _read_seconds(self) -> dict[str, float]:
        try:
            return json.loads((self.logs / "seconds.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
