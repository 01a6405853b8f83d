"""Processes and devices: start-up, collectives, BatchNorm over the global batch, precision.

With one process every collective is the identity. So the same code runs on one process and on many, on CPUs (gloo) and
on GPUs (nccl).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from rrcm.utils.errors import RRCMError


@dataclass(frozen=True)
class DistEnv:
    """Rank of this process, number of processes, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """The device of this process: `cpu`, `cuda:N`, `cuda` (the GPU of the local rank) or `auto`.

    `auto` is `cuda` if the machine has a GPU, else `cpu`. Raises `RRCMError` for a GPU that does not exist.
    """
    gpus = torch.cuda.device_count()
    local_gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device({"auto": local_gpu if gpus else "cpu", "cuda": local_gpu}.get(name, name))
    if device.type == "cuda" and device.index >= gpus:
        raise RRCMError(f"device = {name!r}: this machine has {gpus} CUDA devices; use auto or cpu")
    return device


def set_threads(threads: int | None) -> None:
    """Compute with so many CPU threads per process; None: torch's default, as many as there are cores.

    The number of threads decides how sums are split, and with it their rounding.
    """
    if threads is not None:
        torch.set_num_threads(threads)


@contextmanager
def init_distributed(device: str) -> Iterator[DistEnv]:
    """Join torchrun's process group, described by its environment variables; without torchrun run alone."""
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield DistEnv(0, 1, chosen)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield DistEnv(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes in the group; 1 without one."""
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
        return (x - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


def native_precision(device: torch.device) -> str:
    """The fast precision of a device: bf16 where it has instructions for it; else fp16 on a GPU, fp32 on a CPU.

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
