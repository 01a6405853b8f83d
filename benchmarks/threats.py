"""Attacks in L1, L-infinity, pixels and patches, inside what L2 certificates say about them: 0 may succeed.

    python benchmarks/threats.py results/digits/seed_0/run --method rrcm_joint --sigma 0.25

RUN is a folder with data/shards and models/METHOD. Each certificate is attacked by gradient ascent on the smoothed
classifier, and PREDICT classifies the result. Few certificates of small images reach the L2 distance of a whole pixel,
so pixels and patches change by as much as the radius covers.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.stopping import ABSTAIN
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.evaluation.threats import GREY_LEVELS, Threat, l1, linf, pixels
from rrcm.methods import model_name
from rrcm.models.kinds import load_model_folder
from rrcm.utils.pixels import to_unit_range

app = make_app()
INSIDE = 0.999  # L1 norms and changes of pixels go to this fraction of the radius; grey levels are whole numbers
Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # offsets (B, C, H, W), sizes (B,) -> offsets


class Attack(NamedTuple):
    """An attack on images whose certificates cover a threat."""

    name: str
    claim: Callable[[float, torch.Size], tuple[Threat, float]]  # radius, image shape -> the threat and its size
    ascend: Callable[[torch.Tensor], torch.Tensor]  # gradient (B, C, H, W) -> a direction, each value at most 1
    project: Project
    step: float  # relative to the size


@app.command()
@exit_on_error
def main(
    run: Path,
    method: str = "rrcm_joint",
    sigma: float = 0.25,
    images: Annotated[int, typer.Option(help="test images, evenly spaced")] = 120,
    n: int = 1000,
    steps: int = 20,
    num_noise: int = 16,
    reach: Annotated[float, typer.Option(help="multiple of the claims; beyond 1 shows that the attacks work")] = 1.0,
) -> None:
    """Attack every certificate of the test images, and print how many PREDICT refutes."""
    loaded = load_model_folder(run / "models" / method / model_name(method, sigma), sigma=sigma)
    smoothed = SmoothedClassifier(loaded.classifier, sigma, loaded.num_classes, num_noise=num_noise, precision="auto")
    split = ShardedDataset(run / "data/shards", "test")
    clean, _, indices = read_split(split, loaded.image_size, max(1, len(split) // images), images)
    clean = to_unit_range(clean)
    certificates = smoothed.certify(clean, indices=indices, n=n, radius_step=0.01)
    certified = [i for i, each in enumerate(certificates) if each.radius > 0]
    x, truth = clean[certified], torch.tensor([certificates[i].prediction for i in certified])
    radii, rows = [certificates[i].radius for i in certified], []
    for attack in ATTACKS:
        claims = [attack.claim(radius, x[0].shape) for radius in radii]
        assert all(threat.radius <= radius for (threat, _), radius in zip(claims, radii, strict=True))
        sizes = reach * torch.tensor([size for _, size in claims], dtype=torch.float64)
        attacked = run_attack(smoothed, x, truth, attack, sizes, steps)
        answers = np.array(smoothed.predict(attacked, n=n, indices=[indices[i] for i in certified]))
        distance = (attacked.double() - x.double()).flatten(1).norm(dim=1).numpy() / radii
        broken, abstained = ((answers != truth.numpy()) & (answers != ABSTAIN)).sum(), (answers == ABSTAIN).sum()
        rows.append([attack.name, len(x), f"{sizes.mean():.3f}", f"{distance.mean():.2f}", broken, abstained])
    headers = ["attack", "certificates", "mean size", "L2 distance / radius", "broken", "abstained"]
    print(tabulate(rows, headers, "github", disable_numparse=True))


def run_attack(
    smoothed: SmoothedClassifier, x: torch.Tensor, truth: torch.Tensor, attack: Attack, sizes: torch.Tensor, steps: int
) -> torch.Tensor:
    """Images within `sizes` (B,) of x (B, C, H, W) that `smoothed` finds unlikely to be of the classes `truth`."""
    offset = torch.zeros_like(x, dtype=torch.float64)
    for _ in range(steps):
        moved = (x + offset).float().requires_grad_()
        F.nll_loss(smoothed(moved), truth, reduction="sum").backward()
        gradient = moved.grad.double()
        blocked = ((moved <= 0) & (gradient < 0)) | ((moved >= 1) & (gradient > 0))
        length = (attack.step * sizes)[:, None, None, None]
        offset = attack.project(offset + length * attack.ascend(gradient.masked_fill(blocked, 0)), sizes)
        offset = (x + offset).clamp(0, 1) - x.double()  # only moves values towards 0
    return (x + offset).float().clamp(0, 1)


def proportional(gradient: torch.Tensor) -> torch.Tensor:
    """The direction of the gradient, so that the pixels that matter most move most."""
    return gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-300)


def steepest_value(gradient: torch.Tensor) -> torch.Tensor:
    """The direction of the value with the largest derivative: the steepest one in L1."""
    flat = gradient.flatten(1)
    largest = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign()).view_as(gradient)


def project_l1(offset: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The nearest offsets whose L1 norm is at most `norms`."""
    size = offset.flatten(1).abs().sort(dim=1, descending=True).values
    sums = size.cumsum(1) - norms[:, None]
    count = torch.arange(1, size.shape[1] + 1)
    kept = (size * count > sums).sum(1, keepdim=True)
    cut = (sums.gather(1, kept - 1) / kept).clamp_min(0)
    return offset.sign() * (offset.flatten(1).abs() - cut).clamp_min(0).view_as(offset)


