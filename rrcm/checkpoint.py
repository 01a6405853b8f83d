"""Trained networks on disk: a folder with model.safetensors and config.json; the authors' released format; timm's."""

import difflib
import hashlib
import logging
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from rrcm.errors import RRCMError, one_line
from rrcm.files import atomic_path, read_json, write_json
from rrcm.model import Classifier, NoiseConditionedViT, ProjectedViT
from rrcm.schedules import karras_levels, nearest_level

Network = TypeVar("Network", bound=nn.Module)
ARCHITECTURE = ("image_size", "channels", "patch_size", "width", "depth", "heads")
DETAILS = ("mlp_width", "qkv_bias", "norm_eps")  # files from before there was a choice lack them: the paper's


def architecture(encoder: NoiseConditionedViT) -> dict[str, int | float | bool]:
    """What must be known to build the encoder again, as keyword arguments of `NoiseConditionedViT`."""
    block = encoder.blocks[0]
    return {
        "image_size": encoder.patch_embed.img_size[0],
        "channels": encoder.in_chans,
        "patch_size": encoder.patch_embed.patch_size[0],
        "width": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "heads": block.attn.num_heads,
        "mlp_width": block.mlp.fc1.out_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "norm_eps": block.norm1.eps,
    }


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


def save_model(folder: Path | str, model: NoiseConditionedViT | Classifier, **facts: object) -> None:
    """Write `model` into `folder`: weights (float32) and config.json with its architecture and `facts` (JSON-able)."""
    folder = Path(folder)
    encoder = model.encoder if isinstance(model, Classifier) else model
    described = {"format": 1, "architecture": architecture(encoder)}
    if isinstance(model, Classifier):
        described |= {"classes": model.head.out_features, "t": model.t}
    save_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "config.json", described | facts)


def load_encoder(path: Path | str, expected: Mapping[str, int] | None = None) -> NoiseConditionedViT:
    """Load the encoder of a folder of ours or of a file of the authors, with or without a head or projector on it.

    With `expected`, which has ARCHITECTURE, other sizes are refused, and the authors' heads are as many as it says.
    """
    path = Path(path)
    if path.is_file():
        heads = None if expected is None else expected["heads"]
        encoder = load_authors_checkpoint(path, heads=heads, sigma=1.0).encoder  # any sigma: it is for the head
        _check_sizes(architecture(encoder), expected, path)
        return encoder
    described = _read_config(path)
    _check_sizes(described["architecture"], expected, path)
    if "classes" in described:
        return load_classifier(path).train().encoder
    return fill(NoiseConditionedViT(**described["architecture"]), load_tensors(path / "model.safetensors"), path)


def load_classifier(folder: Path | str) -> Classifier:
    """Load a fine-tuned classifier, in eval mode."""
    folder = Path(folder)
    described = _read_config(folder)
    if "classes" not in described:
        raise RRCMError(f"{folder}/config.json: this is an encoder without a head; fine-tune it first")
    model = Classifier(NoiseConditionedViT(**described["architecture"]), described["classes"], described["t"])
    return fill(model, load_tensors(folder / "model.safetensors"), folder).eval()


def _read_config(folder: Path) -> dict:
    described = read_json(folder / "config.json")
    found = described.get("architecture")
    if not isinstance(found, dict) or not set(ARCHITECTURE) <= set(found) <= {*ARCHITECTURE, *DETAILS}:
        raise RRCMError(f"{folder}/config.json: does not describe a network of rrcm; it must have `architecture`")
    return described


def _check_sizes(found: Mapping, expected: Mapping | None, origin: Path) -> None:
    for name in ARCHITECTURE if expected is not None else ():
        if found[name] != expected[name]:
            raise RRCMError(
                f"{origin}: checkpoint of another architecture: {name} is {found[name]}, "
                f"the settings want {expected[name]}; pre-train again or change the settings"
            )


def fill(model: Network, tensors: Mapping[str, torch.Tensor], origin: Path | str) -> Network:
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
    fill(encoder, trunk, path)
    if not final_norm:
        encoder.norm = nn.Identity()
    if not fine_tuned:
        if not projector:
            raise RRCMError(f"{path}: has no projection_head; a pre-trained checkpoint of the authors has one")
        model = ProjectedViT(encoder, hidden=len(projector["0.weight"]), out=len(projector["6.weight"]))
        fill(model.projector, projector, path)
        return model
    if sigma is None:
        raise RRCMError(f"{path}: a fine-tuned checkpoint needs sigma=, the pixel noise it was tuned for")
    nearest = nearest_level(karras_levels(levels), 2 * sigma)
    head = {name.removeprefix("linear_head."): t for name, t in weights.items() if name.startswith("linear_head.")}
    classifier = Classifier(encoder, len(head["bias"]) if "bias" in head else 0, nearest)
    fill(classifier.head, head, path)
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


def unknown_to_timm(name: str) -> str | None:
    """What is wrong with the name of a model of timm's, and what may be meant; None when there is such a model."""
    if timm.is_model(name):
        return None
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has them all"
    return f"timm has no model of that name; {hint}"


def load_timm(name: str, weights: Path | str | None = None) -> nn.Module:
    """timm's model, trained: with the weights that timm downloads, or those of a safetensors file and as many classes
    as they have. Raises `RRCMError` for an unknown name, and for weights that are not to be had or of another model.
    """
    if complaint := unknown_to_timm(name):
        raise RRCMError(f"{name}: {complaint}")
    if weights is not None:
        return _fill_timm(name, Path(weights))
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, protocols and timm have their own
        raise RRCMError(f"{name}: no pre-trained weights to be had ({one_line(error)}); give a file of them") from None


def _fill_timm(name: str, weights: Path) -> nn.Module:
    tensors = load_tensors(weights)
    try:
        config = timm.get_pretrained_cfg(name)
        head = tensors.get(f"{config.classifier}.weight") if config else None
        classes = config.num_classes if head is None else len(head)
        overlay = {"file": str(weights), "num_classes": classes}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    except Exception as error:  # each of timm's loaders has its own
        raise RRCMError(f"{weights}: not the weights of timm's {name} ({one_line(error)})") from None
