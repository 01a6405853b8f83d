"""The accuracy of base classifiers without noise: one pass over each clean image, without smoothing and voting.

This is not the certified accuracy at r = 0, which counts the images that the smoothed classifier gets right with
enough votes to be sure. A network that is conditioned on the noise level stays conditioned on the level of its sigma,
t = 2 sigma, because that is the network that is deployed. docs/experiments.md has the accuracy with other levels.
"""

from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from rrcm.certification.noise import ESTIMATE
from rrcm.certification.packing import SampleRequest
from rrcm.certification.results import sigma_name
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.verification import verify_shards
from rrcm.methods import model_name
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import pick_device, set_threads
from rrcm.utils.files import write_json
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.provenance import describe_environment

NO_NOISE = torch.finfo(torch.float32).tiny  # the least sigma: added to a grey level above black it changes nothing


def measure_clean_accuracy(config: Config, shard_folder: Path | str, models: Path, output: Path) -> None:
    """Count the clean images that each base classifier gets right, and write `output` (JSON).

    The images of a method are those that it certifies. Raises `RRCMError` for missing or damaged inputs.
    """
    start = perf_counter()
    set_threads(config.threads)
    device, split, correct, images = pick_device(config.device), ShardedDataset(shard_folder, "test"), {}, {}
    verify_shards([split])
    for method in config.methods:
        limits = config.certify.max_images, config.denoised.max_images.get(method)
        pixels, labels, indices = read_split(split, config.data.image_size, config.certify.every, *limits)
        pixels, images[method], correct[method] = to_unit_range(pixels.to(device)), len(indices), {}
        for sigma in config.sigmas:
            classifier = load_model_folder(models / method / model_name(method, sigma), sigma=sigma).classifier
            classes = classify(classifier.to(device), pixels, indices, config)
            correct[method][sigma_name(sigma)] = int((classes == labels.numpy()).sum())
    seconds, environment = perf_counter() - start, describe_environment(device)
    write_json(output, {"seconds": seconds, "correct": correct, "images": images, "environment": environment})


def classify(classifier: BaseClassifier, pixels: torch.Tensor, indices: list[int], config: Config) -> np.ndarray:
    """The class of each image (N, C, H, W) in [0, 1] by one pass of the base classifier: (N,) int64.

    It is a single vote without noise, with the precision and the random draws of certification.
    """
    options = {"seed": config.seed, "precision": config.certify.torch_precision}
    voter = SmoothedClassifier(classifier, NO_NOISE, classifier.num_classes, **options)
    requests = [SampleRequest(image, index, ESTIMATE, 0, 1) for image, index in zip(pixels, indices, strict=True)]
    return voter.count_votes(requests).argmax(1)
