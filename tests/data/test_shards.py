"""Shards: the same bytes for any number of workers, read back without loss; error messages name damaged files."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import read_with_test
from PIL import Image

from rrcm.config import Data
from rrcm.data import shards
from rrcm.data.images import LISTED, read_image
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset, read_manifest, read_split
from rrcm.data.verification import verify_shards
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import sha256_file


def settings(**changes: object) -> Data:
    digits = {"source": "digits", "root": None, "image_size": 8, "channels": 1, "labels_per_class": None}
    return Data(**digits | {"val_fraction": 0.1, "shard_size": 300, "workers": 0} | changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def images_and_labels(folder: Path, split: str) -> dict[str, tuple[bytes, int]]:
    """Key -> (image file, label), read by the webdataset library."""
    names = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    dataset = webdataset.WebDataset(names, shardshuffle=False)
    return {s["__key__"]: (s.get("png") or s["jpg"], int(s["cls"])) for s in dataset}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    write_shards(settings(), 0, folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of small images in many formats and modes."""
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i, suffix in enumerate(["jpg", "jpeg", "JPG", "png", "bmp", "webp", "tif", "tiff"]):
            pixels = rng.integers(0, 256, (12 + i, 17, 3), np.uint8)
            options = {"webp": {"lossless": True}, "png": {"compress_level": 1}}.get(suffix, {})
            Image.fromarray(pixels).save(root / name / f"{i}.{suffix}", **options)
    Image.new("L", (9, 9), 7).save(root / "cat/gray.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(root / "cat/alpha.png")
    Image.new("P", (9, 9), 1).save(root / "dog/palette.png")
    Image.new("CMYK", (9, 9), (10, 20, 30, 40)).save(root / "dog/cmyk.tif")
    Image.new("CMYK", (9, 9), (10, 20, 30, 40)).save(root / "dog/cmyk.jpg")
    Image.new("RGB", (9, 9), (5, 6, 7)).save(root / "dog/named_wrongly.jpg", "PNG")
    return root


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "shards"))


def complaint(action) -> str:
    with pytest.raises(RRCMError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_bytes_do_not_depend_on_workers_or_the_run(digits: Path, photos: Path, tmp_path: Path, workers: int):
    write_shards(settings(workers=workers), 0, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(digits)
    folder = settings(source="imagefolder", root=str(photos), channels=3, shard_size=3)
    write_shards(folder, 1, tmp_path / "one")
    write_shards(folder.model_copy(update={"workers": workers}), 1, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_seed_moves_val_but_not_test(digits: Path, tmp_path: Path):
    write_shards(settings(), 1, tmp_path / "other")
    first, other = contents(digits), contents(tmp_path / "other")
    assert first["test-00000.tar"] == other["test-00000.tar"]
    assert first["train-00000.tar"] != other["train-00000.tar"]
    assert set(images_and_labels(digits, "val")) != set(images_and_labels(tmp_path / "other", "val"))


def test_splits_are_complete_disjoint_and_stratified(digits: Path):
    source = read_with_test(settings())
    train, val, test = (images_and_labels(digits, split) for split in ("train", "val", "test"))
    assert not set(train) & set(val)
    for samples, records in ((train | val, source.train), (test, source.test)):
        assert set(samples) == {f"{i:08d}" for i in range(len(records.labels))}
        for key, (content, label) in samples.items():
            pixels = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(pixels, records.images[int(key)]) and label == records.labels[int(key)]
    share = np.bincount([y for _, y in val.values()]) / np.bincount(source.train.labels)
    assert np.all(np.abs(share - 0.1) < 0.005)
    assert list(test) == sorted(test)  # the order of the raw data set
    assert list(train) != sorted(train)
    labels = np.array([y for _, y in train.values()])
    assert len(set(labels[:50])) == 10  # classes are mixed


def test_manifest(digits: Path):
    manifest = json.loads((digits / "manifest.json").read_text())
    assert manifest["classes"] == list("0123456789") and manifest["channels"] == 1 and manifest["seed"] == 0
    for split, entry in manifest["splits"].items():
        assert all(shard["samples"] <= 300 for shard in entry["shards"])
        assert all((digits / shard["name"]).stat().st_size == shard["bytes"] for shard in entry["shards"])
        samples = images_and_labels(digits, split)
        assert sum(shard["samples"] for shard in entry["shards"]) == len(samples)
        assert entry["counts"] == np.bincount([y for _, y in samples.values()]).tolist()
    assert len(manifest["splits"]["train"]["shards"]) == 5


def test_reader_agrees_with_webdataset(digits: Path):
    for split in ("train", "val", "test"):
        images, samples = ShardedDataset(digits, split), images_and_labels(digits, split)
        verify_shards([images])
        assert len(images) == len(samples) == len(images.labels)
        for i, (key, (content, label)) in enumerate(samples.items()):
            image, our_label, our_key = images.read(i)
            assert (our_key, our_label, images.labels[i]) == (key, label, label)
            assert image.mode == "L" and np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(content))))
    assert images.labels.dtype == np.int64 and images.image_size == 8


