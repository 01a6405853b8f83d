"""Seconds per image of encoders with different stems, patches and depths, and of the CNN, on one thread.

A step is a forward and a backward pass. A vote is a forward pass without gradients, at one noise level, in float32.

They alternate in one process, so that drifting machine speed affects all of them equally. Compare medians. Seconds are
of the process, so that other work on the machine counts little. Each argument is STEM:PATCH_SIZE:DEPTH, or
cnn:PATCH_SIZE:WIDTH, and the first is the one that the ratios refer to.

    python benchmarks/stems.py patches:7:4 convolutions:7:4 patches:4:4 convolutions:4:4 convolutions:4:2 cnn:7:512
"""

import time
from statistics import median
from typing import Annotated

import torch
import typer
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, make_app
from rrcm.models.cnn import NoiseConditionedCNN
from rrcm.models.encoders import Encoder
from rrcm.models.stems import STEMS
from rrcm.models.vit import NoiseConditionedViT, parameter_count
from rrcm.utils.distributed import autocast
from rrcm.utils.errors import RRCMError


def build(text: str, image_size: int, embed_dim: int) -> Encoder:
    """The encoder that STEM:PATCH_SIZE:DEPTH or cnn:PATCH_SIZE:WIDTH describes, for grey images.

    Raises `RRCMError` for other text.
    """
    stem, _, rest = text.partition(":")
    patch_size, _, size = rest.partition(":")
    if stem not in (*STEMS, "cnn") or not (patch_size.isdigit() and size.isdigit()):
        raise RRCMError(f"{text!r}: must be cnn:PATCH_SIZE:WIDTH or STEM:PATCH_SIZE:DEPTH, of {', '.join(STEMS)}")
    if stem == "cnn":
        return NoiseConditionedCNN(image_size, 1, int(patch_size), int(size))
    return NoiseConditionedViT(image_size, 1, int(patch_size), embed_dim, int(size), num_heads=4, stem=stem)


@torch.no_grad()
def seconds_of_votes(encoder: Encoder, images: torch.Tensor) -> float:
    """The process's seconds for a forward pass of the images (B, C, H, W)."""
    start = time.process_time()
    encoder(images, 1.0)
    return time.process_time() - start


def seconds_of_step(encoder: Encoder, images: torch.Tensor, precision: str) -> float:
    """The process's seconds for a forward and a backward pass of the images (B, C, H, W)."""
    encoder.zero_grad()
    start = time.process_time()
    with autocast(images.device, precision):
        representation = encoder(images, 1.0)
    representation.float().square().mean().backward()
    return time.process_time() - start


def main(
    encoders: Annotated[list[str], typer.Argument(help="STEM:PATCH_SIZE:DEPTH or cnn:PATCH_SIZE:WIDTH")],
    image_size: Annotated[int, typer.Option(help="Side of an image, in pixels.")] = 28,
    embed_dim: Annotated[int, typer.Option(help="Width of the ViTs.")] = 128,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 256,
    rounds: Annotated[int, typer.Option(help="Steps that are timed, after one that is not.")] = 9,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    networks = {text: build(text, image_size, embed_dim) for text in encoders}
    images = torch.randn(batch, 1, image_size, image_size)
    measured: dict[str, list[float]] = {text: [] for text in networks}
    votes: dict[str, list[float]] = {text: [] for text in networks}
    for number in range(rounds + 1):
        for text, network in networks.items():
            seconds, forward = seconds_of_step(network, images, precision), seconds_of_votes(network, images)
            if number:
                measured[text].append(1e6 * seconds / batch)
                votes[text].append(1e6 * forward / batch)
    first = median(measured[encoders[0]])
    rows = [
        (
            text,
            networks[text].num_patches,
            parameter_count(networks[text]),
            median(each),
            median(each) / first,
            median(votes[text]),
            median(votes[text]) / median(votes[encoders[0]]),
        )
        for text, each in measured.items()
    ]
    ranges = [f"{min(each):,.0f} to {max(each):,.0f}" for each in measured.values()]
    head = ["encoder", "positions", "parameters", "step, µs per image", "ratio", "vote, µs", "ratio", "range of a step"]
    table = [(*row, spread) for row, spread in zip(rows, ranges, strict=True)]
    floatfmt = ("", "", "", ",.0f", ".2f", ",.0f", ".2f", "")
    print(tabulate(table, head, floatfmt=floatfmt, intfmt=",", tablefmt="github"))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
