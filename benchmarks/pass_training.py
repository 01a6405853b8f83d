"""Compare rules for where a joint model should pass, by the certificates of its cascade on validation images.

In a project with data/shards and models/NAME_joint/joint:

    python benchmarks/pass_training.py table NAME_joint              # all rules and dials
    python benchmarks/pass_training.py figure NAME_joint pass.png    # small against large radii

The encoder is frozen, as in the training of the product, so its representations of noisy images are computed once. They
are kept in pass_features/. Each rule then trains a head on them, in seconds. Certificates are binary and at tau 0. They
assume that N samples would vote in the proportions of the fewer samples that were drawn.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from rrcm.utils.app import resume_gc
from rrcm.certification.cascade_thresholds import certified_radii, claim_bounds
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.folders import read_model_config
from rrcm.models.joint import read_joint
from rrcm.models.kinds import load_scales
from rrcm.objectives.consistency import consistency_regularizer
from rrcm.objectives.passing import add_pass, pass_targets
from rrcm.report.figures import figure_style, save
from rrcm.utils.pixels import to_model_space, to_unit_range

resume_gc()
RADII = [0.25 * k for k in range(9)]
SMALL, LARGE = slice(0, 3), slice(5, 9)  # of RADII
N, ALPHA = 1000, 0.001
FOLDER, SHARDS = Path("pass_features"), Path("data/shards")
SPLITS = {"train": ("train", 4, 3), "val": ("val", 4, 100)}  # by name: split, every k-th image, noisy copies
BIASES = (-2.0, -1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LEVELS = (72.0, 73.0, 74.0)  # mean certified accuracies at SMALL, in %, at which rules are compared
EPOCHS, BATCH_SIZE, LR = 6, 256, 2e-3


class Features(NamedTuple):
    """The representations (N, S, copies, D) of images with noise of the S sigmas, and the labels (N,)."""

    representations: torch.Tensor
    labels: torch.Tensor


class Trial(NamedTuple):
    """A rule and how its head is trained."""

    passes: Callable[[np.ndarray, np.ndarray], np.ndarray]  # votes (N, S, K), labels (N,) -> shares of pass (N, S)
    consistency_weight: float = 0.0
    hidden: int = 0  # units of a hidden layer beside the linear one


def right_shares(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of right votes: (N, S)."""
    return np.take_along_axis(votes, labels[:, None, None], -1)[..., 0] / votes.sum(-1)


def uncertain(votes: np.ndarray, labels: np.ndarray, bound: float) -> np.ndarray:
    """Pass where fewer than `bound` of the votes are right."""
    return (right_shares(votes, labels) < bound) & (np.arange(votes.shape[1]) > 0)


