"""Soft labels: the engine's votes for every training image, whatever the processes and the kills."""

from multiprocessing.connection import wait
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import change, exit_codes, stage, start, start_all
from safetensors.torch import load_file

from rrcm.certification.journal import append_states, open_journal, restore_states
from rrcm.certification.noise import SOFT_LABEL, counter_normal
from rrcm.certification.split_votes import VotesState, is_possible_votes
from rrcm.certification.stopping import ALL_SAMPLES, FUTILE
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.data.soft_labels import read_soft_labels, write_votes
from rrcm.models.load import load_model_folder
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import sha256_file

N, IMAGES = 50, 1295
FILE = "data/soft_labels.safetensors"


@pytest.fixture
def ready(project, trained):
    """A project in which rrcm's classifier at sigma 0.5 is to vote."""
    (project / "models").symlink_to(trained / "models")
    change(project, methods=["rrcm", "cat_rs"], soft_labels={"method": "rrcm", "sigma": 0.5, "n": N})
    return project


@pytest.fixture
def votes(ready):
    """The file that one undisturbed process writes."""
    answer = stage(ready, "soft_labels")
    assert answer.returncode == 0, answer.stderr
    return ready / FILE


@pytest.mark.thorough
def test_soft_labels_are_the_votes_of_the_smoothed_classifier(ready, votes):
    """Counted again by brute force, with the same noise, for a few images."""
    split = ShardedDataset(ready / "data/shards", "train")
    pixels, _, _ = read_split(split, 8)
    found, labels = load_file(votes)["votes"], read_soft_labels(votes, split)
    assert found.shape == (IMAGES, 10) and (found.sum(1) == N).all()
    assert torch.equal(labels, found / N) and (labels.argmax(1) == torch.from_numpy(split.labels)).float().mean() > 0.5
    classifier, seed = (
        load_model_folder(ready / "models/rrcm/sigma_0.5").classifier,
        load_config(ready / "params.yaml").seed,
    )
    for index in (0, 7, IMAGES - 1):
        row = torch.full((N,), index)
        noise = counter_normal((1, 8, 8), seed, torch.full_like(row, SOFT_LABEL), row, torch.arange(N))
        with torch.no_grad():
            logits = classifier(pixels[index].float() / 255 + 0.5 * noise)
        counted = np.bincount(logits.argmax(1), minlength=10)
        assert np.abs(counted - found[index].numpy()).sum() <= 2  # another batch size may move a vote


@pytest.mark.thorough
def test_batches_processes_and_kills_change_no_byte(ready, votes):
    """Two processes; then one that is killed after some images, resumed by two."""
    expected = sha256_file(votes)
    votes.unlink()
    for kill in (False, True):
        if kill:
            process = start(ready, "soft_labels")
            while not any(
                journal.stat().st_size > 20_000 for journal in ready.glob("runs/soft-labels-*/journal-*.txt")
            ):
                assert process.is_alive()
                wait([process.sentinel], timeout=0.01)
            process.kill()
            process.join()
            assert not votes.exists()
        assert exit_codes(start_all(ready, "soft_labels", [], 2)) == [0, 0]
        assert sha256_file(votes) == expected
        votes.unlink()


def test_bad_files_are_refused_in_one_line(tmp_path, tiny_shards):
    train, test = (ShardedDataset(tiny_shards, split) for split in ("train", "test"))
    path = tmp_path / "votes.safetensors"
    for votes, said in (
        (torch.ones(len(test), 10, dtype=torch.int64), "must have votes for 1295 images"),
        (torch.zeros(len(train), 10, dtype=torch.int64), "must have votes"),
    ):
        write_votes(path, votes, train)
        with pytest.raises(RRCMError, match=said):
            read_soft_labels(path, train)
    write_votes(path, torch.ones(len(train), 10, dtype=torch.int64), train)
    assert (read_soft_labels(path, train) == 0.1).all()
    train.manifest = train.manifest.model_copy(update={"seed": 7})
    with pytest.raises(RRCMError, match="has soft labels of other images than"):
        read_soft_labels(path, train)
    with pytest.raises(RRCMError, match="no such file"):
        read_soft_labels(tmp_path / "none.safetensors", train)


def test_only_possible_lines_of_a_journal_are_restored(tmp_path):
    """Of three images with two classes and five votes each. Another run may have had more images."""
    possible = {"index": 1, "votes": [{"0": 2, "1": 3}], "samples": 5, "stop_reason": ALL_SAMPLES, "seconds": 0.5}
    impossible = [("index", 3), ("index", -1), ("index", 1.0), ("index", None), ("samples", 4), ("samples", 5.0)]
    impossible += [("stop_reason", ""), ("stop_reason", FUTILE), ("stop_reason", None), ("seconds", -1.0)]
    wrong = [[{"0": 2, "1": 2}], [{"0": -1, "1": 6}], [{"0": 2.0, "1": 3.0}], [{"0": True, "1": 4}], [{"2": 5}]]
    wrong += [[{"0": 2, "1": 3}] * 2, [[2, 3]], [2, 3], [], None, {"0": 5}, "23"]
    lines = [possible | {name: value} for name, value in impossible] + [possible | {"votes": votes} for votes in wrong]
    states = [VotesState(index) for index in range(3)]

    def write_and_restore(lines: list[dict]) -> None:
        with open_journal(tmp_path) as journal:
            append_states(journal, [SimpleNamespace(**values) for values in lines])
        restore_states(states, tmp_path, lambda saved: is_possible_votes(saved, n=5, outputs=[2]))

    write_and_restore(lines)
    assert states == [VotesState(index) for index in range(3)]
    write_and_restore([possible])
    assert states == [VotesState(0), VotesState(**possible), VotesState(2)]