def project_linf(offset: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
    """The offsets with each value cut at `changes`."""
    limits = changes[:, None, None, None]
    return offset.clamp(-limits, limits)


def keep_pixels(count: int) -> Project:
    """Only the `count` pixels that have moved most stay, each value changed by at most the size."""

    def project(offset: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        moved = offset.abs().sum(1).flatten(1)
        kept = torch.zeros_like(moved).scatter(1, moved.topk(count).indices, 1.0)
        return project_linf(offset, changes) * kept.view(len(offset), 1, *offset.shape[2:])

    return project


def keep_patch(side: int) -> Project:
    """Only the square of `side` x `side` pixels that has moved most stays, each value changed by at most the size."""

    def project(offset: torch.Tensor, changes: torch.Tensor) -> torch.Tensor:
        window = torch.ones(1, 1, side, side, dtype=offset.dtype)
        moved = F.conv2d(offset.abs().sum(1, keepdim=True), window)
        place = F.one_hot(moved.flatten(1).argmax(1), moved[0].numel()).view_as(moved).to(offset.dtype)
        return project_linf(offset, changes) * F.conv_transpose2d(place, window)

    return project


def claim_levels(radius: float, shape: torch.Size) -> tuple[Threat, float]:
    """The largest whole number of grey levels, as in the report, that the radius covers in L-infinity."""
    values = math.prod(shape)
    levels = math.floor(GREY_LEVELS * radius / math.sqrt(values))
    while linf(levels, values).radius > radius:
        levels -= 1
    return linf(levels, values), levels / GREY_LEVELS


def claim_pixels(count: int) -> Callable[[float, torch.Size], tuple[Threat, float]]:
    """Changes of `count` pixels, as large as the radius covers."""

    def claim(radius: float, shape: torch.Size) -> tuple[Threat, float]:
        change = min(1.0, INSIDE * radius / math.sqrt(count * shape[0]))
        return pixels(count, shape[0], change), change

    return claim


def attacks() -> Iterator[Attack]:
    """The attacks in the order of the table."""
    yield Attack("L1", lambda radius, _: (l1(INSIDE * radius), INSIDE * radius), steepest_value, project_l1, 0.25)
    yield Attack("L-infinity, whole grey levels", claim_levels, torch.sign, project_linf, 0.25)
    for count in (1, 2, 4):
        yield Attack(f"{count} pixel{'s' * (count > 1)}", claim_pixels(count), proportional, keep_pixels(count), 0.5)
    for side in (2, 3):
        yield Attack(f"patch {side} x {side}", claim_pixels(side**2), proportional, keep_patch(side), 0.5)


ATTACKS = list(attacks())

if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    app()
