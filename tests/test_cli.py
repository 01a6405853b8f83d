"""`rrcm certify` as its users run it: every kind of model, odd images, and bad input, which ends in one line."""

import contextlib
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import REPOSITORY
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from rrcm.certification.certify_images import find_images, find_labels, read_square
from rrcm.certification.recompute import recompute_radii
from rrcm.certification.record import read_record
from rrcm.certification.results import read_certificates
from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.cli import app
from rrcm.data.images import Listing
from rrcm.models.authors import load_authors_checkpoint
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model
from rrcm.models.joint import JointSigmas
from rrcm.models.load import LoadedClassifier, class_folders, load_base_classifier
from rrcm.models.vit import NoiseConditionedViT
from rrcm.report.certified_images import kind_of_answer
from rrcm.report.gallery import Thumbnail, draw_certified_images, rounded_down
from rrcm.report.thumbnails import Answer, make_answer

SMALL = ["--n", "300", "--n0", "20", "--batch-size", "64"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved() -> nn.Module:
    """A classifier in the model folder `model`: 3 classes, grey images of 8 pixels. Its head answers by brightness."""
    torch.manual_seed(0)
    encoder = NoiseConditionedViT(8, 1, 4, embed_dim=32, depth=1, num_heads=2)
    model = NoiseConditionedClassifier(encoder, 3, t=0.5).eval()
    nn.init.normal_(model.head.weight)
    save_model("model", model)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    """Four grey images in class folders of the folder `images`, in the order of their names: (4, 1, 8, 8) in [0, 1]."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    for name, image in zip(["0/a.png", "1/a.png", "1/b.png", "other/a.png"], pixels, strict=True):
        path = Path("images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return torch.from_numpy(pixels)[:, None].float() / 255


def rrcm(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["certify", *map(str, arguments)])


def certified(*arguments: object) -> pd.DataFrame:
    """What is in the file that a run writes."""
    answer = rrcm(*arguments, *SMALL)
    assert answer.exit_code == 0, answer.output
    return pd.read_csv("certificates.tsv", sep="\t")


def refused(answer: Result, *said: str) -> None:
    assert answer.exit_code == 1 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1, answer.stderr
    for text in said:
        assert text in answer.stderr


@pytest.mark.slow
def test_the_page_has_every_image_with_its_certificate(saved, images):
    Path("images/other/a.png").rename("images/other/<b>\u202e&.png")
    certified("images", "--model", "model", "--page", "page.html")
    page, files = Path("page.html").read_bytes(), pd.read_csv("certificates.files.tsv", sep="\t")
    frame = pd.read_csv("certificates.tsv", sep="\t")
    text = page.decode()
    assert text.count("data:image/png;base64,") == 4 == text.count('<tr><th scope="row">')
    for file, radius in zip(files["file"], frame["radius"], strict=True):
        row = text.split(f'<tr><th scope="row">{escape(file)}<td>')[1].split("<tr>")[0]
        assert f'<td class="n">{rounded_down(radius)}<td' in row or "abstains" in row
    assert "other/&lt;b&gt;\\u202e&amp;.png" in text and f"{frame['correct'].sum()}</strong> of the 3 images" in text
    assert read_record(Path("certificates.json")).models[0].sha256 in text
    certified("images", "--model", "model", "--page", "page.html")
    assert Path("page.html").read_bytes() == page


@pytest.mark.parametrize("stopping", ["fixed", "sequential"])
def test_the_command_writes_and_prints_the_certificates_of_the_engine(saved, images, stopping):
    answer = rrcm("images", "--model", "model", "--stopping", stopping, *SMALL)
    assert answer.exit_code == 0, answer.output
    smoothed = SmoothedClassifier(saved, 0.25, 3, batch_size=64)
    expected = smoothed.certify(images, stopping=stopping, n0=20, n=300, radius_step=0.05)
    frame = pd.read_csv("certificates.tsv", sep="\t")
    assert list(frame) == ["idx", "label", "predict", "radius", "correct", "time"]
    assert frame["label"].tolist() == [0, 1, 1, -1] and frame["idx"].tolist() == [0, 1, 2, 3]
    assert frame["predict"].tolist() == [c.prediction for c in expected]
    assert frame["radius"].tolist() == [c.radius for c in expected]
    assert frame["correct"].tolist() == [int(c.prediction == y) for c, y in zip(expected, [0, 1, 1, None], strict=True)]
    assert (frame["time"] == 0).all()

    files = pd.read_csv("certificates.files.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert files["file"].tolist() == ["0/a.png", "1/a.png", "1/b.png", "other/a.png"]
    assert files["class"].tolist() == ["" if c.prediction < 0 else str(c.prediction) for c in expected]
    assert files["samples"].tolist() == [str(c.samples) for c in expected]
    assert files["stop_reason"].tolist() == [c.stop_reason for c in expected]

    rows = [line.split() for line in answer.stdout.splitlines()[2:6]]
    assert [row[0] for row in rows] == files["file"].tolist()
    shown = ["abstains" if c.prediction < 0 else rounded_down(c.radius) for c in expected]
    assert [row[2] for row in rows] == shown
    abstained = shown.count("abstains")
    assert f"{4 - abstained} certified" in answer.stdout and f"{abstained} abstained" in answer.stdout
    assert "wrong with probability at most 0.001" in answer.stdout
    assert Image.open("gallery.png").format == "PNG"
    assert "4/4 images" in answer.stderr


@pytest.mark.slow
def test_a_joint_model_certifies_at_any_sigma_of_its_range(saved, images):
    save_model("joint", saved, sigma=JointSigmas((0.25, 0.5, 1.0)))
    frame = certified("images", "--model", "joint", "--sigma", "0.37")
    expected = SmoothedClassifier(saved.at(0.37), 0.37, 3, batch_size=64).certify(
        images, n0=20, n=300, radius_step=0.37 / 5
    )
    assert frame["radius"].tolist() == [each.radius for each in expected]
    assert read_record(Path("certificates.json")).radius_step == 0.37 / 5  # by default
    answer = CliRunner().invoke(app, ["audit", "certificates.tsv", "--model", "joint", "--images", "images"])
    assert answer.exit_code == 0 and answer.stdout.startswith("verified: "), answer.output
    refused(rrcm("images", "--model", "joint"), "joint: was trained for sigma 0.25 to 1; give sigma, in pixel units")
    outside = ["images", "--model", "joint", "--sigma", "1.5"]
    refused(rrcm(*outside), "which 1.5 is outside of; choose another sigma, or allow it with outside_range")
    assert len(certified(*outside, "--outside-range")) == 4


def test_the_files_of_a_folder_can_be_audited(saved, images):
    """The radii follow from the votes, and the model votes the same on the same pictures, but not on others."""
    Path("images/other/a.png").rename("images/other/an odd_name é.png")
    frame = certified("images", "--model", "model", "--bound", "margin")
    radii = recompute_radii("certificates.tsv")
    assert radii["radius"].tolist() == frame["radius"].tolist()
    record = read_record(Path("certificates.json"))
    assert (record.bound, record.model.kind, record.data.split, record.sigma) == ("margin", "classifier", None, 0.25)
    assert set(record.files) == {f"certificates{name}.tsv" for name in ("", ".samples", ".files")}
    arguments = ["audit", "certificates.tsv", "--model", "model", "--images", "images"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith(
        "verified: certificates.tsv, 4 of 4 radii follow from their votes, 4 voted again as"
    )
    shutil.copy("images/0/a.png", "images/1/a.png")
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 1 and answer.stdout.startswith("NOT verified: certificates.tsv: 1 problem")
    assert "images: its images are not those that were certified" in answer.stderr


def test_the_file_reads_back_where_labels_are_known(saved, images):
    shutil.rmtree("images/other")
    frame = certified("images", "--model", "model")
    pd.testing.assert_frame_equal(
        read_certificates("certificates.tsv"), frame.astype({"time": float}), check_exact=True
    )


def test_an_abstention_of_unknown_label_is_not_correct(saved, images):
    """Both are written as -1. 300 votes of 300 say nothing at this alpha."""
    frame = certified("images", "--model", "model", "--alpha", "1e-90", "--stopping", "fixed")
    assert (frame["predict"] == -1).all() and (frame["correct"] == 0).all() and (frame["label"] == -1).sum() == 1


def test_seed_limit_and_another_sigma(saved, images):
    whole = certified("images", "--model", "model", "--stopping", "fixed")
    some = certified("images", "--model", "model", "--stopping", "fixed", "--limit", "2")
    columns = ["idx", "label", "predict", "radius", "correct"]
    pd.testing.assert_frame_equal(some[columns], whole[columns].iloc[[0, 3]].reset_index(drop=True))
    other = certified("images", "--model", "model", "--stopping", "fixed", "--seed", "1")
    assert other["radius"].tolist() != whole["radius"].tolist()
    answer = rrcm("images", "--model", "model", "--sigma", "0.3", *SMALL)
    assert answer.exit_code == 0 and answer.stderr.startswith("note: model was trained for sigma 0.25")


def test_images_are_found_as_people_sort_them():
    for name in [
        "img10.png",
        "img2.PNG",
        "b/1.jpg",
        "a 1/c.gif",
        "x.txt",
        "x.h5",
        ".hidden/a.png",
        ".a.png",
        "gallery.png",
    ]:
        path = Path("images", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("images/folder.png").mkdir()
    found = find_images(Path("images"), [Path("images/gallery.png")])
    assert list(map(str, found.files)) == ["a 1/c.gif", "b/1.jpg", "img2.PNG", "img10.png"]


def subject(
    size: int, channels: int, names: list[str] | None = None, synsets: list[str] | None = None
) -> LoadedClassifier:
    return LoadedClassifier(nn.Identity(), size, channels, names or ["a", "b"], synsets or [])


def test_class_folders():
    named = subject(8, 1, ["crane", "cat", "crane", "dog"], ["n01", "n02", "n03", "n04"])
    synsets = {"n01": 0, "n02": 1, "n03": 2, "n04": 3}
    assert class_folders(named) == {"0": 0, "1": 1, "2": 2, "3": 3, "cat": 1, "dog": 3} | synsets
    months = subject(8, 1, [str(month) for month in range(1, 13)])
    assert class_folders(months) == {str(month): month - 1 for month in range(1, 13)}


def odd_images() -> dict[str, tuple[Image.Image, int, tuple[int, int, int]]]:
    """Images, the grey value and the colour that they should be read as."""
    clear = Image.new("P", (4, 4), 1)
    clear.putpalette([255, 0, 0, 0, 0, 255])
    clear.info["transparency"] = 1
    blue = clear.copy()
    del blue.info["transparency"]
    return {
        "sixteen.png": (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), 100, (100, 100, 100)),
        "sixteen.tif": (Image.fromarray(np.full((4, 4), 257 * 100, np.int32)), 100, (100, 100, 100)),
        "clear.png": (clear, 255, (255, 255, 255)),
        "blue.gif": (blue, 29, (0, 0, 255)),
        "half.png": (Image.new("LA", (4, 4), (0, 51)), 204, (204, 204, 204)),
        "rgba.png": (Image.new("RGBA", (4, 4), (0, 0, 255, 255)), 29, (0, 0, 255)),
        "bit.png": (Image.new("1", (4, 4), 1), 255, (255, 255, 255)),
        "cmyk.tif": (Image.new("CMYK", (4, 4), (255, 255, 0, 0)), 29, (0, 0, 255)),
    }


@pytest.mark.parametrize("name", odd_images())
def test_odd_images(name):
    image, grey, colour = odd_images()[name]
    image.save(name)
    assert read_square(Path(name), subject(4, 1)).tolist() == [[[grey] * 4] * 4]
    assert read_square(Path(name), subject(4, 3))[:, 0, 0].tolist() == list(colour)


def test_a_wide_image_is_cut_as_in_the_pipeline():
    """The middle of 4 x 12, enlarged twice: of three squares the grey one."""
    wide = np.concatenate([np.zeros((4, 4)), np.full((4, 4), 90), np.full((4, 4), 255)], axis=1).astype(np.uint8)
    Image.fromarray(wide).save("wide.png")
    pixels = read_square(Path("wide.png"), subject(8, 1))
    assert pixels.shape == (1, 8, 8) and (pixels[:, :, 2:6] == 90).mean() > 0.4 and abs(pixels[0, 4, 4] - 90.0) < 3


def authors_checkpoint(path: str, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """A fine-tuned checkpoint with the names that the authors give."""
    torch.manual_seed(1)
    trunk = NoiseConditionedViT(8, 1, 4, embed_dim=64, depth=1, num_heads=1).state_dict()
    head = {"linear_head.weight": torch.randn(3, 64), "linear_head.bias": torch.randn(3)}
    torch.save({f"module.base_model.{name}": t for name, t in trunk.items()} | head | extra, path)
    return trunk


@pytest.mark.parametrize("flag", ["--final-norm", "--no-final-norm"])
def test_a_checkpoint_of_the_authors(images, flag):
    authors_checkpoint("theirs.pth")
    frame = certified("images", "--model", "theirs.pth", "--sigma", "0.5", "--stopping", "fixed", flag)
    model = load_authors_checkpoint("theirs.pth", sigma=0.5, final_norm=flag == "--final-norm")
    expected = SmoothedClassifier(model, 0.5, 3, batch_size=64).certify(images, stopping="fixed", n0=20, n=300)
    assert frame["radius"].tolist() == [c.radius for c in expected]
    refused(rrcm("images", "--model", "theirs.pth"), "theirs.pth", "give sigma")


def test_a_pretrained_checkpoint_of_the_authors_has_no_classes(images):
    trunk = NoiseConditionedViT(8, 1, 4, embed_dim=64, depth=1, num_heads=1).state_dict()
    trunk |= {f"projection_head.{i}.weight": torch.zeros(8, n) for i, n in ((0, 64), (3, 8), (6, 8))}
    for i in (1, 4):
        trunk |= {f"projection_head.{i}.{name}": torch.zeros(8) for name in ("weight", "bias", "running_mean")}
        trunk |= {f"projection_head.{i}.running_var": torch.ones(8)}
        trunk |= {f"projection_head.{i}.num_batches_tracked": torch.tensor(0)}
    torch.save(trunk, "theirs.pth")
    refused(rrcm("images", "--model", "theirs.pth", "--sigma", "0.5"), "pre-trained network has no classes")


@pytest.mark.slow
def test_a_timm_model_with_weights_of_a_file(images):
    """Five classes are read off the weights; pixels are normalised as its configuration has it."""
    torch.manual_seed(2)
    network = timm.create_model("test_vit", num_classes=5).eval()
    nn.init.normal_(network.head.weight)
    save_file(network.state_dict(), "weights.safetensors")
    few = ["--n", "100", "--n0", "10", "--batch-size", "55", "--limit", "2"]
    answer = rrcm(
        "images",
        "--model",
        "test_vit",
        "--weights",
        "weights.safetensors",
        "--sigma",
        "1",
        *few,
        "--stopping",
        "fixed",
    )
    assert answer.exit_code == 0, answer.output
    unseen = "note: test_vit has never seen noise, unless somebody else fine-tuned it under noise; if so, its certified"
    assert f"{unseen} accuracy at sigma 1 will be near 0\n" in answer.stderr

    class Pixels(nn.Module):
        def forward(self, pixels):
            return network((pixels - 0.5) / 0.5)

    pixels = [read_square(Path("images", name), subject(160, 3)) for name in ("0/a.png", "other/a.png")]
    inputs = torch.from_numpy(np.stack(pixels)).float() / 255
    smoothed = SmoothedClassifier(Pixels(), 1.0, 5, batch_size=55)
    expected = smoothed.certify(inputs, stopping="fixed", n0=10, n=100, indices=[0, 3])
    frame = pd.read_csv("certificates.tsv", sep="\t")
    assert frame["predict"].tolist() == [c.prediction for c in expected]
    assert frame["radius"].tolist() == [c.radius for c in expected]

    refused(
        rrcm("images", "--model", "test_resnet", "--weights", "weights.safetensors", "--sigma", "1"),
        "weights.safetensors: not the weights of timm's test_resnet",
    )
    refused(rrcm("images", "--model", "test_vit", "--weights", "weights.safetensors"), "give --sigma")


def test_imagenets_classes_have_names():
    save_file(timm.create_model("test_vit").state_dict(), "weights.safetensors")
    known = load_base_classifier("test_vit", weights=Path("weights.safetensors"))
    assert (known.class_names[0], known.synsets[0], len(known.class_names)) == ("tench", "n01440764", 1000)
    assert class_folders(known)["n01440764"] == class_folders(known)["tench"] == 0


@pytest.mark.parametrize("model", ["test_vit", "test_mambaout"])  # the second one was never uploaded
def test_weights_that_cannot_be_downloaded(images, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(Path("empty").absolute()))
    refused(rrcm("images", "--model", model, "--sigma", "1"), f"{model}: cannot download pretrained weights")


def test_class_names_of_the_model_folder(saved, images):
    """They name the predicted class in the output, and folders of images by class."""
    save_model("model", saved, class_names=["cat", "dog", "fox"])
    Path("images/other").rename("images/fox")
    frame = certified("images", "--model", "model", "--stopping", "fixed")
    assert frame["label"].tolist() == [0, 1, 1, 2]
    files = pd.read_csv("certificates.files.tsv", sep="\t", keep_default_na=False)
    names = {-1: "", 0: "cat", 1: "dog", 2: "fox"}
    assert files["class"].tolist() == [names[k] for k in frame["predict"]] and set(files["class"]) - {""}


def test_class_names_of_a_file(saved, images):
    Path("names.txt").write_text("cat\ndog\nfox\n")
    assert load_base_classifier("model", classes=Path("names.txt")).class_names == ["cat", "dog", "fox"]
    Path("images/other").rename("images/fox")
    assert certified("images", "--model", "model", "--classes", "names.txt")["label"].tolist() == [0, 1, 1, 2]
    Path("names.txt").write_text("cat\n")
    refused(rrcm("images", "--model", "model", "--classes", "names.txt"), "names.txt", "1 class names", "3 classes")
    refused(rrcm("images", "--model", "model", "--classes", "none.txt"), "none.txt", "cannot be read")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["images", "--model", "vit_tiny_patch16_225", "--sigma", "1"], "did you mean vit_tiny_patch16_224"),
        (["images", "--model", "test_vit.none", "--sigma", "1"], "Invalid pretrained tag"),
        (["images", "--model", "model", "--sigma", "0"], "sigma = 0.0: must be above 0"),
        (["images", "--model", "model", "--sigma", "nan"], "sigma = nan"),
        (["images", "--model", "model", "--n", "0"], "n = 0"),
        (["images", "--model", "model", "--alpha", "1"], "alpha = 1.0"),
        (["images", "--model", "model", "--radius-step", "0"], "radius_step = 0.0"),
        (["images", "--model", "model", "--stopping", "adaptive"], "must be fixed or sequential"),
        (["images", "--model", "model", "--precision", "fp8"], "must be auto, fp32 or bf16"),
        (["images", "--model", "model", "--batch-size", "0"], "batch_size = 0"),
        (["images", "--model", "model", "--batch-size", "1000000000"], "batch_size = 1000000000: needs more than"),
        (["images", "--model", "model", "--batch-size", "9" * 30], "needs more than"),
        (["images", "--model", "model", "--limit", "0"], "limit = 0"),
        (["images", "--model", "model", "--device", "gpu"], "device = 'gpu'"),
        (["images", "--model", "model", "--device", "cuda:99"], "cuda:99"),
        (["images", "--model", "images"], "images: is no folder of a model, as it has no config.json"),
        (["images", "--model", "models/rrcm_joint/joint"], "`dvc pull models/rrcm_joint/joint` fetches the published"),
        (["images", "--model", "models/rrcm/joint", "--cascade"], "`dvc pull models/rrcm/joint` fetches the published"),
        (["images", "--model", "junk.pth", "--sigma", "1"], "junk.pth"),
        (["images", "--model", "model", "--weights", "junk.pth"], "weights are for a timm model"),
        (["images", "--model", "model", "--no-final-norm"], "only an authors' checkpoint file"),
        (["nowhere", "--model", "model"], "nowhere: no such folder"),
        (["empty", "--model", "model"], "empty: no images in it or below, only .txt files (1)"),
        (["images", "--model", "model", "--gallery", "gallery.jpg"], "must end in .png, .svg or .pdf"),
        (["images", "--model", "model", "--page", "page.txt"], "page.txt: must end in .html"),
        (["images", "--model", "model", "--output", "a.html", "--page", "a.html"], "a.html: is the path of both"),
        (["images", "--model", "model", "--output", "images"], "images: no file can be written there"),
        (["images", "--model", "model", "--output", "junk.pth/a.tsv"], "junk.pth/a.tsv: no file can be written"),
        (["images", "--model", "model", "--output", "gallery.png"], "gallery.png: is the path of both"),
        (["images", "--model", "model", "--output", "/dev/null"], "/dev/null: no file can be written there"),
        (["images", "--model", "model", "--output", "pipe"], "pipe: no file can be written there"),
        (["images", "--model", "model", "--gallery", "pipe.png"], "pipe.png: no file can be written there"),
        (["images", "--model", "model", "--output", "images/0/a.png"], "images/0/a.png: is one of the images"),
        (["images", "--model", "m" * 100_000, "--sigma", "1"], " characters) ... "),
    ],
)
def test_bad_input_ends_in_one_line_and_nothing_is_written(saved, images, arguments, said):
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("no image")
    Path("junk.pth").write_bytes(b"not a checkpoint")
    for pipe in ("pipe", "pipe.png"):
        os.mkfifo(pipe)
    for name in ("certificates.tsv", "certificates.samples.tsv", "certificates.json", "gallery.png"):
        Path(name).write_text("of an earlier run")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    refused(rrcm(*arguments), said)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def release_lock(answer: Result) -> None:
    """The end of a process releases its lock; here the traceback of the interruption still holds it."""
    answer.exc_info = answer.exception = None
    gc.collect()


def test_an_interrupted_run_continues(saved, images, monkeypatch):
    outputs = [f"certificates{name}" for name in (".tsv", ".samples.tsv", ".files.tsv", ".json")] + ["gallery.png"]
    assert rrcm("images", "--model", "model", *SMALL).exit_code == 0
    whole = [Path(name).read_bytes() for name in outputs]
    for name in outputs:
        Path(name).unlink()
    run, drawn = SmoothedClassifier.certify_stream, []

    def interrupted(self, states, rule, **_):
        for changed in run(self, states, rule, at_once=1):
            drawn.append(sum(state.samples for state in changed))
            yield changed
            if changed[0].index == 1 and changed[0].stop_reason:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SmoothedClassifier, "certify_stream", interrupted)
        answer = rrcm("images", "--model", "model", *SMALL)
    assert answer.exit_code == 130 and not any(Path(name).exists() for name in outputs)
    assert answer.stderr == "interrupted: 2 of 4 images are finished; the same command continues from there\n"
    release_lock(answer)

    counted = []
    count_votes = SmoothedClassifier.count_votes
    monkeypatch.setattr(
        SmoothedClassifier, "count_votes", lambda *args: counted.extend(r.index for r in args[1]) or count_votes(*args)
    )
    answer = rrcm("images", "--model", "model", *SMALL)
    assert answer.exit_code == 0 and "resuming: 2 of 4 images are finished\n" in answer.stderr
    assert set(counted) == {2, 3}
    assert [Path(name).read_bytes() for name in outputs] == whole
    assert not list(Path().glob(".certificates*"))  # the journal


def stopped_before_writing(monkeypatch, *arguments: str) -> None:
    """A run that has counted everything and written nothing."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rrcm.certification.certify_images._frame", stop)
        answer = rrcm(*arguments)
    assert answer.exit_code == 130
    release_lock(answer)


