"""The attack reaches the optimum where it is known, never leaves its ball, and notices broken certificates."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_close, change, compose, files_of, stage, write_certificates
from torch import nn

from rrcm.certification.cascade import CascadedClassifier
from rrcm.certification.results import ABSTAIN, read_certificates
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.config import Attack, load_config
from rrcm.data.shards import ShardedDataset, evenly_spaced, read_split
from rrcm.evaluation.attack import pgd, project, smoothed_target, unsmoothed_target, worst_predictions
from rrcm.evaluation.metrics import certified_accuracy
from rrcm.models.base_classifiers import BaseClassifier
from rrcm.utils.errors import RRCMError
from rrcm.utils.progress import Progress

CASCADED = ("sigma_0.25", "sigma_0.5", "cascade")  # what is attacked of a method with a cascade
SETTINGS = Attack(methods=[], steps=5, num_noise=4, n=100, max_images=None, batch_size=2)


class Linear(nn.Module):
    """Logits W x of the flattened image."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.flatten(1) - 0.5) @ self.weight.T


def half_space(direction: torch.Tensor) -> Linear:
    """Class 1 where the image is beyond the middle grey along `direction`, a unit vector."""
    return Linear(torch.stack([-direction, direction]))


def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """L2 distances (float64) between the images of two float32 batches."""
    return (one.double() - other.double()).flatten(1).norm(dim=1)


def test_pgd_reaches_the_optimum_against_a_linear_classifier():
    """The optimum is a step of the whole radius of each image along the difference of the two classes' weights."""
    torch.manual_seed(0)
    network = Linear(torch.randn(2, 48))
    images, labels = 0.4 + 0.2 * torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 0, 1, 0])
    radius = torch.tensor([0.0, 0.01, 0.1, 0.2, 0.3])
    attacked = pgd(network, images, labels, radius, steps=10)
    away = nn.functional.normalize(network.weight[1 - labels] - network.weight[labels]).detach()
    expected = images + (radius[:, None] * away).view_as(images)
    assert torch.equal(attacked[0], images[0])
    assert_close(attacked, expected)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_attacked_images_never_leave_the_ball_or_the_box(shape):
    """This must hold for black and white pixels, tiny radii, and steps of any length."""
    torch.manual_seed(1)
    images = torch.rand(200, *shape).mul(1.4).sub(0.2).clamp(0, 1)
    radius = 10 ** torch.empty(200).uniform_(-9, 1.5)
    for scale in (1e-6, 1e-2, 1.0, 1e6):
        moved = project(images + scale * torch.randn_like(images), images, radius)
        assert moved.dtype == torch.float32
        assert moved.min() >= 0 and moved.max() <= 1
        assert (distances(moved, images) <= radius.double()).all()
        assert torch.equal(project(images, images, radius), images)
    network = Linear(torch.randn(10, math.prod(shape)))
    attacked = pgd(network, images, torch.arange(200) % 10, radius, steps=3)
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert (distances(attacked, images) <= radius.double()).all()
    reachable = (radius > 1e-3) & (radius < 0.5)  # the ball is used, where the box leaves room
    assert (distances(attacked, images) > 0.5 * radius)[reachable].all()


def test_pgd_stays_inside_the_box_against_a_black_and_white_image():
    """Half of the pixels cannot move further out of the box, so the other half uses the whole radius."""
    direction = torch.full((16,), 0.25)
    images = torch.cat([torch.zeros(8), torch.ones(8)]).view(1, 1, 4, 4)
    attacked = pgd(half_space(direction), images, torch.tensor([0]), torch.tensor([0.5]), steps=50)
    assert torch.equal(attacked.flatten()[8:], torch.ones(8))
    torch.testing.assert_close(attacked.flatten()[:8], torch.full((8,), 0.5 / math.sqrt(8)), atol=1e-3, rtol=0)


