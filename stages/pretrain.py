"""Pre-train the encoder: models/pretrain. Run it as it is, or under torchrun for many processes."""

from pathlib import Path

from rrcm.utils.app import run_command
from rrcm.config import load_config
from rrcm.training.pretrain import pretrain


def main(
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    output: Path = Path("models/pretrain"),
    timing: Path = Path("timings/pretrain.json"),
) -> None:
    """Pre-train with rRCM's loss. Continues where a killed run stopped. SHARDS is a folder or a URL."""
    pretrain(load_config(params), shards, output, timing)


if __name__ == "__main__":
    run_command(main)
