"""Certify a finished model from anywhere on the test split, for a row of the report. Not a DVC stage."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.certification.certify_model import certify_model
from rrcm.config import load_config


def main(
    model: str,
    sigma: float,
    output: Path,
    weights: Path | None = None,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
) -> None:
    """Certify MODEL, as `rrcm certify --model` takes it, at the smoothing noise SIGMA (pixel units): external/FILE.tsv.

    The images and all other settings are those of the run. A killed run continues.
    """
    certify_model(load_config(params), model, sigma, output, shards=shards, weights=weights)
    print(f"written: {output}; name it in report.external_results for a row of the report")


if __name__ == "__main__":
    run_command(main)