@pytest.mark.parametrize("change", ["weights", "t", "heads", "settings", "journal"])
def test_a_journal_of_another_run_is_not_used(saved, images, monkeypatch, change):
    """Nor is the journal of another model with the same weights."""
    arguments = "images", "--model", "model", *SMALL, "--sigma", "0.25"
    stopped_before_writing(monkeypatch, *arguments)
    options = []
    match change:
        case "t":
            saved.t = 4.0
            save_model("model", saved)
        case "heads":
            saved.encoder.blocks[0].attn.num_heads = 4
            save_model("model", saved)
        case "weights":
            nn.init.normal_(saved.head.weight)
            save_model("model", saved)
        case "settings":
            options = ["--alpha", "0.01"]
        case "journal":
            [journal] = Path().glob(".certificates*/journal-0.txt")
            journal.write_bytes(journal.read_bytes().replace(b'"', b"'"))
    answer = rrcm(*arguments, *options)
    assert answer.exit_code == 0 and "resuming" not in answer.stderr
    check_that_it_is_as_afresh(*arguments, *options)


def check_that_it_is_as_afresh(*arguments: str) -> None:
    found = Path("certificates.tsv").read_bytes()
    assert rrcm(*arguments, "--output", "afresh.tsv").exit_code == 0
    assert Path("afresh.tsv").read_bytes() == found


