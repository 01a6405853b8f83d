"""OpenAI's UNet of guided-diffusion (Dhariwal and Nichol 2021) and improved-diffusion (Nichol and Dhariwal 2021).

Parameters have the names of their files, so weights load without renaming. A test compares with their code.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from rrcm.config import Count, Positive
from rrcm.models.folders import MAX_LEVELS, Depth, Entries, ImageSize
from rrcm.models.vit import attention, sinusoidal_embedding

PARTS = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")  # prefixes of its parameters
HEAD_CHANNELS = 64  # of all guided-diffusion models that were released
# Image size by the multipliers of the channels on each level: the defaults of both repositories.
IMAGE_SIZES = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}

Resample = Callable[[torch.Tensor], torch.Tensor]


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Each pixel four times: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: torch.Tensor) -> torch.Tensor:
    """The mean of each 2x2 pixels: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups, as everywhere in this network."""
    return nn.GroupNorm(32, channels)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut. The time shifts what is between them, with `scale_shift` it also scales.

    `resample` (`upsample` or `downsample`) comes before the first convolution and in the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        time_dim: int,
        scale_shift: bool,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample or nn.Identity()
        self.in_layers = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, (1 + scale_shift) * channels))
        dropout = nn.Identity()  # in training; it keeps the place in the parameters' names
        self.out_layers = nn.Sequential(
            group_norm(channels), nn.SiLU(), dropout, nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, H, W), embedded time (B, time_dim) -> (B, channels, H, W), resampled."""
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        shift = self.emb_layers(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + shift)
        return self.skip_connection(self.resample(x)) + self.out_layers[1:](h)


class AttentionBlock(nn.Module):
    """Self-attention over pixels, with a shortcut.

    The rows of `qkv` are sorted by head first, then into q, k and v ("legacy order"), or with `qkv_first` the other way
    round (`use_new_attention_order` in the authors' code).
    """

    def __init__(self, channels: int, num_heads: int | None, qkv_first: bool = False):
        super().__init__()
        self.qkv_first = qkv_first
        self.num_heads = num_heads or channels // HEAD_CHANNELS
        if not self.num_heads or channels % self.num_heads:
            into = f"{num_heads} heads" if num_heads else f"heads of {HEAD_CHANNELS}; give num_heads"
            raise ValueError(f"{channels} channels do not divide into {into}")
        self.norm = group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        pixels = x.flatten(2)  # (B, C, HW)
        order = (3, self.num_heads, -1) if self.qkv_first else (self.num_heads, 3, -1)
        qkv = self.qkv(self.norm(pixels)).unflatten(1, order)  # (B, *order with C / heads, HW)
        attended = attention(*qkv.mT.unbind(1 if self.qkv_first else 2)).mT.flatten(1, 2)
        return (pixels + self.proj_out(attended)).view_as(x)


