"""Let a joint model vote on training images: data/training_votes/METHOD.safetensors. Runs alone or under torchrun."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.certification.training_votes import count_training_votes
from rrcm.config import load_config
from rrcm.methods import JOINT, TRAINING_VOTES
from rrcm.utils.errors import RRCMError


def main(
    method: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    votes: Path = Path(TRAINING_VOTES),
    timings: Path = Path("timings/training_votes"),
) -> None:
    """Count the votes of METHOD, such as `rrcm_joint`, at all sigmas. A killed run continues."""
    config = load_config(params)
    if method not in config.derived["training_votes"]:
        raise RRCMError(f"{method}: no method in {params} continues it to pass, among {config.methods}")
    count_training_votes(
        config, shards, models / method / JOINT, votes / f"{method}.safetensors", timings / f"{method}.json"
    )


if __name__ == "__main__":
    run_command(main)
