"""What every training has around its loss: mixed precision, the optimiser's step, metrics, checkpoints, and the ways to
end before its time. Which loss, and of what, is up to pretrain.py and finetune.py."""

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rrcm.data.loader import Batch
from rrcm.utils.distributed import (
    DistEnv,
    all_gather_cat,
    all_reduce_any,
    all_reduce_min,
    all_reduce_sum,
    autocast,
    barrier,
    resolve_precision,
)
from rrcm.utils.errors import Interrupted, RRCMError, one_line
from rrcm.utils.files import write_csv
from rrcm.utils.progress import Progress
from rrcm.utils.resume import Run, pack_state, unpack_state


class Trainer:
    """A training from its last checkpoint on.

    A run that is killed at any instant continues from there and ends with the same bytes; SIGTERM makes it save after
    the step it is at and raise `Interrupted`. `history` (rows) and `notes`, both JSON-able, survive like the tensors do.

        trainer = Trainer(run, process, ...)
        trainer.resume()
        for step, batch in trainer.steps(loader.batch_loader(..., first_step=trainer.done)):
            with trainer.autocast():
                loss = ...
            trainer.descend(loss, rate)
            trainer.count(loss)
    """

    def __init__(
        self,
        run: Run,
        env: DistEnv,
        *,
        label: str,
        steps: int,  # of the whole training
        modules: Mapping[str, nn.Module],  # whose state a checkpoint holds
        optimizer: torch.optim.Optimizer,  # each group has a `factor` on the learning rate
        precision: str,
        metrics: Sequence[str],  # names of what `count` is given
        checkpoint_every: int,  # steps
        suspects: Callable[[int], str],  # the images of a step in words, for the message when its loss breaks
    ):
        self.run, self.env, self.label, self.total = run, env, label, steps
        self.modules, self.optimizer = modules, optimizer
        self.precision = resolve_precision(env.device, precision)
        self.metrics, self.checkpoint_every, self.suspects = metrics, checkpoint_every, suspects
        self.scaler = torch.amp.GradScaler(env.device.type, enabled=self.precision == "fp16")
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sums = torch.zeros(len(metrics), dtype=torch.float64, device=env.device)  # of this process
        self.broken_at = torch.tensor(math.inf, device=env.device)  # first step that was not finite
        self.done = 0
        self.history: list[dict] = []
        self.notes: dict = {}
        self.before, self.start = 0.0, time.monotonic()
        if env.is_main:
            run.lock()

    def resume(self) -> bool:
        """Take up the newest good checkpoint; False: there is none."""
        if (state := self.run.load()) is None:
            return False
        self.done, tensors, notes = state
        unpack_state(tensors, self.modules, self.optimizer)
        if notes["scaler"]:  # else this device computes in fp16 and the one before did not
            self.scaler.load_state_dict(notes["scaler"])
        self.history, self.notes, self.before = notes["history"], notes["notes"], notes["seconds"]
        sums, rank = tensors["sums"], self.env.rank  # a row a process
        if len(sums) == self.env.world_size:
            self.sums.copy_(sums[rank])
        elif rank == 0:
            self.sums.copy_(sums.sum(0))
        return True

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the processes."""
        if self.env.world_size == 1:
            return module
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name, unknown to older torch
            return DistributedDataParallel(module, broadcast_buffers=False)

    def autocast(self) -> torch.autocast:
        """The context of forward passes."""
        return autocast(self.env.device, self.precision)

    def steps(self, batches: Generator[Batch]) -> Iterator[tuple[int, Batch]]:
        """Number the batches, show progress, and after each step save where that is due."""
        progress = Progress(self.total, self.label, "steps", done=self.done, quiet=not self.env.is_main)
        if self.env.is_main:
            self.live = LiveMetrics(self.label, self.history)
        with progress as self.progress, catch_sigterm() as told, closing(batches):
            for batch in batches:
                yield self.done, batch
                self.done += 1
                progress.update(1)
                if self.done == self.total:
                    return
                stopping = all_reduce_any(bool(told))
                if stopping or self.done % self.checkpoint_every == 0:
                    self.save()
                if stopping:
                    raise Interrupted(f"{self.label}: stopped after step {self.done} as told; run it again to go on")

    def descend(self, loss: torch.Tensor, rate: float, grad_clip_norm: float = math.inf) -> torch.Tensor:
        """One step of the optimiser down the gradient of the scalar `loss`. Returns the gradient's norm, unclipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, grad_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        suspect = loss.detach() if self.scaler.is_enabled() else loss.detach() + norm  # a scaler forgives gradients
        self.broken_at = torch.where(suspect.isfinite(), self.broken_at, self.broken_at.clamp(max=self.done))
        return norm

    def count(self, *values: torch.Tensor) -> None:
        """Add to the metrics, scalars of this process; nothing waits for the device."""
        self.sums += torch.stack(values).detach().double()

    def averages(self, steps: int) -> dict[str, float]:
        """Means of the metrics over all processes and the last `steps` steps, which begin anew."""
        self.check()
        means = (all_reduce_sum(self.sums) / (self.env.world_size * steps)).tolist()
        self.sums.zero_()
        return dict(zip(self.metrics, means, strict=True))

    def check(self) -> None:
        """Raises `RRCMError` if the loss or its gradient has been NaN or infinite on any process."""
        if (step := float(all_reduce_min(self.broken_at))) < math.inf:
            raise RRCMError(
                f"{self.label}: the loss or its gradient is not finite at step {step:.0f}, "
                f"{self.suspects(int(step))}; lower the learning rate or use fp32. {self.run.last_good()}"
            )

    def log(self, row: Mapping[str, float | None], **shown: str) -> None:
        """Add a row to the history and to the live metrics; `shown` are texts for the progress line."""
        self.history.append(dict(row))
        self.progress.update(0, **shown)
        if self.env.is_main:
            self.live(row)

    def save(self) -> None:
        """Write a checkpoint of a sound state."""
        self.check()
        sums = all_gather_cat(self.sums[None])[0]
        if self.env.is_main:
            notes = {"scaler": self.scaler.state_dict(), "history": self.history, "notes": self.notes}
            tensors = pack_state(self.modules, self.optimizer) | {"sums": sums}
            self.run.save(self.done, tensors, notes | {"seconds": self.seconds})
            if self.history:
                write_csv(self.run.folder / "history.csv", self.history)
        barrier()

    @property
    def seconds(self) -> float:
        """That the training has taken so far, in all its processes one after the other."""
        return self.before + time.monotonic() - self.start


class LiveMetrics:
    """DVC's live metrics below dvclive/, for `dvc plots`, its editor extensions and Studio; no output of a stage.

    They are begun anew from the history, since a killed process may leave half a file of them. Whatever is wrong with
    them is said once, and the training goes on without.
    """

    def __init__(self, label: str, history: Sequence[Mapping[str, float | None]]):
        self.live = None
        try:
            from dvclive import Live  # here: only the first process needs it

            folder = Path("dvclive") / label.replace(" ", "-")
            self.live = Live(str(folder), report=None, save_dvc_exp=False, dvcyaml=None)
        except Exception as error:  # DVC's, git's and the file system's own
            self._give_up(error)
        for row in history:
            self(row)

    def __call__(self, row: Mapping[str, float | None]) -> None:
        """Add a row of the history; its first entry says where in the training it is."""
        if self.live is None:
            return
        (_, step), *metrics = row.items()
        try:
            self.live.step = step
            for name, value in metrics:
                if value is not None:
                    self.live.log_metric(name, value)
            self.live.make_summary()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"no live metrics in dvclive/: {one_line(error)}", file=sys.stderr)
        self.live = None


@contextmanager
def catch_sigterm() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes: clusters send it before they take a machine away."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # there Python takes no signals
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
