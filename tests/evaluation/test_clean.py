"""Accuracy without noise: the base classifier alone, conditioned on the level of its sigma, on the certified images."""

from pathlib import Path

import pytest
import torch
from conftest import change

from rrcm.config import load_config
from rrcm.data.shards import ShardedDataset, read_split
from rrcm.evaluation.clean import NO_NOISE, measure_clean_accuracy
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json
from rrcm.utils.pixels import to_unit_range


def make_classifier(t: float) -> NoiseConditionedClassifier:
    torch.manual_seed(3)
    classifier = NoiseConditionedClassifier(NoiseConditionedViT(8, 1, 4, embed_dim=64, depth=1, num_heads=1), 10, t)
    torch.nn.init.normal_(classifier.head.weight)  # its class depends on the image and on t
    return classifier.eval()


def test_the_network_that_is_deployed_classifies_each_certified_image_once(project: Path):
    change(project, methods=["rrcm"], sigmas=[0.25, 2.0], certify__every=2, certify__precision="fp32")
    config = load_config(project / "params.yaml")
    pixels, labels, _ = read_split(ShardedDataset(project / "data/shards", "test"), 8, 2)
    images, expected = to_unit_range(pixels), {}
    for sigma in config.sigmas:
        classifier = make_classifier(2 * sigma)
        save_model(project / f"models/rrcm/sigma_{sigma}", classifier, sigma=sigma)
        expected[f"sigma_{sigma}"] = int((classifier(images).argmax(1) == labels).sum())
    assert len(set(expected.values())) == 2  # the level matters
    measure_clean_accuracy(config, project / "data/shards", project / "models", project / "clean.json")
    record = read_json(project / "clean.json")
    assert record["correct"] == {"rrcm": expected} and record["images"] == {"rrcm": len(labels)}
    assert record["seconds"] > 0 and "hardware" in record["environment"]


def test_noise_of_the_least_sigma_changes_no_image():
    images = torch.arange(256, dtype=torch.float32) / 255
    noisy = images.clone().add_(torch.full_like(images, 6.0), alpha=NO_NOISE)
    assert torch.equal(noisy[1:], images[1:]) and noisy[0] < 1e-36


def test_a_missing_model_is_named(project: Path):
    config = load_config(project / "params.yaml")
    with pytest.raises(RRCMError, match=r"models/rrcm/sigma_0\.25"):
        measure_clean_accuracy(config, project / "data/shards", project / "models", project / "clean.json")
