"""Folders of images as data sets: ImageNet and the user's own, with links and wrong folders."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import read_with_test
from PIL import Image
from test_datasets import one_line, settings

from rrcm.data.datasets import read_dataset
from rrcm.data.images import LISTED
from rrcm.utils.errors import RRCMError


def write_folders(root: Path, classes: dict[str, int]) -> None:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (9, 7), (20 * i, 50 * number, 0)).save(
                root / name / f"{i:03d}.{('png', 'JPG', 'bmp')[i % 3]}"
            )


def test_imagenet_folders(tmp_path: Path):
    write_folders(tmp_path / "train", {"n02": 3, "n01": 4})
    write_folders(tmp_path / "val", {"n02": 2})
    (tmp_path / "train/n01/notes.txt").write_text("not an image")
    (tmp_path / "train/n01/._000.png").write_text("macOS leaves these")
    (tmp_path / "train/.cache").mkdir()
    dataset = read_dataset(settings("imagenet", tmp_path))
    assert dataset.classes == ["n01", "n02"]
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 3
    assert [str(p.relative_to(tmp_path)) for p in dataset.test.images] == ["val/n02/000.png", "val/n02/001.JPG"]
    assert dataset.test.labels.tolist() == [1, 1]


def test_imagefolder_with_and_without_test(tmp_path: Path):
    write_folders(tmp_path / "flat", {"a": 10, "b": 5, "single": 1})
    dataset = read_with_test(settings("imagefolder", tmp_path / "flat"))
    assert np.bincount(dataset.test.labels, minlength=3).tolist() == [2, 1, 0]  # the last image of a class is kept
    assert len(dataset.train.labels) == 13
    assert not set(dataset.train.images) & set(dataset.test.images)
    write_folders(tmp_path / "split/train", {"a": 3, "b": 3})
    write_folders(tmp_path / "split/test", {"a": 1, "b": 2})
    assert read_dataset(settings("imagefolder", tmp_path / "split")).test.labels.tolist() == [0, 1, 1]


def test_links_between_classes(tmp_path: Path):
    write_folders(tmp_path / "a", {"cat": 4, "dog": 4})
    (tmp_path / "a/dog/link.png").symlink_to("../cat/000.png")
    (tmp_path / "a/dog/more").symlink_to("../cat")
    (tmp_path / "a/cat/again").symlink_to(".")
    os.link(tmp_path / "a/cat/001.JPG", tmp_path / "a/dog/001hard.JPG")
    found = read_dataset(settings("imagefolder", tmp_path / "a"))
    assert len(found.train.labels) == 8
    assert +Counter(found.left_out) == {LISTED: 1, "links from one class to images of another": 3}
    (tmp_path / "a/kitty").symlink_to("cat")
    with pytest.raises(RRCMError, match="kitty: leads only to what is in cat; remove one of the classes") as error:
        read_dataset(settings("imagefolder", tmp_path / "a"))
    one_line(error)
    (tmp_path / "a/kitty").unlink()
    (tmp_path / "a/puppy").mkdir()
    (tmp_path / "a/puppy/1.png").symlink_to("../dog/000.png")
    with pytest.raises(RRCMError, match=r"puppy: leads only to what is in dog/000.png; remove one"):
        read_dataset(settings("imagefolder", tmp_path / "a"))


def test_classes_of_links_to_images_outside_class_folders(tmp_path: Path):
    write_folders(tmp_path, {"pool": 10})
    for i, file in enumerate(sorted((tmp_path / "pool").iterdir())):
        name = tmp_path / "root" / ("even", "odd")[i % 2] / file.name
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(file.rename(tmp_path / "root" / file.name))
    found = read_dataset(settings("imagefolder", tmp_path / "root"))
    assert np.bincount(found.train.labels).tolist() == [5, 5]


def test_errors_name_the_wrong_folder(tmp_path: Path):
    def complaint(source: str, root: Path | None, size: int = 8) -> str:
        with pytest.raises(RRCMError) as error:
            read_dataset(settings(source, root, size))
        return one_line(error)

    assert f"{tmp_path / 'none'}: no such dataset folder" in complaint("imagefolder", tmp_path / "none")
    assert f"{tmp_path / 'none'}: no such" in complaint("imagenet", tmp_path / "none")
    for source in ("fashion_mnist", "cifar10", "pathmnist"):
        assert f"data.root {tmp_path / 'none'}: no such" in complaint(source, tmp_path / "none", 28)
    assert "data.root: imagenet has no default folder" in complaint("imagenet", None)
    write_folders(tmp_path / "a/train", {"x": 1, "y": 1})
    write_folders(tmp_path / "a/val", {"x": 1, "z": 1})
    assert "class folder z is not among the training images" in complaint("imagenet", tmp_path / "a")
    assert f"{tmp_path / 'a'}: holds train/, val/ but no test/; rename" in complaint("imagefolder", tmp_path / "a")
    (tmp_path / "a/train/empty").mkdir()
    assert f"{tmp_path / 'a/train/empty'}: class folder without images" in complaint(
        "imagefolder", tmp_path / "a/train"
    )
    (tmp_path / "bare").mkdir()
    assert f"{tmp_path / 'bare'}: holds no class folders" in complaint("imagefolder", tmp_path / "bare")
    write_folders(tmp_path / "b/Training", {"x": 1, "y": 1})
    write_folders(tmp_path / "b/Testing", {"x": 1, "y": 1})
    assert "holds Testing/, Training/ but no train/; rename" in complaint("imagefolder", tmp_path / "b")
    write_folders(tmp_path / "c/wrapper/x", {"1": 1, "2": 1})
    assert "holds one class, wrapper; a classifier needs two" in complaint("imagefolder", tmp_path / "c")
    write_folders(tmp_path / "d", {"caf\u00e9": 1, "cafe\u0301": 1})
    assert "two class folders are called caf\u00e9" in complaint("imagefolder", tmp_path / "d")
    write_folders(tmp_path / "e", {"a": 1, "b\nc": 1})
    assert r"class folder 'b\nc' is not printable text" in complaint("imagefolder", tmp_path / "e")
