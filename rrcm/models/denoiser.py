"""Denoisers D(x; t), which estimate the mean of the clean image given a noisy one (Karras et al. 2022).

The model folder has `kind` "denoiser". Images are in model space, with pixels in [-1, 1], and t is the standard
deviation of their noise there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import nn

from rrcm.config import Count, UNetSettings
from rrcm.models.checkpoints import ViTSizes, architecture
from rrcm.models.folders import (
    MAX_LEVELS,
    WEIGHTS,
    Depth,
    Entries,
    ImageSize,
    check_kind,
    load_network,
    parse_entries,
    read_model_config,
    write_model_folder,
)
from rrcm.models.vit import SIGMA_DATA, NoiseConditionedViT, forward_in_chunks
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.tensors import load_tensors


class Preconditioning(NamedTuple):
    """The factors of D(x; t) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, table 1)."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


def preconditioning(t: torch.Tensor) -> Preconditioning:
    """The factors at noise levels t > 0, each of the shape of t."""
    variance = t.square() + SIGMA_DATA**2
    return Preconditioning(SIGMA_DATA**2 / variance, t * SIGMA_DATA * variance.rsqrt(), variance.rsqrt(), t.log() / 4)


def loss_weight(t: torch.Tensor) -> torch.Tensor:
    """lambda(t) = (t^2 + sd^2) / (t sd)^2, which gives F's squared error the same weight at all levels (table 1)."""
    return (t.square() + SIGMA_DATA**2) / (t * SIGMA_DATA).square()


