"""Models of the user's own code: what may be returned, what is said, and bad code, which ends in one line."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import SMALL, images, in_a_folder, refused, rrcm  # noqa: F401 (fixtures)
from torch import nn
from typer.testing import CliRunner

import rrcm as package
from rrcm.cli import app
from rrcm.models.own_code import is_own_code, load_own_code
from rrcm.utils.errors import RRCMError

CODE = """
import beside
import torch
from torch import nn
from rrcm import BaseClassifier

def build():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.image_size, model.channels = 8, 1
    return model

def named():
    model = build()
    model.class_names = ["cat", "dog", "fox"]
    return model

class Conditioned(BaseClassifier):
    image_size, channels, num_classes, t = 8, 1, 2, None
    def forward(self, noisy, draw=None):
        return torch.stack([noisy.mean((1, 2, 3)), torch.full((len(noisy),), self.t / 4)], 1)

def conditioned():
    return Conditioned()

def broken():
    raise ValueError("no such layer\\nat all")

def bare():
    return nn.Flatten()

def wrong_size():
    model = build()
    model.image_size = 9
    return model

class Exported(nn.Module):
    image_size, channels = 8, 1
    def eval(self):
        raise NotImplementedError("as of exported programs")
    def forward(self, noisy):
        return noisy.flatten(1)[:, :2]

def exported():
    return Exported()

def picture():
    model = nn.Identity()
    model.image_size = 8
    return model

def number():
    return 3

