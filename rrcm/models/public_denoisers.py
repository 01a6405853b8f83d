"""Public diffusion models of the package diffusers as denoisers.

No code from their files is executed: weights are safetensors, or torch checkpoints that contain only tensors.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from rrcm.models.denoiser import PREDICTIONS, Denoiser, DiffusersUNet, DiscreteDenoiser, import_diffusers
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import expand_user, read_json
from rrcm.utils.tensors import load_tensors, load_weights

HUB = "hf-hub:"
MIN_IMAGES = 8  # images that a denoiser is tried on
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
LATENT = ("vae", "vqvae")  # parts of a pipeline whose UNet works on latent images
# Names of attention layers before version 0.12 of diffusers.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_public_denoiser(source: Path | str, images: torch.Tensor, sigmas: Sequence[float]) -> DiscreteDenoiser:
    """Load a public diffusion model as `read_public_denoiser` does, and make sure that it denoises.

    `images` (N, C, H, W) float in [0, 1] are at least MIN_IMAGES clean images of the denoiser's domain and size. For
    each of the pixel `sigmas`, its mean squared error on them must be smaller than the error of the best linear
    denoiser of each pixel, and no other prediction type may give a smaller error. The device of the images computes.

    Raises `RRCMError` as `read_public_denoiser` does, and if the model does not denoise or needs images of another
    size.
    """
    if images.ndim != 4 or len(images) < MIN_IMAGES:
        raise RRCMError(f"{source}: needs {MIN_IMAGES} images (N, C, H, W) to be tried on, got {tuple(images.shape)}")
    denoiser = read_public_denoiser(source, image_size=images.shape[-1])
    if images.shape[1:] != (denoiser.channels, denoiser.image_size, denoiser.image_size):
        raise RRCMError(
            f"{source}: is for images of {denoiser.channels} x {denoiser.image_size} pixels, not of "
            f"{images.shape[1]} x {images.shape[-1]}; choose another"
        )
    denoiser, stated = denoiser.to(images.device), denoiser.prediction_type
    trials = {}
    for prediction_type in (stated, *sorted(PREDICTIONS.keys() - {stated})):
        denoiser.prediction_type = prediction_type
        trials[prediction_type] = denoising_errors(denoiser, images, sigmas)
    denoiser.prediction_type = stated
    best = min(trials, key=lambda prediction_type: sum(error for error, _ in trials[prediction_type]))
    for sigma, (error, linear) in zip(sigmas, trials[best], strict=True):
        if not error < linear:
            raise RRCMError(
                f"{source}: does not denoise: at sigma {sigma:g} its mean squared error is {error:.2g}, but "
                f"{linear:.2g} for the best linear denoiser; is it for such images, is its schedule right?"
            )
    if best != stated:
        raise RRCMError(f"{source}: predicts {best}, not {stated}: so it denoises best; correct its scheduler")
    return denoiser


@torch.no_grad()
def denoising_errors(denoiser: Denoiser, images: torch.Tensor, sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """For each pixel sigma, the mean squared errors of the denoiser and of the best linear denoiser.

    `images` (N, C, H, W) are in [0, 1]. The errors are averages over all numbers, in model space. The linear denoiser
    knows the mean m and variance v of each number. Its estimate m + v / (v + t^2) (x - m) has the error
    v t^2 / (v + t^2).
    """
    clean, errors = 2 * images.float() - 1, []
    variance = clean.var(dim=0)
    for sigma in sigmas:
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean.device)
        noisy, t = clean + 2 * sigma * noise, 2 * sigma
        estimate = torch.cat([denoiser(row, t).clamp(-1, 1) for row in noisy.split(1)])  # one image at a time
        linear = variance * t**2 / (variance + t**2)
        errors.append((float((estimate - clean).square().mean()), float(linear.mean())))
    return errors


def read_public_denoiser(source: Path | str, *, image_size: int | None = None) -> DiscreteDenoiser:
    """Read a public unconditional diffusion model as a denoiser, in eval mode, without trying it.

    `source` is one of these:
    - a folder that diffusers has saved: a pipeline, or a UNet2DModel with a scheduler_config.json beside it
    - `hf-hub:owner/name` or `hf-hub:owner/name@revision`: such a folder on the Hugging Face hub

    `image_size` is the side in pixels, for a model whose config does not give it. Raises `RRCMError` for any other
    source, for conditional models, for models of latent images, and for damaged files.
    """
    source = str(source)
    path = expand_user(source)
    if path.is_file():
        raise RRCMError(f"{source}: is a file; give a folder that diffusers has saved, or {HUB}owner/name")
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
    if config.get("sample_size") is None:
        config |= {"sample_size": image_size}
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
    """The alphas_cumprod (K,) and the prediction type in a scheduler's config."""
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
    """Rename the weights of an old UNet2DModel to the current names."""
    old = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(OLD_NAMES)})(?=\.)")
    return {old.sub(lambda m: f"{m[1]}.{OLD_NAMES[m[2]]}", name): tensor for name, tensor in tensors.items()}


def _download(name: str) -> Path:
    """Download a model. Returns its folder in the hub's cache."""
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
    except Exception as error:  # the hub and the protocols raise all kinds of exceptions
        raise RRCMError(f"{name}: cannot be downloaded ({one_line(error)}); pass a local folder of it") from None
    return folder