class Downsample(nn.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.op(x)


class Upsample(nn.Module):
    """`upsample`, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(upsample(x))


class Layers(nn.ModuleList):
    """Layers in turn. Residual blocks are given the time as well."""

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), embedded time (B, time_dim) -> (B, C', H', W')."""
        for layer in self:
            x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
        return x


class Sizes(Entries):
    """What says how to build the UNet. Level i works at image_size / 2^i pixels."""

    image_size: ImageSize
    channels: Count
    out_channels: Count  # twice `channels` if the network also predicts a variance
    model_channels: Count  # of the embedding of the time
    level_channels: Annotated[list[Count], Field(min_length=1, max_length=MAX_LEVELS)]  # for each level
    num_res_blocks: Depth  # per level
    attention_levels: list[int]
    num_heads: Count | None  # None: one per 64 channels
    scale_shift: bool
    resblock_updown: bool  # between levels are residual blocks that resample; else convolutions
    time_scale: Positive  # the time that the network is given, per step of the diffusion
    qkv_first: bool = False  # the rows of `qkv` are sorted into q, k and v first ("new attention order"), else by head


class GuidedDiffusionUNet(nn.Module):
    """The UNet of guided-diffusion without classes."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.architecture = {"network": "guided_diffusion", **sizes.model_dump()}
        self.image_size, self.channels, self.out_channels = sizes.image_size, sizes.channels, sizes.out_channels
        self.model_channels, self.time_scale = sizes.model_channels, sizes.time_scale
        time_dim = 4 * sizes.model_channels

        def res_block(before: int, after: int, resample: Resample | None = None) -> ResBlock:
            return ResBlock(before, after, time_dim, sizes.scale_shift, resample)

        def attention_of(level: int) -> list[AttentionBlock]:
            needed = level in sizes.attention_levels
            return [AttentionBlock(sizes.level_channels[level], sizes.num_heads, sizes.qkv_first)] if needed else []

        self.time_embed = nn.Sequential(
            nn.Linear(sizes.model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        width = sizes.level_channels[0]
        self.input_blocks = nn.ModuleList([Layers([nn.Conv2d(sizes.channels, width, 3, padding=1)])])
        skipped = [width]  # channels of what each block on the way down hands to the way up
        for level, after in enumerate(sizes.level_channels):
            for _ in range(sizes.num_res_blocks):
                self.input_blocks.append(Layers([res_block(width, after), *attention_of(level)]))
                width = after
                skipped.append(width)
            if level < len(sizes.level_channels) - 1:
                down = res_block(width, width, downsample) if sizes.resblock_updown else Downsample(width)
                self.input_blocks.append(Layers([down]))
                skipped.append(width)
        middle = AttentionBlock(width, sizes.num_heads, sizes.qkv_first)
        self.middle_block = Layers([res_block(width, width), middle, res_block(width, width)])
        self.output_blocks = nn.ModuleList()
        for level, after in reversed(list(enumerate(sizes.level_channels))):
            for block in range(sizes.num_res_blocks + 1):
                layers = Layers([res_block(width + skipped.pop(), after), *attention_of(level)])
                width = after
                if level and block == sizes.num_res_blocks:
                    layers.append(res_block(width, width, upsample) if sizes.resblock_updown else Upsample(width))
                self.output_blocks.append(layers)
        self.out = nn.Sequential(group_norm(width), nn.SiLU(), nn.Conv2d(width, sizes.out_channels, 3, padding=1))

    def set_order(self, qkv_first: bool) -> None:
        """Read the rows of every `qkv` in the other order or in the same: see `AttentionBlock`."""
        self.architecture["qkv_first"] = qkv_first
        for module in self.modules():
            if isinstance(module, AttentionBlock):
                module.qkv_first = qkv_first

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """x (B, channels, H, W) float, rounded to the network's dtype; step (B,) -> (B, out_channels, H, W)."""
        dtype = self.time_embed[0].weight.dtype
        time = self.time_embed(sinusoidal_embedding(step * self.time_scale, self.model_channels).to(dtype))
        x, skipped = x.to(dtype), []
        for block in self.input_blocks:
            x = block(x, time)
            skipped.append(x)
        x = self.middle_block(x, time)
        for block in self.output_blocks:
            x = block(torch.cat([x, skipped.pop()], dim=1), time)
        return self.out(x)


def read_sizes(
    weights: Mapping[str, torch.Tensor], *, image_size: int | None, num_heads: int | None, num_steps: int
) -> Sizes:
    """The sizes of the UNet that has these weights.

    `image_size` None stands for that of the repositories' model with the same levels. The network's time is the step's
    on a scale from 0 to 1000, whatever the number of steps. Raises `ValueError` or `KeyError` for other weights.
    """
    if strange := [part for part in PARTS if not any(name.startswith(part) for name in weights)]:
        raise ValueError(f"no weights are called {strange[0]}*")
    if any(name.startswith("label_emb.") for name in weights):
        raise ValueError("it is conditional on classes; use an unconditional one")
    num_blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("output_blocks."))
    goes_up = re.compile(r"output_blocks\.(\d+)\.[12]\.(in_layers|conv)\.")  # after the block there is a higher level
    blocks_per_level = 1 + min((int(m[1]) for name in weights if (m := goes_up.match(name))), default=num_blocks - 1)
    first = [f"input_blocks.{1 + number}" for number in range(0, num_blocks, blocks_per_level)]  # of each level
    level_channels = [len(weights[f"{block}.0.out_layers.3.weight"]) for block in first]
    model_channels = weights["time_embed.0.weight"].shape[1]
    if image_size is None:
        multipliers = tuple(channels / model_channels for channels in level_channels)
        if multipliers not in IMAGE_SIZES:
            raise ValueError("its image size cannot be told; give image_size")
        image_size = IMAGE_SIZES[multipliers]
    return Sizes(
        image_size=image_size,
        channels=weights["input_blocks.0.0.weight"].shape[1],
        out_channels=len(weights["out.2.weight"]),
        model_channels=model_channels,
        level_channels=level_channels,
        num_res_blocks=blocks_per_level - 1,
        attention_levels=[level for level, block in enumerate(first) if f"{block}.1.qkv.weight" in weights],
        num_heads=num_heads,
        scale_shift=len(weights["input_blocks.1.0.emb_layers.1.weight"]) == 2 * level_channels[0],
        resblock_updown=not any(name.endswith(".op.weight") for name in weights),
        time_scale=1000 / num_steps,
    )


def named_schedule(schedule: str, num_steps: int) -> torch.Tensor:
    """abar_k of the schedule "linear" (Ho et al. 2020) or "cosine" (Nichol and Dhariwal 2021): (num_steps,) float64.

    Raises `ValueError` for other names.
    """
    if schedule == "linear":
        betas = torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps, dtype=torch.float64)
    elif schedule == "cosine":
        time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        abar = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"beta_schedule = {schedule!r} must be linear or cosine")
    return (1 - betas).cumprod(0)
