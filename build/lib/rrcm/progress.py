"""Progress of long work: a live bar on a terminal, plain lines with rate and time left in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Count `total` units of work. Use as a context manager and call `update`.

    On a terminal this is a tqdm bar; elsewhere (a log file, CI) it prints one plain line every `interval` seconds.
    `done` is where resumed work starts; the rate counts only what this process did.
    """

    def __init__(
        self, total: int, label: str, unit: str, *, done: int = 0, interval: float = 10.0, quiet: bool = False
    ):
        self.total, self.label, self.unit, self.interval = total, label, unit, interval
        self.done = self.start_done = done
        self.quiet = quiet
        self.start = self.last_print = time.monotonic()
        live = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True) if live else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif not self.quiet and kind is None:
            self._print(time.monotonic(), "")

    def update(self, count: int = 1, **metrics: str) -> None:
        """Add `count` finished units; `metrics` are short texts shown beside them."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix(metrics, refresh=False)
            self.bar.update(count)
        elif not self.quiet and time.monotonic() - self.last_print >= self.interval:
            self._print(time.monotonic(), "  ".join(f"{name} {value}" for name, value in metrics.items()))

    def _print(self, now: float, metrics: str) -> None:
        self.last_print = now
        elapsed = now - self.start
        rate = (self.done - self.start_done) / max(elapsed, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        time_left = f", {left:.0f} s left" if self.done < self.total else f", took {elapsed:.1f} s"
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s{time_left}  {metrics}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
