"""The journal of a certification: each image's counts after each round, so that a killed run continues from there."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rrcm.certification.smoothing import ImageState
from rrcm.utils.files import writing


@contextmanager
def open_journal(folder: Path, rank: int = 0) -> Iterator[TextIO]:
    """Open the journal of one process in `folder`, to append to it."""
    path = folder / f"journal-{rank}.txt"
    with writing(path, "run it again to continue"), path.open("a", encoding="utf-8") as journal:
        journal.write("\n")  # ends the half line that a killed process may have left
        yield journal


def append_states(journal: TextIO, states: Iterable[ImageState]) -> None:
    """Write one line per image: checksum and state. It is on the disk when this returns."""
    for state in states:
        text = json.dumps({name: value for name, value in vars(state).items() if name != "image"})
        journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
    journal.flush()
    os.fsync(journal.fileno())


def restore_states(states: Iterable[ImageState], folder: Path) -> None:
    """Put each image into the most advanced state that the journals in `folder` have of it.

    Incomplete and damaged lines are ignored; their samples are drawn again.
    """
    by_index = {state.index: state for state in states}
    for path in sorted(folder.glob("journal-*.txt")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            checksum, _, text = line.partition(" ")
            if checksum != f"{zlib.crc32(text.encode()):08x}":
                continue
            saved = json.loads(text)
            state = by_index[saved["index"]]
            if saved["samples"] > state.samples:
                vars(state).update(saved)