def test_files_are_kept_as_they_are_or_without_loss(photos: Path, tmp_path: Path):
    write_shards(settings(source="imagefolder", root=str(photos), channels=3, shard_size=4), 0, tmp_path / "shards")
    source = read_with_test(settings(source="imagefolder", root=str(photos), channels=3, shard_size=4))
    seen = 0
    for split in ("train", "val", "test"):
        images = ShardedDataset(tmp_path / "shards", split)
        paths = (source.test if split == "test" else source.train).images
        samples = images_and_labels(tmp_path / "shards", split)
        for i in range(len(images)):
            image, _, key = images.read(i)
            path, content = paths[int(key)], samples[key][0]
            kind = Image.open(path).format
            if kind in ("JPEG", "PNG"):
                assert content == path.read_bytes()
            assert Image.open(io.BytesIO(content)).format == ("JPEG" if kind == "JPEG" else "PNG")
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(read_image(path, 3)))
            seen += 1
    assert seen == 22
    tar = b"".join(path.read_bytes() for path in (tmp_path / "shards").glob("*.tar"))
    assert b".jpg\0" in tar and b".png\0" in tar and b".jpeg\0" not in tar


def test_gray_data_from_colour_files(photos: Path, tmp_path: Path):
    write_shards(settings(source="imagefolder", root=str(photos), channels=1), 0, tmp_path / "shards")
    pixels, labels, _ = read_split(ShardedDataset(tmp_path / "shards", "train"), 6)
    assert pixels.shape[1:] == (1, 6, 6) and len(labels) == len(pixels)


