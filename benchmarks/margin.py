"""What the margin bound gains over the binary bound, on a network and for each of its three tests on simulated votes.

python benchmarks/margin.py network models/rrcm/sigma_1.0 data/shards --n 10000
python benchmarks/margin.py tests --n 10000
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.special import ndtri
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification.margin import BINARY, PAIR, TWO_BOUNDS, margin_radius
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.stopping import WRONG_CLASS
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.kinds import load_model_folder

app = make_app()
GRID = np.arange(61) * 0.05
PROBABILITIES = [(0.3, 0.1), (0.4, 0.3), (0.6, 0.4), (0.7, 0.1), (0.95, 0.02), (0.999, 0.0005), (0.9999, 0.0001)]


@app.command()
@exit_on_error
def network(
    model: Path,
    shards: Path,
    n: int = 10_000,
    every: Annotated[int, typer.Option(help="every k-th test image")] = 3,
    radius_step: float = 0.01,
    radii: str = "0,0.25,0.5,1,2",
) -> None:
    """Certify test images by the margin bound, and print the results and sample counts for both bounds."""
    loaded = load_model_folder(model)
    pixels, labels, indices = read_split(ShardedDataset(shards, "test"), loaded.image_size, every)
    smoothed = SmoothedClassifier(loaded.classifier, loaded.sigma, loaded.num_classes, precision="auto")
    outcomes = smoothed.certify(
        pixels.float() / 255, labels, n=n, bound="margin", radius_step=radius_step, indices=indices
    )
    right = np.array([each.stop_reason != WRONG_CLASS for each in outcomes])  # any other chosen class is the label
    at, rows, counts = [float(radius) for radius in radii.split(",")], [], {}
    for bound, samples in (("binary", "binary_samples"), ("margin", "samples")):
        radius = np.array([-1.0 if (r := getattr(each, f"{bound}_radius")) is None else r for each in outcomes])
        radius = np.where(right, radius, -1.0)
        counts[bound] = (radius[:, None] >= GRID - 1e-9).sum(0)
        accuracy = [f"{100 * (radius >= r).mean():.1f}" for r in at]
        mean = np.mean([getattr(each, samples) for each in outcomes])
        rows.append([bound, f"{radius.clip(0).mean():.3f}", *accuracy, f"{mean:,.0f}"])
    print(f"{model}: {len(outcomes)} test images, n = {n:,}, {smoothed.precision}\n")
    print(tabulate(rows, ["bound", "ACR", *(f"r = {r:g}" for r in at), "samples"], "github", disable_numparse=True))
    gain = counts["margin"] - counts["binary"]
    print(f"\nimages gained at a radius, over radii in steps of 0.05: {gain.min()} to {gain.max()}")


@app.command()
@exit_on_error
def tests(n: int = 10_000, alpha: float = 0.001, images: int = 2000) -> None:
    """Mean radius by each test in units of sigma, for given probabilities of the chosen class and the runner-up."""
    rng, rows = np.random.default_rng(0), []
    for p_a, p_b in PROBABILITIES:
        votes = rng.multinomial(n, [p_a, p_b, max(0.0, 1 - p_a - p_b)], images)
        radii = [
            margin_radius(test, 1.0, votes[:, 0], votes[:, 1:2], n, alpha).clip(0).mean()
            for test in (BINARY, TWO_BOUNDS, PAIR)
        ]
        limit = normal_limit(p_a, p_b, n, alpha)
        rows.append([f"{p_a:g}, {p_b:g}", *(f"{radius:.3f}" for radius in [*radii, limit])])
    print(tabulate(rows, ["p_A, p_B", BINARY, TWO_BOUNDS, PAIR, "limit"], "github", disable_numparse=True))


def normal_limit(p_a: float, p_b: float, n: int, alpha: float) -> float:
    """The lower confidence bound on the radius at alpha, by the normal approximation (delta method)."""
    z_a, z_b = ndtri(p_a), ndtri(p_b)
    slope_a, slope_b = (np.sqrt(2 * np.pi) * np.exp(z**2 / 2) for z in (z_a, z_b))  # of Phi^-1
    variance = slope_a**2 * p_a * (1 - p_a) + slope_b**2 * p_b * (1 - p_b) + 2 * slope_a * slope_b * p_a * p_b
    return float((z_a - z_b + ndtri(alpha) * np.sqrt(variance / n)) / 2)


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    app()
