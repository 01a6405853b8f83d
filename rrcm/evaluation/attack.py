"""Attack the smoothed classifier, to see what its certificates are worth: PGD of Salman et al. 2019.

Within its radius a certificate allows no other class whatever is done to the image, so an attack that finds one has
broken it. Beyond, an attack shows how much of the accuracy that is not certified is lost indeed. The same attack is
made on the network without its defence, asked once and without noise, to show that the attack works. (That network was
trained on noisy images, which alone makes it harder to attack than one that has seen only clean ones.)

An attacked image is judged by PREDICT, with noise that the attack has not seen. PREDICT may abstain, which no
certificate excludes: it is counted by itself, neither as right nor as wrong. So up to PREDICT's and CERTIFY's own alpha

    certified accuracy at r <= share of images right or abstained on under attack within r.
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from rrcm.certification.certify import smooth
from rrcm.certification.results import ABSTAIN, COLUMNS, read_certificates, sigma_name
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import Attack, Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.evaluation.metrics import certified_accuracy
from rrcm.models.base_classifiers import Classifier
from rrcm.models.checkpoints import load_classifier
from rrcm.report.figures import FORMATS, draw_attack, save
from rrcm.utils.distributed import pick_device
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import atomic_directory, write_json
from rrcm.utils.progress import Progress

JUST_BELOW = 0.999  # of a certificate's radius
COUNTS = ("certificates", "broken", "abstained")


def pgd(
    classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor, radius: torch.Tensor, *, steps: int = 20
) -> torch.Tensor:
    """Images within `radius` of the given ones for which `classifier` finds `labels` unlikely: (B, C, H, W) float32.

    Projected gradient ascent on the cross-entropy with steps of L2 length 2 radius / steps, after each back into the
    ball and into [0, 1]. images (B, C, H, W) float32 in [0, 1], labels (B,) int64, radius (B,) L2 in pixel units;
    `classifier` gives logits or log-probabilities (B, K) and treats images one by one. With a `SmoothedClassifier` this
    is SmoothAdv_PGD (Salman et al. 2019, eq. 6 and section 3): its gradient is that of the log of the mean softmax over
    noisy copies, the same ones in all steps.
    """
    length = 2 * radius.double() / steps
    attacked = images
    for _ in range(steps if radius.any() else 0):
        attacked = attacked.detach().requires_grad_()
        loss = F.cross_entropy(classifier(attacked).float(), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        direction = F.normalize(gradient.double().flatten(1), dim=1, eps=1e-300)  # of a zero gradient zero
        moved = attacked.detach().double() + (length[:, None] * direction).view_as(images)
        attacked = project(moved, images, radius)
    return attacked


def project(moved: torch.Tensor, images: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Move images back into the L2 balls around `images` and into the box [0, 1]: (B, C, H, W) float32.

    `images` (float32) lie in the box, so clipping to it only brings a point nearer. The result is in the ball as the
    numbers it has: rounding a pixel of the box to float32 moves it by at most 2^-25, the whole image of d pixels by at
    most sqrt(d) 2^-25, and twice that is kept from the surface.
    """
    offset = moved.double() - images.double()
    room = (radius.double() - math.sqrt(images[0].numel()) * 2**-24).clamp_min(0)
    shrink = (room / offset.flatten(1).norm(dim=1).clamp_min(1e-300)).clamp_max(1)
    return (images.double() + shrink[:, None, None, None] * offset).clamp(0, 1).float()


class AttackTarget(NamedTuple):
    """What is attacked: the network that gives the gradients, and what is answered to images of these indices."""

    network: nn.Module
    answer: Callable[[torch.Tensor, Sequence[int]], Sequence[int]]


def smoothed_victim(smoothed: SmoothedClassifier, n: int, alpha: float) -> AttackTarget:
    """The smoothed classifier: it answers as PREDICT does, with n samples."""
    return AttackTarget(smoothed, lambda images, indices: smoothed.predict(images, n=n, alpha=alpha, indices=indices))


