"""Model folders of joint trainings: one network that is loaded for any sigma of its range."""

from pathlib import Path

import pytest
import torch
from conftest import change_model

from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier
from rrcm.models.checkpoints import load_encoder, save_model
from rrcm.models.ensembles import write_ensemble
from rrcm.models.joint import JointSigmas
from rrcm.models.kinds import load_model_folder
from rrcm.models.load import load_base_classifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

LIST, RANGE = JointSigmas((0.25, 0.5, 1.0)), JointSigmas((0.25, 1.0), (0.12, 1.1))
LENET = {"name": "lenet", "image_size": 28, "channels": 1, "pixel_mean": None, "pixel_std": None}


def conditioned(seed: int = 0) -> NoiseConditionedClassifier:
    torch.manual_seed(seed)
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=1, num_heads=2), 3, 1.0)
    torch.nn.init.normal_(classifier.head.weight)
    return classifier.eval()


def save_ensemble(folder: Path) -> None:
    for seed in range(2):
        save_model(folder / f"member_{seed}", conditioned(seed), sigma=LIST)
    write_ensemble(folder, ["member_0", "member_1"], "abc", joint=LIST.entries)


def test_a_joint_folder_names_its_sigmas_in_place_of_one(tmp_path):
    save_model(tmp_path, conditioned(), sigma=RANGE)
    config = read_json(tmp_path / "config.json")
    assert config["joint"] == {"sigmas": [0.25, 1.0], "interval": [0.12, 1.1]}
    assert config["kind"] == "classifier" and not {"sigma", "t"} & config.keys()


@pytest.mark.parametrize("sigma", [0.12, 0.37, 1.1])
def test_the_network_is_conditioned_on_twice_the_sigma(tmp_path, sigma):
    save_model(tmp_path, conditioned(), sigma=RANGE)
    loaded, pixels = load_base_classifier(tmp_path, sigma=sigma), torch.rand(4, 1, 8, 8)
    assert loaded.sigma == sigma
    expert = conditioned().at(sigma)
    assert torch.equal(loaded.classifier(pixels), expert(pixels))
    assert torch.equal(expert(pixels), conditioned()(pixels, t=torch.full((4,), 2 * sigma)))
    assert not torch.equal(expert(pixels), conditioned().at(0.9)(pixels))


def test_an_ensemble_and_a_network_without_condition_are_loaded_for_a_sigma(tmp_path):
    save_ensemble(tmp_path / "ensemble")
    pixels = torch.rand(4, 1, 8, 8)
    ensemble = load_base_classifier(tmp_path / "ensemble", sigma=0.3)
    logits = torch.stack([conditioned(seed).at(0.3)(pixels) for seed in range(2)])
    assert ensemble.sigma == 0.3 and torch.equal(ensemble.classifier(pixels), logits.mean(0))
    other = load_base_classifier(tmp_path / "ensemble", sigma=0.6).classifier
    assert torch.equal(other.at(0.3)(pixels), ensemble.classifier(pixels)) and other.sigma == 0.6
    save_model(tmp_path / "lenet", network_classifier(LENET, 3, 0.5).eval(), sigma=LIST)
    one, other = (load_base_classifier(tmp_path / "lenet", sigma=sigma) for sigma in (0.25, 1.0))
    pixels = torch.rand(2, 1, 28, 28)
    assert (one.sigma, other.sigma) == (0.25, 1.0) and torch.equal(one.classifier(pixels), other.classifier(pixels))


def test_the_networks_at_several_sigmas_share_their_weights():
    classifier = conditioned()
    one, other = classifier.at(0.25), classifier.at(1.0)
    assert (one.sigma, one.t, other.sigma, other.t, classifier.t) == (0.25, 0.5, 1.0, 2.0, 1.0)
    assert one.head is other.head and BaseClassifier().at(0.5).sigma == 0.5


@pytest.mark.parametrize("save", [save_ensemble, lambda folder: save_model(folder, conditioned(), sigma=LIST)])
def test_a_sigma_outside_the_range_is_refused_unless_it_is_asked_for(tmp_path, save):
    save(tmp_path)
    with pytest.raises(RRCMError, match=r"was trained for sigma 0\.25 to 1; give sigma, in pixel units$") as missing:
        load_model_folder(tmp_path)
    assert "\n" not in str(missing.value)
    for sigma in (0.2, 1.5, float("nan")):
        with pytest.raises(RRCMError, match=rf"was trained for sigma 0\.25 to 1, which {sigma} is outside of; choose"):
            load_base_classifier(tmp_path, sigma=sigma)
    assert load_base_classifier(tmp_path, sigma=1.5, outside_range=True).sigma == 1.5


def test_a_joint_classifier_has_an_encoder_to_start_from(tmp_path):
    save_model(tmp_path, conditioned(), sigma=LIST)
    pixels = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_encoder(tmp_path)(pixels, 0.7), conditioned().encoder(pixels, 0.7))


@pytest.mark.parametrize(
    ("joint", "said"),
    [
        ([0.5], "joint = [0.5]: should be a valid dictionary"),
        ({"sigmas": []}, "joint.sigmas = []: List should have at least 1 item"),
        ({"sigmas": [1.0, 0.5], "interval": None}, "sigmas [1.0, 0.5] must increase, within the interval None"),
        ({"sigmas": [0.5], "interval": [0.6, 1.0]}, "sigmas [0.5] must increase, within the interval [0.6, 1.0]"),
        ({"sigmas": [-0.5], "interval": None}, "joint.sigmas.0 = -0.5: should be greater than 0"),
    ],
)
def test_impossible_sigmas_are_refused_in_one_line(tmp_path, joint, said):
    save_model(tmp_path, conditioned(), sigma=LIST)
    change_model(tmp_path, joint=joint)
    with pytest.raises(RRCMError) as caught:
        load_base_classifier(tmp_path, sigma=0.5)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)
    assert said in str(caught.value)
