"""Measure the time that each method takes to certify one image, on one device.

The time to certify is proportional to the number of samples (tests/evaluation/test_latency.py). It is therefore enough
to time a few full batches, and to multiply the seconds per sample by the number of samples. Each round times all
methods, one after another, so that a machine that slows down does so for all of them.

A cascade draws at each sigma of its path, so its samples are timed at each sigma. It predicts with as many samples as
an image needs, so the seconds to predict are measured as a whole.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.certify import smoothing_options
from rrcm.certification.noise import ESTIMATE
from rrcm.certification.results import sigma_name
from rrcm.certification.smoothing import SampleRequest, SmoothedClassifier
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.methods import model_name
from rrcm.models.denoised import DenoisedClassifier
from rrcm.models.ensembles import Ensemble
from rrcm.models.kinds import load_model_folder, load_scales
from rrcm.models.vit import parameter_count
from rrcm.utils.distributed import pick_device, set_threads
from rrcm.utils.files import write_json
from rrcm.utils.pixels import to_unit_range
from rrcm.utils.provenance import describe_environment

IMAGES = 8  # images that the samples come from
PREDICT_N = 1000  # samples of PREDICT, for a cascade at each sigma that it asks
HALVINGS = 3  # how often the largest batch that fits is halved in the search for the fastest size
TURNS = 4  # how often the search times each size


def measure_latency(config: Config, shard_folder: Path | str, models: Path, output: Path) -> None:
    """Time each of `config.methods` for the first sigma in every round, and write `output` (JSON).

    The cascades of the methods in `config.cascade.methods` are timed at all their sigmas.

    The file has for each method the seconds per sample in each round, the batch size, which is the fastest for this
    method, the number of parameters, and the passes per sample. Raises `RRCMError` for missing or damaged inputs.
    """
    set_threads(config.threads)
    settings, device, sigma = config.latency, pick_device(config.device), config.sigmas[0]
    pixels, _, _ = read_split(ShardedDataset(shard_folder, "test"), config.data.image_size, limit=IMAGES)
    images = to_unit_range(pixels.to(device))
    timed, records = {}, {}
    for method in config.methods:
        classifier = load_model_folder(models / method / model_name(method, sigma), sigma=sigma).classifier.to(device)
        smoothed = SmoothedClassifier(
            classifier, sigma, classifier.num_classes, seed=config.seed, precision=config.certify.torch_precision
        )
        size, rate = fastest_batch(smoothed, images)
        smoothed.batch_size = size
        samples = size * max(1, round(settings.seconds * rate / size))
        timed[method] = smoothed, samples
        records[method] = {
            "parameters": {kind: sum(map(parameter_count, each)) for kind, each in networks(classifier).items()},
            "passes": count_passes(smoothed, images, size),
            "batch_size": size,
            "samples": samples,
            "seconds_per_sample": [],
        }
    cascades = {method: open_cascade(config, models / method, timed[method][0]) for method in config.cascade.methods}
    of_cascades = {method: new_cascade_record(cascade) for method, cascade in cascades.items()}
    for _ in range(settings.rounds):
        for method, (smoothed, samples) in timed.items():
            records[method]["seconds_per_sample"].append(seconds_to_vote(smoothed, images, samples) / samples)
        for method, cascade in cascades.items():
            time_cascade(cascade, *timed[method], images, of_cascades[method])
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": smoothed.precision,
        "sigma": sigma,
        "methods": records,
        "environment": describe_environment(device),
    }
    write_json(output, record | ({"cascades": of_cascades} if cascades else {}))


def open_cascade(config: Config, models: Path, smoothed: SmoothedClassifier) -> CascadedClassifier:
    """The cascade of a method whose model folders are in `models`, with the batch size of its classifier `smoothed`.

    Thresholds that are chosen elsewhere are 0 here. Raises `RRCMError` for missing or damaged models.
    """
    sigmas, thresholds = config.cascade_sigmas, config.cascade.thresholds
    folders = [models / name for name in dict.fromkeys(model_name(models.name, sigma) for sigma in sigmas)]
    scales, can_pass = load_scales(folders, sigmas)
    thresholds = [0.0] * (len(sigmas) - 1) if thresholds == "chosen" else thresholds
    options = smoothing_options(config) | {"can_pass": can_pass, "batch_size": smoothed.batch_size}
    classifiers = [scale.classifier.to(smoothed.device) for scale in scales]
    return CascadedClassifier(classifiers, sigmas, thresholds, smoothed.num_classes, **options)


def new_cascade_record(cascade: CascadedClassifier) -> dict[str, object]:
    """The entry of a cascade before any round."""
    names = map(sigma_name, cascade.sigmas)
    return {"seconds_per_sample": {name: [] for name in names}, "predict_seconds": [], "single_predict_seconds": []}


def time_cascade(
    cascade: CascadedClassifier, smoothed: SmoothedClassifier, samples: int, images: torch.Tensor, record: dict
) -> None:
    """Add a round to the `record` of a cascade: seconds per sample at each sigma, and per image to predict.

    `single_predict_seconds` is the time of the single classifier `smoothed`.
    """
    for scale, seconds in zip(cascade.scales, record["seconds_per_sample"].values(), strict=True):
        seconds.append(seconds_to_vote(scale, images, samples) / samples)
    for name, classifier in (("predict_seconds", cascade), ("single_predict_seconds", smoothed)):
        start = perf_counter()
        classifier.predict(images, n=PREDICT_N)
        record[name].append((perf_counter() - start) / len(images))


def networks(classifier: nn.Module) -> dict[str, list[nn.Module]]:
    """The networks that a base classifier consists of, under the keys `denoiser` and `classifier`."""
    if isinstance(classifier, DenoisedClassifier):
        parts = networks(classifier.classifier)
        return {"denoiser": [classifier.denoiser, *parts["denoiser"]], "classifier": parts["classifier"]}
    if isinstance(classifier, Ensemble):
        members = [networks(member) for member in classifier.members]
        return {kind: [each for parts in members for each in parts[kind]] for kind in ("denoiser", "classifier")}
    return {"denoiser": [], "classifier": [classifier]}


def count_passes(smoothed: SmoothedClassifier, images: torch.Tensor, samples: int) -> dict[str, float]:
    """The passes of the networks of each kind per noisy sample, as the mean over `samples` samples.

    This counts the rows of the networks' inputs. Padding is counted too, so `samples` must fill whole batches. The
    model must have voted before, because its first vote includes checks.
    """
    rows, hooks = Counter(), []
    for kind, each in networks(smoothed.model).items():
        rows[kind] = 0

        def count(network: nn.Module, inputs: tuple, kind: str = kind) -> None:
            rows[kind] += len(inputs[0])

        hooks += [network.register_forward_pre_hook(count) for network in each]
    try:
        smoothed.count_votes(_requests(images, samples))
    finally:
        for hook in hooks:
            hook.remove()
    return {kind: count / samples for kind, count in rows.items()}


def seconds_to_vote(smoothed: SmoothedClassifier, images: torch.Tensor, samples: int) -> float:
    """The seconds that noise, networks and votes take for `samples` samples."""
    start = perf_counter()
    smoothed.count_votes(_requests(images, samples))  # returns counts on the CPU, which waits for the device
    return perf_counter() - start


def fastest_batch(smoothed: SmoothedClassifier, images: torch.Tensor) -> tuple[int, float]:
    """The fastest batch size, and its samples per second, among the largest that fits into memory and its halves.

    The sizes are timed alternately, so that a slow moment does not decide between sizes that are equally fast.
    """
    largest = smoothed.find_batch_size(images[0])
    rates = dict.fromkeys([max(1, largest >> halving) for halving in range(HALVINGS + 1)], 0.0)
    smoothed.count_votes(_requests(images, 1))  # warm-up
    for _ in range(TURNS):
        for size in rates:
            smoothed.batch_size = size
            rates[size] = max(rates[size], size / seconds_to_vote(smoothed, images, size))
    return max(rates.items(), key=lambda each: each[1])


def _requests(images: torch.Tensor, samples: int) -> Sequence[SampleRequest]:
    """Requests for `samples` noisy samples in all, spread over the images as evenly as possible."""
    bounds = [samples * number // len(images) for number in range(len(images) + 1)]
    return [
        SampleRequest(image, index, ESTIMATE, *bounds[index : index + 2])
        for index, image in enumerate(images)
        if bounds[index] < bounds[index + 1]
    ]