class Denoiser(nn.Module):
    """Estimates clean images from noisy ones in a single step."""

    image_size: int
    channels: int

    def forward(self, noisy: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """noisy (B, C, H, W) float32: images in [-1, 1] plus noise of standard deviation t, one number or (B,).

        Returns (B, C, H, W) float32, not clipped.
        """
        raise NotImplementedError


class PixelViT(nn.Module):
    """F: the noise-conditioned ViT with a linear head that turns each patch token into pixels.

    The ViT itself scales its input by c_in and has a token for the noise level.
    """

    def __init__(self, encoder: NoiseConditionedViT):
        super().__init__()
        self.encoder = encoder
        self.image_size, self.channels = encoder.patch_embed.img_size[0], encoder.in_chans
        self.architecture = {"network": "vit", **architecture(encoder)}
        self.head = nn.Linear(encoder.embed_dim, encoder.in_chans * encoder.patch_embed.patch_size[0] ** 2)
        nn.init.zeros_(self.head.weight)  # as in EDM, so that D starts as c_skip x
        nn.init.zeros_(self.head.bias)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """noisy (B, C, H, W), t (B,) -> (B, C, H, W)."""
        patches = self.head(self.encoder.patch_tokens(noisy, t))
        size, side = self.encoder.patch_embed.img_size, self.encoder.patch_embed.patch_size
        return F.fold(patches.mT, size, side, stride=side)


class UNet(nn.Module):
    """F: the UNet of Ho et al. (2020) in the package `diffusers`.

    Level i works at image_size / 2^i pixels with base_channels * channel_mults[i] channels. Self-attention follows its
    residual blocks if it is in `attention_levels`. There is also attention between the way down and the way up, unless
    no level has any.

    Raises `RRCMError` for sizes that do not fit together, and without `diffusers`.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        base_channels: int,
        channel_mults: Sequence[int],
        layers_per_block: int,
        attention_levels: Sequence[int],
    ):
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.architecture = {
            "network": "unet",
            "image_size": image_size,
            "channels": channels,
            "base_channels": base_channels,
            "channel_mults": list(channel_mults),
            "layers_per_block": layers_per_block,
            "attention_levels": list(attention_levels),
        }
        depth = len(channel_mults)
        if image_size % 2 ** (depth - 1):
            raise RRCMError(
                f"a UNet of {depth} levels needs images of a multiple of {2 ** (depth - 1)} pixels, not {image_size}"
            )
        if base_channels % 4:
            raise RRCMError(f"the base channels of a UNet must be a multiple of 4, not {base_channels}")
        if unknown := sorted(set(attention_levels) - set(range(depth))):
            raise RRCMError(
                f"a UNet of {depth} levels has attention at some of the levels 0 to {depth - 1}, not at {unknown}"
            )
        kinds = ["Attn" if level in attention_levels else "" for level in range(depth)]
        self.unet = import_diffusers().UNet2DModel(
            sample_size=image_size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=[base_channels * factor for factor in channel_mults],
            layers_per_block=layers_per_block,
            down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
            add_attention=bool(attention_levels),
            attention_head_dim=math.gcd(64, base_channels),
            norm_num_groups=math.gcd(32, base_channels // 4),
        )
        _sort_defaults(self.unet)
        nn.init.zeros_(self.unet.conv_out.weight)  # as in EDM, so that D starts as c_skip x
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """noisy (B, C, H, W) float32, t (B,) -> (B, C, H, W)."""
        scaled = preconditioning(t[:, None, None, None]).c_in * noisy
        return self.unet(scaled.to(self.unet.conv_in.weight.dtype), 250 * t.log(), return_dict=False)[0]


def import_diffusers() -> ModuleType:
    """Import the optional package `diffusers`. Raises `RRCMError` if it is not installed."""
    try:
        import diffusers  # takes seconds
    except ImportError:
        raise RRCMError("this denoiser needs the package diffusers; run `pip install 'rrcm[diffusers]'`") from None
    return diffusers


def _sort_defaults(unet: nn.Module) -> None:
    """Sort the names of settings with default values. diffusers lists them in random order.

    A stopped run is resumed only by a process that describes the network in the same way.
    """
    unet.register_to_config(_use_default_values=sorted(unet.config.get("_use_default_values", [])))


class DiffusersLayers(Entries):
    """The entries of a UNet2DModel's config that decide how many layers it has."""

    model_config = ConfigDict(extra="ignore")

    layers_per_block: Depth = 2  # the library's default
    block_out_channels: Annotated[Sequence[Count], Field(max_length=MAX_LEVELS)] = ()
    sample_size: ImageSize | Sequence[int] | None = None


class DiffusersUNet(nn.Module):
    """A `diffusers.UNet2DModel` with its own `config`, trained on the steps of a discrete diffusion.

    Raises `ValueError` for conditional models and for images that are not square.
    """

    def __init__(self, config: Mapping):
        super().__init__()
        for name in ("class_embed_type", "num_class_embeds"):
            if config.get(name) is not None:
                raise ValueError(f"it is conditional on classes ({name}); use an unconditional one")
        DiffusersLayers.model_validate(config)
        self.unet = import_diffusers().UNet2DModel.from_config(dict(config))
        _sort_defaults(self.unet)
        config = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}
        self.architecture = {"network": "diffusers", "config": config}
        size = config["sample_size"]
        height, width = size if isinstance(size, Sequence) else (size, size)
        if height != width or not isinstance(width, int):
            raise ValueError(f"sample_size {size} is not the side of square images; give image_size")
        self.image_size, self.channels, self.out_channels = width, config["in_channels"], config["out_channels"]

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """x (B, channels, H, W) float, rounded to the network's dtype; step (B,) -> (B, out_channels, H, W)."""
        return self.unet(x.to(self.unet.conv_in.weight.dtype), step, return_dict=False)[0]


class PixelViTSizes(ViTSizes):
    """The arguments of the encoder of a `PixelViT`."""

    condition_dim: None = Field(default=None, exclude=True)  # null in folders of earlier versions


class UNetSizes(Entries, UNetSettings):
    """The arguments of a `UNet`."""

    image_size: ImageSize
    channels: Literal[1, 3]
    channel_mults: Annotated[list[Count], Field(min_length=1, max_length=MAX_LEVELS)]
    layers_per_block: Depth


class DiffusersConfig(Entries):
    """The argument of a `DiffusersUNet`."""

    config: dict[str, object]


