"""Evaluate representations before any fine-tuning.

k-nearest-neighbour accuracy is measured with and without noise, and cosine similarity along a noise trajectory, which
rRCM trains to be high.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rrcm.data.shards import ShardedDataset, read_pixels
from rrcm.utils.distributed import DistEnv, all_gather_cat, autocast
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.rng import normal_per_sample

BATCH = 256
COLLAPSED = 0.99  # representations have collapsed if different clean images have a mean cosine above this


def knn_accuracy(
    queries: torch.Tensor,
    labels: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy (a share) of the weighted k-NN classifier of Wu et al. 2018.

    `queries` (N, D) and `bank` (M, D) are floating-point representations, `labels` (N,) and `bank_labels` (M,) int64.
    Neighbours are the k nearest by cosine, and each votes with weight exp(cosine / temperature).
    """
    correct = 0
    for chunk, target in zip(queries.split(1024), labels.split(1024), strict=True):
        cosine, nearest = (F.normalize(chunk) @ F.normalize(bank).T).topk(min(k, len(bank)))
        votes = F.one_hot(bank_labels[nearest]) * (cosine / temperature).exp()[..., None]
        correct += int((votes.sum(1).argmax(1) == target).sum())
    return correct / len(queries)


def same_and_cross_cosine(noisy: torch.Tensor, clean: torch.Tensor) -> tuple[float, float]:
    """Mean cosine between noisy and clean representations of the same image, and of different images.

    Both are (N, D) with N >= 2, and row i belongs to image i. The second value is what the first would be if the noise
    erased all differences between images. It is near 1 for a collapsed encoder.
    """
    n, noisy, clean = len(noisy), F.normalize(noisy.double()), F.normalize(clean.double())
    same, everything = (noisy * clean).sum(), noisy.sum(0) @ clean.sum(0)
    return float(same / n), float((everything - same) / (n * (n - 1)))


def centred(representations: torch.Tensor) -> torch.Tensor:
    """`representations` (N, D) minus their mean over the images, as float64. This removes what all images share."""
    return representations.double() - representations.double().mean(0)


class EvalImages(NamedTuple):
    """Images evenly spaced over a split, divided among the processes."""

    pixels: torch.Tensor  # (n, C, H, W) uint8: images rank, rank + world_size, ...; n is the same on every process
    labels: torch.Tensor  # (N,) int64, of all images


def load_eval_images(images: ShardedDataset, size: int, most: int, env: DistEnv) -> EvalImages:
    """Load at most `most` images of a split, cropped to `size` pixels. Each process reads its share."""
    rows = np.arange(0, len(images), -(-len(images) // most))
    padded = rows[np.arange(-(-len(rows) // env.world_size) * env.world_size) % len(rows)]
    share = padded[env.rank :: env.world_size].tolist()
    return EvalImages(read_pixels(images, size, share), torch.from_numpy(images.labels[rows]).to(env.device))


@dataclass(frozen=True)
class Evaluation:
    """Evaluates an encoder on clean images and at each pixel noise: call it with the encoder for a row per sigma.

    Clean images have sigma 0 and the noise level t_min; pixel noise sigma is the noise level t = 2 sigma. In each row,
    `knn` is the accuracy of the noisy held-out images, with the clean bank as neighbours. `same_image_cosine` is the
    mean cosine between the representations of an image at t and at t_min, with the same noise sample.
    `cross_image_cosine` compares an image at t with the other images at t_min. `centred_cosine` is the same-image
    cosine after subtracting the mean representation of each noise level.

    rRCM should raise the same-image cosine. A collapsed or untrained encoder also scores high, because its outputs
    hardly differ. Compare it with the cross-image cosine, or use the centred cosine.
    """

    bank: EvalImages
    held_out: EvalImages
    sigmas: list[float]
    t_min: float
    seed: int
    precision: str
    env: DistEnv

    def __call__(self, encoder: nn.Module) -> list[dict[str, float]]:
        """Evaluate `encoder`, a network of (images in model space, t) with outputs (n, D), on all processes."""
        training = encoder.training
        encoder.eval()
        neighbours, clean = (self._represent(encoder, images, self.t_min) for images in (self.bank, self.held_out))
        rows = []
        for sigma in (0.0, *self.sigmas):
            noisy = self._represent(encoder, self.held_out, 2 * sigma) if sigma else clean
            same, cross = same_and_cross_cosine(noisy, clean)
            rows.append(
                {
                    "sigma": sigma,
                    "knn": knn_accuracy(noisy, self.held_out.labels, neighbours, self.bank.labels),
                    "same_image_cosine": same,
                    "cross_image_cosine": cross,
                    "centred_cosine": same_and_cross_cosine(centred(noisy), centred(clean))[0],
                }
            )
        encoder.train(training)
        return rows

    @torch.no_grad()
    def _represent(self, encoder: nn.Module, images: EvalImages, t: float) -> torch.Tensor:
        """Representations (N, D) float32 of the images of all processes at level t. Image i has noise sample i."""
        indices, outputs = torch.arange(len(images.pixels)) * self.env.world_size + self.env.rank, []
        for pixels, chunk in zip(images.pixels.split(BATCH), indices.split(BATCH), strict=True):
            clean = to_model_space(to_unit_range(pixels.to(self.env.device)))
            positions = (chunk % len(images.labels)).tolist()
            noise = normal_per_sample(
                clean.shape[1:], self.seed, "trajectory", positions=positions, device=self.env.device
            )
            with autocast(self.env.device, self.precision):
                outputs.append(encoder(clean + t * noise, t).float())
        gathered = all_gather_cat(torch.cat(outputs))[0].unflatten(0, (self.env.world_size, -1))
        return gathered.transpose(0, 1).flatten(0, 1)[: len(images.labels)]
