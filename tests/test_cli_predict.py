"""`rrcm predict`: the answers of PREDICT for files, folders and names on standard input, as CSV and JSON lines."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import images, in_a_folder, refused, saved  # noqa: F401 (fixtures)
from torch import nn
from typer.testing import CliRunner, Result

from rrcm import CascadedClassifier, SmoothedClassifier
from rrcm.certification.predict_images import Prediction, list_files, name_classes, predict_images, unique_names
from rrcm.cli import app
from rrcm.models.checkpoints import save_model
from rrcm.models.joint import JointSigmas
from rrcm.utils.errors import RRCMError

FILES = [f"images/{name}.png" for name in ("0/a", "1/a", "1/b", "other/a")]
MODEL = ["--model", "model", "--batch-size", "64", "--n", "200"]

pytestmark = pytest.mark.usefixtures("images", "saved")


def predict(*arguments: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=text)


def rows(answer: Result) -> list[dict[str, str]]:
    assert answer.exit_code == 0, answer.output
    return list(csv.DictReader(io.StringIO(answer.stdout)))


def test_the_answers_are_those_of_predict(saved: nn.Module, images: torch.Tensor):  # noqa: F811
    smoothed = SmoothedClassifier(saved, 0.25, 3, batch_size=64)
    found = rows(predict("images", *MODEL))
    assert [row["file"] for row in found] == FILES
    assert [int(row["predict"]) for row in found] == smoothed.predict(images, n=200)
    for row, votes in zip(found, smoothed.count_samples(images, range(4), 2, 200), strict=True):
        second, first = np.sort(votes)[-2:] / 200
        assert (float(row["first_share"]), float(row["second_share"])) == (first, second)
        assert row["first"] == str(votes.argmax()) and (row["samples"], row["sigma"]) == ("200", "0.25")
        assert row["class"] == ("abstain" if row["predict"] == "-1" else row["predict"])


def test_a_near_tie_abstains(saved: nn.Module, images: torch.Tensor):  # noqa: F811
    """And the answers agree with `predict` also there."""
    nn.init.zeros_(saved.head.weight)
    saved.forward = lambda noisy, draw=None: torch.stack(
        [noisy.mean((1, 2, 3)) - images[0].mean(), noisy[:, 0, 0, 0] * 0], 1
    )
    smoothed = SmoothedClassifier(saved, 0.25, 2, batch_size=64)
    answers = [answer.predict for answer in predict_images(smoothed, images, range(4), n=200, n0=20, alpha=0.001)]
    assert answers == smoothed.predict(images, n=200) and answers[0] == -1 and set(answers) != {-1}


def test_the_answers_of_a_cascade_are_those_of_predict(saved: nn.Module, images: torch.Tensor):  # noqa: F811
    save_model("joint", saved, sigma=JointSigmas((0.25, 1.0)))
    scales = [saved.at(sigma) for sigma in (0.25, 1.0)]
    cascade = CascadedClassifier(scales, (0.25, 1.0), (0.1,), 3, batch_size=64)
    options = ["--model", "joint", "--cascade", "--threshold", 0.1, "--batch-size", 64, "--n0", 50]
    found = rows(predict("images", *options, "--n", 200))
    assert [int(row["predict"]) for row in found] == cascade.predict(images, n0=50, n=200)
    assert {row["sigma"] for row in found} <= {"0.25", "1"} and all(100 <= int(row["samples"]) <= 500 for row in found)
    for row in found:
        assert row["class"] in (row["first"], "abstain")


def test_names_on_standard_input_and_json_lines():
    """A name that is given twice is answered once. CSV and JSON lines say the same."""
    text = f"{FILES[3]}\n\n{FILES[0]}\n{FILES[3]}\n"
    found = rows(predict("-", "images/1", *MODEL, text=text))
    assert [row["file"] for row in found] == [FILES[3], FILES[0], *FILES[1:3]]
    answer = predict("-", "images/1", *MODEL, "--output", "out.jsonl", text=text)
    assert answer.exit_code == 0 and not answer.stdout and "written: out.jsonl" in answer.stderr
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    for row, line in zip(found, lines, strict=True):
        assert (line["file"], line["class"], str(line["predict"])) == (row["file"], row["class"], row["predict"])
        assert sum(line["shares"].values()) == pytest.approx(1) and line["samples"] == 200
        name, share = next(iter(line["shares"].items()))
        assert (name, f"{share:.6g}") == (row["first"], row["first_share"])


def test_a_csv_file_has_the_lines_of_standard_output():
    shown = predict("images", *MODEL, "--limit", 2)
    assert predict("images", *MODEL, "--limit", 2, "--output", "out.csv").exit_code == 0
    assert Path("out.csv").read_text() == shown.stdout and len(rows(shown)) == 2


def test_classes_of_one_name_stay_apart():
    names = unique_names(["crane", "cat", "crane"])
    assert names == ["crane (0)", "cat", "crane (2)"]
    answer = name_classes("a.png", Prediction(-1, np.array([4, 0, 4, 2]), 0.5, 10), names)
    assert answer.shares == {"crane (0)": 0.4, "crane (2)": 0.4, "pass": 0.2} and answer.predicted == "abstain"
    assert answer.as_csv() == "a.png,abstain,-1,crane (0),0.4,crane (2),0.4,0.5,10"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such file or folder; give images, or folders with images"),
        (["-"], "no images are given"),
        (["images", "--output", "out.txt"], "--output out.txt: must end in .csv or .jsonl"),
        (["images", "--output", "images"], "--output images: must end in"),
        (["images", "--n", "5"], "n = 5: always abstains at alpha = 0.001"),
        (["images", "--limit", "0"], "limit = 0: must be at least 1"),
        (["images", "--cascade"], "model: is no joint model"),
        (["images", "--threshold", "0"], "thresholds are for a cascade"),
    ],
)
def test_bad_input_ends_in_one_line(arguments: list[str], said: str):
    refused(predict(*arguments, "--model", "model", text=""), said)
    assert not Path("out.txt").exists()


def test_unreadable_images_are_named_and_skipped_on_request():
    Path(FILES[1]).write_bytes(b"no image")
    answer = predict("images", *MODEL)
    assert answer.exit_code == 1 and not answer.stdout and f"{FILES[1]}: cannot be decoded" in answer.stderr
    assert [row["file"] for row in rows(predict("images", *MODEL, "--skip-unreadable"))] == [FILES[0], *FILES[2:]]


def test_a_folder_without_images_is_refused():
    Path("empty").mkdir()
    with pytest.raises(RRCMError, match="empty: no images in it or below"):
        list_files(["empty"])