def test_unreadable_images_are_all_named_and_nothing_is_written(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    data = settings(source="imagefolder", root=str(photos), channels=3, workers=2, shard_size=2)
    write_shards(data, 0, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    cut = photos / "cat/0.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])  # the header is intact
    (photos / "dog/3.png").write_bytes(b"")
    Image.fromarray(np.full((5, 5), 0.5, np.float32)).save(photos / "dog/4.tif")
    capsys.readouterr()
    text = complaint(lambda: write_shards(data, 0, tmp_path / "shards"))
    assert text == "3 of 23 images cannot be read, named above; replace or remove them"
    said = capsys.readouterr().err
    for path in (cut, photos / "dog/3.png", photos / "dog/4.tif"):
        assert f"{path}: cannot be decoded (" in said
    assert contents(tmp_path / "shards") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "shards"]


def test_left_out_files_and_the_order_of_classes_are_in_the_manifest(photos: Path, tmp_path: Path):
    (photos / "cat/old").mkdir()
    (photos / "cat/0.jpg").rename(photos / "cat/old/0.jpg")
    for name in (
        "notes.txt",
        ".hidden.png",
        "cat/a.heic",
        "cat/b.HEIC",
        "@eaDir/cat/a.png",
        "dog/Thumbs.db",
        "top.png",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(photos / name, "PNG")
    write_shards(settings(source="imagefolder", root=str(photos), channels=3), 0, tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert (
        manifest["class_order"] == "natural" and sum(map(sum, (s["counts"] for s in manifest["splits"].values()))) == 22
    )
    assert manifest["left_out"] == {
        ".db files": 1,
        ".heic files": 2,
        ".txt files": 1,
        "files in @eaDir": 1,
        "hidden files": 1,
        "images outside class folders": 1,
    }


def write_photos(root: Path, *names: str) -> None:
    """Photos of noise, all different."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        seed = np.frombuffer(str(name).encode(), np.uint8)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)).save(root / name)


def pixels_of(folder: Path, split: str) -> set[bytes]:
    images = ShardedDataset(folder, split)
    return {images.read(i)[0].tobytes() for i in range(len(images))}


def repeat_photos(root: Path, how: str, classes: str, source: str, target: str) -> None:
    """Give the photos in `source` a second path, in `target`."""
    for name in classes:
        (root / target.format(name)).parent.mkdir(parents=True, exist_ok=True)
        if how == "linked folder":
            (root / target.format(name)).symlink_to(root / source.format(name))
            continue
        for file in sorted((root / source.format(name)).iterdir()):
            again = root / target.format(name) / f"again{file.name}"
            again.parent.mkdir(parents=True, exist_ok=True)
            match how:
                case "copy":
                    shutil.copy(file, again)
                case "link":
                    again.symlink_to(file)
                case "hard link":
                    os.link(file, again)
                case "encoding":
                    Image.open(file).save(again.with_suffix(".tif"))
                case "turned":  # as EXIF data says
                    exif = Image.Exif()
                    exif[0x112] = 3
                    Image.open(file).rotate(180).save(again, exif=exif)


REPEATED = ["copy", "link", "hard link", "linked folder", "encoding", "turned"]


@pytest.mark.parametrize("how", REPEATED)
def test_no_test_image_was_trained_on_whatever_way_leads_to_it(tmp_path: Path, how: str, capsys: pytest.CaptureFixture):
    """In a folder without test images, every image gets into exactly one split, and each split has its share."""
    write_photos(tmp_path / "photos", *(f"{name}/a/{i}.png" for name in "xy" for i in range(20)))
    repeat_photos(tmp_path / "photos", how, "xy", "{}/a", "{}/b")
    write_shards(settings(source="imagefolder", root=str(tmp_path / "photos"), channels=3), 0, tmp_path / "shards")
    train, val, test = (pixels_of(tmp_path / "shards", split) for split in ("train", "val", "test"))
    assert not train & val and not (train | val) & test
    assert (len(train), len(val), len(test)) == (28, 4, 8)
    manifest, said = read_manifest(tmp_path / "shards"), capsys.readouterr().err
    if "link" in how:
        assert manifest.left_out == {LISTED: 2 if how == "linked folder" else 40} and manifest.repeated is None
        assert f"note: left out {LISTED} (" in said
    else:
        assert manifest.repeated == {"copies among the test images": 8, "copies among the training images": 32}
        assert "note: kept copies among the training images (32), copies among the test images (8)\n" in said


@pytest.mark.parametrize("source", ["imagefolder", "imagenet"])
@pytest.mark.parametrize("how", REPEATED)
def test_images_of_both_train_and_test_are_left_out_of_test(
    tmp_path: Path, how: str, source: str, capsys: pytest.CaptureFixture
):
    """ImageNet's test images stay, because publications use them. All are reported."""
    photos, test = tmp_path / "photos", "val" if source == "imagenet" else "test"
    write_photos(photos, *(f"train/{name}/{i}.png" for name in "xy" for i in range(10)))
    write_photos(photos, *(f"train/{name}/few/{i}.png" for name in "xy" for i in range(7)))
    write_photos(photos, *(f"{test}/{name}/new.png" for name in "xy"))
    repeat_photos(photos, how, "xy", "train/{}/few", f"{test}/{{}}/more")
    write_shards(settings(source=source, root=str(photos), channels=3), 0, tmp_path / "shards")
    trained_on = pixels_of(tmp_path / "shards", "train") | pixels_of(tmp_path / "shards", "val")
    tested, manifest = pixels_of(tmp_path / "shards", "test"), read_manifest(tmp_path / "shards")
    counted = {"test images that are training images too": 14}
    if source == "imagenet":
        assert len(tested & trained_on) == 14 and manifest.repeated == counted and manifest.left_out is None
    else:
        assert len(tested) == 2 and not tested & trained_on and manifest.left_out == counted
    note = "kept" if source == "imagenet" else "left out"
    assert f"note: {note} test images that are training images too (14)\n" in capsys.readouterr().err


def test_one_image_in_two_classes_is_reported_and_stays_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_photos(tmp_path / "photos", *(f"{name}/{i}.png" for name in "xy" for i in range(20)))
    for i in range(10):
        shutil.copy(tmp_path / f"photos/x/{i}.png", tmp_path / f"photos/y/again{i}.png")
    write_shards(settings(source="imagefolder", root=str(tmp_path / "photos"), channels=3), 0, tmp_path / "shards")
    splits = [pixels_of(tmp_path / "shards", split) for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 40
    manifest = read_manifest(tmp_path / "shards")
    assert sum(sum(split.counts) for split in manifest.splits.values()) == 50
    assert manifest.repeated["images in several classes"] == 10
    assert "images in several classes (10)" in capsys.readouterr().err


def test_a_test_set_of_training_images_is_refused(tmp_path: Path):
    write_photos(tmp_path / "photos", *(f"train/{name}/{i}.png" for name in "xy" for i in range(4)))
    (tmp_path / "photos/test").symlink_to("train")
    data = settings(source="imagefolder", root=str(tmp_path / "photos"), channels=3)
    text = complaint(lambda: write_shards(data, 0, tmp_path / "shards"))
    assert "photos: every test image is a training image too; give it other test images" in text
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(("channels", "count"), [(1, 2), (3, 3)])
def test_colours_of_the_same_brightness_are_one_image_in_grey(tmp_path: Path, channels: int, count: int):
    photos = tmp_path / "photos"
    write_photos(photos, *(f"{split}/{name}/{i}.png" for split in ("train", "test") for name in "xy" for i in "1"))
    write_photos(photos, "train/x/2.png")
    Image.new("RGB", (5, 5), (100, 0, 0)).save(photos / "train/x/red.png")
    Image.new("RGB", (5, 5), (0, 51, 0)).save(photos / "test/x/green.png")
    write_shards(settings(source="imagefolder", root=str(photos), channels=channels), 0, tmp_path / "shards")
    assert len(ShardedDataset(tmp_path / "shards", "test")) == count


def test_classes_that_a_split_lacks_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_photos(tmp_path / "photos", *(f"{name}/{i}.png" for name in "xy" for i in range(10)))
    write_photos(tmp_path / "photos", "single/1.png", "two/1.png", "two/2.png")
    write_shards(settings(source="imagefolder", root=str(tmp_path / "photos"), channels=3), 0, tmp_path / "shards")
    assert read_manifest(tmp_path / "shards").splits["test"].counts == [0, 1, 2, 2]
    said = capsys.readouterr().err
    assert "note: 1 of 4 classes have no test images: single\n" in said
    assert "note: 2 of 4 classes have no validation images: single, two\n" in said


def test_nothing_to_validate_on(tmp_path: Path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            write_photos(tmp_path, f"{split}/{name}/1.png")
    data = settings(source="imagefolder", root=str(tmp_path))
    assert "no class has a second training image" in complaint(lambda: write_shards(data, 0, tmp_path / "shards"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "another run"])
def test_damaged_shard_is_named(digits: Path, tmp_path: Path, damage: str):
    folder = copy(digits, tmp_path)
    path = folder / "train-00002.tar"
    content = bytearray(path.read_bytes())
    match damage:
        case "truncated":
            path.write_bytes(content[:-1000])
        case "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "missing":
            path.unlink()
        case "another run":
            write_shards(settings(), 1, tmp_path / "other")
            shutil.copy(tmp_path / "other/train-00002.tar", path)
    images = ShardedDataset(folder, "train")
    word = {"flipped": "hash", "missing": "missing"}.get(damage, "from another run")
    text = complaint(lambda: verify_shards([images]))
    assert str(path) in text and word in text and "shard-data" in text
    assert "(and" not in text
    (folder / "train-00004.tar").unlink()
    assert "(and 1 other shards)" in complaint(lambda: verify_shards([images]))
    if damage in ("truncated", "missing"):
        assert str(path) in complaint(lambda: images.read(650))


@pytest.mark.slow
def test_reading_unverified_damage_is_named(digits: Path, tmp_path: Path):
    """A shard of the right size with wrong bytes, read without `verify_shards`."""
    folder = copy(digits, tmp_path)
    path, images = folder / "train-00001.tar", ShardedDataset(folder, "train")
    offset, size, _, key = images.index[310].tolist()
    whole = path.read_bytes()

    def read(start: int, content: bytes) -> str:
        path.write_bytes(whole[:start] + content + whole[start + len(content) :])
        return complaint(lambda: ShardedDataset(folder, "train").read(310))

    assert f"{path}: no tar header at byte {offset}" in read(offset, b"x" * 512)
    assert f"{path}: sample {key:08d} cannot be decoded" in read(offset + 512 + size // 2, b"\xff\xfe\xfd")
    other = images.index[311, 0]
    assert f"where {key:08d} should be: from another run" in read(offset, whole[other : other + 512])
    path.write_bytes(whole)
    ShardedDataset(folder, "train").read(310)


def test_bad_manifest_and_index(digits: Path, tmp_path: Path):
    folder = copy(digits, tmp_path)
    path = folder / "manifest.json"
    good = json.loads(path.read_text())

    def opening(text: str) -> str:
        path.write_text(text)
        return complaint(lambda: ShardedDataset(folder, "train"))

    assert f"{path}: not a shard manifest" in opening(json.dumps(good)[:-30])
    assert "splits" in opening(json.dumps({k: v for k, v in good.items() if k != "splits"}))
    assert "format" in opening(json.dumps(good | {"format": "rrcm-shards-9"}))
    escape = json.dumps(good).replace("train-00000.tar", "../train-00000.tar")
    assert "splits.train.shards.0.name" in opening(escape)
    path.write_text(json.dumps(good))
    assert "has no split valid; it has train, val, test" in complaint(lambda: ShardedDataset(folder, "valid"))
    index = folder / "train.index.npy"
    index.write_bytes(index.read_bytes()[:-8])
    assert f"{index}: " in complaint(lambda: ShardedDataset(folder, "train"))
    shutil.copy(folder / "val.index.npy", index)
    assert f"{index}: " in complaint(lambda: ShardedDataset(folder, "train"))
    path.unlink()
    assert f"{path}: cannot be read" in complaint(lambda: ShardedDataset(folder, "train"))


def set_manifest(folder: Path, **values: object) -> None:
    """Change manifest.json; a double underscore in a name stands for a level."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, value in values.items():
        *parents, key = name.split("__")
        section = manifest
        for parent in parents:
            section = section[parent]
        section[key] = value(section.get(key)) if callable(value) else value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": lambda names: names[::-1]}, "classes differ from the classes of digits"),
        ({"classes": lambda names: names[:5]}, "classes differ from the classes of digits"),
        ({"source": "mine", "classes": lambda names: names[:5]}, "train counts 10 classes, but there are 5"),
        ({"source": "mine", "classes": ["a"]}, "classes: List should have at least 2 items"),
        ({"source": "mine", "classes": lambda names: ["", *names[1:]]}, "classes.0: String should have at least 1"),
        (
            {"source": "imagefolder", "classes": lambda names: names[::-1], "class_order": "natural"},
            "classes are not in natural order",
        ),
        ({"source": "imagefolder", "classes": ["a"] * 10, "class_order": "natural"}, "classes are not in natural"),
        ({"splits__test__counts": [0] * 10}, "test counts other numbers of images than its shards"),
        ({"splits__test__counts": lambda counts: [-1, *counts[1:]]}, "splits.test.counts.0: Input should be greater"),
        ({"splits__test__counts": lambda counts: counts[:9]}, "test counts 9 classes, but there are 10"),
        ({"splits__test__shards": []}, "splits.test.shards: List should have at least 1 item"),
        ({"splits__test__index__name": "train.index.npy"}, "test has files of another split"),
        ({"image_size": 0}, "image_size: Input should be greater than 0"),
        ({"left_out": {"copies": -3}}, "left_out.copies: Input should be greater than 0"),
    ],
)
def test_a_manifest_that_no_shards_have_is_refused(digits: Path, tmp_path: Path, changes: dict, said: str):
    folder = copy(digits, tmp_path)
    set_manifest(folder, **changes)
    text = complaint(lambda: ShardedDataset(folder, "train"))
    assert f"{folder}/manifest.json: not a shard manifest ({said}" in text and text.endswith("(dvc repro shard-data)")


@pytest.mark.parametrize("renamed", [False, True])
def test_a_test_split_that_is_the_training_split_is_refused(digits: Path, tmp_path: Path, renamed: bool):
    folder = copy(digits, tmp_path)
    split = json.loads((folder / "manifest.json").read_text())["splits"]["train"]
    for file in [split["index"], *split["shards"]] if renamed else []:
        path = folder / file["name"]
        file["name"] = file["name"].replace("train", "test")
        shutil.copy(path, folder / file["name"])
    set_manifest(folder, splits__test=split)
    said = "two shards are the same" if renamed else "test has files of another split"
    assert said in complaint(lambda: ShardedDataset(folder, "test"))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((shards.LABEL, value) for value in (1, 10, -1, 2**62)),
        *((shards.OFFSET, value) for value in (-512, 2**62)),
        *((shards.SIZE, value) for value in (-1, 2**62)),
        *((shards.KEY, value) for value in (-1, 1)),
    ],
)
def test_an_index_that_does_not_fit_is_refused_before_an_image_is_read(
    digits: Path, tmp_path: Path, column: int, value: int
):
    """Its hash in the manifest is correct."""
    folder = copy(digits, tmp_path)
    path = folder / "test.index.npy"
    index = np.load(path)
    assert index[0].tolist()[shards.LABEL :] == [0, 0] and index[1, shards.KEY] == 1
    index[0, column] = value
    np.save(path, index)
    set_manifest(folder, splits__test__index__sha256=sha256_file(path))
    assert f"{path}: does not fit manifest.json" in complaint(lambda: ShardedDataset(folder, "test"))


def test_read_split(digits: Path):
    images = ShardedDataset(digits, "test")
    pixels, labels, rows = read_split(images, 8, every=7, limit=20)
    assert rows == [7 * round(i) for i in np.floor(np.linspace(0, 51, 20))] and pixels.shape == (20, 1, 8, 8)
    assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64
    source = read_with_test(settings()).test
    assert np.array_equal(pixels[:, 0].numpy(), source.images[rows]) and labels.tolist() == source.labels[rows].tolist()
    assert len(read_split(images, 8)[0]) == len(images)
    assert read_split(images, 5, limit=2)[0].shape == (2, 1, 5, 5)


def test_a_limit_spreads_over_a_split_that_is_sorted_by_class(tmp_path: Path):
    for name in ("a", "b", "c"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(30):
            Image.new("L", (2, 2), i).save(tmp_path / "photos" / name / f"{i}.png")
    write_shards(settings(source="imagefolder", root=str(tmp_path / "photos")), 0, tmp_path / "shards")
    images = ShardedDataset(tmp_path / "shards", "test")  # 18 images
    _, labels, rows = read_split(images, 2, limit=9)
    assert np.bincount(labels).tolist() == [3, 3, 3] and len(set(rows)) == 9


def test_reader_pickles_and_keeps_few_files_open(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    monkeypatch.setattr(shards, "DECODED_BYTES", 0)
    images = ShardedDataset(digits, "train")
    for i in range(0, len(images), 100):
        images.read(i)
    assert len(images._files) == 2 and not images._decoded
    copied = pickle.loads(pickle.dumps(images))
    assert copied.read(5)[2] == images.read(5)[2]


@pytest.mark.parametrize(("column", "value"), [(0, -512), (0, 10**9), (1, -1), (2, -1), (3, -1)])
def test_an_index_that_points_outside_its_shard(digits: Path, tmp_path: Path, column: int, value: int):
    """The index and the manifest are made by hand, and the hashes fit."""
    folder = Path(shutil.copytree(digits, tmp_path / "shards"))
    manifest, path = json.loads((folder / "manifest.json").read_text()), folder / "test.index.npy"
    index = np.load(path)
    index[3, column] = value
    np.save(path, index)
    manifest["splits"]["test"]["index"]["sha256"] = sha256_file(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RRCMError, match=r"test\.index\.npy: does not fit manifest\.json; run shard-data again"):
        ShardedDataset(folder, "test")
