"""Read checkpoints released by the paper's authors."""

import math
from collections.abc import Mapping
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
    """Load a checkpoint of the authors, in any format that `load_tensors` reads.

    A pre-trained checkpoint gives an `EncoderWithProjector`. A fine-tuned one (names `base_model.` and `linear_head.`)
    gives a `NoiseConditionedClassifier` and needs the pixel `sigma` that it was fine-tuned for. As in the authors'
    code, the classifier's noise level is the one among `levels` Karras levels that is nearest to 2 * sigma.

    The weights do not determine `num_heads`. The default is one head per 64 dimensions, as in all models of the
    authors. `final_norm=False` is for their fine-tuned CIFAR-10 models, which skip the last LayerNorm.

    Raises `RRCMError` for any other file.

    >>> classifier = rrcm.load_authors_checkpoint("rrcm_finetuned.pth", sigma=0.5)
    >>> classifier.num_classes
    10
    """
    path = Path(path)
    weights = load_tensors(path)
    fine_tuned = any(name.startswith("base_model.") for name in weights)
    network = _below(weights, "base_model." if fine_tuned else "")
    projector, head = _below(network, "projection_head."), _below(weights, "linear_head.")
    trunk = {name: t for name, t in network.items() if not name.startswith(("projection_head.", "linear_head."))}
    encoder = load_weights(_build_encoder(trunk, num_heads, path), trunk, path)
    if not final_norm:
        encoder.norm = nn.Identity()
    if not fine_tuned:
        if not projector:
            raise RRCMError(f"{path}: neither a projection_head nor a linear_head: not an authors' checkpoint")
        hidden, out = (_rows(projector, name, path) for name in ("0.weight", "6.weight"))
        model = EncoderWithProjector(encoder, hidden, out)
        load_weights(model.projector, projector, path)
        return model
    if sigma is None:
        raise RRCMError(f"{path}: a fine-tuned checkpoint; pass sigma=, the pixel noise it was tuned for")
    nearest = nearest_level(karras_levels(levels), 2 * sigma)
    classifier = NoiseConditionedClassifier(encoder, _rows(head, "bias", path), nearest)
    load_weights(classifier.head, head, path)
    return classifier


def _below(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _build_encoder(trunk: Mapping[str, torch.Tensor], num_heads: int | None, path: Path) -> NoiseConditionedViT:
    """An encoder of the sizes that the shapes of its weights determine, and of `num_heads`."""
    try:
        embed_dim, channels, patch_size, _ = trunk["patch_embed.proj.weight"].shape
        grid = math.isqrt(trunk["pos_embed"].shape[1] - 2)
        depth = len({int(name.split(".")[1]) for name in trunk if name.startswith("blocks.")})
        if not min(embed_dim, channels, patch_size, grid, depth):
            raise ValueError
    except (KeyError, ValueError, IndexError):
        raise RRCMError(
            f"{path}: not an authors' checkpoint (holds no ViT with a time token); the weights of another network need "
            "--weights beside a --model"
        ) from None
    num_heads = num_heads or embed_dim // 64
    if num_heads == 0 or embed_dim % num_heads:
        raise RRCMError(f"{path}: {embed_dim} dimensions do not divide into {num_heads} heads; pass num_heads=")
    return NoiseConditionedViT(grid * patch_size, channels, patch_size, embed_dim, depth, num_heads)


def load_authors_encoder(path: Path, expected: Mapping[str, int] | None) -> NoiseConditionedViT:
    """The encoder alone. `expected` has `num_heads`, or is None. Raises the errors of `load_authors_checkpoint`."""
    num_heads = None if expected is None else expected["num_heads"]
    return load_authors_checkpoint(path, num_heads=num_heads, sigma=1.0).encoder  # sigma affects only the head


def _rows(weights: dict[str, torch.Tensor], name: str, path: Path) -> int:
    if name not in weights or weights[name].ndim == 0:
        raise RRCMError(f"{path}: not an authors' checkpoint (the {name} of its head is missing or has no rows)")
    return len(weights[name])
