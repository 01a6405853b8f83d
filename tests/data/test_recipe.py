"""The README's example of a new data set, taken step by step in a copy of the repository."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from recipe import copy_code, follow, run

from rrcm.data.shards import read_manifest


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code with the data set of the example."""
    files = follow("rrcm/data/README.md", "Add a data set", copy_code(tmp_path))
    assert files == ["rrcm/sources/mine.py", "rrcm/sources/__init__.py", "conf/profile/mine.yaml"]
    return tmp_path


def test_a_data_set_is_added_as_the_readme_says(copy):
    rng = np.random.default_rng(0)
    (copy / "data/raw/mine").mkdir(parents=True)
    arrays = {"labels": np.arange(200) % 2, "test_labels": np.arange(40) % 2}
    for name in ("images", "test_images"):
        labels = arrays[name.replace("images", "labels")]
        arrays[name] = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    np.savez(copy / "data/raw/mine/mine.npz", **arrays)
    for command in (["stages/compose.py", "profile=mine"], ["stages/shard_data.py"]):
        answer = run(copy, *command)
        assert answer.returncode == 0, answer.stderr
    manifest = read_manifest(copy / "data/shards")
    assert (manifest.source, manifest.classes) == ("mine", ["cat", "dog"])
    assert {name: sum(split.counts) for name, split in manifest.splits.items()} == {"train": 192, "val": 8, "test": 40}
    assert yaml.safe_load((copy / "params.yaml").read_text())["report"]["name"] == "mine"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("# @package _global_\n", "conf/profile/mine.yaml: the first line must be `# @package _global_`; add it\n"),
        (
            "defaults: [fashion_mnist]\n",
            "error: Interpolation key 'finetune.epochs' not found; correct it, or let the profile name others in "
            "`defaults`, as in rrcm/data/README.md\n",
        ),
    ],
)
def test_a_profile_that_misses_a_line_is_told_what_is_missing(copy, line, said):
    profile = copy / "conf/profile/mine.yaml"
    profile.write_text(profile.read_text().replace(line, ""))
    answer = run(copy, "stages/compose.py", "profile=mine")
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1
    assert answer.stderr.startswith("error: ") and answer.stderr.endswith(said)
