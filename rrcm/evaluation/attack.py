"""Attack smoothed classifiers with PGD (Salman et al. 2019) to test their certificates.

No attack within the certified radius may change the class: an attack that does refutes the certificate. Beyond that
radius, the attack gives an upper bound on robust accuracy. The base classifier is also attacked, without smoothing and
noise, to show that the attack works. (It was trained on noisy images, so it is harder to attack than one that was
trained on clean images.)

PREDICT classifies the attacked image with noise that the attack has not seen. A certificate does not rule out that
PREDICT abstains, so abstentions are counted separately, neither as correct nor as wrong. Up to the error probabilities
alpha of PREDICT and CERTIFY,

    certified accuracy at r <= share of images that are classified correctly or abstained on under attack within r.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from rrcm.certification.certify import make_smoothed_classifier
from rrcm.certification.noise import FORWARD, CounterDraw
from rrcm.certification.results import ABSTAIN, COLUMNS, read_certificates, sigma_name
from rrcm.certification.smoothing import SmoothedClassifier, is_stochastic
from rrcm.config import Attack, Config
from rrcm.data.shards import ShardedDataset, evenly_spaced, read_split
from rrcm.data.verification import verify_shards
from rrcm.evaluation.metrics import certified_accuracy
from rrcm.methods import model_name
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.models.kinds import load_model_folder
from rrcm.objectives.adversarial import ascend
from rrcm.utils.distributed import explain_out_of_memory, pick_device, set_threads
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import write_json
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.progress import Progress

RADIUS_FRACTION = 0.999  # each certificate is attacked within this fraction of its radius
COUNTS = ("certificates", "broken", "abstained")


def pgd(
    classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor, radius: torch.Tensor, *, steps: int = 20
) -> torch.Tensor:
    """Images (B, C, H, W) float32 within `radius` of the given ones for which `classifier` finds `labels` unlikely.

    This is projected gradient ascent on the cross-entropy. Each step has the L2 length 2 radius / steps and is
    projected into the ball and into [0, 1]. images (B, C, H, W) float32 in [0, 1], labels (B,) int64, radius (B,) L2 in
    pixel units. `classifier` returns logits or log-probabilities (B, K), each row for its own image. With a
    `SmoothedClassifier` this is SmoothAdv_PGD (Salman et al. 2019, eq. 6 and section 3): it differentiates the log of
    the mean softmax over noisy copies, with the same noise in all steps.
    """
    return ascend(
        lambda attacked: F.cross_entropy(classifier(attacked).float(), labels, reduction="sum"),
        images,
        steps=steps if radius.any() else 0,
        length=2 * radius / steps,
        project=lambda moved: project(moved, images, radius),
    )


def project(moved: torch.Tensor, images: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Move `moved` (B, C, H, W) back into the L2 balls around `images` and into [0, 1], as float32.

    Clipping to [0, 1] only reduces the distance, because `images` (float32) are in [0, 1]. Rounding to float32 moves a
    pixel by at most 2^-25, and an image of d pixels by at most sqrt(d) 2^-25. The ball is shrunk by twice that, so that
    the rounded result lies inside it.
    """
    offset = moved.double() - images.double()
    room = (radius.double() - math.sqrt(images[0].numel()) * 2**-24).clamp_min(0)
    shrink = (room / offset.flatten(1).norm(dim=1).clamp_min(1e-300)).clamp_max(1)
    return (images.double() + shrink[:, None, None, None] * offset).clamp(0, 1).float()


class AttackTarget(NamedTuple):
    """A classifier under attack."""

    network: nn.Module  # to differentiate: (B, C, H, W) -> logits or log-probabilities (B, K)
    predict: Callable[[torch.Tensor, Sequence[int]], Sequence[int]]  # images and their indices -> classes or ABSTAIN


def smoothed_target(smoothed: SmoothedClassifier, n: int, alpha: float) -> AttackTarget:
    """The smoothed classifier. It predicts by PREDICT with `n` samples at level `alpha`."""
    return AttackTarget(smoothed, lambda images, indices: smoothed.predict(images, n=n, alpha=alpha, indices=indices))


