"""A base classifier at one sigma as a program of torch.export, and the comparison of programs with their classifier.

The program maps images (B, C, H, W) float32 in [0, 1], with noise added, to logits. It contains the noise level and the
normalization of the images.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from rrcm.certification.networks import batch_limits, in_batches, logits_of, set_eval
from rrcm.certification.smoothing import TOLERANCE
from rrcm.utils.quiet import quiet

COMPARED = 512  # noisy images
BATCHES = (1, 7, 64)  # the sizes of batches that are tried
LEAST_EQUAL = 0.99  # share of votes that must be equal; near a tie, rounding may flip one


class Program(nn.Module):
    """A base classifier that only maps images in [0, 1] with noise to logits."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) float32 -> (B, K) float32."""
        return logits_of(self.classifier(images))


def make_program(classifier: nn.Module) -> Program:
    """A copy of `classifier` on the CPU in eval mode, without gradients for its weights."""
    program = Program(copy.deepcopy(classifier)).cpu().requires_grad_(False)
    set_eval(program)
    return program


def export_program(program: nn.Module, example: torch.Tensor, **options: object) -> torch.export.ExportedProgram:
    """Export `program` for batches like `example`, with further `options` of `torch.export.export`.

    Raises all kinds of exceptions for programs that cannot be exported.
    """
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), quiet():
        return torch.export.export(program, (example,), **options)


class Comparison(NamedTuple):
    """How a program differs from the classifier that it was exported from."""

    images: int  # noisy ones
    difference: float  # the largest between two logits
    largest: float  # logit of the classifier, without its sign
    equal: float  # share of equal votes
    certified: int = 0  # images that were certified by both
    agree: int = 0  # images with the same class and radius by both

    def __str__(self) -> str:
        """One line."""
        votes = f"{100 * self.equal:.2f} % of {self.images:,} votes on random noisy images are equal"
        text = f"{votes}; the logits are at most {self.largest:.3g}, and differ by at most {self.difference:.2g}"
        if self.certified:
            text += f"; {self.agree:,} of {self.certified:,} certificates agree in class and radius"
        return text

    def is_the_model(self, precision: str) -> bool:
        """Whether the differences are no larger than rounding in `precision` explains."""
        return self.equal >= LEAST_EQUAL and self.difference <= TOLERANCE[precision] * self.largest


@torch.no_grad()
def compare(
    original: nn.Module,
    program: nn.Module,
    example: torch.Tensor,
    sigma: float,
    sizes: Sequence[int] = BATCHES,
) -> Comparison:
    """Compare logits and votes on at least COMPARED random images with noise, in batches of the given `sizes`."""
    generator, limits = torch.Generator().manual_seed(0), batch_limits(program)
    done, difference, largest, equal = 0, 0.0, 0.0, 0
    while done < COMPARED:
        for size in sizes:
            shape = (size, *example.shape[1:])
            images = torch.rand(shape, generator=generator) * torch.rand(size, 1, 1, 1, generator=generator)
            noisy = images + sigma * torch.randn(shape, generator=generator)
            expected, found = original(noisy), in_batches(program, noisy, limits)
            difference = max(difference, (found - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
            equal += int((found.argmax(1) == expected.argmax(1)).sum())
            done += size
    return Comparison(done, difference, largest, equal / done)
