"""`rrcm train` as its users run it: on a folder of drawn pictures, stopped and continued, and with bad input."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import files_of, stage
from pictures import SHAPES, write_pictures
from typer.testing import CliRunner, Result

from rrcm.certification.record import read_record
from rrcm.cli import app
from rrcm.config import Data, load_config
from rrcm.models.load import load_cascade
from rrcm.own_images import speed, train
from rrcm.own_images.rules import TRUNKS, Speed

pytestmark = pytest.mark.xdist_group("own images")
QUICK = {"finetune.epochs": 2, "finetune.warmup_epochs": 0.2, "certify.n": 100, "certify.max_images": 6}
QUICK |= {"cascade.choose_n": 10, "certify.n0": 10, "finetune.checkpoint_every": 1}


def rrcm_train(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def edit(path: Path, **settings: object) -> None:
    values = yaml.safe_load(path.read_text())
    for name, value in settings.items():
        *above, key = name.split(".")
        section = values
        for each in above:
            section = section[each]
        section[key] = value
    path.write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """24 pictures of two classes."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shapes", (12, 12), side=24)


@pytest.fixture(scope="module")
def timed() -> pytest.MonkeyPatch:
    """In place of timed steps, a speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "measure_speed", lambda config, folder: Speed(0.01, 0.001))
        yield patch


@pytest.fixture(scope="module")
def walked(pictures, timed, tmp_path_factory) -> tuple[Path, list[Result]]:
    """A folder with a model that was trained in three calls: settings written, edited and stopped, continued."""
    home = tmp_path_factory.mktemp("home")
    command = [pictures, "--output", "model", "--params", "settings.yaml"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        answers = [rrcm_train(*command)]
        edit(home / "settings.yaml", **QUICK)
        with pytest.MonkeyPatch.context() as stopped:

            def stop(*arguments: object, **options: object) -> None:
                raise KeyboardInterrupt

            stopped.setattr(train, "certify_cascade_split", stop)
            answers.append(rrcm_train(*command))
        with pytest.MonkeyPatch.context() as trained:
            trained.setattr(train, "finetune", None)  # the training is not repeated
            answers.append(rrcm_train(*command))
    return home, answers


def test_the_walk_ends_with_a_model(walked):
    _, (written, stopped, finished) = walked
    assert [answer.exit_code for answer in (written, stopped, finished)] == [0, 130, 0], finished.output
    assert "written: settings.yaml. The same command trains with these settings" in written.output
    assert "estimate" in written.output and "2 classes with 10 images each to learn from" in written.output
    assert "settings     of the run that was stopped, which continues" in finished.output
    assert "interrupted; the same command continues from here" in stopped.output
    assert "candidate    ViT for 16 x 16 pixels, patches of 4, width 96, depth 3: a few steps" in written.output
    assert "certified accuracy on 4 held-out images" in finished.output
    assert "naming the most frequent class, which is right for 50 %" in finished.output


def test_nothing_else_is_left_behind(walked):
    assert sorted(path.name for path in walked[0].iterdir()) == ["model", "settings.yaml"]


def test_the_model_is_a_cascade_like_any_other(walked):
    loaded = load_cascade([walked[0] / "model"])
    assert loaded.sigmas == [0.12, 0.25, 0.5] and loaded.scales[0].class_names == list(SHAPES[:2])


def test_the_pipeline_takes_the_settings(walked, pictures):
    """They are those that were edited, and nothing is missing or behind the others."""
    config = load_config(walked[0] / "model/params.yaml")
    assert (config.certify.n, config.finetune.epochs, config.data.root) == (100, 2, str(pictures))
    assert set(config.derived["finetune"]) == {"consistency_joint-joint"}


@pytest.mark.thorough
def test_the_pipeline_trains_and_certifies_the_same(walked, tmp_path):
    shutil.copy(walked[0] / "model/params.yaml", tmp_path / "params.yaml")
    for command in ("shard_data", "finetune consistency_joint joint", "certify_cascade consistency_joint"):
        answer = stage(tmp_path, *command.split())
        assert answer.returncode == 0, answer.stderr
    for ours, theirs in (("", "models/consistency_joint/joint"), ("certificates", "certificates/consistency_joint")):
        for name, content in files_of(tmp_path / theirs).items():
            if name != "cascade.json":  # names the environment
                assert (walked[0] / "model" / ours / name).read_bytes() == content, name


def test_the_certificates_name_their_files(walked, pictures):
    folder = walked[0] / "model/certificates"
    files = pd.read_csv(folder / "files.tsv", sep="\t")
    frame = pd.read_csv(folder / "cascade.tsv", sep="\t")
    assert [SHAPES.index(Path(file).parent.name) for file in files["file"]] == frame["label"].tolist()
    assert all((pictures / file).is_file() for file in files["file"])
    assert read_record(folder / "cascade.json").chosen.n == 10


def test_the_card_and_the_page_have_the_certificates(walked):
    card = (walked[0] / "model/README.md").read_text()
    page = (walked[0] / "model/index.html").read_text()
    frame = pd.read_csv(walked[0] / "model/certificates/cascade.tsv", sep="\t")
    assert f"| 0 | {100 * frame['correct'].mean():.1f} % |" in card and "4 of the 4 held-out images" in card
    assert "--model model --thresholds model/certificates/cascade.json" in card and "None" not in card
    for file in pd.read_csv(walked[0] / "model/certificates/files.tsv", sep="\t")["file"]:
        assert file in page


def test_the_page_counts_no_wrong_answer_as_certified(walked):
    """Sampling stops where the likeliest class is not the label, so nothing is certified there."""
    page = (walked[0] / "model/index.html").read_text()
    samples = pd.read_csv(walked[0] / "model/certificates/cascade.samples.tsv", sep="\t")
    frame = pd.read_csv(walked[0] / "model/certificates/cascade.tsv", sep="\t")
    certified = (frame["predict"] >= 0) & (samples["stop_reason"] != "wrong class")
    assert f"<strong>{certified.sum()}</strong> of 4 images have a certificate" in page


def test_the_command_of_the_card_runs(walked, pictures):
    card = (walked[0] / "model/README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("rrcm certify")]
    words = line.replace("PHOTOS", str(pictures)).split()[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(walked[0])
        folder = walked[0] / "again"
        folder.mkdir()
        beside = ["--limit", "2", "--output", "again/photos.tsv", "--gallery", "again/photos.png"]
        answer = CliRunner().invoke(app, [*words, *beside])
        shutil.rmtree(folder)
    assert answer.exit_code == 0 and "of 2 labelled ones correct" in answer.output, answer.output


def test_a_run_with_other_options_is_not_continued(pictures, timed, tmp_path):
    """The hidden folder is not touched, and neither is an output."""
    hidden = tmp_path / ".model.train"
    hidden.mkdir()
    (hidden / "asked.json").write_text('{"hours": 2.0}')
    answer = rrcm_train(pictures, "--output", tmp_path / "model")
    assert answer.exit_code == 1 and "holds an unfinished training with other options" in answer.output
    assert files_of(tmp_path) == {".model.train/asked.json": b'{"hours": 2.0}'}


def broken(folder: Path) -> None:
    (folder / "circle" / "0.jpg").write_bytes(b"no image")


def single(folder: Path) -> None:
    for number in range(1, 6):
        next((folder / "circle").glob(f"{number}.*")).unlink()


def with_params(text: str):
    return lambda folder: (folder.parent / "p.yaml").write_text(text)


BAD = {
    "no folder": (["none"], None, "no such folder; give one that has a folder of images for each class"),
    "no classes": (["shapes/circle"], None, "holds no class folders"),
    "one class": (
        ["shapes"],
        lambda folder: shutil.rmtree(folder / "cross"),
        "has one class, circle; give a",
    ),
    "one image": (["shapes"], single, "class circle has 1 image; add some, to have 5, or remove it"),
    "empty class": (["shapes"], lambda folder: (folder / "empty").mkdir(), "class folder without images"),
    "broken file": (["shapes"], broken, "1 of 12 images cannot be read, named above; replace or remove them"),
    "output exists": (["shapes", "--output", "shapes/.."], None, "exists; choose another name, or remove it"),
    "output inside": (["shapes", "--output", "shapes/model"], None, "is inside the folder of images"),
    "output below a file": (["shapes", "--output", "shapes/circle/0.jpg/model"], None, "is inside the folder"),
    "hours 0": (["shapes", "--hours", "0"], None, "--hours 0: must be a positive number"),
    "hours negative": (["shapes", "--hours", "-1"], None, "--hours -1: must be a positive number"),
    "hours nan": (["shapes", "--hours", "nan"], None, "--hours nan: must be a positive number"),
    "hours infinite": (["shapes", "--hours", "inf"], None, "--hours inf: must be a positive number"),
    "hours too few": (["shapes", "--hours", "0.0001"], None, "of the smallest network, which needs"),
    "weights alone": (["shapes", "--weights", "shapes/circle/0.jpg"], None, "name it with --start"),
    "weights missing": (
        ["shapes", "--start", "vit_tiny_patch16_224", "--weights", "w"],
        None,
        "--weights w: no such file",
    ),
    "start unknown": (
        ["shapes", "--start", "vit_tiny_patch16_225"],
        None,
        "timm has no model of that name; did",
    ),
    "params no mapping": (["shapes", "--params", "p.yaml"], with_params("7"), "p.yaml: must be a mapping of settings"),
    "params unknown": (["shapes", "--params", "p.yaml"], with_params("sigmas: [1.0]"), "p.yaml: "),
    "params nowhere": (["shapes", "--params", "shapes/circle/0.jpg/p.yaml"], None, "no file can be written there"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_before_any_work(case, timed, tmp_path, monkeypatch):
    arguments, change, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    folder = write_pictures(tmp_path / "shapes", (6, 6), side=8)
    if change is not None:
        change(folder)
    before = files_of(tmp_path)
    output = [] if "--output" in arguments else ["--output", "model"]
    answer = rrcm_train(*arguments, *output)
    lines = answer.output.strip().splitlines()
    assert answer.exit_code == 1 and said in lines[-1] and lines[-1].startswith("error: "), answer.output
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"methods": ["rrcm_joint"], "cascade.methods": ["rrcm_joint"]},
            "needs no other training, such as",
        ),
        ({"methods": ["gaussian"], "cascade.methods": []}, "must be one joint method that needs no other training"),
        (
            {"methods": ["consistency_ensemble_joint"], "cascade.methods": ["consistency_ensemble_joint"]},
            "must be one joint method that needs no other training",
        ),
        ({"data.source": "digits"}, "data.source = digits: must be imagefolder"),
        ({"finetune.epochs": 0}, "finetune.epochs = 0: should be greater than or equal to 1"),
        ({"data.image_size": 17}, "data.image_size 17 must be a multiple of model.patch_size 4"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(changes, said, walked, pictures, timed, tmp_path):
    path = Path(shutil.copy(walked[0] / "model/params.yaml", tmp_path / "p.yaml"))
    if changes.get("methods") == ["rrcm_joint"]:
        changes = changes | {"pretrain.objectives": ["rrcm"]}
    edit(path, **changes)
    answer = rrcm_train(pictures, "--output", tmp_path / "model", "--params", path)
    assert answer.exit_code == 1 and said in answer.output and os.listdir(tmp_path) == ["p.yaml"]  # noqa: PTH208


def test_steps_and_votes_are_timed(walked, pictures, monkeypatch):
    monkeypatch.setattr(speed, "TIMED", 0.0)
    config, folder = load_config(walked[0] / "model/params.yaml"), train.look_at_folder(pictures, load_data(pictures))
    measured = speed.measure_speed(config, folder)
    assert 0 < measured.vote < measured.image  # a step has six passes of each image
    assert speed.reading_seconds(pictures, folder) == 0
    monkeypatch.setattr(speed, "DECODED_BYTES", 1000)
    assert speed.reading_seconds(pictures, folder) > 0


@pytest.mark.parametrize(("first", "runs", "seconds"), [(8, 1, 8), (2, 1 + 3, 2), (5, 1 + 2, 3)])
def test_work_that_takes_long_is_timed_once(first, runs, seconds, monkeypatch):
    """The clock is invented. Runs after the first take 2 seconds, or 2 and then 4."""
    clock, done, later = [0.0], [], [2, 2, 2] if first == 2 else [2, 4]

    def work() -> None:
        clock[0] += later[len(done) - 1] if done else first
        done.append(clock[0])

    monkeypatch.setattr(speed, "TIMED", 6)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    assert speed.seconds_of(work) == seconds
    assert len(done) == runs


def load_data(root: Path) -> Data:
    return train.parse_config(train.complete(train.with_root(root))).data


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    """A small ViT of timm for 32 pixels and one that is not plain, as folders, and the file of a CNN's weights."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm")
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 3}
    timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", **small), folder / "vit", model_args=small)
    other = {"img_size": 32, "patch_size": 8, "num_classes": 3}
    timm.models.save_for_hf(timm.create_model("test_vit2", **other), folder / "vit2", model_args=other)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "w")
    return folder


