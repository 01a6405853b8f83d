"""Train the denoiser of the methods that denoise first: models/denoiser. Run it as it is, or under torchrun.

With an objective: the denoiser that is conditional on that encoder's representations, generated/denoiser/OBJECTIVE.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path
from typing import Annotated

import typer

from rrcm.config import load_config
from rrcm.methods import DENOISER
from rrcm.training.checks import check_before_training
from rrcm.training.denoiser import train_denoiser


def main(
    objective: Annotated[str | None, typer.Argument()] = None,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    encoders: Path = Path("models/pretrain"),
    output: Path | None = None,
    timing: Path | None = None,
) -> None:
    """Train a denoiser, for OBJECTIVE a conditional one. Continues where a killed run stopped. SHARDS may be a URL."""
    config = load_config(params)
    check_before_training(config, shards)
    if objective is None:
        train_denoiser(config, shards, output or Path(DENOISER), timing or Path("timings/denoiser.json"))
    else:
        own = Path("generated/denoiser") / objective
        train_denoiser(config, shards, output or own, timing or own.with_suffix(".json"), encoders / objective)


if __name__ == "__main__":
    run_command(main)
