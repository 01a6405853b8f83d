"""Try targets of "pass" for a joint model, and see what they do to its cascade on validation images.

In a project with params.yaml (a method NAME_joint_pass), data/shards and models/NAME_joint/joint:

    python benchmarks/pass_training.py train gain 0.25       # a rule of RULES and its dial: trains and votes
    python benchmarks/pass_training.py table                 # certified accuracies of all trials so far
    python benchmarks/pass_training.py figure pass.png       # small against large radii

`train` writes models to trials/RULE-DIAL/ and votes to trials/RULE-DIAL.npz. `train none 0` votes with the joint model
itself, and `train never 0` trains further without any pass.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from rrcm import CascadedClassifier
from rrcm.certification.cascade_thresholds import certified_radii, choose_thresholds, claim_bounds
from rrcm.certification.training_votes import count_training_votes
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.methods import METHODS, continued_method
from rrcm.models.kinds import load_scales
from rrcm.objectives.passing import pass_targets
from rrcm.training.finetune import finetune
from rrcm.training.plan import Files, plan_training
from rrcm.utils.distributed import set_threads
from rrcm.utils.pixels import to_unit_range

RADII = [0.25 * k for k in range(9)]
SMALL, LARGE = RADII[:3], RADII[5:]
N = 1000  # samples per sigma of the certificates that the votes stand for
ALPHA = 0.001
TRIALS, SHARDS, VOTES = Path("trials"), Path("data/shards"), Path("data/training_votes")


def shares(votes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the label and of the most frequent other class in votes (N, S, K): two (N, S)."""
    share = (votes + 0.5) / (votes.sum(-1, keepdims=True) + 1)
    is_label = np.arange(share.shape[-1]) == np.asarray(labels)[:, None, None]
    return np.where(is_label, share, 0).max(-1), np.where(is_label, 0, share).max(-1)


def uncertain(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], dial: float) -> np.ndarray:
    """Pass where the label has a smaller share of the votes than `dial`."""
    return (shares(votes, labels)[0] < dial) & (np.arange(len(sigmas)) > 0)


def wrong(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], dial: float) -> np.ndarray:
    """Pass where another class leads by more than `dial` of the votes, and a smaller sigma is right."""
    top, other = shares(votes, labels)
    right_below = np.maximum.accumulate(np.pad(top > other, ((0, 0), (1, 0)))[:, :-1], 1)
    return (other - top > dial) & right_below


def soft(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], dial: float) -> np.ndarray:
    """Pass by the share of the votes that are wrong, to the power of `dial`, where a smaller sigma is right."""
    top, other = shares(votes, labels)
    right_below = np.maximum.accumulate(np.pad(top > other, ((0, 0), (1, 0)))[:, :-1], 1)
    return np.clip((1 - top) * right_below, 0, 1) ** dial


def gain_at_largest(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], dial: float) -> np.ndarray:
    """As `gain`, at the largest sigma alone."""
    return pass_targets(votes, labels, sigmas, dial) & (np.arange(len(sigmas)) == len(sigmas) - 1)


def relative_gain(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], dial: float) -> np.ndarray:
    """As `gain`, with a dial relative to the sigma that passes."""
    each = [pass_targets(votes, labels, sigmas, dial * sigma)[:, k] for k, sigma in enumerate(sigmas)]
    return np.stack(each, 1)


def never(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], dial: float) -> np.ndarray:
    """Never pass."""
    return np.zeros(votes.shape[:2], bool)


RULES: dict[str, Callable] = {
    "gain": pass_targets,
    "gain_at_largest": gain_at_largest,
    "relative_gain": relative_gain,
    "uncertain": uncertain,
    "wrong": wrong,
    "soft": soft,
    "never": never,
}


