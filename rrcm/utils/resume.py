"""Checkpoints from which unfinished runs resume. DVC does not track them: it deletes a stage's outputs before a run.

The folder of a run is named by a hash of its settings, its input data and its code, so a run is never resumed after
one of these has changed. The folder is deleted when the outputs are in place.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rrcm.utils.code import fingerprints
from rrcm.utils.describe import Description
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path, in_repository, open_locked, sha256_file, write_text, writing
from rrcm.utils.tensors import write_tensors


def runs_directory() -> Path:
    """The folder of unfinished runs: $RRCM_RUNS, or `runs/` of this repository, also for DVC's experiments."""
    return Path(os.environ.get("RRCM_RUNS") or in_repository("runs").absolute())


def fingerprint(settings: object, inputs: Mapping[str, str], module: str, *objects: object) -> str:
    """16 hexadecimal digits that identify a run: a hash of everything that decides its result.

    The hash covers the JSON-able `settings`, the named hashes of the `inputs`, the code of `module` and of everything
    that it imports from rrcm (code.py), and the `objects` that compute the result, such as networks: their content, and
    the code of their classes and functions, wherever that comes from (describe.py). Raises `RRCMError` for objects that
    cannot be described.
    """
    description = Description()
    try:
        described = [description.of(each) for each in objects]
    except RecursionError:
        raise RRCMError("the model is nested too deeply to be described; make it of fewer levels") from None
    code = fingerprints(module, *sorted(description.modules))
    versions = {name: _version(name) for name in sorted({name.split(".")[0] for name in code})}
    text = json.dumps([settings, dict(inputs), described, code, versions, torch.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    """The version of an installed package. None for rrcm, whose code is hashed, and for modules of no package."""
    with suppress(PackageNotFoundError):
        return None if package == "rrcm" else version(package)
    return None


DAMAGED = {errno.ENOENT, errno.EIO}  # errors from reading a damaged checkpoint; others have another cause


class RunState:
    """The newest checkpoints of one run, each a safetensors file written atomically, with its SHA-256."""

    keep = 2  # the older one is used if the newest is damaged

    def __init__(self, name: str, fingerprint: str, parent: Path | None = None):
        self.folder = (parent or runs_directory()) / f"{name}-{fingerprint}"
        self._elsewhere = "" if parent else "or set RRCM_RUNS to another folder"
        self._lock: IO | None = None

    def lock(self) -> None:
        """Claim the run for this process until it ends. Raises `RRCMError` if another process holds it."""
        with writing(self.folder, self._elsewhere):
            self._lock = open_locked(self.folder / "lock")
        if self._lock is None:
            raise RRCMError(f"{self.folder}: this run is locked by another process; wait for it or stop it")

    def save(self, step: int, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        """Write the state after `step` steps. `metadata` is JSON-able."""
        path = self.folder / f"{step:09d}.safetensors"
        with atomic_path(path) as scratch:
            write_tensors(scratch, tensors, {"metadata": json.dumps(metadata)})
            write_text(path.with_suffix(".sha256"), sha256_file(scratch))  # first, so no checkpoint ever lacks it
        with writing(self.folder):
            for old in self._checkpoints()[self.keep :]:
                old.with_suffix(".sha256").unlink(missing_ok=True)
                old.unlink()

    def load(self) -> tuple[int, dict[str, torch.Tensor], dict] | None:
        """The newest intact checkpoint as (step, tensors, metadata), or None. Prints a line for a damaged one.

        Raises `RRCMError` for a checkpoint that may be intact but cannot be read, for example without permission.
        """
        for path in self._checkpoints():
            try:
                if sha256_file(path) != path.with_suffix(".sha256").read_text():
                    raise ValueError("it does not match its hash")
                with safe_open(path, "pt") as file:
                    metadata = json.loads(file.metadata()["metadata"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, OSError) and error.errno not in DAMAGED:
                    raise RRCMError(f"{path}: cannot be read ({error.strerror}); correct that or delete it") from None
                print(f"{path}: damaged checkpoint skipped ({error}); an older one is used", file=sys.stderr)
                continue
            print(f"resuming {self.folder.name} after step {int(path.stem)}", file=sys.stderr)
            return int(path.stem), tensors, metadata
        return None

    def last_good(self) -> str:
        """A sentence that says where the newest checkpoint is."""
        newest = next(iter(self._checkpoints()), None)
        if newest is None:
            return "No state had been saved yet"
        return f"The last good state, after step {int(newest.stem)}, is {newest}"

    def finish(self) -> None:
        """Delete the checkpoints. Call it when the outputs are in place."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
            with suppress(OSError):  # NFS keeps a deleted file under another name while it is open
                self.folder.rmdir()

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)


def pack_state(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of the modules and of the optimizer's state under flat names."""
    packed = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        packed |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    return packed


def unpack_state(
    packed: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Load what `pack_state` returned."""
    for name, module in modules.items():
        module.load_state_dict({key: packed[f"{name}.{key}"] for key in module.state_dict()})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in packed.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # Files do not keep the memory layout, and fused optimizers traverse a weight and its moments in memory order.
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            if value.shape == parameter.shape:
                moments[key] = torch.empty_like(parameter, requires_grad=False).copy_(value)
