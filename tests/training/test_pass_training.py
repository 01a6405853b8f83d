"""Training of classifiers that can pass: the votes, the targets, the model folder, kills."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import change, files_of, kill_when, make_project, stage
from safetensors.torch import load_file

from rrcm.certification.noise import SOFT_LABEL
from rrcm.certification.training_votes import TrainingVotesState, is_possible_state
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.data.shards import ShardedDataset, read_pixels
from rrcm.data.training_votes import read_training_votes, write_training_votes
from rrcm.models.kinds import load_model_folder, load_scales
from rrcm.training.finetune import finetune, read_targets
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.pixels import to_unit_range

N, SIGMAS = 4, [0.25, 0.5]
VOTES = "data/training_votes/consistency_joint.safetensors"
METHOD = "consistency_joint_pass"


def succeed(answer) -> None:
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def passing(tmp_path_factory, tiny_shards) -> Path:
    """A project in which a joint method was trained, has voted and was continued; do not change it."""
    folder = make_project(tmp_path_factory.mktemp("passing"), tiny_shards, f"methods=[{METHOD}]")
    change(folder, pretrain__objectives=[], finetune__pass_votes=N, finetune__pass_share=0.5)
    succeed(stage(folder, "finetune", "consistency_joint", "joint"))
    succeed(stage(folder, "training_votes", "consistency_joint"))
    succeed(stage(folder, "finetune", METHOD, "joint"))
    return folder


def test_the_votes_are_those_of_the_joint_model_at_each_sigma(passing):
    train = ShardedDataset(passing / "data/shards", "train")
    votes = read_training_votes(passing / VOTES, train, SIGMAS)
    assert votes.shape == (len(train), 2, 10) and (votes.sum(-1) == N).all()
    pixels = to_unit_range(read_pixels(train, 8, [3, 1000]))
    for k, sigma in enumerate(SIGMAS):
        classifier = load_model_folder(passing / "models/consistency_joint/joint", sigma=sigma).classifier
        smoothed = SmoothedClassifier(classifier, sigma, 10, batch_size=200)
        counts = smoothed.count_samples(pixels, [3, 1000], SOFT_LABEL, N)
        assert torch.equal(torch.as_tensor(np.array(counts)), votes[[3, 1000], k])
    assert read_json(passing / "timings/training_votes/consistency_joint.json")["samples"] == 2 * N * len(train)
