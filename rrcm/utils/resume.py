"""Half-done work: kept outside of DVC (which deletes a stage's outputs before it runs it), found again by fingerprint.

A run's folder is named after a hash of its settings, its input data and the code that computes it, so state is never
resumed under changed ones. It is deleted when the outputs are in place.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path, sha256_file, write_text
from rrcm.utils.tensors import write_tensors


def runs_directory() -> Path:
    """Where half-done work lives: $RRCM_RUNS, else `runs/` here. Inside `dvc exp run --temp` or `--queue`, which work
    in a throw-away copy under .dvc/tmp/exps, it is `runs/` of the repository that the experiment was started in."""
    if place := os.environ.get("RRCM_RUNS"):
        return Path(place)
    here = Path.cwd()
    for folder in here.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2] / "runs"
    return here / "runs"


def fingerprint(settings: object, inputs: Mapping[str, str], code: Sequence[ModuleType]) -> str:
    """16 hex digits over JSON-able settings, named hashes of the inputs, and the source text of `code`."""
    source = {module.__name__: Path(module.__file__).read_text(encoding="utf-8") for module in code}
    text = json.dumps([settings, dict(inputs), source, torch.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Run:
    """The state of one run: the newest checkpoints, each a safetensors file written atomically, and its SHA-256."""

    keep = 2  # the older one serves when the newest is damaged

    def __init__(self, name: str, mark: str):
        self.folder = runs_directory() / f"{name}-{mark}"

    def lock(self) -> None:
        """Claim the run for this process until it ends. Raises `RRCMError` if another process is at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RRCMError(f"{self.folder}: another process is doing this very run; wait for it or stop it") from None

    def save(self, step: int, tensors: dict[str, torch.Tensor], notes: dict) -> None:
        """Write the state after `step` steps; `notes` is JSON-able."""
        path = self.folder / f"{step:09d}.safetensors"
        with atomic_path(path) as scratch:
            write_tensors(scratch, tensors, {"notes": json.dumps(notes)})  # the disk is busy with it while it is hashed
            write_text(path.with_suffix(".sha256"), sha256_file(scratch))  # first: no checkpoint is ever without
        for old in self._checkpoints()[self.keep :]:
            old.with_suffix(".sha256").unlink(missing_ok=True)
            old.unlink()

    def load(self) -> tuple[int, dict[str, torch.Tensor], dict] | None:
        """The newest readable state as (step, tensors, notes), or None. Says so when it skips a damaged one."""
        for path in self._checkpoints():
            try:
                if sha256_file(path) != path.with_suffix(".sha256").read_text():
                    raise OSError("it does not match its hash")
                with safe_open(path, "pt") as file:
                    notes = json.loads(file.metadata()["notes"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                print(f"{path}: damaged checkpoint skipped ({error}); an older one is used", file=sys.stderr)
                continue
            print(f"resuming {self.folder.name} after step {int(path.stem)}", file=sys.stderr)
            return int(path.stem), tensors, notes
        return None

    def last_good(self) -> str:
        """Where the newest checkpoint is, in a sentence."""
        newest = next(iter(self._checkpoints()), None)
        if newest is None:
            return "It had saved no state yet"
        return f"The last good state, after step {int(newest.stem)}, is {newest}"

    def finish(self) -> None:
        """Delete the state; called when the outputs are in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)


def pack_state(modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All tensors of the modules and of the optimiser's state under flat names."""
    packed = {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        packed |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    return packed


def unpack_state(
    packed: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """Put what `pack_state` gave back in place."""
    for name, module in modules.items():
        module.load_state_dict({key: packed[f"{name}.{key}"] for key in module.state_dict()})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in packed.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
