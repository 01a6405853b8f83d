"""A finished model is certified on the images of a run as the run certifies its own models, without training."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import stage

OWN = """
from torch import nn

def net(classes=10):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    model.image_size, model.channels = 8, 1
    return model

def few():
    return net(3)

def named():
    model = net()
    model.class_names = list("0123456798")
    return model
"""


@pytest.fixture
def project(trained, tmp_path) -> Path:
    """A copy of a project with a certified classifier, and a file with models of the user's own code."""
    for name in ("models", "params.yaml"):
        (shutil.copytree if (trained / name).is_dir() else shutil.copy)(trained / name, tmp_path / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to((trained / "data/shards").resolve())
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_its_certificates_are_those_of_the_run(trained, project):
    for model, file in (("models/rrcm/sigma_0.5", "same.tsv"), ("own.py:net", "own.tsv")):
        answer = stage(project, "certify_model", model, "0.5", f"external/{file}")
        assert answer.returncode == 0 and "report.external_results" in answer.stdout, answer.stderr
    certified = trained / "certificates/rrcm/sigma_0.5.tsv"
    assert (project / "external/same.tsv").read_bytes() == certified.read_bytes()
    own, frame = (pd.read_csv(path, sep="\t") for path in (project / "external/own.tsv", certified))
    assert own[["idx", "label"]].equals(frame[["idx", "label"]])
    assert {path.name for path in (project / "external").iterdir()} == {
        f"{name}{ending}" for name in ("same", "own") for ending in (".tsv", ".samples.tsv", ".json")
    }


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own.py:few", "own.py:few: is for 3 classes, the run has 10; give a model for the same data"),
        ("own.py:named", "own.py:named: has the class 9 where the run has 8; give a model with the classes 0, 1, 2"),
    ],
)
def test_a_model_of_other_data_is_refused(project, model, said):
    answer = stage(project, "certify_model", model, "0.5", "external/own.tsv")
    assert answer.returncode == 1 and answer.stderr.splitlines()[-1].startswith(f"error: {said}"), answer.stderr
    assert not (project / "external").exists()
