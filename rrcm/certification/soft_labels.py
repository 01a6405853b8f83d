"""Soft labels: how often a smoothed classifier votes for each class, for each training image (Jeong et al. 2023)."""

from pathlib import Path

import torch

from rrcm.certification.certify import open_split
from rrcm.certification.split_votes import count_split_votes, votes_array
from rrcm.config import Config
from rrcm.data.soft_labels import write_votes
from rrcm.utils.distributed import explain_lost_processes
from rrcm.utils.files import claimed, write_json


@explain_lost_processes()
def count_soft_labels(config: Config, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path) -> None:
    """Let a smoothed classifier vote `soft_labels.n` times on each training image, and write the votes to `output`.

    Precision and batch size follow the settings `certify`. Processes and kills are as for `count_split_votes`. Raises
    `RRCMError` for missing or damaged inputs.
    """
    settings = config.soft_labels
    voter = open_split(config, settings.sigma, shard_folder, "train", model_folder)
    states, run = count_split_votes(voter, "soft labels", settings.n, settings.model_dump(mode="json"))
    if voter.queue.rank == 0:
        votes = torch.from_numpy(votes_array(states, voter.smoothed.num_classes)[:, 0].copy())
        with claimed(output, timing, wait=True):  # another run of this stage must not mix its files with these
            write_votes(output, votes, voter.images)
            write_json(timing, voter.describe_votes(states))
        run.finish()
