"""Train one classifier: models/METHOD/sigma_SIGMA or models/METHOD/joint. Runs alone or under torchrun."""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from environment import run_command

from pathlib import Path

from rrcm.config import load_config
from rrcm.methods import JOINT, METHODS, SOFT_LABELS, TRAINING_VOTES, model_name
from rrcm.training.checks import check_before_training
from rrcm.training.denoised import finetune_denoised
from rrcm.training.ensemble import finetune_ensemble
from rrcm.training.finetune import finetune
from rrcm.training.plan import Files, plan_training
from rrcm.utils.errors import RRCMError


def main(
    method: str,
    sigma: str,
    params: Path = Path("params.yaml"),
    shards: str = "data/shards",
    pretrained: Path = Path("models/pretrain"),
    models: Path = Path("models"),
    timings: Path = Path("timings/finetune"),
    soft_labels: Path = Path(SOFT_LABELS),
    training_votes: Path = Path(TRAINING_VOTES),
) -> None:
    """Fine-tune METHOD for smoothing noise SIGMA (pixel units), or for all with SIGMA `joint`.

    A run that was killed continues where it stopped.
    """
    config = load_config(params)
    noise = _read_noise(sigma)
    if f"{method}-{noise}" not in config.derived["finetune"]:
        raise RRCMError(f"{method} at sigma {noise}: not in {params}, which has {config.methods} and {config.sigmas}")
    check_before_training(config, shards)
    name = f"{method}/{model_name(method, noise)}"
    files = Files(shards, pretrained, models / name, timings / f"{name}.json", soft_labels, training_votes)
    row = METHODS[method]
    train = finetune_ensemble if row.is_ensemble else finetune_denoised if row.denoises else finetune
    train(plan_training(config, method, noise, files))


def _read_noise(sigma: str) -> float | str:
    try:
        return sigma if sigma == JOINT else float(sigma)
    except ValueError:
        raise RRCMError(f"sigma = {sigma!r}: must be a number, or {JOINT}") from None


if __name__ == "__main__":
    run_command(main)
