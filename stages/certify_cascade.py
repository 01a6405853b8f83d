"""Certify the cascade of a method's classifiers on the test split: certificates/METHOD/cascade.tsv. Runs alone or under
torchrun.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.certification.certify_cascade import certify_cascade_split
from rrcm.config import load_config
from rrcm.methods import model_name, require_method


def main(
    method: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    certificates: Path = Path("certificates"),
    timings: Path = Path("timings/certify_cascade"),
) -> None:
    """Certify the cascade of METHOD at the sigmas of the settings. A killed run continues."""
    config = load_config(params)
    require_method(method)
    names = dict.fromkeys(model_name(method, sigma) for sigma in config.cascade_sigmas)
    folders = [models / method / name for name in names]
    files = certificates / method, timings / f"{method}.json"
    certify_cascade_split(config, shards, folders, *files, max_images=config.denoised.max_images.get(method))


if __name__ == "__main__":
    run_command(main)