def test_pgd_with_a_zero_or_tiny_gradient():
    images, labels, radius = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1]), torch.full((2,), 0.1)
    assert torch.equal(pgd(half_space(torch.zeros(4)), images, labels, radius), images)
    faint = pgd(half_space(torch.full((4,), 1e-30)), images, labels, radius)  # its square is 0 in float32
    torch.testing.assert_close(distances(faint, images), radius.double(), atol=1e-5, rtol=0)


def test_a_smoothed_half_space_changes_class_only_beyond_its_radius():
    """Smoothing does not change a half-space, so its radius is the distance to the plane. PREDICT errs with 1e-6."""
    torch.manual_seed(2)
    direction = nn.functional.normalize(torch.randn(16), dim=0)
    smoothed = SmoothedClassifier(half_space(direction), 0.25, 2, num_noise=8)
    images = (0.5 + 0.25 * direction).view(1, 1, 4, 4).repeat(4, 1, 1, 1)
    labels, radius = torch.ones(4, dtype=torch.int64), 0.25 * torch.tensor([0.0, 0.96, 1.04, 1.3])
    attacked = pgd(smoothed, images, labels, radius, steps=10)
    assert smoothed.predict(attacked, n=50_000, alpha=1e-6) == [1, 1, 0, 0]


def test_the_worst_prediction_counts_and_misclassified_images_are_not_attacked_again():
    """Four images of label 1 with their predictions within each radius. None: there must be no prediction."""
    answers = {7: [1, 1, 1], 8: [1, ABSTAIN, 1], 9: [ABSTAIN, 0, None], 10: [2, None, None]}
    asked, radii = dict.fromkeys(answers, 0), [0.0, 0.1, 0.2]

    def predict(images: torch.Tensor, indices: list[int]) -> list[int]:
        assert len(images) == len(indices) <= SETTINGS.batch_size
        predictions = [answers[index][asked[index]] for index in indices]
        for index in indices:
            asked[index] += 1
        return predictions

    target = smoothed_target(SmoothedClassifier(half_space(torch.ones(4)), 0.5, 2), n=1, alpha=0.5)._replace(
        predict=predict
    )
    with Progress(12, "attack", "attacks") as progress:
        worst = worst_predictions(
            target,
            torch.full((4, 1, 2, 2), 0.5),
            np.array([7, 8, 9, 10]),
            np.ones(4, np.int64),
            np.repeat(np.array(radii)[:, None], 4, axis=1),
            SETTINGS,
            progress,
        )
    assert worst.T.tolist() == [[1, 1, 1], [1, ABSTAIN, ABSTAIN], [ABSTAIN, 0, 0], [2, 2, 2]]
    assert progress.done == 12


def test_a_stochastic_base_classifier_is_attacked_with_fixed_draws():
    """With fixed draws the attack maximizes one function, and reaches its worst case."""

    class Shifted(BaseClassifier):
        num_classes, stochastic = 2, True

        def forward(self, noisy, draw=None):
            score = noisy.flatten(1).mean(1) - 0.5 + 0.1 * draw.normal("shift", (1,))[:, 0]
            return torch.stack([-score, score], dim=1)

    target = unsmoothed_target(Shifted(), seed=3)
    images = torch.full((3, 1, 4, 4), 0.9)
    logits = target.network(images)
    assert torch.equal(logits, target.network(images)) and torch.equal(logits[0], logits[2])
    assert target.predict(images, [5, 6, 7]) == [1, 1, 1]
    distance = 4 * float(logits[0, 1].detach())  # the mean of 16 pixels moves by a quarter of the L2 distance
    for factor, expected in ((0.95, 1), (1.05, 0)):
        radius = torch.full((3,), factor * distance)
        attacked = pgd(target.network, images, torch.ones(3, dtype=torch.int64), radius)
        assert target.predict(attacked, [5, 6, 7]) == [expected] * 3
    assert unsmoothed_target(half_space(torch.ones(4))).predict(torch.ones(1, 1, 2, 2), [0]) == [1]