class NetworkKind(NamedTuple):
    """A kind of network: the entries of its architecture, and the function that builds it from their values."""

    entries: type[Entries]
    build: Callable[..., nn.Module]


# Kinds of networks, by the entry `network` of the architecture in config.json.
NETWORKS = {
    "vit": NetworkKind(PixelViTSizes, lambda **sizes: PixelViT(ViTSizes(**sizes).build())),
    "unet": NetworkKind(UNetSizes, UNet),
    "diffusers": NetworkKind(DiffusersConfig, DiffusersUNet),
}


class EDMDenoiser(Denoiser):
    """D(x; t) = c_skip x + c_out F(c_in x; c_noise) with the network F."""

    def __init__(self, network: PixelViT | UNet):
        super().__init__()
        self.network = network
        self.image_size, self.channels = network.image_size, network.channels

    def forward(self, noisy: torch.Tensor, t: torch.Tensor | float, *, num_chunks: int = 1) -> torch.Tensor:
        """As `Denoiser.forward`.

        With `num_chunks` above 1 the network processes the batch in chunks, which saves memory in training.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=noisy.device).expand(len(noisy))
        output = forward_in_chunks(self.network, num_chunks, noisy, t).float()
        factors = preconditioning(t[:, None, None, None])
        return factors.c_skip * noisy + factors.c_out * output


def discrete_levels(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The noise level t_k of each step k of a discrete diffusion, in model space: (K,) -> (K,).

    The diffusion scales images: x_k = abar_k^(1/2) clean + (1 - abar_k)^(1/2) noise. Hence x_k / abar_k^(1/2) is the
    clean image plus noise of standard deviation t_k = ((1 - abar_k) / abar_k)^(1/2).
    """
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


