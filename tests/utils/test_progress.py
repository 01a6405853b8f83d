"""The progress display."""

import io
import sys

import pytest

from rrcm.utils.progress import Progress


def test_metrics_stay_until_they_are_replaced(capsys):
    """Training reports losses at intervals and progress at every step."""
    with Progress(5, "work", "steps", interval=0.0) as progress:
        progress.update()
        progress.update(0, loss="2.50", N="21")
        progress.update()
        progress.update(0, loss="1.25")
        progress.update(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[2] for line in lines] == [
        "",
        "loss 2.50  N 21",
        "loss 2.50  N 21",
        "loss 1.25  N 21",
        "loss 1.25  N 21",
        "loss 1.25  N 21",
    ]
    assert lines[0].startswith("work: 1/5 steps, ") and " s left" in lines[0]
    assert lines[-1].startswith("work: 5/5 steps, ") and ", took " in lines[-1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", [{}, {"loss": "2.50"}])
def test_a_terminal_shows_the_metrics_on_their_own_line(monkeypatch, shown):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(2, "work", "steps") as progress:
        progress.update(1, **shown)
        progress.update(1)
    assert "2/2" in terminal.getvalue()
    assert ("loss 2.50" in terminal.getvalue()) == bool(shown)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(2, "work", "steps") as progress:
        progress.update(2, loss="2.50")
    (line,) = terminal.getvalue().splitlines()
    assert line.startswith("work: 2/2 steps, ") and "\r" not in line and "\x1b" not in line


@pytest.mark.parametrize(("interval", "lines"), [(0.0, 2), (3600.0, 0)])
def test_short_work_can_be_silent(capsys, interval, lines):
    with Progress(2, "work", "steps", interval=interval, only_if_long=True) as progress:
        progress.update()
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_other_processes_are_quiet(capsys):
    with Progress(2, "work", "steps", interval=0.0, quiet=True) as progress:
        progress.update(2, loss="1")
    assert capsys.readouterr().err == ""
