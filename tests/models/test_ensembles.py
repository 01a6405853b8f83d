"""Ensembles: the mean of logits, and their model folders."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import change_model
from torch import nn

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.models.base_classifiers import BaseClassifier, NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.ensembles import Ensemble, write_ensemble
from rrcm.models.load import load_base_classifier, load_model_folder
from rrcm.models.vit import NoiseConditionedViT
from rrcm.utils.errors import RRCMError

K = 5


def member(seed: int, num_classes: int = K, image_size: int = 8) -> NoiseConditionedClassifier:
    torch.manual_seed(seed)
    encoder = NoiseConditionedViT(image_size, 1, 4, embed_dim=16, depth=1, num_heads=2)
    classifier = NoiseConditionedClassifier(encoder, num_classes, t=1.0)
    nn.init.normal_(classifier.head.weight)
    return classifier.eval()


def noisy_images(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_an_ensemble_answers_with_the_mean_of_the_logits():
    members, noisy = [member(seed) for seed in range(3)], noisy_images()
    expected = sum(each(noisy) for each in members) / 3
    torch.testing.assert_close(Ensemble(members)(noisy), expected)
    same = Ensemble([members[0]] * 3)
    assert torch.equal(same(noisy).argmax(1), members[0](noisy).argmax(1)) and same.sigma == 0.5


@torch.no_grad()
def test_a_bfloat16_ensemble_gives_each_member_the_input_it_wants():
    class Plain(BaseClassifier):
        num_classes = K

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, K)

        def forward(self, noisy, draw=None):
            assert noisy.dtype == self.layer.weight.dtype
            return self.layer(noisy.flatten(1))

    smoothed = SmoothedClassifier(Ensemble([member(0), Plain()]), 0.5, K, batch_size=16, precision="bf16")
    assert smoothed.predict(noisy_images(2).sigmoid(), n=32)


def save(folder: Path, classifier: nn.Module, **options) -> None:
    folder.mkdir(parents=True)
    save_model(folder, classifier, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed in range(3):
        save(tmp_path / f"ensemble/member_{seed}", member(seed))
    write_ensemble(tmp_path / "ensemble", [f"member_{seed}" for seed in range(3)], [str(k) for k in range(K)])
    return tmp_path / "ensemble"


@torch.no_grad()
def test_a_folder_loads_as_any_other_model(folder):
    loaded = load_base_classifier(folder)
    assert (loaded.num_classes, loaded.image_size, loaded.channels, loaded.sigma) == (K, 8, 1, 0.5)
    torch.testing.assert_close(
        loaded.classifier(noisy_images()), Ensemble([member(s) for s in range(3)])(noisy_images())
    )
    assert len(SmoothedClassifier(loaded.classifier, 0.5, K).certify(noisy_images(2).sigmoid(), n=100)) == 2


def another_member(folder: Path) -> None:
    change_model(folder / "member_1", seed=7)


def other_classes(folder: Path) -> None:
    shutil.rmtree(folder / "member_2")
    save(folder / "member_2", member(2, num_classes=4))
    write_ensemble(folder, [f"member_{seed}" for seed in range(3)], "abcde")


def other_size(folder: Path) -> None:
    shutil.rmtree(folder / "member_2")
    save(folder / "member_2", member(2, image_size=16))
    write_ensemble(folder, [f"member_{seed}" for seed in range(3)], "abcde")


def one_member(folder: Path) -> None:
    write_ensemble(folder, ["member_0"], "abcde")


def no_members(folder: Path) -> None:
    change_model(folder, members="member_0")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (another_member, "member_1: is not the part that the model it belongs to names"),
        (other_classes, "member_2: has class_names .* all members must agree"),
        (other_size, "member_2: has image_size 16, the first member 8; all members must agree"),
        (one_member, "members = .*: List should have at least 2 items"),
        (no_members, "members = 'member_0': should be a valid list"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(folder, harm, said):
    harm(folder)
    with pytest.raises(RRCMError, match=said) as caught:
        load_model_folder(folder)
    assert "\n" not in str(caught.value)
