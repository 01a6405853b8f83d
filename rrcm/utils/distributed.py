"""Processes and devices: start-up, collectives, shared work, BatchNorm over the global batch, precision.

With one process every collective is the identity. The same code therefore runs in one process and in many, on CPUs
(gloo) and on GPUs (nccl).
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.provenance import available_cores

_connections = itertools.count()  # every process connects equally often, so all count the same


@dataclass(frozen=True)
class DistEnv:
    """The rank of this process, the number of processes, the device it uses, and the store that all processes share."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store = field(default_factory=dist.HashStore, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """The device of this process: `cpu`, `cuda:N`, `cuda` (the GPU of the local rank) or `auto`.

    `auto` is `cuda` if the machine has a GPU, otherwise `cpu`. Raises `RRCMError` for a GPU that does not exist.
    """
    gpus = torch.cuda.device_count()
    local_gpu = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    device = torch.device({"auto": local_gpu if gpus else "cpu", "cuda": local_gpu}.get(name, name))
    if device.type == "cuda" and device.index >= gpus:
        if gpus and str(device) == local_gpu:
            raise RRCMError(
                f"device = {name!r}: process {device.index + 1} of this machine finds {gpus} CUDA devices; "
                f"start at most {gpus} processes here, or show it more in CUDA_VISIBLE_DEVICES"
            )
        raise RRCMError(f"device = {name!r}: this machine has {gpus} CUDA devices; use auto or cpu")
    return device


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of this process. None keeps torch's default, one thread per core.

    torch does not see a container's quota of CPU time, so here the quota limits the number of cores. The number of
    threads decides how sums are split, and therefore how they are rounded.
    """
    if threads is None and not os.environ.get("OMP_NUM_THREADS") and available_cores() < torch.get_num_threads():
        threads = available_cores()
    if threads is not None:
        torch.set_num_threads(threads)


def process_count() -> int:
    """The number of processes that torchrun started (WORLD_SIZE), or 1 without torchrun.

    Raises `RRCMError` if WORLD_SIZE is not a positive number.
    """
    text = os.environ.get("WORLD_SIZE") or "1"
    if not (text.isdecimal() and int(text)):
        raise RRCMError(f"WORLD_SIZE is {text!r}, but must be a number of processes; start them with torchrun")
    return int(text)


def connect(device: str) -> DistEnv:
    """Connect to the processes that torchrun started, on one node or several. They share a store, but no group yet."""
    chosen, count = pick_device(device), process_count()
    if count == 1:
        return DistEnv(0, 1, chosen)
    try:
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
        store, rank = _rendezvous(*(os.environ.get(name) for name in names))
    except ValueError as error:
        raise RRCMError(f"WORLD_SIZE is {count}, but {one_line(error)}; start the processes with torchrun") from None
    return DistEnv(rank, count, chosen, dist.PrefixStore(f"connection {next(_connections)}", store))


@cache
def _rendezvous(*environment: str | None) -> tuple[dist.Store, int]:
    """The store of the processes that `environment` describes, and the rank of this process.

    One store serves all connections of a process, because a second one on the same port might still reach the first.
    """
    store, rank, _ = next(dist.rendezvous("env://"))
    return store, rank


@contextmanager
def explain_lost_processes() -> Iterator[None]:
    """Turn torch's errors about a lost process into one line. The lost process itself has printed why it ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RRCMError(f"another process of this run has ended; its message says why ({one_line(error)})") from None


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line that ends with `advice`, which says what to set."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RRCMError(f"the GPU has too little free memory ({one_line(error)}); {advice}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # torch's own error on a CPU
            raise RRCMError(f"there is too little free memory ({one_line(error)}); {advice}") from error
        raise


@contextmanager
def init_distributed(device: str) -> Iterator[DistEnv]:
    """Join the process group that torchrun's environment variables describe. Without torchrun, run alone."""
    with explain_lost_processes():
        env = connect(device)
        if env.device.type == "cuda":
            torch.cuda.set_device(env.device)
        if env.world_size == 1:
            yield env
            return
        if device not in ("auto", "cuda", "cpu"):
            raise RRCMError(f"device = {device!r}: one GPU for {env.world_size} processes; use cuda, a GPU for each")
        backend = "cpu:gloo,cuda:nccl" if env.device.type == "cuda" else "gloo"
        store = dist.PrefixStore("group", env.store)
        dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size)
        try:
            yield env
        finally:
            dist.destroy_process_group()