@pytest.mark.parametrize(
    ("change", "same", "of"),
    [("pixels", 3, 4), ("more images", 4, 5), ("other places", 2, 5), ("fewer images", 3, 3), ("--limit=2", 2, 2)],
)
def test_an_unchanged_image_is_not_certified_again(saved, images, monkeypatch, change, same, of):
    """That is one with the same pixels and the same place in the list, which chooses its noise."""
    arguments = "images", "--model", "model", *SMALL
    stopped_before_writing(monkeypatch, *arguments)
    match change:
        case "pixels":
            Image.new("L", (8, 8)).save("images/0/a.png")
        case "more images":
            Image.new("L", (8, 8)).save("images/other/b.png")
        case "other places":
            Image.new("L", (8, 8)).save("images/1/aa.png")
        case "fewer images":
            Path("images/other/a.png").unlink()
        case limit:
            arguments += (limit,)
    answer = rrcm(*arguments)
    assert answer.exit_code == 0 and f"resuming: {same} of {of} images are finished\n" in answer.stderr
    check_that_it_is_as_afresh(*arguments)


def in_a_process(*arguments: str) -> subprocess.Popen:
    code = "import sys; from rrcm.cli import main; sys.argv[0] = 'rrcm'; main()"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "certify", "images", "--model", "model", "--batch-size", "64", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.thorough