BUILD = 3
"""


@pytest.fixture(autouse=True)
def code(in_a_folder: None) -> None:  # noqa: F811
    Path("code").mkdir()
    Path("code/mine.py").write_text(CODE)
    Path("code/beside.py").write_text("")
    Path("code/syntax.py").write_text("def build(:\n")
    Path("code/damaged.pt2").write_bytes(b"PK\3\4")


@pytest.fixture(autouse=True)
def restored_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test puts on the path and imports is gone afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_") or name == "beside":
            del sys.modules[name]


def test_which_names_are_code():
    assert all(map(is_own_code, ["code/mine.py:build", "mine:build", "a.b:c", "/x y/z.py:f"]))
    others = ["hf_hub:a", "hf-hub:a/b", "local-dir:x", "resnet50", "models/a", "a:b:c", "file.py", "mine.py:", "a b:c"]
    assert not any(map(is_own_code, others))


@pytest.mark.parametrize("place", ["code/mine.py", "own_things.mine"])
def test_a_function_is_certified_like_any_other_model(images: torch.Tensor, place: str):  # noqa: F811
    if not place.endswith(".py"):
        Path("code").rename("own_things")
        Path("own_things/mine.py").write_text(CODE.replace("import beside", "from own_things import beside"))
    options = ["--sigma", "0.5", "--n", "100", "--batch-size", "64", "--model", f"{place}:build"]
    answer = CliRunner().invoke(app, ["predict", "images", *options])
    assert answer.stderr.startswith(f"note: runs your code: build() of {place}\n")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    expected = package.SmoothedClassifier(model, 0.5, 3, batch_size=64).predict(images, n=100)
    assert [int(line.split(",")[2]) for line in answer.stdout.splitlines()[1:]] == expected


def test_weights_are_a_state_dict():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    save_file(model.state_dict(), "own.safetensors")
    torch.save({"state_dict": model.state_dict()}, "own.pt")
    for file in ("own.safetensors", "own.pt"):
        loaded = load_own_code("code/mine.py:build", weights=Path(file))
        assert torch.equal(loaded.classifier[1].weight, model[1].weight) and not loaded.classifier.training
    torch.save(model, "whole.pt")
    with pytest.raises(RRCMError, match="a pickle that holds more than tensors"):
        load_own_code("code/mine.py:build", weights=Path("whole.pt"))
    save_file(nn.Linear(2, 2).state_dict(), "other.safetensors")
    with pytest.raises(RRCMError, match="weights of another network"):
        load_own_code("code/mine.py:build", weights=Path("other.safetensors"))


def test_names_of_classes():
    assert load_own_code("code/mine.py:build").class_names == ["0", "1", "2"]
    assert load_own_code("code/mine.py:exported").class_names == ["0", "1"]
    assert load_own_code("code/mine.py:named").class_names == ["cat", "dog", "fox"]
    Path("names.txt").write_text("a\nb\nc\n")
    assert load_own_code("code/mine.py:named", classes=Path("names.txt")).class_names == ["a", "b", "c"]


def test_a_cascade_and_its_audit(images: torch.Tensor):  # noqa: F811
    """A base classifier that is conditioned on the noise level gets t = 2 sigma."""
    options = ["--model", "code/mine.py:conditioned", "--cascade", "--sigma", 0.25, "--sigma", 0.5]
    answer = rrcm("images", *options, *SMALL)
    assert answer.exit_code == 0, answer.output
    audit = ["audit", "certificates.tsv", "--images", "images", "--model", "code/mine.py:conditioned"]
    answer = CliRunner().invoke(app, audit)
    assert answer.exit_code == 0 and answer.stdout.startswith("verified: "), answer.output


def test_an_audit_takes_the_weights_that_were_certified(images: torch.Tensor):  # noqa: F811
    save_file(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).state_dict(), "own.safetensors")
    model = ["--model", "code/mine.py:build", "--weights", "own.safetensors"]
    assert rrcm("images", *model, "--sigma", 0.5, *SMALL).exit_code == 0
    audit = ["audit", "certificates.tsv", "--images", "images"]
    answer = CliRunner().invoke(app, [*audit, *model])
    assert answer.exit_code == 0 and answer.stdout.startswith("verified: "), answer.output
    answer = CliRunner().invoke(app, [*audit, *model[:2]])
    assert answer.exit_code == 1 and "code/mine.py:build: is not the model that was certified" in answer.stderr


@pytest.mark.thorough
def test_a_program_is_a_model_as_it_is(images: torch.Tensor):  # noqa: F811
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    sizes = ({0: torch.export.Dim("batch", max=64)},)
    torch.export.save(torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=sizes), "model.pt2")
    options = ["predict", "images", "--model", "model.pt2", "--sigma", "0.5", "--n", "100", "--batch-size", "64"]
    answer = CliRunner().invoke(app, options)
    assert answer.stderr.startswith("note: runs your code: the program model.pt2\n")
    expected = package.SmoothedClassifier(model, 0.5, 3, batch_size=64).predict(images, n=100)
    assert [int(line.split(",")[2]) for line in answer.stdout.splitlines()[1:]] == expected
    assert load_own_code("model.pt2").class_names == ["0", "1", "2"]
    Path("classes.txt").write_text("cat\ndog\nfox\n")
    assert load_own_code("model.pt2").class_names == ["cat", "dog", "fox"]
    torch.export.save(torch.export.export(nn.Flatten(), (torch.zeros(2, 3, 8, 9),)), "other.pt2")
    with pytest.raises(RRCMError, match=r"^other.pt2: maps .* must map images"):
        load_own_code("other.pt2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("code/none.py:build", "there is no file code/none.py; give FILE.py:FUNCTION"),
        ("code/mine.py:nothing", "has no function nothing; it has build, named, Conditioned, "),
        ("code/mine.py:BUILD", "has no function BUILD; it has"),
        ("code/mine.py:broken", "fails with ValueError (no such layer at all, line 27 of mine.py); correct it"),
        ("code/mine.py:bare", "has no attribute image_size; set it to the side of its images in pixels, such as"),
        ("code/mine.py:wrong_size", "fails with RuntimeError (mat1 and mat2 shapes cannot be multiplied"),
        ("code/mine.py:picture", "its module returns (2, 3, 8, 8) for 2 images; let it return logits (2, K)"),
        ("code/mine.py:number", "returns a int; let it return a torch.nn.Module"),
        ("code/syntax.py:build", "fails with SyntaxError"),
        ("no_such_module:build", "fails with ModuleNotFoundError (No module named 'no_such_module'"),
        ("code/damaged.pt2", "is no program of torch.export ("),
    ],
)
def test_bad_code_ends_in_one_line(name: str, said: str):
    with pytest.raises(RRCMError) as error:
        load_own_code(name)
    assert str(error.value).startswith(f"{name}: ") and said in str(error.value) and "\n" not in str(error.value)


def test_options_that_do_not_fit(images: torch.Tensor):  # noqa: F811
    own = ["images", "--model", "code/mine.py:build"]
    answer = rrcm(*own, *SMALL)
    assert answer.stderr.splitlines()[-1].endswith(
        "was not trained for a particular noise; give --sigma, in pixel units"
    )
    refused(rrcm(*own, "--sigma", 1, "--no-final-norm"), "only an authors' checkpoint file")
    refused(rrcm(*own, "--cascade"), "code/mine.py:build: its sigmas are not known; give the sigmas of the cascade")
