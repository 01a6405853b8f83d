"""The votes of a joint model for the training images at each of its sigmas, from which the targets of "pass" follow."""

from dataclasses import replace
from pathlib import Path

import torch

from rrcm.certification.certify import make_smoothed_classifier, open_split
from rrcm.certification.split_votes import count_split_votes, votes_array
from rrcm.config import Config
from rrcm.data.training_votes import write_training_votes
from rrcm.models.kinds import load_scales
from rrcm.utils.distributed import explain_lost_processes
from rrcm.utils.files import claimed, write_json


@explain_lost_processes()
def count_training_votes(
    config: Config, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path
) -> None:
    """Let a joint model vote on each training image at each of `sigmas`, and write the votes to `output`.

    An image gets `finetune.pass_votes` votes at each sigma. Precision and batch size follow the settings `certify`.
    Processes and kills are as for `count_split_votes`. Raises `RRCMError` for missing or damaged inputs.
    """
    sigmas = sorted(config.sigmas)
    voter = open_split(config, sigmas[0], shard_folder, "train", model_folder)
    scales = [
        make_smoothed_classifier(scale.classifier.to(voter.smoothed.device), sigma, config)
        for scale, sigma in zip(load_scales([model_folder], sigmas)[0], sigmas, strict=True)
    ]
    voter = replace(voter, scales=scales)
    states, run = count_split_votes(voter, "training votes", config.finetune.pass_votes, sigmas)
    if voter.queue.rank == 0:
        votes = torch.from_numpy(votes_array(states, voter.smoothed.num_classes))
        with claimed(output, timing, wait=True):  # another run of this stage must not mix its files with these
            write_training_votes(output, votes, voter.images, sigmas)
            write_json(timing, voter.describe_votes(states))
        run.finish()