def unsmoothed_victim(network: nn.Module) -> AttackTarget:
    """The network itself, asked once and without noise."""
    return AttackTarget(network, lambda images, indices: network(images).argmax(1).tolist())


def worst_predictions(
    victim: AttackTarget,
    images: torch.Tensor,
    indices: np.ndarray,
    truth: np.ndarray,
    radii: np.ndarray,
    settings: Attack,
    progress: Progress,
) -> np.ndarray:
    """The worst answer found within each radius, (R, N) int64: another class than `truth`, else ABSTAIN, else `truth`.

    images (N, C, H, W), indices and truth (N,), radii (R, N) growing from row to row: what was found within a radius
    counts for the larger ones too, and an image that is lost is not attacked again.
    """
    worst, found = np.empty(radii.shape, np.int64), truth.copy()
    for row, radius in zip(worst, radii, strict=True):
        standing = np.flatnonzero((found == truth) | (found == ABSTAIN))
        progress.update(len(truth) - len(standing))
        for first in range(0, len(standing), settings.batch_size):
            some = standing[first : first + settings.batch_size]
            labels, reach = (torch.from_numpy(values[some]).to(images.device) for values in (truth, radius))
            attacked = pgd(victim.network, images[some], labels, reach, steps=settings.steps)
            answers = np.array(victim.answer(attacked, indices[some].tolist()))
            found[some] = np.where(answers == truth[some], found[some], answers)
            progress.update(len(some))
        row[:] = found
    return worst


def attack_classifier(
    config: Config,
    sigma: float,
    network: Classifier,
    certificates: pd.DataFrame,
    images: torch.Tensor,
    progress: Progress,
) -> pd.DataFrame:
    """Attack one network, smoothed and unsmoothed, on `images` (N, C, H, W), of which `certificates` is the frame.

    Returns the certificates with the worst answers to each image: `attacked` just below its radius (the truth being
    what was certified; NA where no radius was), `broken` (0 or 1) when that is another class, and `r=R` and
    `unsmoothed_r=R` within each radius R of the report (the truth being the label).
    """
    settings = config.attack
    smoothed = smooth(network, sigma, config, samples=settings.num_noise)
    victims = {"": smoothed_victim(smoothed, settings.n, settings.alpha), "unsmoothed_": unsmoothed_victim(network)}
    table = certificates[COLUMNS[:-1]].copy()
    idx, label, predict, radius = (table[name].to_numpy() for name in ("idx", "label", "predict", "radius"))
    claims, radii = np.flatnonzero(radius > 0), report_radii(config)

    case = (images[claims], idx[claims], predict[claims], JUST_BELOW * radius[None, claims])
    (found,) = worst_predictions(victims[""], *case, settings, progress)
    table["attacked"] = pd.Series(found, claims, "Int64")
    table["broken"] = 0
    table.loc[claims, "broken"] = ((found != predict[claims]) & (found != ABSTAIN)).astype(int)
    everywhere = np.repeat(np.array(radii)[:, None], len(table), axis=1)
    for name, victim in victims.items():
        found = worst_predictions(victim, images, idx, label, everywhere, settings, progress)
        for r, answers in zip(radii, found, strict=True):
            table[f"{name}r={r}"] = answers
    return table


def report_radii(config: Config) -> list[float]:
    """The report's radii in order, and 0: what is wrong without an attack is wrong under it."""
    return sorted({0.0, *config.report.radii})


