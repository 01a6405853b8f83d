"""timm's pre-trained ViTs as ours: the same function of an image, with a time token added."""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import GELU, Attention, LayerNorm, Mlp, PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from rrcm.models.vit import SIGMA_DATA, NoiseConditionedViT, time_embedding
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.tensors import load_tensors, load_weights

PARTS = {  # the kinds of modules that a ViT like ours is made of
    *(VisionTransformer, PatchEmbed, Block, Attention, Mlp),
    *(nn.Sequential, nn.Conv2d, nn.Linear, nn.LayerNorm, LayerNorm, nn.GELU, GELU, nn.Dropout, nn.Identity),
}


@torch.no_grad()
def convert_timm_vit(
    network: nn.Module, name: str, *, image_size: int, channels: int, patch_size: int, t: float
) -> NoiseConditionedViT:
    """Our network with the weights of timm's `network`, whose head is left behind and which is left as it is.

    Fed a clean image of ours at noise level t (model space), the patch tokens are those that timm's stem makes of the
    image normalised as its configuration says; class token, blocks and last norm are timm's. A grey image (channels 1)
    counts as a colour one with three equal channels. Where image_size or patch_size differ from timm's, position and
    patch embedding are resampled as timm does it. The time token starts as one more patch, of the mean colour and the
    mean position. Raises `RRCMError`, which calls the network `name`, for a feature that ours lacks.
    """
    if feature := unsupported_feature(network, channels):
        raise RRCMError(f"{name}: has {feature}, which cannot be carried over; take a plain ViT of timm's")
    embed_dim, grid, stem = network.embed_dim, image_size // patch_size, network.patch_embed.proj
    encoder = NoiseConditionedViT(
        image_size,
        channels,
        patch_size,
        embed_dim,
        depth=len(network.blocks),
        num_heads=network.blocks[0].attn.num_heads,
        mlp_dim=network.blocks[0].mlp.fc1.out_features,
        qkv_bias=network.blocks[0].attn.qkv.bias is not None,
        norm_eps=network.norm.eps,
    )
    data = resolve_model_data_config(network)
    kernel = resample_patch_embed(stem.weight.float(), [patch_size, patch_size])
    weight, bias = fold_normalization(kernel, stem.bias.float(), data["mean"], data["std"], t)
    if channels < stem.in_channels:
        weight = weight.sum(dim=1, keepdim=True)
    prefix = 0 if network.no_embed_class else 1
    old_grid = list(network.patch_embed.grid_size)
    positions = resample_abs_pos_embed(network.pos_embed.float(), [grid, grid], old_grid, prefix)
    of_class, of_patches = positions[:, :prefix], positions[:, prefix:]
    blank_patch = stem.bias + of_patches.mean(dim=1, keepdim=True)
    of_time = blank_patch - time_embedding(torch.tensor([t]), embed_dim)
    tensors = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
    tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"] = weight, bias
    tensors["pos_embed"] = torch.cat([of_class if prefix else torch.zeros(1, 1, embed_dim), of_time, of_patches], dim=1)
    return load_weights(encoder, tensors, name)


def fold_normalization(
    weight: torch.Tensor, bias: torch.Tensor, mean: Sequence[float], deviation: Sequence[float], t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stem for (pixels - mean) / deviation as one for c_in(t) * (2 * pixels - 1), the same function of the pixels.

    weight (D, C, P, P), bias (D,); mean, deviation: one a channel, pixels in [0, 1]; t in model space.

    With u = c (2 p - 1):  (p - mean) / deviation = u / (2 c deviation) + (1/2 - mean) / deviation
    """
    c_in = (t**2 + SIGMA_DATA**2) ** -0.5
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
    shift = (weight * ((0.5 - mean) / deviation)).sum(dim=(1, 2, 3))
    return weight / (2 * c_in * deviation), bias + shift


def unsupported_feature(network: nn.Module, channels: int) -> str | None:
    """What a network of timm's has that ours, for images of so many channels, has no place for; None if nothing."""
    if getattr(network, "rope", None) is not None:
        return "a rotary position embedding"
    for part in network.modules():
        if type(part) not in PARTS:
            return f"a part of the kind {type(part).__name__}"
    attention, mlp = network.blocks[0].attn, network.blocks[0].mlp
    features = {
        "no class token": network.cls_token is None,
        "register tokens": network.num_reg_tokens > 0,
        f"{network.global_pool or 'no'} pooling": network.global_pool != "token",
        "a norm at its head (fc_norm)": not isinstance(network.fc_norm, nn.Identity),
        "a norm before its blocks (pre_norm)": not isinstance(network.norm_pre, nn.Identity),
        "no norm after its blocks": isinstance(network.norm, nn.Identity),
        "no learned position embedding": network.pos_embed is None,
        "a norm in its stem": not isinstance(network.patch_embed.norm, nn.Identity),
        f"a stem for {network.in_chans} channels": network.in_chans not in (3, channels),
        "normalised queries and keys (qk_norm)": not isinstance(attention.q_norm, nn.Identity),
        "gated attention": attention.gate is not None,
        "a norm inside its attention": not isinstance(attention.norm, nn.Identity),
        "a norm inside its MLPs": not isinstance(mlp.norm, nn.Identity),
    }
    return next((feature for feature, present in features.items() if present), None)


def suggest_timm_name(name: str) -> str | None:
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
    if complaint := suggest_timm_name(name):
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
