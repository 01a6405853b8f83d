"""One deployed classifier for all radii: what a cascade certifies and costs, and PGD inside its certificates.

    python benchmarks/cascade.py table results/digits/seed_0/run --shards data/shards --methods rrcm,gaussian --n 2000
    python benchmarks/cascade.py attack results/digits/seed_0/run --methods rrcm --n 2000

RUN is a folder with models/METHOD, of experts or of a joint network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from tabulate import tabulate

from rrcm.utils.app import exit_on_error, keep_freed_memory, make_app
from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.cascade_rules import CERTIFICATES, LABEL_AWARE, MULTI_SCALE
from rrcm.certification.cascade_thresholds import choose_thresholds
from rrcm.certification.stopping import ABSTAIN, BOUNDS
from rrcm.config import Attack
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.evaluation.attack import RADIUS_FRACTION, smoothed_target, worst_predictions
from rrcm.evaluation.metrics import average_certified_radius, certified_accuracy
from rrcm.methods import model_name
from rrcm.models.kinds import load_scales
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress
from rrcm.utils.provenance import describe_environment

app = make_app()
Images = Annotated[int | None, typer.Option(help="test images, evenly spaced; all by default")]
Shards = Annotated[Path | None, typer.Option(help="folder with the splits; RUN/data/shards by default")]


@app.command()
@exit_on_error
def table(
    run: Path,
    methods: str = "rrcm",
    shards: Shards = None,
    images: Images = None,
    n: int = 2000,
    radius_step: float = 0.25,
    sigmas: str = "0.25,0.5,1",
    radii: str = "0,0.25,0.5,0.75",
) -> None:
    """Print certified accuracies, ACR and samples of one cascade, of each sigma alone, and of the best of the sigmas.

    Thresholds are 0, and chosen by ACR and by the sum of the certified accuracies, on the validation images.
    """
    shards, levels, at = shards or run / "data/shards", _numbers(sigmas), _numbers(radii)
    test, validation = (ShardedDataset(shards, split) for split in ("test", "val"))
    for method in methods.split(","):
        cascade, size = load_cascade(run, method, levels, [0.0] * (len(levels) - 1))
        pixels, labels, indices = read_images(test, size, images)
        votes, truth = validation_votes(cascade, validation, size)
        for bound in BOUNDS:
            settings = {"labels": labels, "indices": indices, "n": n, "radius_step": radius_step, "bound": bound}
            weights = {"for ACR": None, "for the sum over radii": dict.fromkeys(at, 1.0)}
            thresholds = {"0": cascade.thresholds} | {
                name: choose_thresholds(votes, truth, levels, n=n, bound=bound, weights=each)[0]
                for name, each in weights.items()
            }
            rows = {}
            for name, tau in thresholds.items():
                deployed = cascade.with_thresholds(tau)
                rules = CERTIFICATES if name == "0" else (LABEL_AWARE,)
                for rule in rules:
                    title = f"cascade, τ {name}: {', '.join(f'{each:g}' for each in tau)}"
                    title += "; published certificates" if rule == MULTI_SCALE else ""
                    rows[title] = as_frame(deployed.certify(pixels, certificates=rule, **settings), labels)
            alone = [as_frame(scale.certify(pixels, **settings), labels) for scale in cascade.scales]
            rows |= {f"σ = {sigma:g} alone": frame for sigma, frame in zip(levels, alone, strict=True)}
            print(f"\n{method}, {bound} bound, {len(labels)} test images, n = {n:,}, radius_step {radius_step:g}\n")
            print(_table(rows, alone, levels, at))
    print(f"\n{len(truth)} validation images; {describe_environment('cpu')['hardware']['cpu']}")


@app.command()
@exit_on_error
def attack(
    run: Path,
    methods: str = "rrcm",
    shards: Shards = None,
    images: Images = None,
    n: int = 2000,
    sigmas: str = "0.25,0.5,1",
    thresholds: str = "0,0",
    steps: int = 20,
    num_noise: int = 16,
) -> None:
    """Attack the cascade inside its certificates with PGD, and print how many certificates PREDICT refutes."""
    rows, levels = [], _numbers(sigmas)
    for method in methods.split(","):
        cascade, size = load_cascade(run, method, levels, _numbers(thresholds), num_noise=num_noise)
        pixels, labels, indices = read_images(ShardedDataset(shards or run / "data/shards", "test"), size, images)
        frame = as_frame(cascade.certify(pixels, indices=indices, n=n, radius_step=0.01), labels)
        certified = np.flatnonzero(frame["radius"] > 0)
        target = smoothed_target(cascade, n, alpha=0.001)
        settings = Attack(methods=[], steps=steps, num_noise=num_noise, n=n, max_images=None, batch_size=32)
        predict, radius = (frame[name].to_numpy()[certified] for name in ("predict", "radius"))
        with Progress(len(certified), f"attack {method}", "attacks") as progress:
            (worst,) = worst_predictions(
                target,
                pixels[certified],
                np.array(indices)[certified],
                predict,
                RADIUS_FRACTION * radius[None],
                settings,
                progress,
            )
        broken, abstained = int(((worst != predict) & (worst != ABSTAIN)).sum()), int((worst == ABSTAIN).sum())
        rows.append([method, len(certified), f"{radius.mean():.3f}", broken, abstained])
    print(tabulate(rows, ["cascade of", "certificates", "mean radius", "broken", "abstained"], "github"))


def load_cascade(
    run: Path, method: str, sigmas: Sequence[float], thresholds: Sequence[float], **options: int
) -> tuple[CascadedClassifier, int]:
    """The cascade of a method, of experts or of a joint network, and the size of its images."""
    names = dict.fromkeys(model_name(method, sigma) for sigma in sigmas)
    loaded, can_pass = load_scales([run / "models" / method / name for name in names], sigmas)
    options = {"num_classes": loaded[0].num_classes, "can_pass": can_pass, "precision": "auto"} | options
    cascade = CascadedClassifier([each.classifier for each in loaded], sigmas, thresholds, **options)
    return cascade, loaded[0].image_size


def read_images(split: ShardedDataset, size: int, images: int | None) -> tuple[torch.Tensor, list[int], list[int]]:
    """Evenly spaced images in [0, 1], their labels and their positions."""
    every = 1 if images is None else max(1, len(split) // images)
    pixels, labels, indices = read_split(split, size, every, images)
    return to_unit_range(pixels), labels.tolist(), indices


def validation_votes(cascade: CascadedClassifier, split: ShardedDataset, size: int) -> tuple[np.ndarray, list[int]]:
    """1,000 votes for each validation image at each sigma, and the labels."""
    pixels, labels, indices = read_images(split, size, None)
    return cascade.votes(pixels, 1000, indices=indices), labels


def as_frame(certificates: Sequence, labels: Sequence[int]) -> pd.DataFrame:
    """A certificate frame with the number of samples and, for a cascade, the sigma that accepts."""
    rows = [
        {
            "label": label,
            "predict": each.prediction,
            "radius": each.radius,
            "correct": int(each.prediction == label),
            "samples": each.samples,
            "accepting": getattr(each, "accepting_sigma", None),
        }
        for each, label in zip(certificates, labels, strict=True)
    ]
    return pd.DataFrame(rows)


def _table(
    rows: dict[str, pd.DataFrame], alone: Sequence[pd.DataFrame], sigmas: Sequence[float], radii: Sequence[float]
) -> str:
    """Certified accuracy in %, and samples relative to the largest sigma alone."""
    largest, lines = alone[-1], []
    for name, frame in rows.items():
        settled = (frame["accepting"] == sigmas[-1]).to_numpy()
        ratio = frame["samples"].sum() / largest["samples"].sum()
        there = frame["samples"][settled].sum() / max(1, largest["samples"][settled].sum())
        costs = [f"{frame['samples'].mean():,.0f}", f"{ratio:.2f}", f"{there:.2f} ({settled.sum()} images)"]
        costs[2] = costs[2] if settled.any() else ""
        lines.append([name, *_results(frame, radii), *costs])
    best = np.max([certified_accuracy(frame, radii) for frame in alone], axis=0)
    lines.append(["best σ at each radius (three deployments)", "", *(f"{100 * share:.1f}" for share in best)])
    route = max_by_image(alone)
    lines.append(["best σ of each image (a perfect route)", *_results(route, radii)])
    headers = ["deployment", "ACR", *(f"r = {radius:g}" for radius in radii)]
    headers += ["samples", "ratio", "ratio where the largest σ accepts"]
    return tabulate(lines, headers, "github", disable_numparse=True)


def _results(frame: pd.DataFrame, radii: Sequence[float]) -> list[str]:
    shares = certified_accuracy(frame, radii)
    return [f"{average_certified_radius(frame):.3f}", *(f"{100 * share:.1f}" for share in shares)]


def max_by_image(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """For each image the certificate with the largest radius among the correct ones: what no classifier has."""
    radius = np.max([np.where(frame["correct"] == 1, frame["radius"], -1) for frame in frames], axis=0)
    return frames[0].assign(radius=radius.clip(0), correct=(radius >= 0).astype(int))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    app()
