"""Model folders of classifiers that can pass: one output more than classes."""

import pytest
import torch
from conftest import change_model

from rrcm import CascadedClassifier
from rrcm.models.architectures import network_classifier
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import load_encoder, save_model
from rrcm.models.joint import JointSigmas
from rrcm.models.kinds import load_model_folder, load_scales
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json

SIGMAS = (0.25, 0.5, 1.0)
LENET = {"name": "lenet", "image_size": 28, "channels": 1, "pixel_mean": None, "pixel_std": None}


def conditioned() -> NoiseConditionedClassifier:
    torch.manual_seed(0)
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=1, num_heads=2), 4, 1.0)
    torch.nn.init.normal_(classifier.head.weight)
    return classifier.eval()


@pytest.fixture(params=["vit", "lenet"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = conditioned() if request.param == "vit" else network_classifier(LENET, 4, 0.5).eval()
    save_model(tmp_path, model, sigma=JointSigmas(SIGMAS), can_pass=True)
    return tmp_path


def test_the_pass_is_left_out_unless_it_is_asked_for(folder):
    loaded, whole = load_model_folder(folder, sigma=0.5), load_model_folder(folder, sigma=0.5, keep_pass=True)
    pixels = torch.rand(3, 1, loaded.image_size, loaded.image_size)
    assert read_json(folder / "config.json")["can_pass"] is True and loaded.class_names == ["0", "1", "2"]
    assert loaded.num_classes == loaded.classifier.num_classes == 3 and whole.classifier.num_classes == 4
    assert torch.equal(loaded.classifier(pixels), whole.classifier(pixels)[:, :3]) and not loaded.classifier.training
    assert loaded.classifier.at(1.0).sigma == 1.0
    assert torch.equal(loaded.classifier.at(1.0)(pixels), whole.classifier.at(1.0)(pixels)[:, :3])
    assert loaded.classifier.keeps_float32_input == whole.classifier.keeps_float32_input


def test_a_cascade_passes_at_all_sigmas_but_the_smallest(folder):
    scales, can_pass = load_scales([folder], SIGMAS)
    assert can_pass and [scale.classifier.num_classes for scale in scales] == [3, 4, 4]
    assert [scale.sigma for scale in scales] == [*SIGMAS]
    weights = [next(scale.classifier.parameters()).data_ptr() for scale in scales]
    assert len(set(weights)) == 1
    cascade = CascadedClassifier([scale.classifier for scale in scales], SIGMAS, [0, 0], 3, can_pass=can_pass)
    size = scales[0].image_size
    (certificate,) = cascade.certify(torch.rand(1, 1, size, size), n0=10, n=100, radius_step=0.05)
    assert certificate.prediction in (-1, 0, 1, 2)
    with pytest.raises(RRCMError, match=r"sigma 0\.25 to 1, which 1\.5 is outside of"):
        load_scales([folder], (0.25, 1.5))
    assert load_scales([folder], (0.25, 1.5), outside_range=True)[0][1].sigma == 1.5


def test_other_models_do_not_pass(tmp_path):
    save_model(tmp_path, conditioned(), sigma=JointSigmas(SIGMAS))
    scales, can_pass = load_scales([tmp_path], SIGMAS)
    assert not can_pass and [scale.classifier.num_classes for scale in scales] == [4, 4, 4]
    assert "can_pass" not in read_json(tmp_path / "config.json")


def test_a_classifier_that_can_pass_has_an_encoder_to_start_from(tmp_path):
    save_model(tmp_path, conditioned(), sigma=JointSigmas(SIGMAS), can_pass=True)
    assert torch.equal(
        load_encoder(tmp_path)(torch.ones(1, 1, 8, 8), 0.7), conditioned().encoder(torch.ones(1, 1, 8, 8), 0.7)
    )
    change_model(tmp_path, can_pass="yes")
    with pytest.raises(RRCMError, match="can_pass = 'yes': should be a valid boolean"):
        load_model_folder(tmp_path, sigma=0.5)
    change_model(tmp_path, can_pass=False)
    with pytest.raises(RRCMError, match="head"):
        load_model_folder(tmp_path, sigma=0.5)
