"""Few labels: which images they are, how the loader repeats them, and that no training becomes shorter or longer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import compose, make_project, stage

from rrcm.config import load_config
from rrcm.data.labelled import labelled_rows
from rrcm.data.loader import batch_loader, describe_step
from rrcm.data.shards import KEY, ShardedDataset
from rrcm.training.budget import plan_budget
from rrcm.training.checks import check_before_training
from rrcm.utils.distributed import DistEnv
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json


@pytest.fixture
def images(tiny_shards) -> ShardedDataset:
    return ShardedDataset(tiny_shards, "train")


def keys(images: ShardedDataset, per_class: int) -> set[int]:
    return set(images.index[labelled_rows(images, per_class), KEY].tolist())


def test_the_labelled_images_are_balanced_and_nested(images):
    rows = labelled_rows(images, 13)
    assert np.bincount(images.labels[rows]).tolist() == [13] * 10 and len(set(rows.tolist())) == 130
    assert np.array_equal(images.labels[rows[:20]], [*range(10), *range(10)])
    assert keys(images, 1) < keys(images, 3) < keys(images, 13)


def test_they_depend_on_the_seed_and_not_on_the_order_of_the_shards(images):
    chosen = keys(images, 3)
    images.index = images.index[np.random.default_rng(0).permutation(len(images))]
    assert keys(images, 3) == chosen
    images.manifest = images.manifest.model_copy(update={"seed": 1})
    assert keys(images, 3) != chosen


def test_an_epoch_repeats_them_equally_often(images):
    """Batch by batch: over three epochs each occurs equally often up to one, and copies are augmented differently."""
    images.labelled = labelled_rows(images, 3)
    steps = 3 * (len(images) // 64)

    def draw(image, rng) -> dict[str, np.ndarray]:
        return {"image": np.asarray(image), "draw": rng.random(1)}

    def load(workers: int, world_size: int, rank: int = 0) -> list:
        env = DistEnv(rank, world_size, "cpu")
        return list(batch_loader(images, draw, batch_size=64, seed=0, steps=range(steps), env=env, workers=workers))

    batches = load(0, 1)
    index = np.concatenate([batch["index"].numpy() for batch in batches])
    draws = np.concatenate([batch["draw"].numpy() for batch in batches])
    assert set(index.tolist()) == set(images.labelled.tolist()) and len(np.unique(draws)) == len(draws)
    dropped = 3 * (len(images) % 64)
    counts = np.unique(index, return_counts=True)[1]
    assert len(index) == 64 * steps and counts.max() - counts.min() <= 1 + dropped
    assert all((images.labels[batch["index"]] == batch["label"].numpy()).all() for batch in batches)
    for parts in ([load(2, 1)], [load(0, 2, rank) for rank in range(2)]):
        together = [np.concatenate([batch["index"].numpy() for batch in each]) for each in zip(*parts, strict=True)]
        assert np.array_equal(np.concatenate(together), index)


def test_an_error_names_the_shards_of_the_labelled_images(images):
    images.labelled = labelled_rows(images, 1)[:1]
    shard = images.split.shards[int(np.searchsorted(images.starts, images.labelled[0], side="right")) - 1]
    assert describe_step(images, 64, 0, 0) == f"images of {shard.name}"


def test_a_class_with_fewer_images_is_refused_before_training(tmp_path, tiny_shards, images):
    message = r"data.labels_per_class = 200: class \d has 1\d\d training images; lower it, or set null"
    with pytest.raises(RRCMError, match=message):
        labelled_rows(images, 200)
    with pytest.raises(RRCMError, match=message):
        check_before_training(load_config(compose(tmp_path / "params.yaml", "data.labels_per_class=200")), tiny_shards)


@pytest.mark.parametrize("method", ["gaussian", "gaussian_matched", "smoothadv_joint", "consistency_matched_joint"])
@pytest.mark.parametrize("equal_passes", ["true", "false"])
def test_budgets_do_not_depend_on_the_number_of_labels(tmp_path, method, equal_passes):
    """Apart from the evaluations: there is one at the end."""
    config = load_config(compose(tmp_path / "params.yaml", f"finetune.equal_passes={equal_passes}"))
    data = config.data.model_copy(update={"labels_per_class": 1})
    noise = "joint" if "joint" in method else 0.5
    all_labels, few = (
        plan_budget(each, method, noise, 1500, tmp_path) for each in (config, config.model_copy(update={"data": data}))
    )
    assert few == replace(all_labels, evaluate_every=few.evaluate_every)
    assert few.evaluate_every >= few.epochs > 1


@pytest.mark.slow
def test_a_training_with_few_labels_keeps_its_last_weights(tmp_path, tiny_shards):
    project = make_project(tmp_path, tiny_shards, "data.labels_per_class=1", "methods=[gaussian]", "finetune.epochs=3")
    answer = stage(project, "finetune", "gaussian", "0.5")
    assert answer.returncode == 0, answer.stderr
    folder = project / "models/gaussian/sigma_0.5"
    history = pd.read_csv(folder / "history.csv")
    assert history["val_accuracy"].notna().tolist() == [False, False, True]
    assert read_json(folder / "config.json")["selected"]["epoch"] == 3
