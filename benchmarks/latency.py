"""Whether certification time is linear in n: compares real certification with the extrapolation of stage `latency`.

In each round every method first votes on as many samples as in the stage, and then certifies all images at once with
each n (`fixed`). The table shows the measured time divided by the extrapolated time, as medians over the rounds. On a
busy machine, use --cpu-time to count only the CPU time of this process.

    python benchmarks/latency.py --images 4
"""

from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from unittest import mock

import typer
from tabulate import tabulate

from rrcm.utils.app import keep_freed_memory
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.evaluation.latency import fastest_batch, seconds_to_vote
from rrcm.methods import model_name
from rrcm.models.kinds import load_model_folder
from rrcm.utils.distributed import set_threads
from rrcm.utils.provenance import describe_environment


def measure(params: Path = Path("params.yaml"), images: int = 4, rounds: int = 3, cpu_time: bool = False) -> None:
    """Compare the times for the first sigma of PARAMS, with the models and shards in the current folder."""
    keep_freed_memory()
    clock = process_time if cpu_time else perf_counter
    config = load_config(params)
    set_threads(config.threads)
    sigma, settings = config.sigmas[0], config.latency
    pixels = read_split(ShardedDataset("data/shards", "test"), config.data.image_size, limit=images)[0].float() / 255
    timed = {}
    for method in config.methods:
        classifier = load_model_folder(Path("models") / method / model_name(method, sigma), sigma=sigma).classifier
        smoothed = SmoothedClassifier(classifier, sigma, classifier.num_classes, precision=settings.precision)
        smoothed.batch_size, rate = fastest_batch(smoothed, pixels)
        timed[method] = smoothed, smoothed.batch_size * max(1, round(settings.seconds * rate / smoothed.batch_size))
    ratios = {(method, n): [] for method in timed for n in settings.n}
    for _ in range(rounds):
        for method, (smoothed, samples) in timed.items():
            for n in settings.n:
                with mock.patch("rrcm.evaluation.latency.perf_counter", clock):
                    per_sample = seconds_to_vote(smoothed, pixels, samples) / samples
                start = clock()
                smoothed.certify(pixels, stopping="fixed", n0=config.certify.n0, n=n)
                expected = per_sample * (config.certify.n0 + n) * len(pixels)
                ratios[method, n].append((clock() - start) / expected)
    rows = [
        [method, *(f"{median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (ratios[method, n] for n in settings.n))]
        for method in timed
    ]
    print(tabulate(rows, ["method", *(f"n = {n:,}" for n in settings.n)], tablefmt="github"))
    print(describe_environment(smoothed.device))


if __name__ == "__main__":
    typer.run(measure)