def test_two_runs_do_not_write_one_output(saved, images):
    """The second is refused, whatever its settings, in any of the files; a killed run does not stand in the way."""
    first = in_a_process("--n", "2000000000", "--stopping", "fixed")
    while not any(path.stat().st_size > 500 for path in Path().glob(".certificates.tsv-*/journal-0.txt")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=0.01)
        assert first.returncode is None, first.stderr.read()
    os.kill(first.pid, signal.SIGSTOP)
    for options, named in (
        (["--seed", "1"], "certificates."),
        (["--output", "certificates.files.tsv", "--gallery", "other.png"], "certificates.files.tsv"),
        (["--output", "other.tsv"], "gallery.png"),
    ):
        answer = rrcm("images", "--model", "model", *SMALL, *options)
        assert answer.exit_code == 1 and not answer.stdout
        assert named in answer.stderr and "another process is writing it" in answer.stderr
    assert not list(Path().glob("*.tsv")) and not list(Path().glob("*.png"))
    first.kill()
    first.communicate()
    second = in_a_process("--n", "300", "--seed", "1")
    assert second.communicate() and second.returncode == 0
    tables = [pd.read_csv(f"certificates{suffix}", sep="\t") for suffix in (".tsv", ".files.tsv")]
    assert [len(table) for table in tables] == [4, 4] and Path("gallery.png").exists()
    assert not list(Path().glob(".*.tmp"))


