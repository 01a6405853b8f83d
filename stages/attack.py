"""Attack the classifiers of one method, smoothed and not: attack/METHOD."""

from pathlib import Path

from rrcm.utils.app import run_command
from rrcm.config import load_config
from rrcm.evaluation.attack import attack_method


def main(
    method: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    certificates: Path = Path("certificates"),
    attacks: Path = Path("attack"),
) -> None:
    """Attack METHOD just below every certificate and at the report's radii."""
    config = load_config(params)
    attack_method(config, method, shards, models / method, certificates / method, attacks / method)


if __name__ == "__main__":
    run_command(main)
