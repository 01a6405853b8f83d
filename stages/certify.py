"""Certify one classifier on the test split: certificates/METHOD/sigma_SIGMA.tsv. Runs alone or under torchrun."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.certification.certify import certify_split
from rrcm.certification.results import sigma_name
from rrcm.config import load_config
from rrcm.methods import model_name, require_method


def main(
    method: str,
    sigma: float,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    certificates: Path = Path("certificates"),
    timings: Path = Path("timings/certify"),
) -> None:
    """Certify METHOD at the smoothing noise SIGMA (pixel units). A killed run continues."""
    name = f"{method}/{sigma_name(sigma)}"
    config = load_config(params)
    require_method(method)
    files = models / method / model_name(method, sigma), certificates / f"{name}.tsv", timings / f"{name}.json"
    certify_split(config, sigma, shards, *files, max_images=config.denoised.max_images.get(method))


if __name__ == "__main__":
    run_command(main)
