"""k-NN accuracy against scikit-learn, and the cosines along a trajectory in cases with a known answer."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from rrcm.evaluation.representations import EvalImages, Evaluation, centred, knn_accuracy, same_and_cross_cosine
from rrcm.utils.distributed import DistEnv

ALONE = DistEnv(0, 1, torch.device("cpu"))


def test_knn_accuracy_against_scikit_learn():
    torch.manual_seed(0)
    centres = torch.randn(7, 12)
    bank_labels, labels = torch.randint(7, (400,)), torch.randint(7, (150,))
    bank, queries = (centres[of] + 2 * torch.randn(len(of), 12) for of in (bank_labels, labels))
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    theirs.fit(bank.numpy(), bank_labels.numpy())
    expected = theirs.score(queries.numpy(), labels.numpy())
    assert 0.3 < expected < 0.9
    assert knn_accuracy(queries, labels, bank, bank_labels) == pytest.approx(expected, abs=1e-9)


def test_same_and_cross_cosine_are_means_over_pairs():
    torch.manual_seed(0)
    clean = torch.randn(30, 5) + 1
    noisy = clean + torch.randn(30, 5)
    cosine = nn.functional.cosine_similarity(noisy[:, None], clean[None], dim=-1)
    same, cross = same_and_cross_cosine(noisy, clean)
    assert same == pytest.approx(float(cosine.diag().mean()), abs=1e-5)
    assert cross == pytest.approx(float(cosine[~torch.eye(30, dtype=bool)].mean()), abs=1e-5)
    assert same > cross + 0.1
    assert same_and_cross_cosine(torch.ones(9, 4), torch.ones(9, 4)) == (pytest.approx(1), pytest.approx(1))


class Pixels(nn.Module):
    """An encoder whose representation is the pixels times `gain` plus `common`."""

    def __init__(self, gain: float, common: float = 0.0):
        super().__init__()
        self.gain, self.common = gain, common

    def forward(self, images: torch.Tensor, t: float) -> torch.Tensor:
        return images.flatten(1) * self.gain + self.common


def evaluate_pixels(encoder: nn.Module) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(300) % 10
    images = EvalImages(pixels, labels)
    evaluate = Evaluation(images, images, sigmas=[0.25, 1.0], t_min=0.002, seed=0, precision="fp32", env=ALONE)
    return evaluate(encoder)


def test_cosines_of_noisy_pixels_have_the_known_value():
    """Uniform pixels x in [-1, 1] have variance 1/3, so the cosine of x and x + t e is 1 / sqrt(1 + 3 t^2)."""
    clean, quiet, loud = evaluate_pixels(Pixels(1.0))
    assert [row["sigma"] for row in (clean, quiet, loud)] == [0.0, 0.25, 1.0]
    assert clean["same_image_cosine"] == pytest.approx(1) and clean["knn"] > 0.5
    for row, t in ((quiet, 0.5), (loud, 2.0)):
        assert row["same_image_cosine"] == pytest.approx((1 + 3 * t**2) ** -0.5, abs=0.02)
        assert abs(row["cross_image_cosine"]) < 0.01
        assert row["centred_cosine"] == pytest.approx(row["same_image_cosine"], abs=0.01)
    assert evaluate_pixels(Pixels(5.0))[2]["same_image_cosine"] == pytest.approx(loud["same_image_cosine"], abs=1e-5)


def test_a_common_component_raises_all_cosines_except_the_centred_one():
    """Adding a constant c raises the same-image cosine to (c^2 + 1/3) / d and the cross-image cosine to c^2 / d, where
    d = sqrt((c^2 + 1/3)(c^2 + 1/3 + t^2)). The centred cosine does not change."""
    for plain, shifted, t in zip(
        evaluate_pixels(Pixels(1.0)), evaluate_pixels(Pixels(1.0, common=2.0)), (0.002, 0.5, 2.0), strict=True
    ):
        expected = (1 + t**2 / (4 + 1 / 3)) ** -0.5
        assert shifted["same_image_cosine"] == pytest.approx(expected, abs=0.02)
        assert shifted["cross_image_cosine"] == pytest.approx(expected * 4 / (4 + 1 / 3), abs=0.02)
        assert shifted["centred_cosine"] == pytest.approx(plain["centred_cosine"], abs=1e-5)


def test_centred_representations_have_no_mean():
    representations = torch.randn(50, 7) + 3
    assert centred(representations).mean(0).abs().max() < 1e-12
    torch.testing.assert_close(
        centred(representations)[0] - centred(representations)[1], (representations[0] - representations[1]).double()
    )


def test_a_collapsed_encoder_has_cosines_of_one_and_chance_accuracy():
    for row in evaluate_pixels(Pixels(0.0, common=1.0)):
        assert (row["same_image_cosine"], row["cross_image_cosine"]) == (pytest.approx(1), pytest.approx(1))
        assert row["knn"] == pytest.approx(0.1, abs=0.05)
