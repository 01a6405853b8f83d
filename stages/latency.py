"""Measure how long each method takes to certify one image: timings/latency.json."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.evaluation.latency import measure_latency


def main(
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    timing: Path = Path("timings/latency.json"),
) -> None:
    """Time the classifiers of all methods alternately, for the first sigma in params.yaml."""
    measure_latency(load_config(params), shards, models, timing)


if __name__ == "__main__":
    run_command(main)
