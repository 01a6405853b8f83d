"""The time it takes to certify one image."""

import time
from pathlib import Path

import torch

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.ensembles import with_consensus
from rrcm.models.load import load_model_folder
from rrcm.models.vit import parameter_count
from rrcm.utils.distributed import pick_device, set_threads
from rrcm.utils.files import write_json
from rrcm.utils.provenance import describe_environment


def measure_latency(config: Config, method: str, shard_folder: Path | str, model_folder: Path, output: Path) -> None:
    """Certify one test image with each n of the settings after a warm-up, and write the seconds to `output` (JSON).

    Raises `RRCMError` for missing or damaged inputs.
    """
    set_threads(config.threads)
    settings, device = config.latency, pick_device(config.device)
    classifier = with_consensus(load_model_folder(model_folder).classifier.to(device), config.certify.consensus)
    smoothed = SmoothedClassifier(
        classifier,
        config.sigmas[0] if classifier.sigma is None else classifier.sigma,
        classifier.num_classes,
        seed=config.seed,
        batch_size=settings.batch_size,
        precision=settings.precision,
    )
    pixels, _, _ = read_split(ShardedDataset(shard_folder, "test"), config.data.image_size, limit=1)
    images = pixels.to(device).float() / 255

    def seconds(n: int) -> float:
        start = time.perf_counter()
        smoothed.certify(  # returns counts on the CPU, so the device has finished
            images, stopping="fixed", n0=min(n, config.certify.n0), n=n, alpha=config.certify.alpha
        )
        return time.perf_counter() - start

    batch_size = smoothed.find_batch_size(images[0])
    seconds(batch_size)  # warm-up
    write_json(
        output,
        {
            "method": method,
            "parameters": parameter_count(classifier),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": smoothed.precision,
            "batch_size": batch_size,
            "seconds": {str(n): seconds(n) for n in settings.n},
            "environment": describe_environment(device),
        },
    )