def summarise(table: pd.DataFrame, radii: Sequence[float]) -> dict:
    """The counts and curves of what `attack_classifier` returns, JSON-able. Lists have an entry a radius."""
    label, answers = table["label"], {name: [table[f"{name}r={r}"] for r in radii] for name in ("", "unsmoothed_")}
    return {
        "images": len(table),
        "certificates": int(table["attacked"].notna().sum()),
        "broken": int(table["broken"].sum()),
        "abstained": int((table["attacked"] == ABSTAIN).sum()),
        "certified_accuracy": certified_accuracy(table, radii).tolist(),
        "accuracy": [float((found == label).mean()) for found in answers[""]],
        "not_wrong": [float(((found == label) | (found == ABSTAIN)).mean()) for found in answers[""]],
        "unsmoothed_accuracy": [float((found == label).mean()) for found in answers["unsmoothed_"]],
    }


def attack_method(
    config: Config, method: str, shard_folder: Path | str, models: Path, certificates: Path, output: Path
) -> None:
    """Attack a method's classifiers of all sigmas and write the folder `output`: sigma_S.tsv with the answers image by
    image, summary.json with counts and accuracies, attack.png and attack.svg.

    Reads sigma_S.tsv in `certificates` and the networks sigma_S in `models`. A broken certificate is no failure, as
    each may be false with probability alpha: it is counted, and said on stderr. Raises `RRCMError` when a file is
    missing or the certificates are of other images than the settings name.
    """
    device, settings = pick_device(config.device), config.attack
    shards = ShardedDataset(shard_folder, "test")
    shards.verify()
    pixels, labels, indices = read_split(
        shards, config.data.image_size, config.certify.every, config.certify.max_images
    )
    networks, frames = {}, {}
    for sigma in config.sigmas:
        path = certificates / f"{sigma_name(sigma)}.tsv"
        if not path.is_file():
            raise RRCMError(f"{path}: no such file; make it with `dvc repro certify`, or fetch it with `dvc pull`")
        frames[sigma] = read_certificates(path)
        if frames[sigma]["idx"].tolist() != indices or frames[sigma]["label"].tolist() != labels.tolist():
            raise RRCMError(f"{path}: certifies other images than the settings name; run `dvc repro certify` again")
        networks[sigma] = load_classifier(models / sigma_name(sigma)).to(device)

    rows, radii = evenly_spaced(len(indices), settings.max_images), report_radii(config)
    images = pixels[rows].to(device).float() / 255
    frames = {sigma: frame.iloc[rows].reset_index(drop=True) for sigma, frame in frames.items()}
    jobs = sum(2 * len(radii) * len(frame) + int((frame["radius"] > 0).sum()) for frame in frames.values())
    with Progress(jobs, f"attack {method}", "attacks") as progress:
        tables = {
            sigma: attack_classifier(config, sigma, networks[sigma], frame, images, progress)
            for sigma, frame in frames.items()
        }

    summaries = {sigma: summarise(table, radii) for sigma, table in tables.items()}
    total = {name: sum(summary[name] for summary in summaries.values()) for name in COUNTS}
    with atomic_directory(output) as folder:
        for sigma, table in tables.items():
            table.to_csv(folder / f"{sigma_name(sigma)}.tsv", sep="\t", index=False, lineterminator="\n")
        by_sigma = {sigma_name(sigma): summary for sigma, summary in summaries.items()}
        write_json(folder / "summary.json", {"method": method, **total, "radii": radii, **by_sigma})
        figure = draw_attack(method, tables, radii, summaries)
        for suffix in FORMATS:
            save(figure, folder / f"attack{suffix}")
    print(outcome(output, total, config.certify.alpha), file=sys.stderr)


def evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    """At most `limit` of `count` places, evenly spread: test images may be sorted by class."""
    return np.linspace(0, count - 1, min(count, limit or count)).astype(int)


def outcome(output: Path, total: dict[str, int], alpha: float) -> str:
    """One line: how many certificates were broken."""
    broken, certificates = total["broken"], total["certificates"]
    line = f"{output}: {broken} of {certificates:,} certificates broken"
    if broken == 0:
        return line
    return f"warning: {line}; chance allows {alpha * certificates:.2g}: see where broken is 1 in {output}/*.tsv"