def nearest_step(levels: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The step whose log level, among `levels` (K,), is nearest to ln t: t of any shape -> int64 of the same shape."""
    return (levels.log() - t.to(levels.dtype).log()[..., None]).abs().argmin(-1)


def diffusion_input(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """abar^(1/2) x, where abar = 1 / (1 + t^2)."""
    return x / (1 + t.square()).sqrt()


def clean_from_epsilon(x: torch.Tensor, epsilon: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The clean image, given x and its noise of variance 1 (Ho et al. 2020)."""
    return x - t * epsilon


def clean_from_v(x: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The clean image, given x and v = abar^(1/2) noise - (1 - abar)^(1/2) clean (Salimans and Ho 2022)."""
    return x / (1 + t.square()) - v * t / (1 + t.square()).sqrt()


def clean_from_sample(x: torch.Tensor, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The clean image, which the network predicts itself."""
    return sample


# Functions by diffusers' prediction_type: x (B, C, H, W), the network's output for `diffusion_input`, t -> clean image.
PREDICTIONS = {"epsilon": clean_from_epsilon, "v_prediction": clean_from_v, "sample": clean_from_sample}


class DiscreteDenoiser(Denoiser):
    """D(x; t) with a network that was trained on the steps of a discrete diffusion (Ho et al. 2020).

    `network(x, step)` maps (B, C, H, W) and (B,) int64 to (B, C, H, W), or to (B, 2C, H, W) with a variance, which is
    ignored. `prediction_type`, a key of PREDICTIONS, says what it predicts. `alphas_cumprod` (K,) is abar_k.

    The network is conditioned on the step k nearest to t. Everything else uses t itself, so the input has the variance
    that the diffusion would give it. Using the step's level t_k instead would give D(x; t_k). For the best network and
    data of standard deviation SIGMA_DATA, this is further from D(x; t) at pixel sigmas up to .75 (a test checks it).

    Raises `ValueError` for arguments that do not fit together.
    """

    def __init__(self, network: nn.Module, alphas_cumprod: torch.Tensor, prediction_type: str):
        super().__init__()
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type {prediction_type!r} must be epsilon, v_prediction or sample")
        self.network, self.prediction_type = network, prediction_type
        self.image_size, self.channels = network.image_size, network.channels
        if self.channels not in (1, 3) or network.out_channels not in (self.channels, 2 * self.channels):
            raise ValueError(f"it maps {self.channels} channels to {network.out_channels}, so it is not for images")
        self.alphas_cumprod = alphas_cumprod.double().cpu()  # not a buffer, which `bfloat16()` would round
        between = torch.cat([torch.ones(1), self.alphas_cumprod, torch.zeros(1)]).diff()
        if not ((between <= 0).all() and (between[1:-1] < 0).all()):
            raise ValueError("alphas_cumprod must fall, from 1 at most to 0 at least")
        self.levels = discrete_levels(self.alphas_cumprod)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """As `Denoiser.forward`."""
        t = torch.as_tensor(t, dtype=torch.float32)
        step = nearest_step(self.levels.to(t.device), t)
        t, step = (number.to(noisy.device).expand(len(noisy)) for number in (t, step))
        t = t[:, None, None, None]
        prediction = self.network(diffusion_input(noisy, t), step)[:, : self.channels].float()
        return PREDICTIONS[self.prediction_type](noisy, prediction, t)


def save_denoiser(
    folder: Path, denoiser: EDMDenoiser | DiscreteDenoiser, *, sigmas: Sequence[float] = (), **metadata: object
) -> None:
    """Write the model folder of a denoiser. `metadata` (JSON-able) is added to config.json.

    For a `DiscreteDenoiser`, config.json also lists the step that is used for each of the pixel `sigmas`.
    """
    config = {"kind": "denoiser", "architecture": denoiser.network.architecture}
    tensors = denoiser.state_dict()
    if isinstance(denoiser, DiscreteDenoiser):
        config |= {"prediction_type": denoiser.prediction_type}
        config |= {"learned_variance": denoiser.network.out_channels > denoiser.channels}
        config |= {"discrete_steps": [_step_of(denoiser.levels, sigma) for sigma in sigmas]}
        tensors["alphas_cumprod"] = denoiser.alphas_cumprod
    write_model_folder(folder, config | metadata, tensors)


def _step_of(levels: torch.Tensor, sigma: float) -> dict[str, float]:
    step = int(nearest_step(levels, torch.tensor(2 * sigma)))
    return {"sigma": sigma, "step": step, "sigma_of_step": float(levels[step]) / 2}


class NetworkName(Entries):
    """The name of a network. The entries beside it belong to its kind."""

    model_config = ConfigDict(extra="allow")

    network: Literal["vit", "unet", "diffusers"]


class DenoiserEntries(Entries):
    """The entries of config.json that describe a denoiser."""

    model_config = ConfigDict(extra="ignore")

    architecture: NetworkName
    prediction_type: str | None = None  # of a `DiscreteDenoiser`


def load_denoiser(folder: Path | str, sha256: str | None = None) -> EDMDenoiser | DiscreteDenoiser:
    """Load the denoiser in a model folder, in eval mode.

    `sha256` is the hash that a larger model names, if this is a part of it. Raises `RRCMError` for a folder that is
    damaged, has another hash, or is of another kind.
    """
    folder = Path(folder)
    config = read_model_config(folder, sha256)
    check_kind(folder, config, ("denoiser",))
    entries = parse_entries(folder, config, DenoiserEntries)
    kind = NETWORKS[entries.architecture.network]
    sizes = parse_entries(folder, entries.architecture.model_extra, kind.entries).model_dump()
    tensors = load_tensors(folder / WEIGHTS)
    alphas_cumprod = tensors.pop("alphas_cumprod", None)
    tensors = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
    network = load_network(folder, lambda: kind.build(**sizes), tensors)
    if entries.prediction_type is None:
        return EDMDenoiser(network).eval()
    try:
        return DiscreteDenoiser(network, alphas_cumprod, entries.prediction_type).eval()
    except (ValueError, TypeError, AttributeError) as error:
        raise RRCMError(f"{folder}: is no denoiser ({one_line(error)}); train it again or dvc pull") from None
