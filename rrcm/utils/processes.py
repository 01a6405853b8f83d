"""Child processes that form a process group each, save their work on SIGTERM, and never outlive their parent."""

import contextlib
import ctypes
import os
import signal
import sys
from typing import BinaryIO

GRACE = 60  # seconds a command has to save its state after SIGTERM
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends, so that this process can wait for them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this process when its parent ends, even by SIGKILL."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def signal_group(group: int, signo: int) -> bool:
    """Send a signal to a process group. Returns whether the group still has a process. Signal 0 only asks."""
    try:
        os.killpg(group, signo)
    except ProcessLookupError:
        return False
    return True


def lead_group(log: BinaryIO, parent: int) -> None:
    """Turn a newly forked process into the leader of a process group that writes to `log` and ends with `parent`.

    On SIGTERM it passes the signal on to the command that it has started, and kills it after `GRACE` seconds.
    """
    os.setpgid(0, 0)  # Ctrl-C reaches the parent alone
    signal.signal(signal.SIGTERM, _stop_command)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    end_with_parent()
    if os.getppid() != parent:  # it ended before the request
        os._exit(128 + signal.SIGTERM)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)


def _stop_command(*_: object) -> None:
    """Handle SIGTERM: pass it on to the whole group, and kill the group if it takes longer than `GRACE` seconds.

    This process itself continues, because it may be recording the command's outputs. If it has not started the command
    yet, the handler tries again shortly.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which the command would inherit
    if _has_children():
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        os.killpg(0, signal.SIGTERM)
    else:
        signal.signal(signal.SIGALRM, _stop_command)
        signal.setitimer(signal.ITIMER_REAL, 0.1)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux: stages outlive a scheduler that was killed
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
