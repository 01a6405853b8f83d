"""The loop behind every command that votes on many images: certification, folders of images, and soft labels.

It shares the images among processes, appends their counts to journals, and reports progress. The votes for an image
depend on no other image (smoothing.py), so any number of processes, in any order, killed and restarted, ends with the
same states.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from rrcm.certification.journal import append_states, open_journal, restore_states
from rrcm.utils.distributed import WorkQueue
from rrcm.utils.progress import Progress
from rrcm.utils.resume import RunState


class State(Protocol):
    """What the driver needs to know of an image. A state is a dataclass with JSON-able fields, except for `image`.

    One state may count the votes of several sigmas, as long as `samples` grows with each count.
    """

    samples: int  # drawn so far, of all purposes
    stop_reason: str  # "" until the image is finished


class Stream(Protocol):
    """Draws samples until every state of an iterator is finished, as `SmoothedClassifier.certify_stream` does.

    At most `at_once` images are in progress (None: as many as fill some batches). After each round it yields the states
    that changed.
    """

    def __call__(self, states: Iterator[State], *, at_once: int | None) -> Iterator[list[State]]: ...


def finish_states(
    states: Sequence[State],
    stream: Stream,
    run: RunState,
    is_possible: Callable[[dict], bool],
    queue: WorkQueue,
    label: str,
) -> None:
    """Finish all states, by this process and the others that share `queue`; continue from the journals of `run`.

    The first process returns when every state is finished, and has them all. Any other process returns when nothing is
    left to do. `is_possible` is as for `restore_states`; `label` names the work in the progress report. Raises
    KeyboardInterrupt with a text that says how many images are finished, and `RRCMError` if another run of the same
    work holds the journals.
    """
    if queue.rank == 0:
        run.lock()
    queue.start()
    restore_states(states, run.folder, is_possible)
    done, samples_before = sum(map(_is_finished, states)), sum(state.samples for state in states)
    if samples_before and queue.rank == 0:
        print(f"resuming: {done:,} of {len(states):,} images are finished", file=sys.stderr)
    with (
        Progress(len(states), label, "images", done=done, quiet=queue.rank > 0) as progress,
        open_journal(run.folder, queue.rank) as journal,
    ):
        try:
            for changed in stream(_share(states, queue), at_once=_at_once(len(states), queue)):
                append_states(journal, changed)
                finished = done + queue.report_done(sum(map(_is_finished, changed)))
                drawn = sum(state.samples for state in states) - samples_before
                rate = drawn / (time.monotonic() - progress.start)
                progress.update(finished - progress.done, samples=f"{rate:,.0f}/s")
        except KeyboardInterrupt:
            text = f": {progress.done} of {len(states)} images are finished; the same command continues from there"
            raise KeyboardInterrupt(text) from None
        journal.close()  # before reporting: on a network file system the others see a file's content when it is closed
        for _ in queue.close():
            progress.update(done + queue.report_done() - progress.done)
        progress.update(done + queue.report_done() - progress.done)
    if queue.rank == 0 and queue.world_size > 1:
        restore_states(states, run.folder, is_possible)  # from the journals of the other processes


def _is_finished(state: State) -> bool:
    return state.stop_reason != ""


def _share(states: Sequence[State], queue: WorkQueue) -> Iterator[State]:
    """The unfinished states that fall to this process: it takes the next one whenever it has room for more samples."""
    while (position := queue.next_index()) < len(states):
        if not _is_finished(states[position]):
            yield states[position]


def _at_once(images: int, queue: WorkQueue) -> int | None:
    """How many images this process has in progress at most, so that the last ones are spread over all processes."""
    return None if queue.world_size == 1 else max(8, images // (4 * queue.world_size))
