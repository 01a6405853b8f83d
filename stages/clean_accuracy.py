"""Measure the accuracy of the base classifiers on clean images: timings/clean_accuracy.json."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.evaluation.clean import measure_clean_accuracy


def main(
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    timing: Path = Path("timings/clean_accuracy.json"),
) -> None:
    """Classify each certified test image once, without noise, with the classifiers of all methods and sigmas."""
    measure_clean_accuracy(load_config(params), shards, models, timing)


if __name__ == "__main__":
    run_command(main)
