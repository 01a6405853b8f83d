"""The votes of a joint model for the training images at each of its sigmas, from which the targets of "pass" follow."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from rrcm.certification.certify import SplitVoter, make_smoothed_classifier, open_split
from rrcm.certification.driver import finish_states
from rrcm.certification.noise import SOFT_LABEL
from rrcm.certification.soft_labels import is_possible_label
from rrcm.certification.stopping import ALL_SAMPLES
from rrcm.config import Config
from rrcm.data.shards import read_pixels
from rrcm.data.training_votes import write_training_votes
from rrcm.models.kinds import load_scales
from rrcm.utils.distributed import explain_lost_processes
from rrcm.utils.files import claimed, write_json
from rrcm.utils.pixels import to_unit_range


@dataclass
class TrainingVotesState:
    """The votes for one training image, as the journal keeps them."""

    index: int  # in the split; selects the noise
    votes: list[list[int]] = field(default_factory=list)  # by sigma and class
    samples: int = 0
    stop_reason: str = ""


@explain_lost_processes()
def count_training_votes(
    config: Config, shard_folder: Path | str, model_folder: Path, output: Path, timing: Path
) -> None:
    """Let a joint model vote on each training image at each of `sigmas`, and write the votes to `output`.

    There are `finetune.pass_votes` votes at each sigma. The images of the split are not augmented. Precision and batch
    size follow the settings `certify`. Under torchrun all processes share the images. A killed run continues from the
    images it has counted. Raises `RRCMError` for missing or damaged inputs.
    """
    sigmas, n = sorted(config.sigmas), config.finetune.pass_votes
    voter = open_split(config, sigmas[0], shard_folder, "train", model_folder)
    scales = [
        make_smoothed_classifier(scale.classifier.to(voter.smoothed.device), sigma, config)
        for scale, sigma in zip(load_scales(model_folder, sigmas)[0], sigmas, strict=True)
    ]
    voter = replace(voter, scales=scales)
    states = [TrainingVotesState(index) for index in range(len(voter.images))]
    run = voter.run_state("training-votes", [sigmas, n], __name__)
    is_possible = partial(is_possible_state, n=n, shape=(len(sigmas), voter.smoothed.num_classes))
    start = time.monotonic()
    finish_states(states, partial(_vote_stream, voter), run, is_possible, voter.queue, "training votes")
    if voter.queue.rank == 0:
        timed = voter.describe_time(time.monotonic() - start, n * len(sigmas) * len(states))
        with claimed(output, timing, wait=True):  # another run of this stage must not mix its files with these
            write_training_votes(output, torch.tensor([state.votes for state in states]), voter.images, sigmas)
            write_json(timing, timed)
        run.finish()


def _vote_stream(
    voter: SplitVoter, states: Iterator[TrainingVotesState], *, at_once: int | None
) -> Iterator[list[TrainingVotesState]]:
    """Vote on the images in groups that fill some batches, and yield each group when it is counted at every sigma."""
    n, size = voter.config.finetune.pass_votes, voter.config.data.image_size
    together = voter.smoothed.images_per_round(torch.zeros(voter.images.channels, size, size), n)
    while group := list(islice(states, together if at_once is None else min(together, at_once))):
        indices = [state.index for state in group]
        pixels = to_unit_range(read_pixels(voter.images, size, indices))
        votes = [scale.count_samples(pixels, indices, SOFT_LABEL, n) for scale in voter.scales]
        for state, *by_sigma in zip(group, *votes, strict=True):
            state.votes = [counts.tolist() for counts in by_sigma]
            state.samples, state.stop_reason = n * len(voter.scales), ALL_SAMPLES
        yield group


def is_possible_state(saved: dict, n: int, shape: tuple[int, int]) -> bool:
    """Whether a journal can have these values of a `TrainingVotesState`: n votes at each sigma.

    `shape` has the numbers of sigmas and of classes.
    """
    (sigmas, num_classes), votes = shape, saved["votes"]
    if not isinstance(votes, list) or len(votes) != sigmas or saved["samples"] != n * sigmas:
        return False
    each = [saved | {"votes": counts, "samples": n} for counts in votes]
    return type(saved["samples"]) is int and all(is_possible_label(one, n, num_classes) for one in each)