def unsmoothed_target(classifier: BaseClassifier, seed: int = 0) -> AttackTarget:
    """The base classifier. It predicts with one pass on the image without noise."""
    network = _FixedDraw(classifier, seed) if is_stochastic(classifier) else classifier
    return AttackTarget(network, lambda images, indices: network(images).argmax(1).tolist())


class _FixedDraw(nn.Module):
    """A stochastic classifier with the same draws at each call, so that an attack maximizes one function."""

    def __init__(self, classifier: BaseClassifier, seed: int):
        super().__init__()
        self.classifier, self.seed = classifier, seed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return self.classifier(images, draw=CounterDraw(self.seed, rows + FORWARD, rows, rows))


def worst_predictions(
    target: AttackTarget,
    images: torch.Tensor,
    indices: np.ndarray,
    truth: np.ndarray,
    radii: np.ndarray,
    settings: Attack,
    progress: Progress,
) -> np.ndarray:
    """The worst prediction within each radius, (R, N) int64.

    A class other than `truth` is the worst, then ABSTAIN, then `truth`. images (N, C, H, W) float32 in [0, 1], indices
    and truth (N,), radii (R, N) increasing from row to row. A prediction within one radius is also one within the
    larger radii, so an image that is misclassified is not attacked again.
    """
    worst, current = np.empty(radii.shape, np.int64), truth.copy()
    for row, radius in zip(worst, radii, strict=True):
        standing = np.flatnonzero((current == truth) | (current == ABSTAIN))
        progress.update(len(truth) - len(standing))
        for first in range(0, len(standing), settings.batch_size):
            batch = standing[first : first + settings.batch_size]
            labels, reach = (torch.from_numpy(values[batch]).to(images.device) for values in (truth, radius))
            attacked = pgd(target.network, images[batch], labels, reach, steps=settings.steps)
            predictions = np.array(target.predict(attacked, indices[batch].tolist()))
            current[batch] = np.where(predictions == truth[batch], current[batch], predictions)
            progress.update(len(batch))
        row[:] = current
    return worst


def attack_classifier(
    config: Config,
    sigma: float,
    classifier: BaseClassifier,
    certificates: pd.DataFrame,
    images: torch.Tensor,
    progress: Progress,
) -> pd.DataFrame:
    """Attack one classifier, smoothed and unsmoothed, on `images` (N, C, H, W), whose certificates are `certificates`.

    Returns the certificates with more columns. `attacked` is the worst prediction just inside the certified radius,
    relative to the certified class, and NA for an image without a radius. `broken` is 1 where `attacked` is another
    class. `r=R` and `unsmoothed_r=R` are the worst predictions within each radius R of the report, relative to the
    label.
    """
    settings = config.attack
    smoothed = make_smoothed_classifier(classifier, sigma, config, num_noise=settings.num_noise)
    targets = {
        "": smoothed_target(smoothed, settings.n, config.certify.alpha),
        "unsmoothed_": unsmoothed_target(classifier, config.seed),
    }
    table = certificates[COLUMNS[:-1]].copy()
    idx, label, predict, radius = (table[name].to_numpy() for name in ("idx", "label", "predict", "radius"))
    certified, radii = np.flatnonzero(radius > 0), report_radii(config)

    inputs = (images[certified], idx[certified], predict[certified], RADIUS_FRACTION * radius[None, certified])
    (worst,) = worst_predictions(targets[""], *inputs, settings, progress)
    table["attacked"] = pd.Series(worst, certified, "Int64")
    table["broken"] = 0
    table.loc[certified, "broken"] = ((worst != predict[certified]) & (worst != ABSTAIN)).astype(int)
    everywhere = np.repeat(np.array(radii)[:, None], len(table), axis=1)
    for name, target in targets.items():
        worst = worst_predictions(target, images, idx, label, everywhere, settings, progress)
        for r, predictions in zip(radii, worst, strict=True):
            table[f"{name}r={r}"] = predictions
    return table


def report_radii(config: Config) -> list[float]:
    """The report's radii in ascending order. 0 is always among them: it counts the errors without an attack."""
    return sorted({0.0, *config.report.radii})


