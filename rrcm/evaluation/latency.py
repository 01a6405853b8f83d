"""How long one image's certificate takes."""

import time
from pathlib import Path

import torch

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import Config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.models.checkpoints import load_classifier
from rrcm.models.vit import parameter_count
from rrcm.utils.distributed import pick_device
from rrcm.utils.files import write_json
from rrcm.utils.provenance import describe_environment


def measure_latency(config: Config, method: str, shard_folder: Path | str, model_folder: Path, output: Path) -> None:
    """Certify one test image with each n of the settings, after a warm-up, and write the seconds to `output` (JSON)."""
    settings, device = config.latency, pick_device(config.device)
    classifier = load_classifier(model_folder).to(device)
    smoothed = SmoothedClassifier(
        classifier,
        classifier.t / 2,
        classifier.head.out_features,
        seed=config.seed,
        batch_size=settings.batch_size,
        precision=settings.precision,
    )
    pixels, _, _ = read_split(ShardedDataset(shard_folder, "test"), config.data.image_size, limit=1)
    images = pixels.to(device).float() / 255

    def seconds(n: int) -> float:
        start = time.perf_counter()
        smoothed.certify(  # ends with the counts on the CPU, so the device is done when it returns
            images, stopping="fixed", n0=min(n, config.certify.n0), n=n, alpha=config.certify.alpha
        )
        return time.perf_counter() - start

    seconds(smoothed.find_batch_size(images[0]))  # warm-up
    write_json(
        output,
        {
            "method": method,
            "parameters": parameter_count(classifier),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": smoothed.precision,
            "batch_size": smoothed.find_batch_size(images[0]),
            "seconds": {str(n): seconds(n) for n in settings.n},
            "environment": describe_environment(device),
        },
    )
