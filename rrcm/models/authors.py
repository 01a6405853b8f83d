"""Read checkpoints released by the paper's authors."""

import pickle
import struct
import zipfile
from pathlib import Path

import torch
from torch import nn

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.noise_levels import karras_levels, nearest_level
from rrcm.models.vit import EncoderWithProjector, NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_tensors, load_weights


def load_authors_checkpoint(
    path: Path | str,
    *,
    num_heads: int | None = None,
    sigma: float | None = None,
    levels: int = 81,
    final_norm: bool = True,
) -> EncoderWithProjector | NoiseConditionedClassifier:
    """Load a checkpoint of the authors: a pickled state dict, read with `weights_only=True`, or safetensors.

    A pretrained checkpoint gives an `EncoderWithProjector`. A fine-tuned one (names `base_model.` and `linear_head.`)
    gives a `NoiseConditionedClassifier` and needs the pixel `sigma` it was tuned for. As in their code, its noise level
    is then the nearest of the `levels` Karras levels to 2 * sigma. A prefix `module.` is ignored.

    `num_heads` cannot be read off the weights; the default is one head per 64 dimensions, as in all their models.
    `final_norm=False` is for their fine-tuned CIFAR-10 models, which skip the last LayerNorm.

    Raises `RRCMError` for any other file.
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
        embed_dim, channels, patch_size, _ = trunk["patch_embed.proj.weight"].shape
        grid = round((trunk["pos_embed"].shape[1] - 2) ** 0.5)
        depth = 1 + max(int(name.split(".")[1]) for name in trunk if name.startswith("blocks."))
    except (KeyError, ValueError):
        raise RRCMError(f"{path}: not an authors' checkpoint (holds no ViT with a time token)") from None
    num_heads = num_heads or embed_dim // 64
    if num_heads == 0 or embed_dim % num_heads:
        raise RRCMError(f"{path}: {embed_dim} dimensions do not divide into {num_heads} heads; pass num_heads=")
    encoder = NoiseConditionedViT(grid * patch_size, channels, patch_size, embed_dim, depth, num_heads)
    trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith("linear_head.")}
    load_weights(encoder, trunk, path)
    if not final_norm:
        encoder.norm = nn.Identity()
    if not fine_tuned:
        if not projector:
            raise RRCMError(f"{path}: neither a projection_head nor a linear_head: not an authors' checkpoint")
        model = EncoderWithProjector(encoder, hidden=len(projector["0.weight"]), out=len(projector["6.weight"]))
        load_weights(model.projector, projector, path)
        return model
    if sigma is None:
        raise RRCMError(f"{path}: a fine-tuned checkpoint; pass sigma=, the pixel noise it was tuned for")
    nearest = nearest_level(karras_levels(levels), 2 * sigma)
    head = {name.removeprefix("linear_head."): t for name, t in weights.items() if name.startswith("linear_head.")}
    classifier = NoiseConditionedClassifier(encoder, len(head["bias"]) if "bias" in head else 0, nearest)
    load_weights(classifier.head, head, path)
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
            f"{path}: a pickle that holds more than tensors, or is damaged; no code in it was run"
        ) from None
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, struct.error) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise RRCMError(f"{path}: truncated or not a torch checkpoint ({reason})") from None
    if not isinstance(weights, dict) or not all(isinstance(t, torch.Tensor) for t in weights.values()):
        raise RRCMError(f"{path}: not a state dict of tensors")
    return weights
