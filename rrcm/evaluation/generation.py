"""What an encoder makes of noise, and images generated from its representations (Lei et al. 2025, appendix).

rRCM's encoder f is trained to be consistent along a noise trajectory: f(x_t; t) is nearly the same for all t. So of
pure noise at the loudest level it makes the representation of an image that might have been there. The Frechet distance
(Heusel et al. 2017) says how far such representations are from those of real images. A conditional denoiser D(x; t, r)
turns them into images: Heun's sampler follows it from noise to an image with the representation r.

All images are in model space, pixels scaled to [-1, 1], where they are not uint8.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from rrcm.config import Config, Pretrain
from rrcm.data.shards import ShardedDataset, evenly_spaced, read_pixels, read_split
from rrcm.data.verification import verify_shards
from rrcm.evaluation.representations import centred, same_and_cross_cosine
from rrcm.models.condition import Condition, load_condition
from rrcm.models.denoiser import EDMDenoiser, load_denoiser
from rrcm.models.folders import read_model_config
from rrcm.models.sampler import Denoise, heun, reverse_levels
from rrcm.models.vit import NoiseConditionedViT, build_encoder
from rrcm.utils.distributed import pick_device, set_threads
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import write_csv, write_json
from rrcm.utils.pixels import to_model_space, to_unit_range
from rrcm.utils.progress import Progress
from rrcm.utils.rng import derive_seed, normal_per_sample

BATCH = 256
CHUNK = 2**24  # numbers of training images in memory at a time, in the search for the nearest
SHOWN_IMAGES = 8


class Gaussian(NamedTuple):
    """Mean (D,) and covariance (D, D), float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


