"""Base classifiers, which randomized smoothing smooths: their contract, and the classifiers that we train."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, Self

import torch
from torch import nn

from rrcm.models.encoders import Encoder
from rrcm.models.vit import forward_in_chunks
from rrcm.utils.pixels import to_model_space


class Draw(Protocol):
    """The random numbers of a batch. Row i depends only on the seed, the name, and the image and sample in row i."""

    def normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal numbers, (B, *shape) float32. The same name always gives the same numbers."""
        ...


class BaseClassifier(nn.Module):
    """A classifier of noisy images that can be smoothed.

    Certification reads the four attributes below. For a module without them it assumes the defaults.

    >>> class Brightness(rrcm.BaseClassifier):
    ...     num_classes = 2
    ...
    ...     def forward(self, noisy, draw=None):
    ...         brightness = noisy.mean((1, 2, 3)) - 0.5
    ...         return torch.stack([-brightness, brightness], 1)
    >>> Brightness()(torch.ones(1, 3, 8, 8))
    tensor([[-0.5000,  0.5000]])
    """

    num_classes: int
    sigma: float | None = None  # the pixel noise that it was trained for; None: any
    keeps_float32_input: bool = False  # under bfloat16 it takes float32 pixels and rounds them itself
    stochastic: bool = False  # its forward draws random numbers, always from `draw`

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """noisy (B, C, H, W) float: images in [0, 1] plus Gaussian noise -> logits (B, num_classes).

        Only a stochastic classifier gets `draw`.
        """
        raise NotImplementedError

    def at(self, sigma: float) -> Self:
        """The same network, with the same weights in memory, for pixel noise `sigma`. Joint models need it.

        A classifier that is conditioned on the noise level has t = 2 sigma.
        """
        other = copy.copy(self)
        other.sigma = sigma
        if hasattr(other, "t"):
            other.t = 2 * sigma
        return other


def part_logits(part: BaseClassifier, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
    """The float32 logits of a classifier that is part of another one.

    As in `SmoothedClassifier`, the input is rounded to the dtype of the weights unless `keeps_float32_input` is set.
    """
    if not part.keeps_float32_input:
        noisy = noisy.to(next((p.dtype for p in part.parameters()), noisy.dtype))
    return (part(noisy, draw) if part.stochastic else part(noisy)).float()


class NoiseConditionedClassifier(BaseClassifier):
    """A noise-conditioned encoder and a linear head, at one fixed noise level t (model space)."""

    keeps_float32_input = True  # the encoder scales its input first

    def __init__(self, encoder: Encoder, num_classes: int, t: float):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.num_classes, self.t, self.sigma = num_classes, t, t / 2

    def forward(
        self,
        noisy: torch.Tensor,
        draw: Draw | None = None,
        *,
        t: torch.Tensor | None = None,
        num_chunks: int = 1,
    ) -> torch.Tensor:
        """noisy (B, C, H, W) float32: images in [0, 1] plus Gaussian noise of pixel sigma t / 2 -> logits (B, K).

        A joint training gives `t` (B,), the noise level of each image, in place of the classifier's own. With
        `num_chunks` above 1 the encoder processes the batch in chunks, which saves memory in training.
        """
        if t is not None:
            return self.head(forward_in_chunks(self.encoder, num_chunks, to_model_space(noisy), t))
        return self.head(forward_in_chunks(partial(self.encoder, t=self.t), num_chunks, to_model_space(noisy)))


class WithoutPass(BaseClassifier):
    """A classifier whose last output is "pass", without that output."""

    def __init__(self, classifier: BaseClassifier):
        super().__init__()
        self.classifier, self.num_classes = classifier, classifier.num_classes - 1
        for name in ("sigma", "keeps_float32_input", "stochastic"):
            setattr(self, name, getattr(classifier, name))

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """noisy (B, C, H, W), pixels in [0, 1] plus noise -> logits (B, num_classes)."""
        logits = self.classifier(noisy, draw) if self.stochastic else self.classifier(noisy)
        return logits[:, : self.num_classes]

    def at(self, sigma: float) -> "WithoutPass":
        """The same classifier for pixel noise `sigma`."""
        return WithoutPass(self.classifier.at(sigma)).train(self.training)


class Normalized(BaseClassifier):
    """Turns a network that expects normalised images into a classifier of pixels in [0, 1]."""

    def __init__(self, network: nn.Module, num_classes: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network, self.num_classes = network, num_classes
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, noisy: torch.Tensor, draw: Draw | None = None) -> torch.Tensor:
        """noisy (B, C, H, W), pixels in [0, 1] plus noise -> logits (B, num_classes)."""
        return self.network((noisy - self.mean) / self.std)


class NetworkClassifier(Normalized):
    """A network that is not conditioned on the noise level, trained for one pixel sigma or for several.

    `rrcm.models.architectures.network_classifier` builds it again from `architecture`.
    """

    def __init__(self, network: nn.Module, num_classes: int, architecture: Mapping, sigma: float):
        channels = architecture["channels"]
        mean, std = architecture["pixel_mean"] or [0.0] * channels, architecture["pixel_std"] or [1.0] * channels
        super().__init__(network, num_classes, mean, std)
        self.architecture, self.sigma = dict(architecture), sigma
