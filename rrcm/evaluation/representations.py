"""How good representations are before any fine-tuning: k-nearest-neighbour accuracy, clean and under noise, and how
still they stay along a noise trajectory, which is what the method promises."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rrcm.data.shards import ShardedDataset, read_pixels
from rrcm.utils.distributed import DistEnv, all_gather_cat, autocast
from rrcm.utils.rng import normal_per_sample

BATCH = 256
COLLAPSED = 0.99  # a mean cosine between clean images above this: the encoder answers alike to all


def knn_accuracy(
    queries: torch.Tensor,
    labels: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries (N, D) whose class is that of their k nearest of the bank (M, D), by cosine; each votes with
    exp(cosine / temperature) (Wu et al. 2018). Labels are int64 (N,) and (M,)."""
    right = 0
    for some, target in zip(queries.split(1024), labels.split(1024), strict=True):
        cosine, nearest = (F.normalize(some) @ F.normalize(bank).T).topk(min(k, len(bank)))
        votes = F.one_hot(bank_labels[nearest]) * (cosine / temperature).exp()[..., None]
        right += int((votes.sum(1).argmax(1) == target).sum())
    return right / len(queries)


def same_and_cross_cosine(seen: torch.Tensor, quiet: torch.Tensor) -> tuple[float, float]:
    """Mean cosine between the representations (N, D) of images under noise and the same images without, and between
    those of different images: what the first would be if noise wiped out which image it was. Near 1 where an encoder
    has collapsed."""
    n, seen, quiet = len(seen), F.normalize(seen.double()), F.normalize(quiet.double())
    own, everything = (seen * quiet).sum(), seen.sum(0) @ quiet.sum(0)
    return float(own / n), float((everything - own) / (n * (n - 1)))


def centred(representations: torch.Tensor) -> torch.Tensor:
    """Less their mean over the images: what tells an image from others. (N, D) -> (N, D) float64."""
    return representations.double() - representations.double().mean(0)


class Sample(NamedTuple):
    """Images evenly spread over a split, shared out over the processes."""

    pixels: torch.Tensor  # (n, C, H, W) uint8: image rank, rank + world, ... and so on, as many on every process
    labels: torch.Tensor  # (N,) int64, of all of them


def load_eval_images(images: ShardedDataset, size: int, most: int, env: DistEnv) -> Sample:
    """At most `most` images of a split; each process reads its share."""
    rows = np.arange(0, len(images), -(-len(images) // most))
    padded = rows[np.arange(-(-len(rows) // env.world_size) * env.world_size) % len(rows)]
    share = padded[env.rank :: env.world_size].tolist()
    return Sample(read_pixels(images, size, share), torch.from_numpy(images.labels[rows]).to(env.device))


def evaluate(
    encoder: nn.Module,
    bank: Sample,
    held_out: Sample,
    *,
    sigmas: list[float],
    t_min: float,
    seed: int,
    precision: str,
    env: DistEnv,
) -> list[dict[str, float]]:
    """A row for clean images (sigma 0, noise level t_min) and one for each pixel `sigma` (noise level t = 2 sigma).

    `knn` is the accuracy of the held-out images under that noise, the clean bank being known; `cosine` the mean cosine
    between an image's representations at t and at t_min, along one noise; `similarity` that between an image's at t
    and other images' at t_min; `centred` as `cosine`, the mean representation of each level taken off before. The
    method promises a high cosine. An encoder that answers much alike to all images, as an untrained one does, has a
    high one as well, but then the similarity is high too; `centred` does not see what all images have in common.
    """

    @torch.no_grad()
    def represent(sample: Sample, t: float) -> torch.Tensor:
        """(N, D) float32, of all processes. Image i has noise i."""
        places, found = torch.arange(len(sample.pixels)) * env.world_size + env.rank, []
        for pixels, some in zip(sample.pixels.split(BATCH), places.split(BATCH), strict=True):
            clean = 2 * (pixels.to(env.device).float() / 255) - 1
            positions = (some % len(sample.labels)).tolist()
            noise = normal_per_sample(clean.shape[1:], seed, "trajectory", positions=positions, device=env.device)
            with autocast(env.device, precision):
                found.append(encoder(clean + t * noise, t).float())
        gathered = all_gather_cat(torch.cat(found))[0].unflatten(0, (env.world_size, -1))
        return gathered.transpose(0, 1).flatten(0, 1)[: len(sample.labels)]

    training = encoder.training
    encoder.eval()
    known, quiet, rows = represent(bank, t_min), represent(held_out, t_min), []
    for sigma in (0.0, *sigmas):
        seen = represent(held_out, 2 * sigma) if sigma else quiet
        accuracy = knn_accuracy(seen, held_out.labels, known, bank.labels)
        own, others = same_and_cross_cosine(seen, quiet)
        still, _ = same_and_cross_cosine(centred(seen), centred(quiet))
        rows.append({"sigma": sigma, "knn": accuracy, "cosine": own, "similarity": others, "centred": still})
    encoder.train(training)
    return rows