def test_an_error_in_the_last_file_leaves_the_others(saved, images, monkeypatch):
    outputs = [f"certificates{name}" for name in (".tsv", ".samples.tsv", ".files.tsv", ".json")] + ["gallery.png"]
    arguments = "images", "--model", "model", *SMALL
    assert rrcm(*arguments).exit_code == 0
    before = [Path(name).read_bytes() for name in outputs]
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith(".gallery"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        answer = rrcm(*arguments, "--seed", "1")
    assert answer.exit_code == 1 and answer.stderr.endswith("free some space; nothing was overwritten\n")
    assert [Path(name).read_bytes() for name in outputs] == before


def test_unreadable_images_are_all_named_and_skipped_on_request(saved, images):
    whole = certified("images", "--model", "model")
    Path("certificates.tsv").unlink()
    Path("images/0/a.png").write_bytes(Path("images/0/a.png").read_bytes()[:40])
    Image.fromarray(np.zeros((4, 4), np.float32)).save("images/1/a.tif")
    answer = rrcm("images", "--model", "model", *SMALL)
    assert answer.exit_code == 1 and not Path("certificates.tsv").exists()
    first, second, last = answer.stderr.splitlines()
    assert first.startswith("images/0/a.png: cannot be decoded (")
    assert second.startswith("images/1/a.tif: cannot be decoded (pixels of mode F")
    assert last.startswith("error: 2 of 5 images cannot be read, named above;") and "--skip-unreadable" in last

    Path("images/1/a.tif").unlink()
    some = certified("images", "--model", "model", "--skip-unreadable")
    pd.testing.assert_frame_equal(some, whole[1:].reset_index(drop=True))  # with the noise of their places in the list
    for path in Path("images").rglob("*.png"):
        path.write_bytes(b"")
    answer = rrcm("images", "--model", "model", *SMALL, "--skip-unreadable")
    assert answer.exit_code == 1 and answer.stderr.splitlines()[-1].endswith("named above; replace or remove them")


def test_notes_name_files_left_out_and_folders_without_class(saved, images):
    Path("images/0/notes.txt").touch()
    Path("images/@eaDir/0").mkdir(parents=True)
    Path("images/@eaDir/0/a.png").touch()
    answer = rrcm("images", "--model", "model", *SMALL)
    assert "note: left out .txt files (1), files in @eaDir (1)\n" in answer.stderr
    assert "note: 1 of 4 images have no label; no class of the model is called other\n" in answer.stderr


@pytest.mark.parametrize(
    ("names", "moved", "labels", "said"),
    [
        ("cat train fox", "train/cat train/train test/fox", [2, 0, 1, 1], "from the folders {}/*/*\n"),
        ("cat dog fox", "5/0 5/1 5/cat", [0, 1, 1, 0], "from the folders {}/*/*\n"),
        ("cat dog fox", "2/dog 2/cat 2/x", [0, 0, 1, -1], "from the folders {}/*/*\n"),
        ("cat dog fox", "a/2 a/1 a/x", [1, 1, 2, -1], "{}/*/*; the folders are taken for numbers of"),
        ("cat dog fox", "x y z", [-1] * 4, "the images have no labels: no folder is named after a"),
        ("cat dog images", "x y z", [2] * 4, "all images have the label images, as their folder is"),
        ("cat dog images", "cat y z", [0, -1, -1, -1], "3 of 4 images have no label"),
    ],
)
def test_labels_come_from_the_level_of_the_class_folders(saved, images, names, moved, labels, said):
    save_model("model", saved, class_names=names.split())
    Path("images").rename("old")
    for old, new in zip(["0", "1", "other"], moved.split(), strict=True):
        shutil.copytree(Path("old", old), Path("images", new))
    answer = rrcm("images", "--model", "model", *SMALL)
    assert pd.read_csv("certificates.tsv", sep="\t")["label"].tolist() == labels
    assert said.format(Path("images").resolve()) in answer.stderr
    certified("images", "--model", "model", "--limit", "1")
    assert pd.read_csv("certificates.tsv", sep="\t")["label"].tolist() == labels[:1]  # of all images, not of these


def test_the_folder_of_one_class(saved, images, monkeypatch):
    save_model("model", saved, class_names=["cat", "dog", "fox"])
    Path("images/1").rename("images/dog")
    answer = rrcm("images/dog", "--model", "model", *SMALL)
    assert "note: all images have the label dog, as their folder is called dog\n" in answer.stderr
    assert pd.read_csv("certificates.tsv", sep="\t")["label"].tolist() == [1, 1]
    monkeypatch.chdir("images/dog")
    assert "have the label dog" in rrcm(".", "--model", "../../model", *SMALL).stderr
    monkeypatch.chdir("../0")
    assert "note: the images have no labels" in rrcm(".", "--model", "../../model", *SMALL).stderr  # it may be a number


@pytest.mark.parametrize(("folder", "label"), [("n02", 1), ("dog", 3), ("crane", None), ("3", None), ("new", None)])
def test_the_folder_of_one_class_of_imagenet(folder, label):
    """Two classes are called crane, and a folder called 3 need not hold class 3."""
    loaded = subject(8, 1, ["crane", "cat", "crane", "dog"], ["n01", "n02", "n03", "n04"])
    assert find_labels(Listing(Path(folder), [Path("1.png"), Path("more/2.png")]), loaded) == [label] * 2


def test_radii_are_never_shown_larger_than_they_are():
    assert [rounded_down(r) for r in (0.0, 0.0625, 0.57, 0.6789, 1.2499999, 1e-9)] == [
        *("0.000", "0.062", "0.570", "0.678", "1.249", "0.000")
    ]


def test_no_radius_is_ticked_that_is_shown_as_zero(saved, images):
    """Neither on the page nor in the listing, whose step is coarse here."""
    kinds = [kind_of_answer(*each) for each in ((1, 1, 0.0), (1, -1, 0.0004), (1, 0, 0.0), (-1, 1, 0.0), (1, 1, 0.001))]
    assert kinds == ["no radius", "no radius", "wrong", "abstains", "correct"]
    assert make_answer("no radius", "cat", 0.0) == Answer("no radius", "○ cat", "0.000")
    shutil.move("images/other", "images/2")
    answer = rrcm("images", "--model", "model", "--radius-step", "9", "--page", "page.html", *SMALL)
    assert read_record(Path("certificates.json")).radius_step == 9
    predicted = (pd.read_csv("certificates.tsv", sep="\t")["predict"] >= 0).sum()
    page = Path("page.html").read_text()
    assert predicted and f"{predicted} of them at radius 0.000" in answer.stdout
    assert "✓" not in page.replace("(✓ correct, ✗ wrong, ○ no radius, ? abstains)", "")
    assert "correct" not in page.split("<tbody>")[1].split("</tbody>")[0] and "of no changed image" in page


@pytest.mark.parametrize("count", [1, 5, 24])
def test_no_two_texts_of_the_gallery_touch(count):
    """Names of all kinds: wide, long, with mathematics in them, with signs that the font lacks (which warns)."""
    names = ["W" * 60, "a/b.png", r"$\frac{1}{2}$ " + "long " * 20, "图像" * 30]
    kinds = ["certified", "no radius", "wrong", "abstains"]
    tiles = [
        Thumbnail(
            np.zeros((8, 8, 3)),
            names[i % 4],
            "" if kinds[i % 4] == "abstains" else names[-1 - i % 4],
            0.5,
            kinds[i % 4],
        )
        for i in range(count)
    ]
    figure = draw_certified_images(tiles, "σ = 0.5, n = 100,000, α = 0.001, the first 48 of 12,345 images")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [figure._suptitle] + [text for axes in figure.axes for text in (axes.title, axes.xaxis.label)]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_text()]
    assert len(boxes) == 1 + 2 * count
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 for box in boxes)


@pytest.mark.thorough
def test_the_installed_command(saved, images):
    """In a process of its own; and asking for help does not import torch."""
    installed = Path(sys.executable).with_name("rrcm")
    command = [str(installed)] if installed.exists() else [sys.executable, "-m", "rrcm.cli"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)

    done = run("certify", "images", "--model", "model", *SMALL)
    assert done.returncode == 0 and "other/a.png" in done.stdout and Path("gallery.png").exists(), done.stderr
    failed = run("certify", "nowhere", "--model", "model")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    code = "import sys; from rrcm.cli import app; app(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "certify" in helped.stdout and "'typer'" in helped.stdout
    assert not any(f"'{module}'" in helped.stdout for module in ("torch", "timm"))
