"""TODO docstring."""

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
    """Write a safetensors file, to be flushed and renamed by the caller. Raises OSError."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as scratch:
        write_tensors(scratch, tensors)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises `RRCMError` when it is missing, truncated or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; run the stage that makes it, or dvc pull") from None
    except (SafetensorError, OSError) as error:
        raise RRCMError(f"{path}: truncated or not a safetensors file ({error}); make it again or dvc pull") from None


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hexadecimal SHA-256 of tensors with their names, shapes and dtypes, whatever their order and device."""
    return hashlib.sha256(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})).hexdigest()


def load_weights(model: Network, tensors: Mapping[str, torch.Tensor], origin: Path | str) -> Network:
    """Put weights into a model. Raises `RRCMError` naming one that does not fit; `origin` is theirs."""
    own = model.state_dict()
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors:
            raise RRCMError(
                f"{origin}: {name} is {'missing' if name in own else 'unknown'}: weights of another network"
            )
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            raise RRCMError(f"{origin}: {name} has shape {shapes}: checkpoint of another architecture")
    model.load_state_dict(tensors)
    return model
