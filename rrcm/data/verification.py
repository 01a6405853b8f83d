"""Check the shards of a data set against its manifest. All processes of a run share the work."""

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event

import torch

from rrcm.data.shards import ShardedDataset
from rrcm.utils.distributed import DistEnv, WorkQueue
from rrcm.utils.errors import RRCMError
from rrcm.utils.progress import Progress

THREADS = 8  # per process


def verify_shards(splits: Sequence[ShardedDataset], env: DistEnv | None = None) -> None:
    """Check the size and hash of every local shard of these splits.

    Call this once in each process of the run `env`; without `env` this process works alone. One process checks each
    shard. If shards are missing or damaged, every process raises an `RRCMError` that names the first one and counts the
    others.
    """
    shards = [(images, shard) for images in splits if not images.remote for shard in images.split.shards]
    env = env or DistEnv(0, 1, torch.device("cpu"))
    queue, stopped = WorkQueue(env, "shards"), Event()

    def check_share() -> None:
        while not stopped.is_set() and (index := queue.next_index()) < len(shards):
            images, shard = shards[index]
            if complaint := images.complaint(shard):
                queue.report_problem(index, complaint)
            queue.report_done(1)

    label = f"verify {splits[0].root}"
    with (
        Progress(len(shards), label, "shards", quiet=not env.is_main, only_if_long=True) as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        try:
            running = {pool.submit(check_share) for _ in range(THREADS)}
            while running:
                ended, running = wait(running, timeout=1, return_when=FIRST_EXCEPTION)
                for thread in ended:
                    thread.result()  # raises the exception of the thread
                progress.update(queue.report_done() - progress.done)
            for _ in queue.wait_for(len(shards)):
                progress.update(queue.report_done() - progress.done)
            progress.update(len(shards) - progress.done)
        finally:
            stopped.set()
    if problems := queue.problems():
        for _ in queue.close():  # the other processes have to read them too
            pass
        others = f" (and {len(problems) - 1} other shards)" if len(problems) > 1 else ""
        raise RRCMError(problems[0] + others)
