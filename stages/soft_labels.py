"""Let a smoothed classifier vote on all training images: data/soft_labels.safetensors. Runs alone or under torchrun."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.certification.results import sigma_name
from rrcm.certification.soft_labels import count_soft_labels
from rrcm.config import load_config
from rrcm.methods import SOFT_LABELS


def main(
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    output: Path = Path(SOFT_LABELS),
    timing: Path = Path("timings/soft_labels.json"),
) -> None:
    """Count the votes of the classifier that the setting `soft_labels` names. A killed run continues."""
    config = load_config(params)
    model = models / config.soft_labels.method / sigma_name(config.soft_labels.sigma)
    count_soft_labels(config, shards, model, output, timing)


if __name__ == "__main__":
    run_command(main)
