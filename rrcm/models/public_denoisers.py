"""Public diffusion models as denoisers: of the package diffusers, and of OpenAI's guided-diffusion.

Nothing in their files is run: weights are safetensors, or checkpoints of torch that hold tensors only.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from rrcm.models.denoiser import DiffusersUNet, DiscreteDenoiser, import_diffusers
from rrcm.models.guided_diffusion import GuidedDiffusionUNet, named_schedule, read_sizes
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, read_json
from rrcm.utils.tensors import load_tensors, load_weights

HUB = "hf-hub:"
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
LATENT = ("vae", "vqvae")  # parts of a pipeline whose UNet does not see images
# Names of the layers of attention before version 0.12 of diffusers.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_public_denoiser(
    source: Path | str,
    *,
    image_size: int | None = None,  # side in pixels, where the model does not tell it
    num_heads: int | None = None,  # of guided-diffusion; None: one per 64 channels
    beta_schedule: str = "linear",  # of guided-diffusion; or "cosine"
    num_steps: int = 1000,  # of guided-diffusion
) -> DiscreteDenoiser:
    """Load a public diffusion model without conditions as a denoiser, in eval mode.

    `source` is one of these:
    - a folder that diffusers has saved: a pipeline, or a UNet2DModel with a scheduler_config.json beside it
    - `hf-hub:owner/name` or `hf-hub:owner/name@revision`: such a folder on the Hugging Face hub
    - a file with the weights of OpenAI's guided-diffusion or improved-diffusion (.pt), which predict epsilon. Heads and
      schedule cannot be read off the weights. The defaults are those of 256x256_diffusion_uncond.pt. The CIFAR-10 model
      of improved-diffusion has num_heads 4 and 4000 steps of the cosine schedule.

    Raises `RRCMError` for anything else, for models with conditions or of latent images, and for damaged files.
    """
    source = str(source)
    path = expand_user(source)
    if path.is_file():
        return _load_guided_diffusion(path, image_size, num_heads, beta_schedule, num_steps)
    if (num_heads, beta_schedule, num_steps) != (None, "linear", 1000):
        raise RRCMError(f"{source}: num_heads, beta_schedule and num_steps are for a file of guided-diffusion")
    if source.startswith(HUB):
        return _load_diffusers(_download(source), source, image_size)
    if path.is_dir():
        return _load_diffusers(path, source, image_size)
    raise RRCMError(f"{source}: no such file or folder; a model on the hub is called {HUB}owner/name")


def _load_diffusers(folder: Path, source: str, image_size: int | None) -> DiscreteDenoiser:
    pipeline = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    if latent := next((part for part in LATENT if part in pipeline), None):
        raise RRCMError(f"{source}: its UNet denoises the latent images of a {latent}; use a model of pixels")
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(unet / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != "UNet2DModel":
        raise RRCMError(f"{source}: its network is {name or 'not of diffusers'}, must be an unconditional UNet2DModel")
    config |= {} if image_size is None else {"sample_size": image_size}
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    schedule = _read_schedule(source, scheduler / "scheduler_config.json")
    try:
        denoiser = DiscreteDenoiser(DiffusersUNet(config), *schedule)
    except RRCMError:
        raise
    except Exception as error:  # the library raises its own
        raise RRCMError(f"{source}: cannot be loaded ({one_line(error)})") from None
    weights = next((unet / name for name in WEIGHTS if (unet / name).is_file()), unet / WEIGHTS[0])
    load_weights(denoiser.network.unet, new_names(load_tensors(weights)), weights)
    return denoiser.eval()


def _read_schedule(source: str, path: Path) -> tuple[torch.Tensor, str]:
    """The alphas_cumprod (K,) and the prediction type of a scheduler's config."""
    config = read_json(path)
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in SCHEDULERS:
        raise RRCMError(f"{source}: its scheduler is {name!r}, must be {' or '.join(SCHEDULERS)}")
    diffusers = import_diffusers()
    try:
        scheduler = getattr(diffusers, name).from_config(config)
    except Exception as error:  # the library raises its own
        raise RRCMError(f"{path}: describes no {name} ({one_line(error)})") from None
    return scheduler.alphas_cumprod, scheduler.config.prediction_type


def new_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a UNet2DModel under today's names."""
    old = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(OLD_NAMES)})(?=\.)")
    return {old.sub(lambda m: f"{m[1]}.{OLD_NAMES[m[2]]}", name): tensor for name, tensor in tensors.items()}


def _load_guided_diffusion(
    path: Path, image_size: int | None, num_heads: int | None, beta_schedule: str, num_steps: int
) -> DiscreteDenoiser:
    weights = load_tensors(path)
    try:
        sizes = read_sizes(weights, image_size=image_size, num_heads=num_heads, num_steps=num_steps)
        alphas_cumprod = named_schedule(beta_schedule, num_steps)
        denoiser = DiscreteDenoiser(GuidedDiffusionUNet(sizes), alphas_cumprod, "epsilon")
    except KeyError as error:
        raise RRCMError(f"{path}: not a UNet of guided-diffusion (has no {error.args[0]})") from None
    except (ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise RRCMError(f"{path}: not a UNet of guided-diffusion that can be loaded ({one_line(error)})") from None
    load_weights(denoiser.network, weights, path)
    return denoiser.eval()


def _download(name: str) -> Path:
    """The folder of the model in the cache of the hub."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise RRCMError(f"{name}: must be {HUB}owner/name or {HUB}owner/name@revision")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry
    try:
        for weights in WEIGHTS:
            wanted = ["*.json", weights, f"unet/{weights}"]
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
            if any((folder / place / weights).is_file() for place in ("", "unet")):
                break
    except Exception as error:  # the hub and the protocols each raise their own
        raise RRCMError(f"{name}: cannot be downloaded ({one_line(error)}); pass a local folder of it") from None
    return folder
