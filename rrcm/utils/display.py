"""Status lines of several computations that run at the same time, on stderr."""

import shutil
import sys
import time
from collections.abc import Callable

from rrcm.utils.progress import can_redraw

REDRAW_EVERY = 0.5  # seconds, on a terminal
PRINT_EVERY = 10.0  # seconds, in a log file


class Display:
    """Redraws the status lines in place on a terminal, and prints them every `PRINT_EVERY` seconds elsewhere."""

    def __init__(self) -> None:
        self.live = can_redraw()
        self.drawn = 0  # status lines on the terminal
        self.last = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(line, file=sys.stderr, flush=True)
        if self.live:
            self.last = 0.0  # redraw the status immediately

    def show(self, status: Callable[[], list[str]]) -> None:
        """Show the lines that `status` returns, if an update is due."""
        now = time.monotonic()
        if now - self.last < (REDRAW_EVERY if self.live else PRINT_EVERY):
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
        """Remove the status lines from the terminal."""
        if self.drawn:
            sys.stderr.write(f"\x1b[{self.drawn}A\x1b[J")
            self.drawn = 0
