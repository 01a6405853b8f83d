"""Write the data set as WebDataset shards: data/shards."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.data.sharding import write_shards


def shard_data(params: Path = Path("params.yaml"), output: Path = Path("data/shards")) -> None:
    """Read the data source that params.yaml names, and write train, val and test shards with a manifest."""
    config = load_config(params)
    write_shards(config.data, config.seed, output)


if __name__ == "__main__":
    run_command(shard_data)
