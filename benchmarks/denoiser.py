"""How well a denoiser denoises test images, compared with the best linear denoiser.

Of all functions that are linear in the noisy image, the one with the smallest error for Gaussian noise follows from the
mean m and covariance C of the images (Wiener): m + C (C + t^2 I)^-1 (x - m). Here m and C are estimated from the
training images.

    python benchmarks/denoiser.py models/denoiser data/shards
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, make_app
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.denoiser import load_denoiser


def linear_denoiser(images: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean m (D,) and matrix C (C + t^2 I)^-1 (D, D) of images (N, D) in model space."""
    covariance = torch.cov(images.T)
    identity = torch.eye(len(covariance), dtype=images.dtype)
    return images.mean(0), torch.linalg.solve(covariance + t**2 * identity, covariance).T


@torch.no_grad()
def main(
    denoiser: Path,
    shards: Path,
    sigma: Annotated[list[float] | None, typer.Option(help="noise, pixel units")] = None,
    split: str = "test",
) -> None:
    """Print the mean squared errors per pixel, in model space."""
    network = load_denoiser(denoiser)
    train, held_out = (
        2 * (read_split(ShardedDataset(shards, name), network.image_size)[0].double() / 255) - 1
        for name in ("train", split)
    )
    noise = torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for level in sigma or (0.25, 0.5, 1.0):
        t = 2 * level
        noisy = held_out + t * noise
        mean, matrix = linear_denoiser(train.flatten(1), t)
        linear = mean + (noisy.flatten(1) - mean) @ matrix.T
        estimate = torch.cat([network(part.float(), t) for part in noisy.split(256)]).double()
        errors = [(each.flatten(1) - held_out.flatten(1)).square().mean().item() for each in (linear, estimate)]
        rows.append([level, *errors, errors[1] / errors[0]])
    headers = ["sigma", "best linear denoiser", "this denoiser", "ratio"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".4f"))


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(main))
    app()
