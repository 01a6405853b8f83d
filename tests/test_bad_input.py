"""Bad folders, models and options of every command: one line that says what is wrong, where and what to do."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import files_of
from PIL import Image
from test_cli import in_a_folder, saved  # noqa: F401 (fixtures)
from typer.testing import CliRunner

from rrcm.certification.smoothing import SmoothedClassifier
from rrcm.cli import app

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
ROWS = [f"{i}\t{i % 3}\t0\t0.5\t{int(i % 3 == 0)}\t0\n" for i in range(9)]
FILES = {
    "note.txt": "hello",
    "texts/a.txt": "no image",
    "damaged/a.png": "no image",
    "names.txt": "cat\ndog\n",
    "p.yaml": "7",
    "net.onnx": "a program",
    "damaged.pt2": "a program",
    "nothing/config.json": "{}",
    "own.py": "from torch import nn\n\ndef bare():\n    return nn.Flatten()\n\ndef fails():\n    return 1 / 0\n",
    "a.tsv": HEADER + "".join(ROWS),
    "b.tsv": HEADER + "".join(f"{i}\t2\t2\t0.5\t1\t0\n" for i in range(9)),
    "unlabelled.tsv": HEADER + "0\t-1\t0\t0.5\t0\t0\n",
    "twice.tsv": HEADER + 2 * ROWS[0],
}
TRAIN = "train classes --output new"
CERTIFY = "certify images --model model"
PREDICT = "predict images --model model"
EXPORT = "export model --format torchscript --output new"
BAD = {  # a command, and what its line says; test_train.py has more of `rrcm train`
    "train nowhere --output new": "nowhere: no such folder; give one that has a folder of images for each class",
    "train images/0 --output new": "images/0: holds no class folders; put the images of each class into its own folder",
    "train images --output new": "images: class 0 has 1 image; add some, to have 5, or remove it",
    "train classes --output model": "--output model: exists; choose another name, or remove it",
    "train classes --output classes/new": "--output classes/new: is inside the folder of images; choose another place",
    f"{TRAIN} --hours 0": "--hours 0: must be a positive number, such as 0.5",
    f"{TRAIN} --params p.yaml": "p.yaml: must be a mapping of settings, found int",
    f"{TRAIN} --weights note.txt": "--weights note.txt: are of a model of timm; name it with --start",
    "certify nowhere --model model": "nowhere: no such folder",
    "certify texts --model model": "texts: no images in it or below, only .txt files (1); give a folder with png, jpg ",
    "certify damaged --model model": "1 of 1 images cannot be read, named above; replace or remove them",
    "certify images --model models/mine": "models/mine: no such folder; in a clone of the repository, `dvc pull ",
    "certify images --model classes": "classes: is no folder of a model, as it has no config.json; give a folder that ",
    "certify images --model damaged.pt2 --sigma 1": "damaged.pt2: is no program of torch.export (",
    "certify images --model nothing": "nothing/config.json: has no `kind`",
    "certify images --model note.txt": "note.txt: truncated or not a torch checkpoint (101); give a state dict, best ",
    "certify images --model net.onnx": "net.onnx: a program of ONNX, which cannot be certified here; export the model",
    "certify images --model own.py:none": "own.py:none: has no function none; it has bare, fails",
    "certify images --model own.py:bare": "own.py:bare: its module has no attribute image_size; set it to the side of ",
    "certify images --model own.py:fails": "own.py:fails: fails with ZeroDivisionError (division by zero, line 7 of ",
    f"{CERTIFY} --sigma 0": "sigma = 0.0: must be above 0 and finite, in pixel units",
    f"{CERTIFY} --alpha 2": "alpha = 2.0: must be above 0 and at most 0.5",
    f"{CERTIFY} --n 5": "n = 5: certifies nothing at alpha = 0.001, even if all votes agree; set n to 10",
    f"{CERTIFY} --radius-step 0": "radius_step = 0.0: must be above 0 and finite, in pixel units",
    f"{CERTIFY} --bound both": "bound = 'both': must be binary or margin",
    f"{CERTIFY} --device tpu": "device = 'tpu': must be auto, cpu, cuda or a GPU such as cuda:0",
    f"{CERTIFY} --batch-size 0": "batch_size = 0: must be at least 1",
    f"{CERTIFY} --limit 0": "limit = 0: must be at least 1",
    f"{CERTIFY} --gallery g.txt": "g.txt: the gallery must end in .png, .svg or .pdf",
    f"{CERTIFY} --output images": "images: no file can be written there; choose another path",
    f"{CERTIFY} --classes names.txt": "names.txt: has 2 class names, the model 3 classes; give one per line",
    f"{CERTIFY} --threshold 0.1": "thresholds are for a cascade; leave them out, or add --cascade",
    f"{CERTIFY} --sigma 0.25 --sigma 0.5": "several models or sigmas are a cascade; add --cascade",
    "predict none.png --model model": "none.png: no such file or folder; give images, or folders with images",
    "predict - --model model": "no images are given; name files or folders, or give their names on standard input with",
    f"{PREDICT} --output a.txt": "--output a.txt: must end in .csv or .jsonl",
    f"{PREDICT} --n 1": "n = 1: always abstains at alpha = 0.001, even if all votes agree; set n to 11",
    "export model --format jpeg --output new": "--format jpeg: must be onnx, torch-export or torchscript",
    "export model --format torchscript --output images": "--output images: exists already; give a new folder",
    f"{EXPORT} --check texts": "texts: no images in it or below, only .txt files (1); give a folder with png, jpg ",
    "compare a.tsv": "'a.tsv': must be NAME=FILE, a name for the legend and a file of certificates",
    "compare A=none.tsv": "none.tsv: no such file",
    "compare A=note.txt": "note.txt: has no rows of certificates",
    "compare A=unlabelled.tsv": "unlabelled.tsv, line 2: label -1: the true class is unknown, so accuracy is undefined",
    "compare A=twice.tsv": "twice.tsv, line 3: idx 0 occurs twice",
    "compare A=a.tsv B=b.tsv": "'A' and 'B': 6 of 9 common image numbers have two labels, such as image 0 has label 0",
    "compare A=a.tsv --reference B": "--reference 'B': must be one of the names 'A'",
    "compare A=a.tsv --radii 0,x": "--radii 0,x: must be numbers >= 0 separated by commas, such as 0,0.25,0.5",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with what the commands name, but for the model."""
    folder, rng = tmp_path_factory.mktemp("bad"), np.random.default_rng(0)
    for name in ["images/0/a.png", "images/1/a.png", *(f"classes/{c}/{i}.png" for c in "ab" for i in range(6))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("command", BAD)
def test_bad_input_ends_in_one_line_before_any_work(saved, folder, command, monkeypatch):  # noqa: F811
    def work(*_: object) -> None:
        raise AssertionError("votes were counted")

    shutil.copytree(folder, ".", dirs_exist_ok=True)
    monkeypatch.setattr(SmoothedClassifier, "count_votes", work)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python compiles own.py when it imports it
    before = files_of(Path())
    answer = CliRunner().invoke(app, command.split(), input="")
    *notes, line = answer.stderr.splitlines()
    assert answer.exit_code == 1 and isinstance(answer.exception, SystemExit), answer.exception
    assert line.startswith("error: ") and line.removeprefix("error: ").removeprefix(f"{Path.cwd()}/").startswith(
        BAD[command]
    ), line
    assert answer.stdout == "" and all(note.startswith(("note: ", "damaged/a.png: ")) for note in notes), answer.output
    assert files_of(Path()) == before