class Moments:
    """Mean and covariance of representations that come in batches."""

    def __init__(self) -> None:
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, representations: torch.Tensor) -> None:
        """Add a batch (B, D) of any floating-point type."""
        rows = representations.double().cpu()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.products = self.products + rows.T @ rows

    def gaussian(self) -> Gaussian:
        """The Gaussian with the mean and the unbiased covariance of all rows, at least 2."""
        mean = self.sum / self.count
        return Gaussian(mean, (self.products - self.count * mean.outer(mean)) / (self.count - 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared distance that FID reports (Heusel et al. 2017, eq. 6).

    The trace of (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2). Unlike a root of the product,
    which is not symmetric, this is stable for singular covariances too.
    """
    shift = (one.mean - other.mean).square().sum()
    shared = torch.linalg.svdvals(_root(one.covariance) @ _root(other.covariance)).sum()
    spread = one.covariance.trace() + other.covariance.trace() - 2 * shared
    return max(0.0, float(shift + spread))  # rounding may leave -1e-15


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


class Nearest(NamedTuple):
    """For each of N images the nearest one of a bank."""

    distance: torch.Tensor  # (N,) float64, L2 over pixels in [0, 1]
    row: torch.Tensor  # (N,) int64, in the bank; the first of equally near ones


def nearest_images(images: torch.Tensor, bank: Iterable[torch.Tensor]) -> Nearest:
    """The nearest images of a bank that comes in chunks (M, C, H, W), to `images` (N, C, H, W); all are uint8.

    Squared distances between images of at most 2^37 numbers are whole numbers without rounding.
    """
    best = torch.full((len(images),), torch.inf, dtype=torch.float64)
    row, first = torch.zeros(len(images), dtype=torch.int64), 0
    for chunk in bank:
        known = chunk.flatten(1).double()
        for part in torch.arange(len(images)).split(BATCH):
            queries = images[part].flatten(1).double()
            squares = queries.square().sum(1)[:, None] + known.square().sum(1) - 2 * queries @ known.T
            least, place = squares.min(1)
            closer = least < best[part]
            row[part] = torch.where(closer, first + place, row[part])
            best[part] = torch.where(closer, least, best[part])
        first += len(chunk)
    return Nearest(best.sqrt() / 255, row)


def sampler_levels(settings: Pretrain, steps: int) -> list[float]:
    """The noise levels of a sampler from t_max to 0 in at least so many steps.

    Between neighbouring levels of the last grid of the pre-training there are equally many, so that the encoder can be
    looked at on the way at the levels that it has learned.
    """
    steps = math.ceil(steps / settings.max_levels) * settings.max_levels
    return reverse_levels(settings.t_max, steps, t_min=settings.t_min, rho=settings.rho)


def trajectory(denoise: Denoise, x: torch.Tensor, levels: list[float]) -> Iterator[torch.Tensor]:
    """x_t at each of the `levels` on the way of Heun's sampler, beginning with x at the first of them."""
    yield x
    for step in pairwise(levels):
        x = heun(denoise, x, step)
        yield x


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images of model space, rounded to uint8 (B, C, H, W) on the CPU."""
    return (255 * (images.clamp(-1, 1) + 1) / 2).round().to("cpu", torch.uint8)


# What the figures call the representations whose Frechet distance is measured.
CURVES = {
    "noisy": "test images with noise",
    "generated": "generated from noise",
    "untrained": "test images with noise, encoder not trained",
}
ENCODERS = {"noisy": "trained", "generated": "trained", "untrained": "untrained"}  # of each curve


class Parts(NamedTuple):
    """The networks, on one device."""

    condition: Condition  # with the pre-trained encoder
    untrained: NoiseConditionedViT  # the encoder before its pre-training
    denoiser: EDMDenoiser

    @property
    def encoders(self) -> dict[str, NoiseConditionedViT]:
        """By the values of ENCODERS."""
        return {"trained": self.condition.encoder, "untrained": self.untrained}


def load_parts(config: Config, encoder: Path, denoiser: Path, device: torch.device) -> Parts:
    """The encoder and the denoiser in their model folders. Raises `RRCMError` if they are missing or do not fit."""
    condition = load_condition(config, encoder, device)
    if read_model_config(denoiser).get("condition") != condition.identity:
        raise RRCMError(f"{denoiser}: was not trained with {encoder}; run `dvc repro conditional-denoiser` again")
    torch.manual_seed(derive_seed(config.seed, "pretrain"))
    untrained = build_encoder(config.model, config.data).to(device).eval().requires_grad_(False)
    return Parts(condition, untrained, load_denoiser(denoiser).to(device))


class Generated(NamedTuple):
    """What `generate` found, for N held-out test images.

    The keys of `images` and of `nearest` are `test` (these images), `from_test` (generated from their representations)
    and `from_noise` (generated from representations of noise).
    """

    t: list[float]  # the last grid of noise levels of the pre-training, from t_max to t_min
    distance: dict[str, list[float]]  # Frechet distance at each of them, by the keys of CURVES
    floor: dict[str, float]  # between the clean images of the two halves, by encoder
    variance: dict[str, float]  # of the clean reference, the sum over dimensions, by encoder
    own_cosine: float  # of the representation of an image generated from a test image with the one it was given
    other_cosine: float  # and with those that the others were given; both are centred
    images: dict[str, torch.Tensor]  # (N, C, H, W) uint8
    nearest: dict[str, Nearest]  # training images
    shown: list[int]  # rows of `images` for a figure
    neighbours: dict[str, torch.Tensor]  # their nearest training images, uint8


class _Measures:
    """The moments of all representations, and the generated images, batch by batch."""

    def __init__(self, parts: Parts, levels: list[float], settings: Pretrain):
        self.parts, self.levels, self.every = parts, levels, (len(levels) - 1) // settings.max_levels
        self.t = [*levels[: -1 : self.every], settings.t_min]
        self.reference, self.clean = ({name: Moments() for name in parts.encoders} for _ in range(2))
        self.moments = {name: [Moments() for _ in self.t] for name in CURVES}
        self.images: dict[str, list[torch.Tensor]] = {"from_test": [], "from_noise": []}
        self.given: list[torch.Tensor] = []  # the representations of the test images
        self.found: list[torch.Tensor] = []  # and those of the images generated from them

    @torch.no_grad()
    def add_reference(self, clean: torch.Tensor) -> None:
        """Add clean images (B, C, H, W) of the reference."""
        for name, encoder in self.parts.encoders.items():
            self.reference[name].add(encoder(clean, self.t[-1]))

    @torch.no_grad()
    def add_held_out(self, clean: torch.Tensor, noise: torch.Tensor) -> None:
        """Add clean images (B, C, H, W) of the other half, with the standard normal noise of each."""
        for name, encoder in self.parts.encoders.items():
            self.clean[name].add(encoder(clean, self.t[-1]))
        for curve in ("noisy", "untrained"):
            encoder = self.parts.encoders[ENCODERS[curve]]
            for moments, t in zip(self.moments[curve], self.t, strict=True):
                moments.add(encoder(clean + t * noise, t))
        condition, start = self.parts.condition, self.levels[0] * noise
        given = condition(clean)
        sample = heun(self._denoise(given), start, self.levels)
        self.images["from_test"].append(to_pixels(sample))
        self.given.append(given.cpu())
        self.found.append(condition(sample).cpu())
        denoise = self._denoise(condition.encoder(start, self.t[0]))
        way = islice(trajectory(denoise, start, self.levels), 0, None, self.every)
        for moments, t, x in zip(self.moments["generated"], self.t, way, strict=True):
            moments.add(condition.encoder(x, t))
        self.images["from_noise"].append(to_pixels(x))

    def _denoise(self, given: torch.Tensor) -> Denoise:
        return lambda x, t: self.parts.denoiser(x, t, given)

    def distances(self, curve: str) -> list[float]:
        """The Frechet distance from the reference at each noise level."""
        reference = self.reference[ENCODERS[curve]].gaussian()
        return [frechet_distance(reference, moments.gaussian()) for moments in self.moments[curve]]

    def floor(self, encoder: str) -> float:
        """The Frechet distance between the clean images of the two halves."""
        return frechet_distance(self.reference[encoder].gaussian(), self.clean[encoder].gaussian())


def generate(config: Config, objective: str, shard_folder: Path | str, encoder: Path, denoiser: Path) -> Generated:
    """Measure the encoder in a model folder along the noise levels, and generate images with a conditional denoiser.

    Half of the test images are the reference of all Frechet distances. The other half is held out from it. It is
    compared with the reference without noise (the floor) and with noise, and gives representations to generate from.
    Noise i is added to image i at all levels, and generated images i start from it. Raises `RRCMError` when something
    is missing or does not fit.
    """
    set_threads(config.threads)
    device, size, settings = pick_device(config.device), config.data.image_size, config.pretrain
    train, test = (ShardedDataset(shard_folder, split) for split in ("train", "test"))
    verify_shards([train, test])
    parts = load_parts(config, encoder, denoiser, device)
    pixels = read_split(test, size, limit=config.generate.max_images)[0]
    half = len(pixels) // 2
    if half < 2:
        raise RRCMError(f"{shard_folder}: has {len(pixels)} test images, and generating needs at least 4; add some")
    reference, held_out = pixels[0 : 2 * half : 2], pixels[1 : 2 * half : 2]
    measures = _Measures(parts, sampler_levels(settings, config.generate.steps), settings)
    with Progress(half, f"generate {objective}", "images") as progress:
        for rows in torch.arange(half).split(BATCH):
            measures.add_reference(to_model_space(to_unit_range(reference[rows].to(device))))
            clean = to_model_space(to_unit_range(held_out[rows].to(device)))
            noise = normal_per_sample(clean.shape[1:], config.seed, "generate", positions=rows.tolist(), device=device)
            measures.add_held_out(clean, noise)
            progress.update(len(rows))
    images = {"test": held_out} | {name: torch.cat(found) for name, found in measures.images.items()}
    found = nearest_images(torch.cat(list(images.values())), _chunks(train, size))  # the training images are read once
    parts_of = zip(found.distance.split(half), found.row.split(half), strict=True)
    nearest = {name: Nearest(*part) for name, part in zip(images, parts_of, strict=True)}
    shown = evenly_spaced(half, SHOWN_IMAGES).tolist()
    own, other = same_and_cross_cosine(centred(torch.cat(measures.found)), centred(torch.cat(measures.given)))
    return Generated(
        t=measures.t,
        distance={curve: measures.distances(curve) for curve in CURVES},
        floor={name: measures.floor(name) for name in parts.encoders},
        variance={name: float(found.gaussian().covariance.trace()) for name, found in measures.reference.items()},
        own_cosine=own,
        other_cosine=other,
        images=images,
        nearest=nearest,
        shown=shown,
        neighbours={name: read_pixels(train, size, found.row[shown].tolist()) for name, found in nearest.items()},
    )


def _chunks(images: ShardedDataset, size: int) -> Iterator[torch.Tensor]:
    """All images of a split, uint8, at most CHUNK numbers at a time."""
    for rows in torch.arange(len(images)).split(max(1, CHUNK // (images.channels * size**2))):
        yield read_pixels(images, size, rows.tolist())


def write_results(folder: Path, objective: str, results: Generated) -> None:
    """Write into `folder` frechet_distance.csv with one row per noise level, and summary.json."""
    curves = results.distance
    rows = [{"t": t} | {name: curve[i] for name, curve in curves.items()} for i, t in enumerate(results.t)]
    write_csv(folder / "frechet_distance.csv", rows)
    distances = {name: found.distance for name, found in results.nearest.items()}
    summary = {
        "objective": objective,
        "images": len(results.images["test"]),
        "frechet_distance": {
            "between_clean_halves": results.floor,
            "pure_noise": results.distance["generated"][0],  # at t_max, where generating starts
            "generated": results.distance["generated"][-1],
        },
        "variance": results.variance,
        "cosine_with_given_representation": {"own": results.own_cosine, "others": results.other_cosine},
        "distance_to_nearest_training_image": {  # L2, pixels in [0, 1]
            name: {"mean": float(found.mean()), "least": float(found.min())} for name, found in distances.items()
        },
    }
    write_json(folder / "summary.json", summary)


def summary_line(output: Path, results: Generated) -> str:
    """One line with the most telling numbers."""
    noise, *_, images = results.distance["generated"]
    mean = {name: float(found.distance.mean()) for name, found in results.nearest.items()}
    return (
        f"{output}: Frechet distance {noise:.3g} of noise, {images:.3g} of generated images, "
        f"{results.floor['trained']:.3g} between halves of the test images; mean L2 distance to the nearest training "
        f"image {mean['from_test']:.3g}, of test images {mean['test']:.3g}"
    )