@pytest.mark.thorough
def test_training_starts_from_a_vit_of_timm(snapshot, pictures, timed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [pictures, "--output", "model", "--params", "p.yaml", "--start", snapshot / "vit"]
    written = rrcm_train(*command)
    said = f"ViT for 24 x 24 pixels, patches of 8, width 32, depth 1, from {snapshot / 'vit'}"
    assert said in written.output, written.output  # 24 is 3/4 of 32, and the images have no more
    edit(tmp_path / "p.yaml", **QUICK)
    answer = rrcm_train(*command)
    assert answer.exit_code == 0, answer.output
    assert f"timm\\_joint, from {snapshot}" in (tmp_path / "model/README.md").read_text().replace("\\_/", "_/")


@pytest.mark.thorough
def test_a_note_says_that_the_images_are_reduced_for_lack_of_time(timed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    large = write_pictures(tmp_path / "large", (12, 12), side=64)
    answer = rrcm_train(large, "--output", "model", "--params", "p.yaml", "--hours", "0.08")
    assert answer.exit_code == 0 and "no time for images of more than 16 x 16 pixels" in answer.output, answer.output


def test_training_starts_from_a_cnn(snapshot, timed, tmp_path, monkeypatch):
    """Its size and its normalization follow from the model, and it is loaded like any other."""
    monkeypatch.chdir(tmp_path)
    large = write_pictures(tmp_path / "large", (12, 12), side=40)
    command = [large, "--output", "model", "--params", "p.yaml", "--start", "test_resnet", "--weights", snapshot / "w"]
    written = rrcm_train(*command)
    assert "test_resnet for 32 x 32 pixels, from test_resnet" in written.output, written.output
    assert "there is no time for images" not in written.output
    edit(tmp_path / "p.yaml", **QUICK)
    answer = rrcm_train(*command)
    assert answer.exit_code == 0, answer.output
    config = load_config(tmp_path / "model/params.yaml")
    assert (config.model.architecture, config.model.pixel_std) == ("test_resnet", [0.5] * 3)
    assert "timm\\_joint, from test\\_resnet" in (tmp_path / "model/README.md").read_text()
    assert load_cascade([tmp_path / "model"]).sigmas == list(config.sigmas)


@pytest.mark.parametrize(
    ("model", "channels", "sides"),
    [("test_resnet", 3, [160, 128, 64, 32]), ("test_resnet", 1, [160, 128, 64, 32]), ("vit2", 3, [32])],
)
def test_the_networks_from_weights(snapshot, model, channels, sides):
    """A network with a position embedding has one size, and grey images make a grey network."""
    given = (model, str(snapshot / "w")) if model == "test_resnet" else (str(snapshot / model), None)
    trunks = speed.timm_trunks(*given, channels)
    assert [trunk.image_size for trunk in trunks] == sides
    assert all((trunk.channels, len(trunk.pixel_mean)) == (channels, channels) for trunk in trunks)


def test_images_too_small_for_the_weights_start_from_scratch(snapshot, pictures, timed, tmp_path):
    """They have 24 pixels, and the weights were made for 160. The settings name no weights."""
    answer = rrcm_train(
        pictures,
        *("--output", tmp_path / "model", "--params", tmp_path / "p.yaml"),
        *("--start", "test_resnet", "--weights", snapshot / "w"),
    )
    assert answer.exit_code == 0 and "was made for 160 x 160 pixels, and the images have 24" in answer.output
    config = load_config(tmp_path / "p.yaml")
    assert (config.methods, config.finetune.timm.model) == (["consistency_joint"], None)


def test_the_smallest_network_comes_last():
    tokens = [(trunk.image_size // trunk.patch_size) ** 2 * trunk.embed_dim**2 * trunk.depth for trunk in TRUNKS]
    assert tokens == sorted(tokens, reverse=True)
