"""Measure what an encoder makes of noise, and generate images from its representations: generated/OBJECTIVE."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.evaluation.generation import generate, summary_line, write_results
from rrcm.report.figures import save_all
from rrcm.report.generated_images import draw_frechet_distance, draw_generated_images
from rrcm.utils.files import atomic_directory


def main(
    objective: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    encoders: Path = Path("models/pretrain"),
    denoisers: Path = Path("generated/denoiser"),
    generated: Path = Path("generated"),
) -> None:
    """Look at the encoder that was pre-trained on OBJECTIVE, with the denoiser that is conditional on it."""
    config, output = load_config(params), generated / objective
    results = generate(config, objective, shards, encoders / objective, denoisers / objective)
    with atomic_directory(output) as folder:
        write_results(folder, objective, results)
        drawn = {"frechet_distance": draw_frechet_distance(results), "samples": draw_generated_images(results)}
        save_all(drawn, folder)
    print(summary_line(output, results), file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