def train(rule: str, dial: float, images: int, samples: int) -> None:
    """Continue the joint model with targets by `rule`, and write the votes of its cascade for validation images."""
    config = load_config()
    set_threads(config.threads)
    (method,) = (name for name in config.methods if METHODS[name].can_pass)
    joint = continued_method(method)
    folder, votes = Path("models") / joint / "joint", VOTES / f"{joint}.safetensors"
    if rule != "none":
        if not votes.exists():
            count_training_votes(config, SHARDS, folder, votes, Path("timings/training_votes.json"))
        output = TRIALS / f"{rule}-{dial:g}" / method / "joint"
        (output.parents[1] / joint).mkdir(parents=True, exist_ok=True)
        if not (output.parents[1] / joint / "joint").exists():
            (output.parents[1] / joint / "joint").symlink_to(folder.resolve())
        files = Files(SHARDS, Path("models/pretrain"), output, output.with_suffix(".json"), training_votes=VOTES)

        def targets(votes: np.ndarray, labels: np.ndarray, sigmas: list[float], gain: float) -> np.ndarray:
            passes = RULES[rule](votes, labels, sigmas, dial)
            print(f"{rule} {dial:g}: passes {np.round(100 * passes.mean(0), 1)} % at {sigmas}", flush=True)
            return passes

        with patch("rrcm.training.finetune.pass_targets", targets):
            finetune(plan_training(config, method, "joint", files))
        folder = output
    sigmas = sorted(config.sigmas)
    scales, can_pass = load_scales(folder, sigmas)
    cascade = CascadedClassifier(
        [scale.classifier for scale in scales],
        sigmas,
        [0.0] * (len(sigmas) - 1),
        scales[0].num_classes,
        can_pass=can_pass,
        precision=config.certify.precision,
        seed=config.seed,
    )
    pixels, labels, indices = read_split(ShardedDataset(SHARDS, "val"), config.data.image_size, 1, images)
    votes = cascade.votes(to_unit_range(pixels), samples, indices=indices)
    TRIALS.mkdir(exist_ok=True)
    np.savez(TRIALS / f"{rule}-{dial:g}.npz", votes=votes, labels=labels.numpy(), sigmas=sigmas)


def crossed_radii(bounds: tuple[np.ndarray, ...], choose: Callable[[np.ndarray], list[float]]) -> np.ndarray:
    """The radius of each image, with thresholds that `choose` finds on the other half of the images."""
    rows, radii = np.arange(len(bounds[0])), np.empty(len(bounds[0]))
    for half in (0, 1):
        thresholds = choose(rows[rows % 2 != half])
        radii[rows % 2 == half] = certified_radii(*(bound[rows % 2 == half] for bound in bounds), thresholds)
    return radii


def radii_of(path: Path, bound: str, weights: dict[float, float] | None) -> np.ndarray:
    """The certified radii of a trial: with tau 0, or with thresholds chosen for `weights` of the radii."""
    held = np.load(path)
    votes, labels, sigmas = held["votes"], held["labels"], held["sigmas"].tolist()
    bounds = claim_bounds(votes, labels, sigmas, N, ALPHA, bound)
    if weights is None:
        return certified_radii(*bounds, [0.0] * (len(sigmas) - 1))
    own = {"n": N, "alpha": ALPHA, "bound": bound, "weights": weights}
    return crossed_radii(bounds, lambda rows: choose_thresholds(votes[rows], labels[rows], sigmas, **own)[0])


def row_of(radii: np.ndarray) -> dict[str, float]:
    """Certified accuracies in %, their sum over RADII, and ACR."""
    accuracy = {f"{radius:g}": round(100 * float(np.mean(radii >= radius)), 1) for radius in RADII}
    return accuracy | {"sum": round(sum(accuracy.values()), 1), "ACR": round(float(np.maximum(radii, 0).mean()), 3)}


def table() -> pd.DataFrame:
    """The certified accuracies of all trials, with tau 0 and with thresholds for the sum over RADII, by both bounds."""
    rows = []
    for path in sorted(TRIALS.glob("*.npz")):
        for bound in ("binary", "margin"):
            for name, weights in (("0", None), ("sum", dict.fromkeys(RADII, 1.0))):
                rows.append({"trial": path.stem, "bound": bound, "tau": name} | row_of(radii_of(path, bound, weights)))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train")
    command.add_argument("rule", choices=["none", *RULES])
    command.add_argument("dial", type=float)
    command.add_argument("--images", type=int, default=400)
    command.add_argument("--samples", type=int, default=N)
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "train":
        train(given.rule, given.dial, given.images, given.samples)
    else:
        print(table().to_string(index=False))
