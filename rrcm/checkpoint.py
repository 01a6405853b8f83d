"""Trained networks on disk: a folder with model.safetensors and config.json; and the authors' released format."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rrcm.errors import RRCMError
from rrcm.files import atomic_path, read_json, write_json
from rrcm.model import Classifier, NoiseConditionedViT, ProjectedViT
from rrcm.schedules import karras_levels

Network = TypeVar("Network", bound=nn.Module)
ARCHITECTURE = ("image_size", "channels", "patch_size", "width", "depth", "heads")


def architecture(encoder: NoiseConditionedViT) -> dict[str, int]:
    """What must be known to build the encoder again, as keyword arguments of `NoiseConditionedViT`."""
    return {
        "image_size": encoder.patch_embed.img_size[0],
        "channels": encoder.in_chans,
        "patch_size": encoder.patch_embed.patch_size[0],
        "width": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "heads": encoder.blocks[0].attn.num_heads,
    }


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_path(path) as scratch:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch, metadata)
        except SafetensorError as error:
            raise OSError(None, str(error)) from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises `RRCMError` when it is missing, truncated or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; run the stage that makes it, or dvc pull") from None
    except (SafetensorError, OSError) as error:
        raise RRCMError(f"{path}: truncated or not a safetensors file ({error}); make it again or dvc pull") from None


def save_model(folder: Path | str, model: NoiseConditionedViT | Classifier, **facts: object) -> None:
    """Write `model` into `folder`: weights (float32) and config.json with its architecture and `facts` (JSON-able)."""
    folder = Path(folder)
    encoder = model.encoder if isinstance(model, Classifier) else model
    described = {"format": 1, "architecture": architecture(encoder)}
    if isinstance(model, Classifier):
        described |= {"classes": model.head.out_features, "t": model.t}
    save_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", described | facts)


def load_encoder(folder: Path | str, expected: dict[str, int] | None = None) -> NoiseConditionedViT:
    """Load a pre-trained encoder. With `expected` (see `architecture`) another architecture is refused."""
    folder = Path(folder)
    described = _read_config(folder, expected)
    return _fill(NoiseConditionedViT(**described["architecture"]), load_tensors(folder / "model.safetensors"), folder)


def load_classifier(folder: Path | str) -> Classifier:
    """Load a fine-tuned classifier, in eval mode."""
    folder = Path(folder)
    described = _read_config(folder, None)
    if "classes" not in described:
        raise RRCMError(f"{folder}/config.json: this is an encoder without a head; fine-tune it first")
    model = Classifier(NoiseConditionedViT(**described["architecture"]), described["classes"], described["t"])
    return _fill(model, load_tensors(folder / "model.safetensors"), folder).eval()


def _read_config(folder: Path, expected: dict[str, int] | None) -> dict:
    described = read_json(folder / "config.json")
    found = described.get("architecture")
    if not isinstance(found, dict) or set(found) != set(ARCHITECTURE):
        raise RRCMError(f"{folder}/config.json: does not describe a network of rrcm; it must have `architecture`")
    if expected is not None:
        for name in ARCHITECTURE:
            if found[name] != expected[name]:
                raise RRCMError(
                    f"{folder}: checkpoint of another architecture: {name} is {found[name]}, "
                    f"the settings want {expected[name]}; pre-train again or change the settings"
                )
    return described


def _fill(model: Network, tensors: dict[str, torch.Tensor], origin: Path) -> Network:
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


def load_authors_checkpoint(
    path: Path | str,
    *,
    heads: int | None = None,
    sigma: float | None = None,
    levels: int = 81,
    final_norm: bool = True,
) -> ProjectedViT | Classifier:
    """Load a checkpoint of the paper's authors (a pickled state dict; read with `weights_only=True`, or safetensors).

    A pre-trained one (their names, with or without `module.`) gives a `ProjectedViT`; a fine-tuned one (`base_model.`
    and `linear_head.`) gives a `Classifier` and needs the pixel `sigma` it was tuned for: its noise level is then the
    nearest of the `levels` Karras levels to 2 * sigma, as their code has it. `heads` cannot be read off the weights;
    the default is one per 64 dimensions, as in all their models. `final_norm=False` is for their CIFAR-10 fine-tuned
    models, which skip the last LayerNorm. Raises `RRCMError` for anything that is not such a checkpoint.
    """
    path = Path(path)
    weights = {name.removeprefix("module."): tensor for name, tensor in _read_authors_file(path).items()}
    fine_tuned = any(name.startswith("base_model.") for name in weights)
    prefix = "base_model." if fine_tuned else ""
    trunk = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    projector = {
        name.removeprefix("projection_head."): trunk.pop(name)
        for name in list(trunk)
        if name.startswith("projection_head.")
    }
    try:
        width, channels, patch_size, _ = trunk["patch_embed.proj.weight"].shape
        grid = round((trunk["pos_embed"].shape[1] - 2) ** 0.5)
        depth = 1 + max(int(name.split(".")[1]) for name in trunk if name.startswith("blocks."))
    except (KeyError, ValueError):
        raise RRCMError(f"{path}: not a checkpoint of the authors' network (no ViT with a time token in it)") from None
    heads = heads or width // 64
    if heads == 0 or width % heads:
        raise RRCMError(f"{path}: width {width} cannot be split over {heads} heads; pass heads=")
    encoder = NoiseConditionedViT(grid * patch_size, channels, patch_size, width, depth, heads)
    trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith("linear_head.")}
    _fill(encoder, trunk, path)
    if not final_norm:
        encoder.norm = nn.Identity()
    if not fine_tuned:
        if not projector:
            raise RRCMError(f"{path}: has no projection_head; a pre-trained checkpoint of the authors has one")
        model = ProjectedViT(encoder, hidden=len(projector["0.weight"]), out=len(projector["6.weight"]))
        _fill(model.projector, projector, path)
        return model
    if sigma is None:
        raise RRCMError(f"{path}: a fine-tuned checkpoint needs sigma=, the pixel noise it was tuned for")
    grid_levels = karras_levels(levels)
    nearest = float(grid_levels[(grid_levels - 2 * sigma).abs().argmin()])
    head = {name.removeprefix("linear_head."): t for name, t in weights.items() if name.startswith("linear_head.")}
    classifier = Classifier(encoder, len(head["bias"]) if "bias" in head else 0, nearest)
    _fill(classifier.head, head, path)
    return classifier


def _read_authors_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise RRCMError(
            f"{path}: a pickle that holds more than tensors, or is damaged; refused, nothing in it was run"
        ) from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, struct.error) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise RRCMError(f"{path}: truncated or not a torch checkpoint ({reason})") from None
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise RRCMError(f"{path}: not a state dict of tensors")
    return weights
