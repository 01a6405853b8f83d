"""The examples in the docstrings of the public names run, and give what they say."""

import doctest

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import rrcm
from rrcm.cli import app
from rrcm.models.base_classifiers import NoiseConditionedClassifier
from rrcm.models.checkpoints import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the examples read: a model folder, an authors' checkpoint, certificates."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    encoder = rrcm.NoiseConditionedViT(8, 1, 4, embed_dim=64, depth=1, num_heads=1)
    classifier = NoiseConditionedClassifier(encoder, 10, t=1.0)
    save_model(folder / "models/rrcm/sigma_0.5", classifier, sigma=0.5)
    weights = {f"base_model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    weights |= {f"linear_head.{name}": tensor for name, tensor in classifier.head.state_dict().items()}
    torch.save(weights, folder / "rrcm_finetuned.pth")
    (folder / "images").mkdir()
    Image.new("L", (8, 8)).save(folder / "images/black.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        answer = CliRunner().invoke(app, ["certify", "images", "--model", "models/rrcm/sigma_0.5", "--n", "100"])
    assert answer.exit_code == 0, answer.stderr
    return folder


def failures(test: doctest.DocTest) -> str:
    """What doctest says of the examples that fail."""
    said: list[str] = []
    doctest.DocTestRunner().run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize("name", rrcm.__all__)
def test_the_example_of_a_public_name_runs(name, folder, monkeypatch):
    """Each has one, in its docstring. It may use `torch` and `rrcm`, and read files of the folder."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    docstring = getattr(rrcm, name).__doc__
    test = doctest.DocTestParser().get_doctest(docstring, {"rrcm": rrcm, "torch": torch}, name, None, None)
    assert test.examples
    assert not (said := failures(test)), said


def test_an_example_that_is_wrong_is_noticed():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "sum", None, None)
    assert "Expected:\n    3\nGot:\n    2" in failures(test)
