"""Tensors on disk, their hashes, and strict loading into a module."""

import argparse
import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path, open_regular

Network = TypeVar("Network", bound=nn.Module)
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")  # timm's order: averages first


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the caller flushes and renames it. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(None, str(error)) from error
    with suppress(OSError):  # not every file system has modes
        path.chmod(mode)  # save_file makes the file readable by this user alone


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as scratch:
        write_tensors(scratch, tensors)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights in a safetensors file or a checkpoint of torch; the first bytes tell which of the two it is.

    A checkpoint is read with `weights_only=True`, which runs no code from the file. Its weights may be nested under one
    of the keys in NESTED. Prefixes that torch.compile, DataParallel and similar wrappers add to names are removed.

    Raises `RRCMError` if the file is missing, truncated or in another format, if it contains more than tensors, or if
    some numbers are not finite.
    """
    try:
        with open_regular(path) as file:
            head = file.read(64)
        if head.startswith(b"version https://git-lfs"):
            raise RRCMError(f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` in that folder")
        if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise RRCMError(f"{path}: a web page, not the weights; download the file itself")
        is_checkpoint = head.startswith((b"PK", b"\x80"))
        is_safetensors = head[8:9] == b"{" or (path.suffix == ".safetensors" and not is_checkpoint)
        tensors = load_file(path) if is_safetensors else None
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; run the stage that writes it, or dvc pull") from None
    except (SafetensorError, OSError) as error:
        raise RRCMError(f"{path}: truncated or not a safetensors file ({error}); rebuild it or run dvc pull") from None
    tensors = plain_names(_load_checkpoint(path) if tensors is None else tensors, path)
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], source: Path | str) -> None:
    """Raise `RRCMError` for NaN or infinite numbers. The message calls the tensors `source`."""
    for name, tensor in tensors.items():
        if not (tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all():  # undefined for 8 bits
            raise RRCMError(f"{source}: {name} has numbers that are NaN or infinite: damaged, or of a failed training")


def _load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        with (
            path.open("rb") as file,  # given a path, newer versions of torch decide by its suffix
            warnings.catch_warnings(action="ignore"),  # about unusual pickle protocols
            torch.serialization.safe_globals([argparse.Namespace]),  # settings beside the weights, as timm allows
        ):
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RRCMError(
            f"{path}: a pickle that holds more than tensors{_foreign_names(path)}, or is damaged; no code in it was "
            "run; save the state dict alone, best as safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, struct.error) as error:
        if "TorchScript" in str(error) or path.suffix == ".pt2":
            raise RRCMError(
                f"{path}: a program, not weights; give --model a function that loads it with torch.jit.load, or smooth "
                "it in Python with SmoothedClassifier"
            ) from None
        reason = (str(error).splitlines() or ["empty"])[0]
        raise RRCMError(
            f"{path}: truncated or not a torch checkpoint ({reason}); give a state dict, best as safetensors"
        ) from None
    while isinstance(weights, dict) and (key := next((k for k in NESTED if isinstance(weights.get(k), dict)), None)):
        weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise RRCMError(f"{path}: not a state dict of tensors")
    for name, tensor in weights.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_meta:
            raise RRCMError(f"{path}: not a state dict of tensors: {name} is no dense tensor with values")
    return weights


def _foreign_names(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an old format, or damaged
        return ""
    return f" ({', '.join(sorted(names)[:5])})" if names else ""


def plain_names(tensors: Mapping[str, torch.Tensor], source: Path | str) -> dict[str, torch.Tensor]:
    """Give weights the names that they have in the network itself.

    torch.compile adds `_orig_mod.` anywhere in a name. DataParallel, DistributedDataParallel and averages of weights
    add `module.` in front, and an average counts its terms in `n_averaged`. Raises `RRCMError` if two weights get the
    same name. The message calls the weights `source`.
    """
    plain = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        while parts[0] == "module" and len(parts) > 1:
            del parts[0]
        if plain.setdefault(".".join(parts), tensor) is not tensor:
            raise RRCMError(f"{source}: two weights are called {'.'.join(parts)} without their prefixes")
    if any(name.startswith("module.") for name in tensors):
        plain.pop("n_averaged", None)
    return plain


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 over names, shapes, dtypes and values; order and device do not matter."""
    return hashlib.sha256(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})).hexdigest()


def load_weights(model: Network, tensors: Mapping[str, torch.Tensor], source: Path | str) -> Network:
    """Load `tensors` into `model` and return it. Raises `RRCMError` as `check_weights` does."""
    check_weights(model.state_dict(), tensors, source)
    model.load_state_dict(tensors)
    return model


def check_weights(
    expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: Path | str
) -> None:
    """Raise `RRCMError` unless names, shapes and kinds of numbers are as expected; it calls the weights `source`."""
    for name in expected.keys() | tensors.keys():
        if name not in expected or name not in tensors:
            problem = "missing" if name in expected else "unknown"
            raise RRCMError(f"{source}: {name} is {problem}: weights of another network")
        if expected[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            raise RRCMError(f"{source}: {name} has shape {shapes}: checkpoint of another architecture")
        if expected[name].is_floating_point() != tensors[name].is_floating_point():
            raise RRCMError(
                f"{source}: {name} has numbers of type {tensors[name].dtype}: quantized weights; save floats"
            )
