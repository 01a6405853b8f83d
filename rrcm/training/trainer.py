"""The training loop that all trainings share: mixed precision, optimizer step, metrics, checkpoints, early exit,
outputs. The caller computes the loss."""

import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rrcm.objectives.base import Batch
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
from rrcm.utils.files import atomic_directory, claimed, write_csv, write_json
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment
from rrcm.utils.resume import RunState, pack_state, unpack_state


@dataclass(eq=False)
class Trainer:
    """Runs a training, from its last checkpoint if there is one.

    A run that is killed at any moment continues from its checkpoint and ends with the same bytes. After SIGTERM it
    saves at the end of the current step and raises `Interrupted`. Checkpoints include `history` (rows) and
    `extra_state`, both JSON-able.

        trainer = Trainer(run_state, env, ...)
        trainer.resume()
        for step, batch in trainer.steps(batch_loader(..., steps=range(trainer.step, total))):
            with trainer.autocast():
                loss = ...
            trainer.optimizer_step(loss, lr)
            trainer.accumulate_metrics(loss)
        trainer.publish(...)
    """

    run_state: RunState
    env: DistEnv
    _: KW_ONLY
    label: str
    total_steps: int
    modules: Mapping[str, nn.Module]  # saved in checkpoints
    optimizer: torch.optim.Optimizer  # each parameter group has an `lr_scale`
    precision: str
    metrics: Sequence[str]  # names of the values given to `accumulate_metrics`
    checkpoint_every: int  # steps
    describe_step: Callable[[int], str]  # names a step's images in the message about a non-finite loss
    extra_state: dict = field(default_factory=dict)
    step: int = field(default=0, init=False)  # steps done
    history: list[dict] = field(default_factory=list, init=False)

    def __post_init__(self):
        device = self.env.device
        self.precision = resolve_precision(device, self.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.sums = torch.zeros(len(self.metrics), dtype=torch.float64, device=device)  # of this process
        self.first_nonfinite_step = torch.tensor(math.inf, device=device)
        self.previous_seconds, self.start = 0.0, time.monotonic()
        if self.env.is_main:
            self.run_state.lock()

    def resume(self) -> bool:
        """Load the newest undamaged checkpoint. False if there is none."""
        if (state := self.run_state.load()) is None:
            return False
        self.step, tensors, metadata = state
        unpack_state(tensors, self.modules, self.optimizer)
        if metadata["scaler"]:  # empty if the run was saved on a device that does not compute in fp16
            self.scaler.load_state_dict(metadata["scaler"])
        self.history, self.extra_state = metadata["history"], metadata["extra_state"]
        self.previous_seconds = metadata["seconds"]
        sums, rank = tensors["sums"], self.env.rank  # one row per process
        if len(sums) == self.env.world_size:
            self.sums.copy_(sums[rank])
        elif rank == 0:
            self.sums.copy_(sums.sum(0))
        return True

    def wrap_ddp(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the processes."""
        if self.env.world_size == 1:
            return module
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # renamed option, unknown to older torch
            return DistributedDataParallel(module, broadcast_buffers=False)

    def autocast(self) -> torch.autocast:
        """The context for forward passes."""
        return autocast(self.env.device, self.precision)

    def steps(self, batches: Generator[Batch]) -> Iterator[tuple[int, Batch]]:
        """Number the batches, show progress, and save checkpoints."""
        progress = Progress(self.total_steps, self.label, "steps", done=self.step, quiet=not self.env.is_main)
        if self.env.is_main:
            self.live = LiveMetrics(self.label, self.history)
        with progress as self.progress, catch_sigterm() as received, closing(batches):
            for batch in batches:
                yield self.step, batch
                self.step += 1
                progress.update(1)
                if self.step == self.total_steps:
                    return
                stopping = all_reduce_any(bool(received))
                if stopping or self.step % self.checkpoint_every == 0:
                    self.save()
                if stopping:
                    raise Interrupted(f"{self.label}: received SIGTERM, saved after step {self.step}; rerun to resume")

    def optimizer_step(self, loss: torch.Tensor, lr: float, max_norm: float = math.inf) -> torch.Tensor:
        """One optimizer step on the scalar `loss`. Returns the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # with fp16 an overflowing gradient is expected: the scaler skips that step
        suspect = loss.detach() if self.scaler.is_enabled() else loss.detach() + norm
        self.first_nonfinite_step = torch.where(
            suspect.isfinite(), self.first_nonfinite_step, self.first_nonfinite_step.clamp(max=self.step)
        )
        return norm

    def accumulate_metrics(self, *values: torch.Tensor) -> None:
        """Add this process's scalars to the metrics. Does not wait for the device."""
        self.sums += torch.stack(values).detach().double()

    def mean_metrics(self, steps: int) -> dict[str, float]:
        """The means of the metrics over all processes and the last `steps` steps. Resets the sums."""
        self.check_finite()
        means = (all_reduce_sum(self.sums) / (self.env.world_size * steps)).tolist()
        self.sums.zero_()
        return dict(zip(self.metrics, means, strict=True))

    def check_finite(self) -> None:
        """Raises `RRCMError` if the loss or its gradient has been NaN or infinite in any process."""
        if (step := float(all_reduce_min(self.first_nonfinite_step))) < math.inf:
            raise RRCMError(
                f"{self.label}: the loss or its gradient is not finite at step {step:.0f}, "
                f"{self.describe_step(int(step))}; lower the learning rate or use fp32. {self.run_state.last_good()}"
            )

    def log(self, row: Mapping[str, float | None], **shown: str) -> None:
        """Add a row to the history and to the live metrics. `shown` goes into the progress line."""
        self.history.append(dict(row))
        self.progress.update(0, **shown)
        if self.env.is_main:
            self.live(row)

    def save(self) -> None:
        """Write a checkpoint, if all losses have been finite."""
        self.check_finite()
        sums = all_gather_cat(self.sums[None])[0]
        if self.env.is_main:
            metadata = {"scaler": self.scaler.state_dict(), "history": self.history, "extra_state": self.extra_state}
            tensors = pack_state(self.modules, self.optimizer) | {"sums": sums}
            self.run_state.save(self.step, tensors, metadata | {"seconds": self.seconds})
            if self.history:
                write_csv(self.run_state.folder / "history.csv", self.history)
        barrier()

    def publish(
        self, output: Path, timing: Path, save_model: Callable[[Path], None], images: int, **measured: object
    ) -> None:
        """Write the outputs and delete the resume state. `images` is the number of images seen in all steps.

        The folder `output` gets history.csv and whatever `save_model` writes. It is moved into place once complete.
        `timing` (JSON) gets the seconds, the environment and `measured`, which holds numbers that vary between runs.
        """
        if self.env.is_main:
            record = {"seconds": self.seconds, "images_per_second": images / self.seconds}
            record |= {
                "processes": self.env.world_size,
                **measured,
                "environment": describe_environment(self.env.device),
            }
            with claimed(output, timing, wait=True):  # another run of this stage must not write in between
                with atomic_directory(output) as folder:
                    write_csv(folder / "history.csv", self.history)
                    save_model(folder)  # last, because it hashes the files in the folder
                write_json(timing, record)
            self.run_state.finish()
        barrier()

    @property
    def seconds(self) -> float:
        """The duration of the training so far, without the time between a kill and the next start."""
        return self.previous_seconds + time.monotonic() - self.start


class LiveMetrics:
    """DVCLive metrics in dvclive/, for `dvc plots`, DVC's editor extensions and Studio. They are no output of a stage.

    They are rewritten from the history at the start, since a killed process may leave a half-written file. After an
    error, which is printed once, the training continues without live metrics.
    """

    def __init__(self, label: str, history: Sequence[Mapping[str, float | None]]):
        self.live = None
        try:
            from dvclive import Live  # here: only the first process needs it

            folder = Path("dvclive") / label.replace(" ", "-")
            self.live = Live(str(folder), report=None, save_dvc_exp=False, dvcyaml=None)
        except Exception as error:  # errors of DVC, git and the file system
            self._give_up(error)
        for row in history:
            self(row)

    def __call__(self, row: Mapping[str, float | None]) -> None:
        """Add a row of the history. Its first entry is the step or epoch."""
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
    """A list that stays empty until SIGTERM arrives, which clusters send before they reclaim a machine."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