class WorkQueue:
    """Numbered pieces of work that the processes of a run share. A process that has finished one takes the next.

    Waits have no timeout: if a process dies, torchrun ends the others. `name` is unique within a run. Several threads
    may call the methods.
    """

    def __init__(self, env: DistEnv, name: str) -> None:
        self.rank, self.world_size = env.rank, env.world_size
        self._store = dist.PrefixStore(f"queue {name}", env.store)

    def next_index(self) -> int:
        """The number of the next piece. No two processes get the same number."""
        return self._store.add("taken", 1) - 1

    def report_done(self, count: int = 0) -> int:
        """Report that this process has finished `count` more pieces. Returns the total over all processes."""
        return self._store.add("finished", count)

    def report_problem(self, index: int, text: str) -> None:
        """Tell all processes what is wrong with a piece. Call it before reporting the piece as done."""
        self._store.set(f"problem {self._store.add('problems', 1)}", json.dumps([index, text]))

    def problems(self) -> list[str]:
        """All reported problems, in the order of the pieces."""
        count = self._store.add("problems", 0)
        return [text for _, text in sorted(json.loads(self._store.get(f"problem {i + 1}")) for i in range(count))]

    def start(self) -> None:
        """The first process lets the others begin; each of the others waits for it."""
        if self.rank == 0:
            self._store.set("started", "")
        for _ in _poll(lambda: self._store.check(["started"])):
            pass

    def wait_for(self, total: int) -> Iterator[None]:
        """Yield repeatedly until all processes together have finished `total` pieces."""
        return _poll(lambda: self.report_done() >= total)

    def close(self) -> Iterator[None]:
        """Report that this process no longer needs the queue. The first process yields until all others have done so.

        The first process may host the store, so it must not end before the others.
        """
        self._store.set(f"ended {self.rank}", "")
        if self.rank == 0:
            yield from _poll(lambda: self._store.check([f"ended {rank}" for rank in range(self.world_size)]))


def from_main(env: DistEnv, name: str, compute: Callable[[], object]) -> object:
    """Call `compute` in the first process, and return its result, a JSON value, in every process.

    The other processes wait for it. `name` is unique within a run.
    """
    key = f"value {name}"
    if env.is_main:
        env.store.set(key, json.dumps(compute()))
    for _ in _poll(lambda: env.store.check([key])):
        pass
    return json.loads(env.store.get(key))


def _poll(condition: Callable[[], bool]) -> Iterator[None]:
    """Yield until the condition holds, at first every few milliseconds and later once a second."""
    pause = 0.002
    while not condition():
        yield
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def world_size() -> int:
    """The number of processes in the group, or 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_gather_cat(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Concatenate x of all processes in rank order, without gradient.

    x (B, ...), with the same B on every process. Returns the rows (world_size * B, ...) and the index of this process's
    first row.
    """
    if world_size() == 1:
        return x, 0
    gathered = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(gathered, x.contiguous())
    return torch.cat(gathered), dist.get_rank() * len(x)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over processes, without gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_min(x: torch.Tensor) -> torch.Tensor:
    """Minimum over processes, without gradient."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def all_reduce_any(flag: bool) -> bool:
    """Whether `flag` is set on any process. Computed on the CPU, so it does not wait for a GPU."""
    return bool(all_reduce_min(torch.tensor(int(not flag))) == 0)


class _AllSum(torch.autograd.Function):
    """`all_reduce_sum` with its exact gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(grad)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the global batch, on any device; torch's SyncBatchNorm does not run on a CPU.

    Input (B, C), with the same B on every process. Parameters and buffers are named as in `nn.BatchNorm1d`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        x = x.float()
        count = len(x) * world_size()
        mean = _AllSum.apply(x.sum(0)) / count
        variance = _AllSum.apply((x - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        normalized = (x - mean) * torch.rsqrt(variance + self.eps)
        return normalized * self.weight + self.bias if self.affine else normalized


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`SyncBatchNorm1d` for images (B, C, H, W). A single process uses torch's own kernels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        rows = x.movedim(1, -1)  # every pixel is a row
        return SyncBatchNorm1d.forward(self, rows.flatten(0, 2)).view(rows.shape).movedim(-1, 1)


def sync_batch_norm(network: nn.Module) -> nn.Module:
    """Replace each `BatchNorm2d` of `network` by one over the global batch. Weights keep their values and names.

    Raises `RRCMError` if several processes train and the network has another kind of BatchNorm.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                synced = SyncBatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
                synced.load_state_dict(child.state_dict())
                setattr(module, name, synced)
            elif isinstance(child, nn.modules.batchnorm._BatchNorm) and world_size() > 1:
                raise RRCMError(f"{type(child).__name__}: several processes cannot share it; train with one process")
    return network


def native_precision(device: torch.device) -> str:
    """The fastest precision of a device: bf16 if it has instructions for it, otherwise fp16 on a GPU and fp32 on a CPU.

    Without such instructions a CPU computes in bfloat16 many times more slowly than in float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
    return "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def resolve_precision(device: torch.device, precision: str) -> str:
    """The precision to train in: `auto` becomes the native one, and so does bf16 on a GPU."""
    if precision == "auto" or (precision == "bf16" and device.type == "cuda"):
        return native_precision(device)
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a precision: `fp32` (off), `bf16` or `fp16`.

    Autocast's weight cache is off: before torch 2.11, weights cached under no_grad are reused without gradient in later
    passes.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32", cache_enabled=False)
