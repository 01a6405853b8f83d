"""Base classifiers that denoise first and then classify: DDS, DensePure, DiffSmooth.

Their model folder has `kind` "denoised". Its config.json names the folders of a denoiser and a classifier by relative
path and hash. The folder contains only weights that were trained for it.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from torch import nn

from rrcm.config import Count, NonNegative, Positive
from rrcm.models import DENOISING_CLASSIFIERS
from rrcm.models.base_classifiers import BaseClassifier, Draw, part_logits
from rrcm.models.denoiser import Denoiser, load_denoiser
from rrcm.models.folders import ClassNames, Entries, Part, Place, Sha256, parse_entries, write_model_folder
from rrcm.models.kinds import LoadedClassifier, load_model_folder, refuse_within
from rrcm.models.load import load_base_classifier
from rrcm.models.sampler import reverse_levels, reverse_sde
from rrcm.utils.errors import RRCMError
from rrcm.utils.pixels import to_model_space
from rrcm.utils.tensors import sha256_tensors


def clipped(denoiser: Denoiser, x: torch.Tensor, t: float) -> torch.Tensor:
    """D(x; t), clipped to the range of images: (B, C, H, W) float32 in [-1, 1]."""
    return denoiser(x, t).clamp(-1, 1)


def denoise_pixels(denoiser: Denoiser, noisy: torch.Tensor, *, sigma: float) -> torch.Tensor:
    """The clipped estimate in pixels: (B, C, H, W) float32 in [0, 1] plus noise of pixel `sigma` -> in [0, 1]."""
    return (clipped(denoiser, to_model_space(noisy), 2 * sigma) + 1) / 2


class DenoisedClassifier(BaseClassifier):
    """A denoiser followed by a classifier of clean images. The denoiser is conditioned on one pixel sigma."""

    keeps_float32_input = True

    def __init__(self, denoiser: Denoiser, classifier: BaseClassifier, sigma: float, classifier_size: int):
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier
        self.num_classes, self.sigma, self.classifier_size = classifier.num_classes, sigma, classifier_size

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Denoised images, (B, C, H, W) float32 -> logits (B, K) float32."""
        if pixels.shape[-1] != self.classifier_size:  # an external classifier may expect another size
            size = (self.classifier_size, self.classifier_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        return part_logits(self.classifier, pixels)


class DDS(DenoisedClassifier):
    """Denoised smoothing by one step of a diffusion model (Carlini et al. 2023)."""

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """noisy (B, C, H, W) float32: images in [0, 1] plus noise of pixel `sigma` -> logits (B, K)."""
        return self.classify(denoise_pixels(self.denoiser, noisy, sigma=self.sigma))


class DensePure(DenoisedClassifier):
    """The majority vote over several reverse processes from one noisy image (Xiao et al. 2023)."""

    stochastic = True

    def __init__(self, *parts: nn.Module, runs: int, steps: int, **options: float):
        super().__init__(*parts, **options)
        self.runs, self.steps = runs, steps  # K and b

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """As `DDS.forward`. The logits come from `majority_vote`."""
        levels = reverse_levels(2 * self.sigma, self.steps)
        choices = []
        for run in range(self.runs):

            def noise(step: int, run: int = run) -> torch.Tensor:
                return draw.normal(f"reverse run {run} step {step}", noisy.shape[1:])

            clean = reverse_sde(partial(clipped, self.denoiser), to_model_space(noisy), levels, noise)
            choices.append(self.classify((clean + 1) / 2).argmax(1))
        return majority_vote(torch.stack(choices, dim=1), self.num_classes)


def majority_vote(choices: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The votes for each class, (B, runs) int64 -> (B, num_classes) float32.

    To break ties, each chosen class gets an extra fraction of at most half a vote. The fraction is larger the earlier
    the class was chosen, so among classes with equally many votes the one that was chosen first wins.
    """
    chosen = F.one_hot(choices, num_classes)
    wait = chosen.argmax(1) / choices.shape[1]  # share of the runs before the first one that chose a class, in [0, 1)
    return chosen.sum(1) + (1 - wait) / 2 * chosen.amax(1)


class DiffSmooth(DenoisedClassifier):
    """One denoising step, then the mean probability over local noises (Zhang et al. 2023)."""

    stochastic = True

    def __init__(self, *parts: nn.Module, num_noise: int, local_sigma: float, **options: float):
        super().__init__(*parts, **options)
        self.num_noise, self.local_sigma = num_noise, local_sigma  # m and sigma', pixel units

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """As `DDS.forward`. The logits are the logarithm of the mean probabilities."""
        clean = denoise_pixels(self.denoiser, noisy, sigma=self.sigma)
        total = torch.zeros(len(noisy), self.num_classes, device=noisy.device)
        for copy in range(self.num_noise):
            noise = draw.normal(f"local noise {copy}", clean.shape[1:]) if self.local_sigma else 0.0
            total = total + self.classify(clean + self.local_sigma * noise).softmax(1)
        return (total / self.num_noise).clamp_min(torch.finfo(total.dtype).tiny).log()


class Runs(Entries):
    """The settings of `DensePure`."""

    runs: Count
    steps: Count


class LocalNoise(Entries):
    """The settings of `DiffSmooth`."""

    num_noise: Count
    local_sigma: NonNegative


SETTINGS = {"dds": Entries, "densepure": Runs, "diffsmooth": LocalNoise}  # as DENOISING_CLASSIFIERS


class PartElsewhere(Entries):
    """A classifier without a model folder: its name and the hash of its weights."""

    model: Place
    sha256: Sha256


class NamedParts(Entries):
    """The parts of a classifier that denoises first."""

    denoiser: Part
    classifier: dict[str, str]  # a Part or a PartElsewhere


class DenoisedEntries(Entries):
    """The entries of config.json that describe a classifier that denoises first."""

    model_config = ConfigDict(extra="ignore")

    denoised: Literal["dds", "densepure", "diffsmooth"]
    parts: NamedParts
    sigma: Positive  # pixel units
    settings: dict[str, object]  # of the class in SETTINGS
    class_names: ClassNames


def write_denoised(
    folder: Path,
    kind: str,
    parts: Mapping[str, Mapping[str, str]],
    class_names: list[str],
    *,
    sigma: float,
    settings: Mapping,
    **metadata: object,
) -> None:
    """Write config.json in `folder` for a classifier of `kind` (in DENOISING_CLASSIFIERS) and pixel noise `sigma`.

    `parts` are the `denoiser` and the `classifier`, each in the form that `part_of` returns. For a classifier without a
    model folder, `model` gives its name in place of the path, and the hash covers its weights. `settings` are the other
    arguments of the class. `metadata` (JSON-able) is added to config.json.
    """
    config = {"kind": "denoised", "denoised": kind, "parts": dict(parts), "sigma": sigma}
    write_model_folder(folder, config | {"settings": settings, "class_names": class_names} | metadata)


def load_denoised(folder: Path, config: dict) -> LoadedClassifier:
    """The loader of kind "denoised" in `rrcm.models.FOLDER_LOADERS`."""
    entries = parse_entries(folder, config, DenoisedEntries)
    settings = parse_entries(folder, entries.settings, SETTINGS[entries.denoised]).model_dump()
    named = entries.parts
    if "model" in named.classifier:
        part = parse_entries(folder, named.classifier, PartElsewhere)
        loaded = load_base_classifier(part.model)
        if sha256_tensors(loaded.classifier.state_dict()) != part.sha256:
            raise RRCMError(f"{part.model}: has other weights than {folder}/config.json names; train it again")
    else:
        part = parse_entries(folder, named.classifier, Part)
        loaded = load_model_folder(folder / part.path, part.sha256)
    refuse_within(folder, loaded.classifier, DenoisedClassifier)
    denoiser = load_denoiser(folder / named.denoiser.path, named.denoiser.sha256)
    fits = loaded.channels == denoiser.channels and loaded.num_classes == len(entries.class_names)
    if not fits or loaded.classifier.stochastic:  # it would get no random numbers
        raise RRCMError(f"{folder}/config.json: its denoiser and its classifier do not fit; train it again")
    build = DENOISING_CLASSIFIERS[entries.denoised]
    classifier = build(denoiser, loaded.classifier, sigma=entries.sigma, classifier_size=loaded.image_size, **settings)
    return loaded._replace(
        classifier=classifier.eval(), image_size=denoiser.image_size, class_names=entries.class_names
    )
