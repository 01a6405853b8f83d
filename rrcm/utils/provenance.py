"""The environment that computed an output: code revision, hardware and versions, but no host names, users or paths."""

import math
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PACKAGES = ["rrcm", "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "matplotlib", "scikit-learn", "pillow"]
PACKAGES += ["safetensors", "webdataset", "dvc"]
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
VERSION = r"^\d[\w.+!-]*$"
Count = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="forbid")


class Git(_Record):
    """The revision of the code."""

    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None
    dirty: bool


class Hardware(_Record):
    """The machine."""

    cpu: str
    instructions: str | None = None
    cores: Count | None = None
    threads: Count | None = None
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    gpus: list[str] = []


class Software(_Record):
    """The versions of all software that may change a result."""

    os: str | None = None
    python: Annotated[str, Field(pattern=VERSION)]
    cuda: Annotated[str, Field(pattern=VERSION)] | None = None
    packages: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]+$")], Annotated[str, Field(pattern=VERSION)] | None] = {}


class Environment(_Record):
    """The record of `describe_environment`, as it is validated when it is read back."""

    git: Git | None
    hardware: Hardware
    software: Software


def describe_environment(device: object) -> dict:
    """A JSON-able record of the environment of this process.

    `device` is the torch device that is used, or its name; for CUDA the record lists the GPUs. `git` is None if this
    package is not in a git checkout. `dirty` is true if the package or the stages beside it differ from the revision.
    """
    import torch

    on_gpu = str(device).startswith("cuda")
    return {
        "git": _revision(Path(__file__).parent.parent),
        "hardware": {
            "cpu": _cpu_model(),
            "instructions": _instructions(torch.backends.cpu.get_cpu_capability()),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if on_gpu else [],
        },
        "software": {
            "os": platform.platform(),
            "python": platform.python_version(),
            "cuda": torch.version.cuda if on_gpu else None,
            "packages": {name: _version(name) for name in PACKAGES},
        },
    }


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores that this process may use: its CPU affinity, limited by the container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0))
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroup versions 2 and 1
        with suppress(OSError, ValueError):  # the files of the other version, or `max`, which means no quota
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in files).split())
            if quota > 0 and period > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores


def uncommitted(root: Path, *paths: str) -> list[str] | None:
    """The files at or below `paths` that are new or differ from the commit of the checkout; None without git."""
    status = _git(root, "status", "--porcelain", "--no-renames", "--untracked-files=all", "-z", "--", *paths)
    return None if status is None else [line[3:] for line in status.split("\0") if line]


def head(root: Path) -> str | None:
    """The commit of a checkout, or None without git."""
    return _git(root, "rev-parse", "HEAD")


def read_committed(root: Path, revision: str, path: str) -> str | None:
    """The text of a file at a commit, or None if the checkout has no such commit or the commit no such file."""
    return _git(root, "show", f"{revision}:{path}")


def changed_since(root: Path, revision: str, path: str) -> bool:
    """Whether a file or folder of the current commit differs from `revision`; False if git cannot compare them."""
    return bool(_git(root, "diff", "--name-only", revision, "HEAD", "--", path))


def _revision(folder: Path) -> dict | None:
    if not _git(folder, "ls-files", "--error-unmatch", "__init__.py"):  # an unrelated checkout around site-packages
        return None
    return {"revision": head(folder), "dirty": bool(uncommitted(folder, ".", "../stages"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in a checkout, or None if it fails or git is missing."""
    try:
        # A killed git must not leave an index.lock. The checkout may belong to another user, for example when it is
        # mounted into a container. Trusting it adds no risk, because its code runs here anyway.
        command = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", folder, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip("\n") if answer.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instructions(capability: str) -> str:
    """The CPU instructions that PyTorch's kernels use, and the limits that the environment sets for oneDNN and MKL."""
    limits = [f"{name}={value}" for name in LIMITS if (value := os.environ.get(name))]
    return ", ".join([capability, *limits])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
