"""Measure how long it takes to certify one image: latency/METHOD.json."""

from environment import run_command

from pathlib import Path

from rrcm.certification.results import sigma_name
from rrcm.config import load_config
from rrcm.evaluation.latency import measure_latency


def main(
    method: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    models: Path = Path("models"),
    latency: Path = Path("latency"),
) -> None:
    """Time METHOD's classifier for the first sigma of params.yaml."""
    config = load_config(params)
    folder = models / method / sigma_name(config.sigmas[0])
    measure_latency(config, method, shards, folder, latency / f"{method}.json")


if __name__ == "__main__":
    run_command(main)