def summarize(table: pd.DataFrame, radii: Sequence[float]) -> dict:
    """Counts and curves from a table of `attack_classifier`, ready for JSON. Lists have one entry per radius."""
    label, worst = table["label"], {name: [table[f"{name}r={r}"] for r in radii] for name in ("", "unsmoothed_")}
    return {
        "images": len(table),
        "certificates": int(table["attacked"].notna().sum()),
        "broken": int(table["broken"].sum()),
        "abstained": int((table["attacked"] == ABSTAIN).sum()),
        "certified_accuracy": certified_accuracy(table, radii).tolist(),
        "accuracy": [float((predict == label).mean()) for predict in worst[""]],
        "not_wrong": [float(((predict == label) | (predict == ABSTAIN)).mean()) for predict in worst[""]],
        "unsmoothed_accuracy": [float((predict == label).mean()) for predict in worst["unsmoothed_"]],
    }


class AttackResults(NamedTuple):
    """The results of attacking the classifiers of a method."""

    radii: list[float]
    tables: dict[float, pd.DataFrame]  # by sigma, from `attack_classifier`
    summaries: dict[float, dict]  # by sigma, from `summarize`

    @property
    def totals(self) -> dict[str, int]:
        """Each of the COUNTS, summed over all sigmas."""
        return {name: sum(summary[name] for summary in self.summaries.values()) for name in COUNTS}


@explain_out_of_memory("lower attack.batch_size or attack.num_noise")
def attack_method(
    config: Config, method: str, shard_folder: Path | str, models: Path, certificates: Path
) -> AttackResults:
    """Attack a method's classifiers at all sigmas, which are the model folders sigma_S or joint in `models`.

    `certificates` is the folder with their certificates sigma_S.tsv. Raises `RRCMError` if a file is missing, or if the
    certificates are for other images than the settings select.
    """
    set_threads(config.threads)
    device = pick_device(config.device)
    images = ShardedDataset(shard_folder, "test")
    verify_shards([images])
    limits = config.certify.max_images, config.denoised.max_images.get(method)
    pixels, labels, indices = read_split(images, config.data.image_size, config.certify.every, *limits)
    classifiers, frames = {}, {}
    for sigma in config.sigmas:
        path = certificates / f"{sigma_name(sigma)}.tsv"
        if not path.is_file():
            raise RRCMError(f"{path}: no such file; make it with `dvc repro certify`, or fetch it with `dvc pull`")
        frames[sigma] = read_certificates(path)
        if frames[sigma]["idx"].tolist() != indices or frames[sigma]["label"].tolist() != labels.tolist():
            raise RRCMError(f"{path}: is for other images than the settings select; run `dvc repro certify` again")
        classifiers[sigma] = load_model_folder(models / model_name(method, sigma), sigma=sigma).classifier.to(device)

    rows, radii = evenly_spaced(len(indices), config.attack.max_images), report_radii(config)
    pixels = to_unit_range(pixels[rows].to(device))
    frames = {sigma: frame.iloc[rows].reset_index(drop=True) for sigma, frame in frames.items()}
    attacks = sum(2 * len(radii) * len(frame) + int((frame["radius"] > 0).sum()) for frame in frames.values())
    with Progress(attacks, f"attack {method}", "attacks") as progress:
        tables = {
            sigma: attack_classifier(config, sigma, classifiers[sigma], frame, pixels, progress)
            for sigma, frame in frames.items()
        }
    return AttackResults(radii, tables, {sigma: summarize(table, radii) for sigma, table in tables.items()})


def write_results(folder: Path, method: str, results: AttackResults) -> None:
    """Write into `folder` sigma_S.tsv with one row per image, and summary.json with counts and accuracies."""
    for sigma, table in results.tables.items():
        table.to_csv(folder / f"{sigma_name(sigma)}.tsv", sep="\t", index=False, lineterminator="\n")
    by_sigma = {sigma_name(sigma): summary for sigma, summary in results.summaries.items()}
    write_json(folder / "summary.json", {"method": method, **results.totals, "radii": results.radii, **by_sigma})


def summary_line(output: Path, totals: dict[str, int], alpha: float) -> str:
    """One line with the number of broken certificates, which is a warning if there are any.

    A broken certificate is not an error, since each certificate may be false with probability alpha.
    """
    broken, certificates = totals["broken"], totals["certificates"]
    line = f"{output}: {broken} of {certificates:,} certificates broken"
    if broken == 0:
        return line
    return f"warning: {line}; chance allows {alpha * certificates:.2g}: see where broken is 1 in {output}/*.tsv"