def wrong(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pass where most votes are wrong, and right at a smaller sigma."""
    return pass_targets(votes, labels) > 0.5


def every_wrong_vote(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pass by the share of the wrong votes, also where no smaller sigma is right."""
    return (1 - right_shares(votes, labels)) * (np.arange(votes.shape[1]) > 0)


def at_the_largest(votes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As the product, at the largest sigma alone."""
    return pass_targets(votes, labels) * (np.arange(votes.shape[1]) == votes.shape[1] - 1)


TRIALS = {
    "product: share of wrong votes": Trial(pass_targets),
    "the same, consistency 10": Trial(pass_targets, 10.0),
    "the same, hidden layer": Trial(pass_targets, hidden=256),
    "the same, at the largest sigma": Trial(at_the_largest),
    "every wrong vote": Trial(every_wrong_vote),
    "wrong by majority": Trial(wrong),
    "wrong by majority, consistency 10": Trial(wrong, 10.0),
    "fewer than half right": Trial(lambda votes, labels: uncertain(votes, labels, 0.5)),
    "fewer than half right, consistency 10": Trial(lambda votes, labels: uncertain(votes, labels, 0.5), 10.0),
}


@torch.inference_mode()
def read_features(folder: Path, sigmas: list[float], name: str) -> Features:
    """The representations of a split of SPLITS, computed at the first call."""
    path, (split, every, copies) = FOLDER / f"{folder.parent.name}-{name}.npz", SPLITS[name]
    if not path.exists():
        scales, generator, by_sigma = load_scales([folder], sigmas)[0], torch.Generator().manual_seed(0), []
        pixels, labels, _ = read_split(ShardedDataset(SHARDS, split), scales[0].image_size, every)
        for scale, sigma in zip(scales, sigmas, strict=True):
            rows = []
            for chunk in pixels.split(max(1, 1024 // copies)):
                clean = to_unit_range(chunk).repeat_interleave(copies, 0)
                noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
                with torch.autocast("cpu", torch.bfloat16):
                    rows.append(scale.classifier.encoder(to_model_space(noisy), scale.classifier.t).half())
            by_sigma.append(torch.cat(rows).unflatten(0, (-1, copies)))
        FOLDER.mkdir(exist_ok=True)
        np.savez(path, representations=torch.stack(by_sigma, 1).numpy(), labels=labels.numpy())
    held = np.load(path)
    return Features(torch.from_numpy(held["representations"]).float(), torch.from_numpy(held["labels"]))


def count(logits: torch.Tensor, num_classes: int) -> np.ndarray:
    """The votes of logits (N, S, copies, C) for the first `num_classes` of the C outputs: (N, S, num_classes) int64."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(2).numpy()[..., :num_classes]


class Head(nn.Module):
    """The head of the joint model with an output for pass, and perhaps a hidden layer beside it."""

    def __init__(self, narrow: nn.Linear, hidden: int):
        super().__init__()
        self.linear = nn.Linear(narrow.in_features, narrow.out_features + 1)
        self.beside = nn.Sequential(nn.Linear(narrow.in_features, hidden), nn.GELU(), nn.Linear(hidden, self.outputs))
        with torch.no_grad():
            for new, old in ((self.linear.weight, narrow.weight), (self.linear.bias, narrow.bias)):
                new.zero_()[:-1] = old
            self.beside[2].weight.zero_(), self.beside[2].bias.zero_()

    @property
    def outputs(self) -> int:
        return self.linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., D) -> logits (..., K + 1)."""
        return self.linear(x) + self.beside(x)


def train(trial: Trial, features: Features, narrow: nn.Linear) -> Head:
    """The head that is trained on the representations with the targets of a trial."""
    torch.manual_seed(0)
    head, (x, labels), num_classes = Head(narrow, trial.hidden), features, narrow.out_features
    if not trial.hidden:
        head.beside.requires_grad_(False)
    votes = count(narrow(x), num_classes)
    passes = torch.from_numpy(trial.passes(votes, labels.numpy()).astype(np.float32))
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], LR, weight_decay=0.0)
    steps = EPOCHS * (len(x) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH_SIZE)[: len(x) // BATCH_SIZE]:
            loss = 0.0
            for k in range(x.shape[1]):
                logits, target = head(x[rows, k].transpose(0, 1)), F.one_hot(labels[rows], num_classes).float()
                logits = logits if k else logits[..., :num_classes]
                target = add_pass(target, passes[rows, k]) if k else target
                loss = loss - (target * logits.log_softmax(-1)).sum(-1).mean()
                if trial.consistency_weight:
                    loss = loss + consistency_regularizer(logits, trial.consistency_weight).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


@torch.inference_mode()
def accuracies(logits: torch.Tensor, labels: np.ndarray, sigmas: list[float], num_classes: int) -> np.ndarray:
    """The certified accuracies in % of the cascade at RADII, for logits (N, S, copies, C)."""
    smallest, larger = logits[:, :1, :, :num_classes], logits[:, 1:]
    votes = np.concatenate([count(smallest, num_classes), count(larger, num_classes)], 1)
    bounds = claim_bounds(votes, labels, sigmas, N, ALPHA, "binary")
    return shares_of(certified_radii(*bounds, [0.0] * (len(sigmas) - 1)))


def shares_of(radii: np.ndarray) -> np.ndarray:
    """The certified accuracies in % at RADII."""
    return np.array([100 * np.mean(radii >= radius) for radius in RADII])


def rows_of(method: str) -> Iterator[dict[str, object]]:
    """A row for the best of three deployments, the joint model, and each trial with each bias."""
    folder = Path("models") / method / "joint"
    sigmas = list(read_joint(folder, read_model_config(folder)).sigmas)
    narrow = load_scales([folder], sigmas)[0][0].classifier.head.requires_grad_(False)
    features, held = (read_features(folder, sigmas, name) for name in ("train", "val"))
    labels, num_classes = held.labels.numpy(), narrow.out_features
    with torch.inference_mode():
        plain = narrow(held.representations)
    votes = count(plain, num_classes)
    radii = claim_bounds(votes, labels, sigmas, N, ALPHA, "binary")[2]
    best = np.max([shares_of(radii[:, k]) for k in range(len(sigmas))], 0)

    def row(name: str, bias: float | None, shares: np.ndarray) -> dict[str, object]:
        at = {f"{radius:g}": round(value, 1) for radius, value in zip(RADII, shares.tolist(), strict=True)}
        means = {"small": shares[SMALL].mean(), "large": shares[LARGE].mean(), "gap": (best - shares).max()}
        return {"rule": name, "bias": bias, **at} | {key: round(float(mean), 1) for key, mean in means.items()}

    yield row("three deployments", None, best)
    yield row("no pass", None, accuracies(plain, labels, sigmas, num_classes))
    for name, trial in TRIALS.items():
        head = train(trial, features, narrow)
        with torch.inference_mode():
            logits = head(held.representations)
        for bias in BIASES:
            shifted = torch.cat([logits[..., :-1], logits[..., -1:] + bias], -1)
            yield row(name, bias, accuracies(shifted, labels, sigmas, num_classes))


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean certified accuracy of each rule at LARGE where that at SMALL has the LEVELS, and its smallest gap."""
    rows = []
    for name, own in frame.dropna().groupby("rule", sort=False):
        own = own.sort_values("small")
        at = {f"{level:g}": round(float(np.interp(level, own["small"], own["large"])), 1) for level in LEVELS}
        best = own.loc[own["gap"].idxmin()]
        rows.append({"rule": name, **at, "smallest gap": best["gap"], "its bias": best["bias"]})
    return pd.DataFrame(rows)


def draw(frame: pd.DataFrame) -> Figure:
    """The mean certified accuracy at SMALL against that at LARGE, a line for each trial with the bias as parameter."""
    with figure_style():
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes = figure.subplots()
    for name, own in frame.groupby("rule", sort=False):
        marker, size = ("o", 4) if len(own) > 1 else ("*", 12)
        axes.plot(own["large"], own["small"], marker=marker, markersize=size, label=name)
    axes.set_xlabel("mean certified accuracy at radius 1.25 to 2, %")
    axes.set_ylabel("mean certified accuracy at radius 0 to 0.5, %")
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", choices=["table", "figure"])
    parser.add_argument("method")
    parser.add_argument("path", nargs="?", type=Path, default=Path("pass.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    frame = pd.DataFrame(rows_of(given.method))
    print(frame.to_string(index=False))
    print(compare(frame).to_string(index=False))
    if given.output == "figure":
        save(draw(frame), given.path)
