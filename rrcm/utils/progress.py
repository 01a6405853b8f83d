"""Progress of a long computation: a bar on a terminal, plain lines in a log."""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm


def can_redraw() -> bool:
    """Whether stderr is a terminal that can redraw lines in place. The terminal of an editor may be unable to."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Progress:
    """Count `total` units of work. Use it as a context manager and call `update`.

    On a terminal it shows a tqdm bar, with the metrics on the line below. Elsewhere (log file, CI) it prints a line
    with the rate and the time left every `interval` seconds. Resumed work starts at `done`, which does not count for
    the rate. With `quiet` nothing is printed, and with `only_if_long` nothing about work shorter than `interval`.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        *,
        done: int = 0,
        interval: float = 10.0,
        quiet: bool = False,
        only_if_long: bool = False,
    ):
        self.total, self.label, self.unit, self.interval = total, label, unit, interval
        self.done = self.start_done = done
        self.quiet, self.delay = quiet, interval if only_if_long else 0.0
        self.metrics: dict[str, str] = {}
        self.start = self.last_print = time.monotonic()
        live = can_redraw() and not quiet
        options = {"unit": f" {unit}", "dynamic_ncols": True, "delay": self.delay}
        self.bar = tqdm(total=total, initial=done, desc=label, **options) if live else None
        self.below: tqdm | None = None  # second line, for the metrics

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
            if self.below is not None:
                self.below.close()
        elif not self.quiet and kind is None and time.monotonic() - self.start >= self.delay:
            self._print(time.monotonic())

    def update(self, count: int = 1, **metrics: str) -> None:
        """Add `count` finished units. `metrics` are short texts, shown until they are replaced."""
        self.done += count
        self.metrics |= metrics
        if self.bar is not None:
            if metrics and self.below is None:
                self.below = tqdm(bar_format="{desc}", position=1, dynamic_ncols=True)
            if metrics:
                self.below.set_description_str(self._metrics_text)
            self.bar.update(count)
        elif not self.quiet and time.monotonic() - self.last_print >= self.interval:
            self._print(time.monotonic())

    @property
    def _metrics_text(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self.metrics.items())

    def _print(self, now: float) -> None:
        self.last_print = now
        elapsed = now - self.start
        rate = (self.done - self.start_done) / max(elapsed, 1e-9)
        if self.done >= self.total:
            pace = f"{rate:.3g}/s, took {elapsed:.1f} s"
        elif rate > 0:
            pace = f"{rate:.3g}/s, {(self.total - self.done) / rate:.0f} s left"
        else:
            pace = f"none finished after {elapsed:.0f} s"
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {pace}  {self._metrics_text}"
        print(line.rstrip(), file=sys.stderr, flush=True)
