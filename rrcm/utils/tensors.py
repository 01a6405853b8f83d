"""Tensors on disk (safetensors), their hashes, and strict loading into a module."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_path

Network = TypeVar("Network", bound=nn.Module)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the caller flushes and renames it. Raises OSError."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as scratch:
        write_tensors(scratch, tensors)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises `RRCMError` if it is missing, truncated or in another format."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; run the stage that writes it, or dvc pull") from None
    except (SafetensorError, OSError) as error:
        raise RRCMError(f"{path}: truncated or not a safetensors file ({error}); rebuild it or run dvc pull") from None


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 over names, shapes, dtypes and values; order and device do not matter."""
    return hashlib.sha256(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})).hexdigest()


def load_weights(model: Network, tensors: Mapping[str, torch.Tensor], source: Path | str) -> Network:
    """Load `tensors` into `model` and return it.

    Raises `RRCMError` if names or shapes differ; the message calls the weights `source`.
    """
    expected = model.state_dict()
    for name in expected.keys() | tensors.keys():
        if name not in expected or name not in tensors:
            problem = "missing" if name in expected else "unknown"
            raise RRCMError(f"{source}: {name} is {problem}: weights of another network")
        if expected[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            raise RRCMError(f"{source}: {name} has shape {shapes}: checkpoint of another architecture")
    model.load_state_dict(tensors)
    return model
