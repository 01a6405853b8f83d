"""Randomized smoothing: CERTIFY and PREDICT of Cohen et al. 2019, for any classifier of noisy images.

The noise of an image is a function of (seed, image index) alone, drawn in blocks of fixed size: the same bits whatever
the batch size, the order of the images or where a killed run was resumed. The network's own rounding depends on the
shape of a batch, so votes can differ in the last bits between batch sizes, thread counts and devices.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from scipy.special import bdtr, betaincinv, ndtri  # scipy.stats takes a second to import

from rrcm import model, rng, shards
from rrcm.checkpoint import load_classifier
from rrcm.config import Config
from rrcm.distributed import pick_device
from rrcm.environment import environment
from rrcm.errors import RRCMError
from rrcm.files import sha256_file, write_json
from rrcm.progress import Progress
from rrcm.results import ABSTAIN, write_certificates
from rrcm.rng import torch_rng
from rrcm.runs import Run, fingerprint
from rrcm.shards import ShardedImages, read_split

BLOCK = 100  # noisy samples drawn from one random stream

CODE = (model, rng, shards)  # what decides the result, with this file


@dataclass(frozen=True)
class Certificate:
    """`predict` is the smoothed classifier's class within the L2 `radius` (pixel units) of the image, or ABSTAIN."""

    predict: int
    radius: float


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """One-sided lower confidence bound of a binomial proportion: it is above the truth with probability <= alpha."""
    return 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, alpha))


def certify(
    classifier: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    *,
    sigma: float,
    num_classes: int,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    seed: int = 0,
    index: int = 0,
) -> Certificate:
    """CERTIFY: n0 samples choose the class, n fresh ones bound its probability below by p; radius sigma Phi^-1(p).

    `classifier` maps noisy pixels (B, C, H, W) float32 to logits (B, num_classes) and is in eval mode; `image` is
    (C, H, W) float32 in [0, 1] on the device to compute on; `sigma` in pixel units. The answer is wrong with
    probability at most alpha. `index` names the image's noise under `seed`.
    """
    _check(n0, n, alpha, sigma)
    guess = vote(classifier, image, n0, sigma, num_classes, batch_size, seed, "select", index)
    top = int(guess.argmax())
    votes = vote(classifier, image, n, sigma, num_classes, batch_size, seed, "estimate", index)
    bound = clopper_pearson_lower(int(votes[top]), n, alpha)
    if bound < 0.5:
        return Certificate(ABSTAIN, 0.0)
    return Certificate(top, sigma * float(ndtri(bound)))


def predict(
    classifier: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    *,
    sigma: float,
    num_classes: int,
    n: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    seed: int = 0,
    index: int = 0,
) -> int:
    """PREDICT: the smoothed classifier's class, or ABSTAIN. Not its class with probability at most alpha."""
    _check(1, n, alpha, sigma)
    votes = vote(classifier, image, n, sigma, num_classes, batch_size, seed, "predict", index)
    first, second = votes.topk(2).values.tolist()
    p_value = 2 * bdtr(second, first + second, 0.5)  # two-sided binomial test of a fair coin
    return int(votes.argmax()) if p_value <= alpha else ABSTAIN


@torch.inference_mode()
def vote(
    classifier: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    n: int,
    sigma: float,
    num_classes: int,
    batch_size: int,
    seed: int,
    purpose: str,
    index: int,
) -> torch.Tensor:
    """SAMPLEUNDERNOISE: how often each class is answered on n noisy copies of the image, (num_classes,) int64, CPU.

    Noise is drawn and added in float32, whatever precision the classifier computes in.
    """
    counts = torch.zeros(num_classes, dtype=torch.int64, device=image.device)
    for noise in _noise(image, n, max(1, batch_size // BLOCK), seed, purpose, index):
        answers = classifier(image + sigma * noise).argmax(1)
        counts += torch.bincount(answers, minlength=num_classes)
    return counts.cpu()


def _noise(
    image: torch.Tensor, n: int, blocks_a_batch: int, seed: int, purpose: str, index: int
) -> Iterator[torch.Tensor]:
    """Batches of standard normal noise, n samples in all; block b is a function of (seed, purpose, index, b)."""
    step = blocks_a_batch * BLOCK
    for start in range(0, n, step):
        noise = torch.empty((step, *image.shape), device=image.device)
        for row in range(0, min(step, n - start), BLOCK):
            block = (start + row) // BLOCK
            noise[row : row + BLOCK].normal_(generator=torch_rng(image.device, seed, purpose, index, block))
        yield noise[: n - start]


def _check(n0: int, n: int, alpha: float, sigma: float) -> None:
    if sigma <= 0:
        raise RRCMError(f"sigma = {sigma}: must be above 0")
    if not 0 < n0 <= n:
        raise RRCMError(f"n0 = {n0}, n = {n}: must be 0 < n0 <= n")
    if not 0 < alpha < 1:
        raise RRCMError(f"alpha = {alpha}: must be between 0 and 1")


def certify_split(
    config: Config, sigma: float, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path
) -> None:
    """Certify every k-th test image and write `output` in the field's format (time 0: it would differ from run to run);
    `timing` (JSON) has the true seconds an image. A killed run continues after its last finished image."""
    settings, device = config.certify, pick_device(config.device)
    images = ShardedImages(shard_folder, "test")
    images.verify()
    classifier = load_classifier(model_folder).to(device)
    if settings.precision == "bf16":
        classifier.bfloat16()
    pixels, labels, indices = read_split(images, config.data.image_size, settings.every, settings.max_images)

    inputs = {
        "shards": images.fingerprint,
        "model": sha256_file(model_folder / "model.safetensors"),
        "network": sha256_file(model_folder / "config.json"),
    }
    described = [settings.model_dump(mode="json"), config.seed, config.data.image_size, sigma, device.type]
    run = Run(f"certify-{sigma}", fingerprint(described, inputs, [*CODE, sys.modules[__name__]]))
    run.lock()
    journal = run.folder / "journal.jsonl"
    rows = _read_journal(journal)
    with (
        journal.open("a") as file,
        Progress(len(indices), f"certify {model_folder}", "images", done=len(rows)) as progress,
    ):
        for image, label, index in list(zip(pixels, labels.tolist(), indices, strict=True))[len(rows) :]:
            start = time.monotonic()
            certificate = certify(
                classifier,
                image.to(device).float() / 255,
                sigma=sigma,
                num_classes=len(images.classes),
                n0=settings.n0,
                n=settings.n,
                alpha=settings.alpha,
                batch_size=settings.batch_size,
                seed=config.seed,
                index=index,
            )
            rows.append(
                {
                    "idx": index,
                    "label": label,
                    "predict": certificate.predict,
                    "radius": certificate.radius,
                    "correct": int(certificate.predict == label),
                    "time": time.monotonic() - start,
                }
            )
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
            progress.update(1)
    frame = pd.DataFrame(rows)
    write_certificates(output, frame.assign(time=0))
    write_json(
        timing,
        {
            "seconds": float(frame["time"].sum()),
            "samples_per_second": len(frame) * (settings.n0 + settings.n) / float(frame["time"].sum()),
            "seconds_by_image": dict(zip(frame["idx"].astype(str), frame["time"], strict=True)),
            "environment": environment(device),
        },
    )
    run.finish()


def _read_journal(path: Path) -> list[dict]:
    """Finished images of an earlier, killed run; a half-written last line is cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
