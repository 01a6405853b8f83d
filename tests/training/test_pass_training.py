"""Training of classifiers that can pass: the votes, the targets, the model folder, kills."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import change, exit_codes, files_of, kill_when, make_project, stage, start_all
from safetensors.torch import load_file

from rrcm import CascadedClassifier
from rrcm.certification.noise import SOFT_LABEL
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.certification.split_votes import VotesState, is_possible_votes
from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_pixels, read_split
from rrcm.data.soft_labels import write_votes
from rrcm.data.training_votes import read_training_votes, write_training_votes
from rrcm.models.kinds import load_model_folder, load_scales
from rrcm.objectives.passing import pass_targets
from rrcm.training.finetune import read_targets
from rrcm.training.plan import Files, plan_training
from rrcm.training.start import load_start
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.pixels import to_unit_range

N, SIGMAS, CPU = 4, [0.25, 0.5], torch.device("cpu")
METHOD, MODEL = "consistency_joint_pass", "models/consistency_joint_pass/joint"
VOTES = "data/training_votes/consistency_joint.safetensors"
SHORT = {"pretrain__objectives": [], "finetune__epochs": 2, "finetune__warmup_epochs": 0}


def succeed(answer) -> None:
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def passing(tmp_path_factory, tiny_shards) -> Path:
    """A project in which a joint method was trained, has voted and was continued; do not change it."""
    folder = make_project(tmp_path_factory.mktemp("passing"), tiny_shards, f"methods=[{METHOD}]")
    change(folder, **SHORT, finetune__pass_votes=N, finetune__pass_share=0.5, finetune__mixup=0.2)
    succeed(stage(folder, "finetune", "consistency_joint", "joint"))
    succeed(stage(folder, "training_votes", "consistency_joint"))
    succeed(stage(folder, "finetune", METHOD, "joint"))
    return folder


@pytest.fixture
def train(passing) -> ShardedDataset:
    return ShardedDataset(passing / "data/shards", "train")


def planned(project: Path):
    files = Files(project / "data/shards", project / "models/pretrain", project / MODEL, project / "timing.json")
    config = load_config(project / "params.yaml")
    return plan_training(config, METHOD, "joint", files)


def test_the_votes_are_those_of_the_joint_model_at_each_sigma(passing, train):
    votes = read_training_votes(passing / VOTES, train, SIGMAS)
    assert votes.shape == (len(train), 2, 10) and (votes.sum(-1) == N).all()
    pixels = to_unit_range(read_pixels(train, 8, [3, 1000]))
    for k, sigma in enumerate(SIGMAS):
        classifier = load_model_folder(passing / "models/consistency_joint/joint", sigma=sigma).classifier
        smoothed = SmoothedClassifier(classifier, sigma, 10, batch_size=200)
        counts = smoothed.count_samples(pixels, [3, 1000], SOFT_LABEL, N)
        assert torch.equal(torch.as_tensor(np.array(counts)), votes[[3, 1000], k])
    assert read_json(passing / "timings/training_votes/consistency_joint.json")["samples"] == 2 * N * len(train)


def test_the_targets_follow_from_the_votes(passing, train, monkeypatch):
    monkeypatch.chdir(passing)
    votes = read_training_votes(passing / VOTES, train, SIGMAS).numpy()
    targets = read_targets(planned(passing), train)
    assert targets.keys() == {"passes"} and targets["passes"].dtype == torch.float32
    assert np.array_equal(targets["passes"].numpy(), pass_targets(votes, train.labels))
    assert not targets["passes"][:, 0].any() and 0 < targets["passes"][:, 1].mean() < 1


def test_the_training_starts_from_the_joint_model(passing):
    start, joint = load_start(planned(passing), 10, CPU).classifier, passing / "models/consistency_joint/joint"
    pixels = torch.rand(5, 1, 8, 8)
    logits = start.eval().at(0.5)(pixels)
    assert torch.equal(logits[:, :10], load_model_folder(joint, sigma=0.5).classifier(pixels))
    assert logits.shape == (5, 11) and not logits[:, 10].any()


def test_the_model_folder_says_that_it_can_pass_and_what_it_cost(passing, train):
    config, joint = (read_json(passing / f"models/{name}/joint/config.json") for name in (METHOD, "consistency_joint"))
    assert config["can_pass"] is True and "can_pass" not in joint and len(config["class_names"]) == 10
    assert config["initial_weights"] == "models/consistency_joint/joint" and config["training"]["epochs"] == 2
    assert config["compute"]["joint"] == joint["compute"]["finetune"] + 2 * N * len(train)
    assert config["compute"]["finetune"] == joint["compute"]["finetune"] / 2 / 3  # half the steps, forward passes alone
    assert not {"consistency_weight", "steps"} & config["training"].keys()
    scales, can_pass = load_scales([passing / MODEL], SIGMAS)
    pixels, labels, indices = read_split(ShardedDataset(passing / "data/shards", "test"), 8, 8)
    cascade = CascadedClassifier([scale.classifier for scale in scales], SIGMAS, [0.0], 10, can_pass=can_pass)
    certificates = cascade.certify(to_unit_range(pixels), labels, n0=20, n=200, radius_step=0.05, indices=indices)
    assert np.mean([each.prediction == y for each, y in zip(certificates, labels.tolist(), strict=True)]) > 0.3
    succeed(stage(passing, "certify", METHOD, "0.5", "--certificates", str(passing / "own")))


def test_its_cascade_is_certified_and_says_that_it_can_pass(passing, tmp_path):
    folder = Path(shutil.copytree(passing, tmp_path / "cascade", symlinks=True))
    own = {"methods": [METHOD], "sigmas": None, "thresholds": [0.0], "choose_by": "acr", "choose_n": 10}
    change(folder, cascade=own | {"multi_scale": False}, certify__every=8)
    succeed(stage(folder, "certify_cascade", METHOD))
    record = read_json(folder / f"certificates/{METHOD}/cascade.json")
    assert record["can_pass"] is True and len(record["models"]) == 1


def test_the_more_bias_the_more_it_passes_and_the_encoder_stays(passing, tmp_path):
    joint = load_file(passing / "models/consistency_joint/joint/model.safetensors")
    folder = Path(shutil.copytree(passing, tmp_path / "other", symlinks=True))
    images = ShardedDataset(folder / "data/shards", "train")
    pixels = to_unit_range(read_pixels(images, 8, range(400))) + 0.5 * torch.randn(400, 1, 8, 8)
    shares = []
    for bias in (0.0, 3.0):  # the shared project was trained with the default, 0
        if bias:
            change(folder, finetune__pass_bias=bias)
            succeed(stage(folder, "finetune", METHOD, "joint"))
        weights = load_file(folder / MODEL / "model.safetensors")
        changed = {name for name, value in weights.items() if not torch.equal(value, joint[name])}
        assert changed == {"head.weight", "head.bias"}
        answers = load_model_folder(folder / MODEL, sigma=0.5, keep_pass=True).classifier(pixels).argmax(1)
        shares.append(float((answers == 10).float().mean()))
    assert shares[0] < shares[1] and shares[1] > 0.2


@pytest.mark.parametrize("method", ["cat_rs", "smoothadv"])
def test_the_joint_model_of_any_objective_learns_to_pass(passing, project, tiny_shards, method):
    """Here it is one of another objective, to save time."""
    change(project, methods=["gaussian", f"{method}_joint_pass"], **SHORT)
    change(project, finetune__objectives__smoothadv__attack_warmup_epochs=1)
    shutil.copytree(passing / "models/consistency_joint", project / f"models/{method}_joint")
    images = ShardedDataset(tiny_shards, "train")
    label = torch.nn.functional.one_hot(torch.from_numpy(images.labels.copy()), 10)
    votes = torch.stack([label, label.roll(1, 1)], 1)  # sigma 0.5 is wrong about every image
    write_training_votes(project / f"data/training_votes/{method}_joint.safetensors", votes, images, SIGMAS)
    succeed(stage(project, "finetune", f"{method}_joint_pass", "joint"))
    folder = project / f"models/{method}_joint_pass/joint"
    assert read_json(folder / "config.json")["compute"]["soft_label_share"] > 0 or method != "cat_rs"
    assert load_scales([folder], SIGMAS)[1]


def test_votes_that_do_not_fit_are_refused(passing, train, tmp_path):
    path = tmp_path / "votes.safetensors"
    votes = torch.ones(len(train), 2, 10, dtype=torch.int64)
    with pytest.raises(RRCMError, match="no such file"):
        read_training_votes(path, train, SIGMAS)
    write_training_votes(path, votes, train, [0.25, 1.0])
    with pytest.raises(RRCMError, match=r"has votes at sigmas \[0\.25, 1\.0\], not \[0\.25, 0\.5\]; run"):
        read_training_votes(path, train, SIGMAS)
    write_training_votes(path, votes, SimpleNamespace(fingerprint="00" * 32), SIGMAS)
    with pytest.raises(RRCMError, match="has votes for other images than"):
        read_training_votes(path, train, SIGMAS)
    for wrong in (votes[1:], votes * 0, votes[:, :, 1:]):
        write_training_votes(path, wrong, train, SIGMAS)
        with pytest.raises(RRCMError, match=f"must have votes for {len(train)} images at each sigma"):
            read_training_votes(path, train, SIGMAS)
    write_votes(path, votes[:, 0], train)
    with pytest.raises(RRCMError, match="is no file of votes for training images"):
        read_training_votes(path, train, SIGMAS)
    answer = stage(passing, "training_votes", "gaussian_joint")
    assert answer.returncode == 1 and "gaussian_joint: no method in params.yaml continues it to pass" in answer.stderr


def test_a_journal_has_only_possible_votes():
    good = vars(VotesState(0, [{"0": 3, "1": 1}, {"1": 4}], 8, "all samples"))
    possible = [good | change for change in ({}, {"index": 5})]
    bad = [{"votes": votes} for votes in ([{"0": 3, "1": 1}], [{"0": 3, "1": 1}, {"1": 3}], 8, [4, {"1": 4}])]
    bad += [{"votes": votes} for votes in ([{"0": 3, "2": 1}, {"1": 4}], [{"0": 5, "1": -1}, {"1": 4}])]
    bad += [{"samples": 4}, {"samples": 8.0}, {"stop_reason": ""}]
    assert all(is_possible_votes(saved, 4, (2, 2)) for saved in possible)
    assert not any(is_possible_votes(good | change, 4, (2, 2)) for change in bad)


@pytest.mark.thorough
def test_killed_runs_end_with_the_same_bytes(passing, tmp_path):
    """On two processes as well, where the votes are concerned."""
    folder = Path(shutil.copytree(passing, tmp_path / "again", symlinks=True))
    expected, votes = files_of(folder / MODEL), (folder / VOTES).read_bytes()
    shutil.rmtree(folder / MODEL)
    (folder / VOTES).unlink()
    assert exit_codes(start_all(folder, "training_votes", ["consistency_joint"], 2)) == [0, 0]
    assert (folder / VOTES).read_bytes() == votes
    kill_when(folder, f"runs/finetune-{METHOD}-joint-*/[0-9]*.safetensors", "finetune", METHOD, "joint")
    answer = stage(folder, "finetune", METHOD, "joint")
    succeed(answer)
    assert "resuming" in answer.stderr and files_of(folder / MODEL) == expected


@pytest.mark.thorough
def test_two_processes_train_like_one(passing, tmp_path):
    """A short training agrees to 2e-3, since sums are in another order."""
    folder = Path(shutil.copytree(passing, tmp_path / "again", symlinks=True))
    change(folder, finetune__weights_dtype="fp32", finetune__mixup=0.0, finetune__pass_share=0.25)
    weights = []
    for world in (1, 2):
        shutil.rmtree(folder / MODEL)
        assert exit_codes(start_all(folder, "finetune", [METHOD, "joint"], world)) == [0] * world
        weights.append(load_file(folder / MODEL / "model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-3, rtol=0, msg=name)
