"""Train the denoiser of the methods that denoise first: models/denoiser. Run it as it is, or under torchrun."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.methods import DENOISER
from rrcm.training.checks import check_before_training
from rrcm.training.denoiser import train_denoiser


def main(
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    output: Path = Path(DENOISER),
    timing: Path = Path("timings/denoiser.json"),
) -> None:
    """Train a denoiser. Continues where a killed run stopped. SHARDS may be a URL."""
    config = load_config(params)
    check_before_training(config, shards)
    train_denoiser(config, shards, output, timing)


if __name__ == "__main__":
    run_command(main)
