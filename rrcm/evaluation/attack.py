"""Attack smoothed classifiers and cascades with PGD (Salman et al. 2019) to test their certificates.

No attack within the certified radius may change the class: an attack that does refutes the certificate. Beyond that
radius, the attack gives an upper bound on robust accuracy. The base classifier is also attacked, without smoothing and
noise, to show that the attack works. (It was trained on noisy images, so it is harder to attack than one that was
trained on clean images.) A cascade has no single base classifier, so only the deployed classifier is attacked.

PREDICT classifies the attacked image with noise that the attack has not seen. A certificate does not rule out that
PREDICT abstains, so abstentions are counted separately, neither as correct nor as wrong. Up to the error probabilities
alpha of PREDICT and CERTIFY,

    certified accuracy at r <= share of images that are classified correctly or abstained on under attack within r.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.certify import make_smoothed_classifier, smoothing_options
from rrcm.certification.noise import FORWARD, CounterDraw
from rrcm.certification.record import CascadeRecord, read_record, record_path
from rrcm.certification.results import ABSTAIN, COLUMNS, read_certificates, sigma_name
from rrcm.certification.smoothing import SmoothedClassifier, is_stochastic
from rrcm.config import Attack, Config
from rrcm.data.shards import ShardedDataset, evenly_spaced, read_split
from rrcm.data.verification import verify_shards
from rrcm.evaluation.metrics import certified_accuracy
from rrcm.methods import CASCADE, model_name
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.models.kinds import load_model_folder, load_scales
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


def smoothed_target(smoothed: SmoothedClassifier | CascadedClassifier, n: int, alpha: float) -> AttackTarget:
    """A smoothed classifier or a cascade. It predicts by PREDICT with `n` samples at level `alpha`."""
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
    targets: Mapping[str, AttackTarget],
    certificates: pd.DataFrame,
    images: torch.Tensor,
    progress: Progress,
) -> pd.DataFrame:
    """Attack the `targets` on `images` (N, C, H, W). The `certificates` are about the target named "".

    Returns the certificates with more columns. `attacked` is the worst prediction just inside the certified radius,
    relative to the certified class, and NA for an image without a radius. `broken` is 1 where `attacked` is another
    class. `r=R` and, for a target named `unsmoothed_`, `unsmoothed_r=R` are the worst predictions within each radius R
    of the report, relative to the label.
    """
    settings = config.attack
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
    label, worst = table["label"], [table[f"r={r}"] for r in radii]
    summary = {
        "images": len(table),
        "certificates": int(table["attacked"].notna().sum()),
        "broken": int(table["broken"].sum()),
        "abstained": int((table["attacked"] == ABSTAIN).sum()),
        "certified_accuracy": certified_accuracy(table, radii).tolist(),
        "accuracy": [float((predict == label).mean()) for predict in worst],
        "not_wrong": [float(((predict == label) | (predict == ABSTAIN)).mean()) for predict in worst],
    }
    if f"unsmoothed_r={radii[0]}" in table:
        summary["unsmoothed_accuracy"] = [float((table[f"unsmoothed_r={r}"] == label).mean()) for r in radii]
    return summary


class AttackResults(NamedTuple):
    """The results of attacking the classifiers of a method, by the names of their certificate files."""

    radii: list[float]
    tables: dict[str, pd.DataFrame]  # from `attack_classifier`
    summaries: dict[str, dict]  # from `summarize`

    @property
    def totals(self) -> dict[str, int]:
        """Each of the COUNTS, summed over all classifiers."""
        return {name: sum(summary[name] for summary in self.summaries.values()) for name in COUNTS}


@explain_out_of_memory("lower attack.batch_size or attack.num_noise")
def attack_method(
    config: Config, method: str, shard_folder: Path | str, models: Path, certificates: Path
) -> AttackResults:
    """Attack a method's classifiers at all sigmas, which are the model folders sigma_S or joint in `models`.

    The cascade of a method that the settings name is attacked too. `certificates` is the folder with the certificates
    sigma_S.tsv and cascade.tsv. Raises `RRCMError` if a file is missing, or if the certificates are for other images
    than the settings select.
    """
    set_threads(config.threads)
    device = pick_device(config.device)
    images = ShardedDataset(shard_folder, "test")
    verify_shards([images])
    limits = config.certify.max_images, config.denoised.max_images.get(method)
    pixels, labels, indices = read_split(images, config.data.image_size, config.certify.every, *limits)
    files = {name: certificates / f"{name}.tsv" for name in map(sigma_name, config.sigmas)}
    if method in config.cascade.methods:
        files[CASCADE] = certificates / f"{CASCADE}.tsv"
    frames = {name: _read_attacked(path, indices, labels.tolist()) for name, path in files.items()}
    targets = {
        sigma_name(sigma): expert_targets(config, sigma, models / model_name(method, sigma), device)
        for sigma in config.sigmas
    }
    if CASCADE in files:
        targets[CASCADE] = cascade_targets(config, method, models, files[CASCADE], device)

    rows, radii = evenly_spaced(len(indices), config.attack.max_images), report_radii(config)
    pixels = to_unit_range(pixels[rows].to(device))
    frames = {name: frame.iloc[rows].reset_index(drop=True) for name, frame in frames.items()}
    attacks = sum(
        len(targets[name]) * len(radii) * len(frame) + int((frame["radius"] > 0).sum())
        for name, frame in frames.items()
    )
    with Progress(attacks, f"attack {method}", "attacks") as progress:
        tables = {
            name: attack_classifier(config, targets[name], frame, pixels, progress) for name, frame in frames.items()
        }
    return AttackResults(radii, tables, {name: summarize(table, radii) for name, table in tables.items()})


def expert_targets(config: Config, sigma: float, folder: Path, device: torch.device) -> dict[str, AttackTarget]:
    """The classifier in a model folder at one sigma, smoothed and unsmoothed."""
    classifier = load_model_folder(folder, sigma=sigma).classifier.to(device)
    smoothed = make_smoothed_classifier(classifier, sigma, config, num_noise=config.attack.num_noise)
    return {
        "": smoothed_target(smoothed, config.attack.n, config.certify.alpha),
        "unsmoothed_": unsmoothed_target(classifier, config.seed),
    }


def cascade_targets(
    config: Config, method: str, models: Path, certificates: Path, device: torch.device
) -> dict[str, AttackTarget]:
    """The cascade of a method, with the thresholds that the record of its `certificates` has.

    Raises `RRCMError` for a missing record, and for the record of a cascade with other sigmas.
    """
    record, sigmas = read_record(record_path(certificates)), config.cascade_sigmas
    if not isinstance(record, CascadeRecord) or record.sigmas != sigmas:
        wrong = f"is not about the cascade of the sigmas {sigmas}"
        raise RRCMError(f"{record_path(certificates)}: {wrong}; run `dvc repro certify-cascade` again")
    folders = [models / name for name in dict.fromkeys(model_name(method, sigma) for sigma in sigmas)]
    scales, can_pass = load_scales(folders, sigmas)
    classifiers = [scale.classifier.to(device) for scale in scales]
    options = smoothing_options(config) | {"can_pass": can_pass, "num_noise": config.attack.num_noise}
    cascade = CascadedClassifier(classifiers, sigmas, record.thresholds, scales[0].num_classes, **options)
    return {"": smoothed_target(cascade, config.attack.n, config.certify.alpha)}


def _read_attacked(path: Path, indices: Sequence[int], labels: Sequence[int]) -> pd.DataFrame:
    """The certificates in a file. Raises `RRCMError` unless they are for the images with `indices` and `labels`."""
    command = "dvc repro certify-cascade" if path.stem == CASCADE else "dvc repro certify"
    if not path.is_file():
        raise RRCMError(f"{path}: no such file; make it with `{command}`, or fetch it with `dvc pull`")
    frame = read_certificates(path)
    if frame["idx"].tolist() != list(indices) or frame["label"].tolist() != list(labels):
        raise RRCMError(f"{path}: is for other images than the settings select; run `{command}` again")
    return frame


def write_results(folder: Path, method: str, results: AttackResults) -> None:
    """Write into `folder` a table with one row per image for each certificate file, and summary.json."""
    for name, table in results.tables.items():
        table.to_csv(folder / f"{name}.tsv", sep="\t", index=False, lineterminator="\n")
    counts = {"method": method, **results.totals, "radii": results.radii}
    write_json(folder / "summary.json", {**counts, **results.summaries})


def summary_line(output: Path, totals: dict[str, int], alpha: float) -> str:
    """One line with the number of broken certificates, which is a warning if there are any.

    A broken certificate is not an error, since each certificate may be false with probability alpha.
    """
    broken, certificates = totals["broken"], totals["certificates"]
    line = f"{output}: {broken} of {certificates:,} certificates broken"
    if broken == 0:
        return line
    return f"warning: {line}; chance allows {alpha * certificates:.2g}: see where broken is 1 in {output}/*.tsv"
