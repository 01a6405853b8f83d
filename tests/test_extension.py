"""A loss, a base classifier and a data set from outside the package, through fine-tuning and certification.

Each takes the steps of the READMEs in objectives/, models/ and data/, and no change inside the package.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from conftest import with_derived

from rrcm.certification.certify import certify_split
from rrcm.certification.results import read_certificates
from rrcm.config import Config, parse_config
from rrcm.data.datasets import DATASETS, RawDataset, RawSplit
from rrcm.data.sharding import write_shards
from rrcm.methods import METHODS, Method
from rrcm.models import FOLDER_LOADERS, TRAINED_CLASSIFIERS
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import build_from_folder, describe_classifier
from rrcm.models.load import load_base_classifier
from rrcm.objectives import FINETUNING
from rrcm.objectives.base import draw_noise, noisy_logits, soft_cross_entropy
from rrcm.training.finetune import finetune
from rrcm.training.plan import Files, plan_training
from rrcm.utils.files import read_json


@dataclass(frozen=True)
class BothViews:
    """CE(f(x), y) + lambda H(f(x), f(x + e)) (Li et al. 2019): a loss as objectives/README.md has it."""

    sigma: float
    num_noise: int
    weight: float = 2.0
    terms: ClassVar[tuple[str, ...]] = ("stability",)

    @property
    def forwards_per_image(self) -> float:
        return 3 * (1 + self.num_noise)

    def __call__(self, classifier, batch, draw):
        clean = classifier(batch["image"])
        noise = draw_noise(batch["image"], draw, self.sigma, self.num_noise)
        noisy = noisy_logits(classifier, batch["image"], noise)
        stability = soft_cross_entropy(noisy, clean.softmax(-1))
        return {
            "loss": soft_cross_entropy(clean[None], batch["target"]) + self.weight * stability,
            "stability": stability,
        }


class Jittered(NoiseConditionedClassifier):
    """A classifier with a kind of its own, which draws noise of its own."""

    stochastic = True

    def forward(self, noisy, draw=None, *, num_chunks=1):
        if draw is not None:
            noisy = noisy + 0.1 * draw.normal("jitter", noisy.shape[1:])
        return super().forward(noisy, num_chunks=num_chunks)


def stripes(data) -> RawDataset:
    """Three classes of 8x8 images, distinguished by the direction of their stripes."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 3
    images = rng.integers(0, 40, (600, 8, 8), dtype=np.uint8)
    images[labels == 0, ::2] += 200
    images[labels == 1, :, ::2] += 200
    train, test = (RawSplit(images[rows], labels[rows]) for rows in (slice(480), slice(480, None)))
    return RawDataset(["horizontal", "vertical", "flat"], train, test)


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method(None, "both_views", "jittered", "#123456", "Both views", family="noise")
    monkeypatch.setitem(METHODS, "both_views", row)
    monkeypatch.setitem(FINETUNING, "both_views", BothViews)
    monkeypatch.setitem(TRAINED_CLASSIFIERS, "jittered", Jittered)
    monkeypatch.setitem(FOLDER_LOADERS, "jittered", load_jittered)
    monkeypatch.setitem(DATASETS, "stripes", stripes)


def settings(project: Path) -> Config:
    import yaml

    values = yaml.safe_load((project / "params.yaml").read_text())
    values |= {"methods": ["both_views"], "sigmas": [0.25]}
    values["pretrain"]["objectives"] = []
    values["data"]["source"] = "stripes"
    values["finetune"] |= {"epochs": 2, "batch_size": 64}
    values["certify"] |= {"every": 2, "n": 200}
    return parse_config(with_derived(values))


def load_jittered(folder: Path, config: dict):
    """A kind of model folder that only this file knows."""
    return describe_classifier(build_from_folder(folder, config, Jittered), config["class_names"])


@pytest.mark.thorough
def test_a_loss_a_classifier_and_a_data_set_from_outside(extended, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(project)
    write_shards(config.data, config.seed, tmp_path / "shards")
    model = tmp_path / "models/both_views/sigma_0.25"
    files = Files(tmp_path / "shards", tmp_path / "models/pretrain", model, tmp_path / "time.json")
    finetune(plan_training(config, "both_views", 0.25, files))

    described = read_json(model / "config.json")
    assert (described["kind"], described["class_names"]) == ("jittered", ["horizontal", "vertical", "flat"])
    assert (model / "history.csv").read_text().split(",")[:3] == ["epoch", "loss", "stability"]
    loaded = load_base_classifier(model)
    assert isinstance(loaded.classifier, Jittered) and loaded.num_classes == 3

    files = [tmp_path / name for name in ("one.tsv", "again.tsv", "large.tsv")]
    for file, batch_size in zip(files, (200, 200, 64), strict=True):
        certify = config.certify.model_copy(update={"batch_size": batch_size})
        changed = config.model_copy(update={"certify": certify})
        certify_split(changed, 0.25, tmp_path / "shards", model, file, tmp_path / "time.json")
    frame = read_certificates(files[0])
    assert len(frame) == 60 and frame["correct"].mean() > 0.9
    assert files[0].read_bytes() == files[1].read_bytes()  # its own noise is drawn by the counter
    assert (read_certificates(files[2])["predict"] == frame["predict"]).mean() > 0.9


@pytest.mark.slow
def test_outside_objects_decide_the_identity_of_a_run(extended, project, tmp_path, monkeypatch):
    """A run is not resumed under another row of the method table, nor under another objective's code."""
    from rrcm.training import finetune as module

    names = []
    monkeypatch.setattr(
        module, "RunState", lambda name, identity: names.append(identity) or (_ for _ in ()).throw(Seen)
    )
    monkeypatch.chdir(tmp_path)
    config = settings(project)
    write_shards(config.data, config.seed, tmp_path / "shards")

    def identity() -> str:
        with pytest.raises(Seen):
            files = Files(tmp_path / "shards", tmp_path, tmp_path / "out", tmp_path / "t.json")
            finetune(plan_training(config, "both_views", 0.25, files))
        return names[-1]

    first = identity()
    assert identity() == first
    monkeypatch.setitem(METHODS, "both_views", Method(**(vars(METHODS["both_views"]) | {"label": "Li et al."})))
    assert identity() == first
    found = [first]
    for objective in ("gaussian", "consistency"):  # only the row distinguishes these two; the code is the same
        monkeypatch.setitem(METHODS, "both_views", Method(**(vars(METHODS["both_views"]) | {"objective": objective})))
        found.append(identity())
    assert len(set(found)) == 3


class Seen(Exception):
    """Ends a training where its identity is known."""
