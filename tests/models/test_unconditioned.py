"""The ablation without a condition: the noise level of a classifier, of an image or of a model folder has no effect."""

import torch

from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.joint import JointSigmas
from rrcm.models.kinds import load_model_folder
from rrcm.models.unconditioned import LEVEL, UnconditionedClassifier
from rrcm.models.vit import NoiseConditionedViT


def classifier(kind: type, t: float) -> NoiseConditionedClassifier:
    torch.manual_seed(0)
    made = kind(NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=1, num_heads=2), 3, t)
    torch.nn.init.normal_(made.head.weight)
    return made.eval()


@torch.no_grad()
def test_the_noise_level_has_no_effect():
    pixels, plain = torch.rand(4, 1, 8, 8), classifier(UnconditionedClassifier, 0.5)
    expected = classifier(NoiseConditionedClassifier, LEVEL)(pixels)
    for logits in (plain(pixels), plain.at(1.0)(pixels), plain(pixels, t=torch.full((4,), 2.0))):
        torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(plain(pixels, num_chunks=2), expected)


@torch.no_grad()
def test_a_joint_folder_gives_the_same_network_at_every_sigma(tmp_path):
    plain = classifier(UnconditionedClassifier, 1.0)
    save_model(tmp_path, plain, sigma=JointSigmas((0.25, 1.0)), kind="unconditioned")
    pixels = torch.rand(4, 1, 8, 8)
    low, high = (load_model_folder(tmp_path, sigma=sigma) for sigma in (0.25, 1.0))
    assert (low.sigma, high.sigma) == (0.25, 1.0) and isinstance(low.classifier, UnconditionedClassifier)
    assert torch.equal(low.classifier(pixels), plain(pixels)) and torch.equal(high.classifier(pixels), plain(pixels))
