"""Convert a pretrained timm ViT into our noise-conditioned ViT.

timm is imported inside the functions, because importing it takes more than a second and most runs do not need it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from rrcm.models.timm_models import load_timm
from rrcm.models.vit import SIGMA_DATA, BlockOptions, NoiseConditionedViT, time_embedding
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import load_weights


def load_timm_encoder(name: str, weights: str | None, **sizes: float) -> NoiseConditionedViT:
    """Our network with the weights of the timm model `name`: `load_timm`, then `convert_timm_vit`."""
    return convert_timm_vit(load_timm(name, weights), name, **sizes)


@torch.no_grad()
def convert_timm_vit(
    network: nn.Module, name: str, *, image_size: int, channels: int, patch_size: int, t: float
) -> NoiseConditionedViT:
    """Our network with the weights of timm's `network`, without its head. `network` itself is not changed.

    The result takes images in model space at noise level t. On a clean image its patch tokens equal the patch tokens of
    timm's stem, which normalises the image by its own mean and deviation. Class token, blocks and last norm are copied.
    A grey image (channels 1) counts as a colour image with three equal channels. If image_size or patch_size differ
    from timm's, position and patch embedding are resampled with timm's functions. The time token starts as one more
    patch, of the mean colour at the mean position.

    Raises `RRCMError` for a feature that our network lacks. The message calls the network `name`.
    """
    from timm.data import resolve_model_data_config
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    if feature := unsupported_feature(network, channels):
        raise RRCMError(
            f"{name}: has {feature}, which our network does not support; choose a plain ViT, or set "
            "model.architecture to timm's name of the network"
        )
    embed_dim, grid, stem = network.embed_dim, image_size // patch_size, network.patch_embed.proj
    first = network.blocks[0]
    encoder = NoiseConditionedViT(
        image_size,
        channels,
        patch_size,
        embed_dim,
        depth=len(network.blocks),
        num_heads=first.attn.num_heads,
        block=BlockOptions(first.mlp.fc1.out_features, first.attn.qkv.bias is not None, network.norm.eps),
    )
    data = resolve_model_data_config(network)
    kernel = resample_patch_embed(stem.weight.float(), [patch_size, patch_size])
    weight, bias = fold_normalization(kernel, stem.bias.float(), data["mean"], data["std"], t)
    if channels < stem.in_channels:
        weight = weight.sum(dim=1, keepdim=True)
    prefix = 0 if network.no_embed_class else 1
    old_grid = list(network.patch_embed.grid_size)
    positions = resample_abs_pos_embed(network.pos_embed.float(), [grid, grid], old_grid, prefix)
    class_position, patch_positions = positions[:, :prefix], positions[:, prefix:]
    if not prefix:
        class_position = torch.zeros(1, 1, embed_dim)
    mean_patch = stem.bias + patch_positions.mean(dim=1, keepdim=True)
    time_position = mean_patch - time_embedding(torch.tensor([t]), embed_dim)
    tensors = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
    tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"] = weight, bias
    tensors["pos_embed"] = torch.cat([class_position, time_position, patch_positions], dim=1)
    return load_weights(encoder, tensors, name)


def fold_normalization(
    weight: torch.Tensor, bias: torch.Tensor, mean: Sequence[float], deviation: Sequence[float], t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold the input normalisation of a stem into its weights.

    The given stem takes (pixels - mean) / deviation. The returned stem takes c_in(t) * (2 * pixels - 1) and computes
    the same function of the pixels.

    weight (D, C, P, P), bias (D,); mean, deviation: one per channel, pixels in [0, 1]; t in model space.

    With u = c (2 p - 1):  (p - mean) / deviation = u / (2 c deviation) + (1/2 - mean) / deviation
    """
    c_in = (t**2 + SIGMA_DATA**2) ** -0.5
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
    shift = (weight * ((0.5 - mean) / deviation)).sum(dim=(1, 2, 3))
    return weight / (2 * c_in * deviation), bias + shift


def unsupported_feature(network: nn.Module, channels: int) -> str | None:
    """A feature of timm's `network` that our network lacks for images of `channels` channels, or None."""
    from timm.layers import GELU, Attention, LayerNorm, Mlp, PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    supported_modules = {VisionTransformer, PatchEmbed, Block, Attention, Mlp, nn.Sequential, nn.Conv2d, nn.Linear}
    supported_modules |= {nn.LayerNorm, LayerNorm, nn.GELU, GELU, nn.Dropout, nn.Identity}
    if getattr(network, "rope", None) is not None:
        return "a rotary position embedding"
    for module in network.modules():
        if type(module) not in supported_modules:
            return f"a module of type {type(module).__name__}"
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return f"a GELU by its approximation {module.approximate}"
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
