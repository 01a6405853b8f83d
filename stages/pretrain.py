"""Pre-train the encoder: models/pretrain/OBJECTIVE. Run it directly, or under torchrun with several processes."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path
from typing import Annotated

import typer

from rrcm.config import load_config
from rrcm.training.checks import check_before_training
from rrcm.training.pretrain import pretrain


def main(
    objective: Annotated[str, typer.Argument()] = "rrcm",
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models/pretrain"),
    timings: Path = Path("timings/pretrain"),
) -> None:
    """Pre-train on OBJECTIVE. A run that was killed continues where it stopped. SHARDS is a folder or a URL."""
    config = load_config(params)
    check_before_training(config, shards)
    pretrain(config, objective, shards, models / objective, timings / f"{objective}.json")


if __name__ == "__main__":
    run_command(main)
