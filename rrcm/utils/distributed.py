"""The edges to processes and devices: start-up, collectives with exact gradients, BatchNorm over the global batch.

Every function is the identity (and every module its single-process self) when only one process runs, so there is
one code path for one process and for many, on CPU (gloo) and on CUDA (nccl).
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
    """This process among `world_size` of them, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """`auto` is this process's GPU if there is one, else the CPU. Raises `RRCMError` for a GPU that is not there."""
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
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
    """Join the process group that torchrun announces in the environment, or run alone."""
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
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def all_gather_cat(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows of all processes in rank order, without gradient, and the index of this process's first row.

    x (B, ...) of the same B everywhere -> ((world * B, ...), rank * B).
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
    """Whether `flag` is set in any process. On the CPU: no device is waited for."""
    return bool(all_reduce_min(torch.tensor(int(not flag))) == 0)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(grad)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the batch of all processes together, on any device (torch's SyncBatchNorm refuses the CPU).

    Input (B, C) with the same B on every process. Parameters and buffers are named as in `nn.BatchNorm1d`.
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
    """bf16 where the device has instructions for it, fp16 on a GPU that has not, fp32 on a CPU that has not: that would
    compute in bfloat16 many times as slowly as in float32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def resolve_precision(device: torch.device, precision: str) -> str:
    """What a training computes in: `auto` is what `native_precision` says, and bf16 is fp16 on a GPU that lacks it."""
    if precision == "auto" or (precision == "bf16" and device.type == "cuda"):
        return native_precision(device)
    return precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision: `fp32` (off), `bf16` or `fp16`.

    Without autocast's cache of cast weights: before torch 2.11 those that a pass without gradient puts there give the
    passes after it none either.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32", cache_enabled=False)