def test_a_subset_of_images_is_evenly_spaced():
    assert evenly_spaced(5, None).tolist() == evenly_spaced(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert evenly_spaced(7, 1).tolist() == [0]


def test_an_undefended_network_is_broken(tiny_shards):
    """A network that is trained on clean digits loses most of its accuracy within the radii of the report."""
    torch.manual_seed(0)
    (images, labels), (others, truth) = (
        (pixels.float() / 255, classes)
        for pixels, classes, _ in (read_split(ShardedDataset(tiny_shards, split), 8) for split in ("train", "test"))
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    def accuracy(radius: float) -> float:
        attacked = pgd(network, others, truth, torch.full((len(others),), radius))
        return float((network(attacked).argmax(1) == truth).float().mean())

    assert accuracy(0.0) > 0.9
    assert accuracy(0.5) < 0.5
    assert accuracy(1.0) < 0.1


@pytest.fixture
def attackable(trained, tmp_path):
    """A copy of the trained project with an attack that takes seconds."""
    settings = ["sigmas=[0.5]", "attack.methods=[rrcm]", "attack.steps=5", "attack.num_noise=4", "attack.n=200"]
    compose(tmp_path / "params.yaml", *settings, "report.radii=[0.5,1.0,2.0]")
    (tmp_path / "data").symlink_to(trained / "data")
    (tmp_path / "models").symlink_to(trained / "models")
    shutil.copytree(trained / "certificates", tmp_path / "certificates")
    return tmp_path


@pytest.mark.thorough
def test_the_attack_stage_breaks_the_base_classifier_but_no_certificate(attackable):
    answer = stage(attackable, "attack", "rrcm")
    assert answer.returncode == 0, answer.stderr
    summary = json.loads((attackable / "attack/rrcm/summary.json").read_text())
    curves = summary["sigma_0.5"]
    table = pd.read_csv(attackable / "attack/rrcm/sigma_0.5.tsv", sep="\t")
    certificates = read_certificates(attackable / "certificates/rrcm/sigma_0.5.tsv")
    assert table["idx"].equals(certificates["idx"])
    claims = certificates["radius"] > 0
    assert summary["certificates"] == curves["certificates"] == claims.sum() == table["attacked"].count() >= 5
    assert summary["broken"] == table["broken"].sum() == 0
    assert table.loc[claims, "attacked"].isin([ABSTAIN]).sum() == summary["abstained"]
    assert "0 of" in answer.stderr and "warning" not in answer.stderr

    radii, label = [0.0, 0.5, 1.0, 2.0], table["label"]
    assert summary["radii"] == radii
    assert curves["certified_accuracy"] == certified_accuracy(certificates, radii).tolist()
    assert curves["accuracy"] == [(table[f"r={r}"] == label).mean() for r in radii]
    assert curves["not_wrong"] == [table[f"r={r}"].where(lambda x: x != ABSTAIN, label).eq(label).mean() for r in radii]
    assert all(c <= e for c, e in zip(curves["certified_accuracy"], curves["not_wrong"], strict=True))
    for name in ("accuracy", "not_wrong", "unsmoothed_accuracy"):
        assert curves[name] == sorted(curves[name], reverse=True), name
    clean, *_, attacked = curves["unsmoothed_accuracy"]
    assert attacked < clean / 4
    written = files_of(attackable / "attack/rrcm")
    assert set(written) == {"attack.pdf", "attack.png", "attack.svg", "sigma_0.5.tsv", "summary.json"}
    assert stage(attackable, "attack", "rrcm").returncode == 0
    assert files_of(attackable / "attack/rrcm") == written


def test_false_certificates_are_found_and_reported(attackable):
    """Most of the radii are too large. The table, the summary and stderr must show that they are broken."""
    path = attackable / "certificates/rrcm/sigma_0.5.tsv"
    certificates = read_certificates(path)
    claimed = certificates["predict"] != ABSTAIN
    write_certificates(path, certificates.assign(radius=np.where(claimed, 3.0, 0.0)))
    answer = stage(attackable, "attack", "rrcm")
    assert answer.returncode == 0, answer.stderr
    summary = json.loads((attackable / "attack/rrcm/summary.json").read_text())
    table = pd.read_csv(attackable / "attack/rrcm/sigma_0.5.tsv", sep="\t")
    assert summary["certificates"] == claimed.sum()
    assert summary["broken"] == table["broken"].sum() > claimed.sum() / 2
    assert f"warning: attack/rrcm: {summary['broken']} of {claimed.sum()} certificates broken" in answer.stderr


def test_certificates_that_are_missing_or_of_other_images_are_refused(attackable):
    path = attackable / "certificates/rrcm/sigma_0.5.tsv"
    write_certificates(path, read_certificates(path).iloc[1:])
    for complaint in ("is for other images than the settings select", "no such file"):
        answer = stage(attackable, "attack", "rrcm")
        assert answer.returncode == 1
        assert answer.stderr.startswith(f"error: certificates/rrcm/sigma_0.5.tsv: {complaint}")
        assert answer.stderr.count("\n") == 1
        assert not (attackable / "attack").exists()
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("methods", ["[consistency]", "[rrcm,rrcm]"])
def test_only_methods_of_the_run_are_attacked(tmp_path, methods):
    with pytest.raises(RRCMError, match=r"attack\.methods .* must be among methods \['rrcm', 'gaussian_matched'\]"):
        load_config(compose(tmp_path / "params.yaml", f"attack.methods={methods}"))


@pytest.mark.thorough
def test_the_cascade_is_attacked_inside_its_certificates(cascaded, tmp_path):
    """Only the deployed classifier has these files: it has no base classifier of its own to attack without noise."""
    folder = Path(shutil.copytree(cascaded, tmp_path / "copy", symlinks=True))
    change(folder, attack__methods=["rrcm"], attack__steps=5, attack__num_noise=4, attack__n=200, report__radii=[0.5])
    answer = stage(folder, "attack", "rrcm")
    assert answer.returncode == 0, answer.stderr
    summary = json.loads((folder / "attack/rrcm/summary.json").read_text())
    certificates = read_certificates(folder / "certificates/rrcm/cascade.tsv")
    assert set(files_of(folder / "attack/rrcm")) >= {"cascade.tsv", "sigma_0.25.tsv", "sigma_0.5.tsv"}
    curves, radii = summary["cascade"], summary["radii"]
    assert curves["certificates"] == (certificates["radius"] > 0).sum() > 0
    assert curves["broken"] == 0 and "unsmoothed_accuracy" not in curves
    assert curves["certified_accuracy"] == certified_accuracy(certificates, radii).tolist()
    assert all(c <= e for c, e in zip(curves["certified_accuracy"], curves["not_wrong"], strict=True))
    assert summary["certificates"] == sum(summary[name]["certificates"] for name in CASCADED)

    path = folder / "certificates/rrcm/cascade.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"sigmas": [0.25, 0.75]}))
    answer = stage(folder, "attack", "rrcm")
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1
    assert "is not about the cascade of the sigmas [0.25, 0.5]; run `dvc repro certify-cascade` again" in answer.stderr


def test_false_certificates_of_a_cascade_are_broken():
    """The cascade of half-spaces has the radius at which one of them changes its answer."""
    direction = torch.ones(16) / 4
    cascade = CascadedClassifier(half_space(direction), [0.25, 0.5], [0.0], num_classes=2, num_noise=64)
    target = smoothed_target(cascade, n=1000, alpha=0.001)
    images = torch.full((2, 1, 4, 4), 0.6)  # 0.4 beyond the plane
    radii = np.array([[0.2, 0.2], [0.7, 0.7]])
    with Progress(4, "attack", "attacks") as progress:
        inside, beyond = worst_predictions(
            target, images, np.arange(2), np.ones(2, np.int64), radii, SETTINGS, progress
        )
    assert inside.tolist() == [1, 1]
    assert beyond.tolist() == [0, 0]
