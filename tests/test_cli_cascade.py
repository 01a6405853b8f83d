"""`rrcm certify --cascade`: one classifier of several sigmas for the images of a folder."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import files_of
from test_cli import SMALL, images, in_a_folder, refused, release_lock, rrcm, saved  # noqa: F401 (fixtures)
from torch import nn
from typer.testing import CliRunner, Result

import rrcm as package
from rrcm.certification.record import read_record, record_bytes
from rrcm.certification.results import read_samples
from rrcm.cli import app
from rrcm.models.checkpoints import save_model
from rrcm.models.joint import JointSigmas
from rrcm.report.gallery import rounded_down
from rrcm.utils.files import read_json

SIGMAS = (0.25, 0.5, 1.0)
AT = [each for sigma in SIGMAS for each in ("--sigma", str(sigma))]
JOINT = ["images", "--cascade", "--model", "joint", *SMALL]
FILES = [f"certificates{name}" for name in (".tsv", ".samples.tsv", ".files.tsv", ".json")] + ["gallery.png"]

pytestmark = pytest.mark.usefixtures("images")


@pytest.fixture(autouse=True)
def models(saved: nn.Module) -> nn.Module:  # noqa: F811
    """The joint model `joint`, and the experts `expert_0.25` to `expert_1.0`, which have its weights."""
    save_model("joint", saved, sigma=JointSigmas(SIGMAS))
    for sigma in SIGMAS:
        save_model(f"expert_{sigma}", saved.at(sigma))
    return saved


def audited(*models: str) -> Result:
    arguments = ["audit", "certificates.tsv", "--images", "images"]
    return CliRunner().invoke(app, arguments + [each for model in models for each in ("--model", model)])


@pytest.mark.parametrize("stopping", ["sequential", "fixed"])
def test_the_command_writes_and_prints_the_certificates_of_the_cascade(models, images, stopping: str):  # noqa: F811
    answer = rrcm(*JOINT, *AT, "--threshold", "-0.1", "--threshold", "0.2", "--stopping", stopping, "--bound", "margin")
    assert answer.exit_code == 0, answer.output
    scales = [models.at(sigma) for sigma in SIGMAS]
    cascade = package.CascadedClassifier(scales, SIGMAS, (-0.1, 0.2), 3, batch_size=64)
    expected = cascade.certify(images, stopping=stopping, n0=20, n=300, bound="margin", radius_step=0.05)
    frame, samples = pd.read_csv("certificates.tsv", sep="\t"), read_samples("certificates.samples.tsv")
    assert frame["predict"].tolist() == [each.prediction for each in expected]
    assert frame["radius"].tolist() == [each.radius for each in expected] and frame["radius"].max() > 0
    assert frame["label"].tolist() == [0, 1, 1, -1]
    assert package.recompute_radii("certificates.tsv")["radius"].tolist() == frame["radius"].tolist()
    assert samples["path"].tolist() == [", ".join(f"{s} {claim}" for s, claim in each.path) for each in expected]
    record = read_record(Path("certificates.json"))
    assert (record.sigmas, record.thresholds, record.certificates) == ([*SIGMAS], [-0.1, 0.2], "label-aware")
    assert len(record.models) == 1 and record.chosen is None and not record.labelled and set(record.files) < set(FILES)
    for line, each in zip(answer.stdout.splitlines()[2:6], expected, strict=True):
        shown = "abstains" if each.prediction < 0 else rounded_down(each.radius)
        path = ", ".join(f"{s} {claim}" for s, claim in each.path)
        assert line.split()[2:4] == [shown, f"{each.samples:,}"] and line.endswith(path)
        assert each.accepting_sigma is None or line.split()[4] == str(each.accepting_sigma)
    assert "accepted at" in answer.stdout and all(Path(name).exists() for name in FILES)


def test_one_model_and_one_for_each_sigma_give_the_same_and_are_verified():
    """A joint model knows its sigmas, and so do experts."""
    assert rrcm(*JOINT).exit_code == 0
    joint = {name: content for name, content in files_of(Path()).items() if name in FILES}
    answer = audited("joint")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith(
        "verified: certificates.tsv, 4 of 4 radii follow from their votes, 4 voted again as"
    )
    experts = [each for sigma in SIGMAS for each in ("--model", f"expert_{sigma}")]
    assert rrcm("images", "--cascade", *experts, *SMALL).exit_code == 0
    assert {name for name in FILES if Path(name).read_bytes() != joint[name]} == {"certificates.json"}
    assert audited("expert_0.25", "expert_0.5", "expert_1.0").exit_code == 0
    swapped = audited("expert_0.5", "expert_0.25", "expert_1.0")
    assert swapped.exit_code == 1 and "expert_0.5: is not the model that was certified" in swapped.output
    assert "was certified with 3 models, 1 are given" in audited("joint").output


def test_thresholds_of_a_record_and_how_they_were_chosen():
    assert rrcm(*JOINT, "--threshold", "0.1", "--threshold", "0.3").exit_code == 0
    chosen = {"by": "acr", "n": 1000, "images": 7, "score": 0.5}
    record = read_record(Path("certificates.json"))
    entries = record.model_dump() | {"chosen": chosen}
    Path("chosen.json").write_bytes(record_bytes(type(record).model_validate(entries)))
    assert rrcm(*JOINT, "--thresholds", "chosen.json").exit_code == 0
    again = read_json(Path("certificates.json"))
    assert (again["thresholds"], again["chosen"]) == ([0.1, 0.3], chosen)


def test_a_killed_run_continues(monkeypatch: pytest.MonkeyPatch):
    """And other batches and an interruption change no byte of the tables."""
    options = [*JOINT, *AT, "--threshold", "0.1", "--threshold", "-0.2"]
    assert rrcm(*options).exit_code == 0
    whole = {name: Path(name).read_bytes() for name in FILES}
    for name in FILES:
        Path(name).unlink()
    run = package.CascadedClassifier.certify_stream

    def interrupted(self, states, rule, **_):
        for changed in run(self, states, rule, at_once=1):
            yield changed
            if changed[0].index == 1 and changed[0].samples > 20:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(package.CascadedClassifier, "certify_stream", interrupted)
        answer = rrcm(*options)
    assert answer.exit_code == 130 and "of 4 images are finished; the same command continues" in answer.stderr
    release_lock(answer)
    answer = rrcm(*options)
    assert answer.exit_code == 0 and "resuming: " in answer.stderr
    assert {name: Path(name).read_bytes() for name in FILES} == whole
    assert not list(Path().glob(".certificates*"))


ERRORS = {
    "one sigma": (["--model", "joint", "--sigma", "0.5"], "sigma = 0.5: a cascade has at least two sigmas; give more"),
    "outside": (["--model", "joint", *AT, "--sigma", "1.5"], "joint: was trained for sigma 0.25 to 1, which 1.5 is"),
    "an expert for all": (["--model", "expert_0.5", *AT], "expert_0.5: was trained for sigma 0.5 alone; give a joint"),
    "an expert alone": (["--model", "expert_0.5"], "expert_0.5: is no joint model, whose sigmas are known; give the"),
    "two models for three": (["--model", "joint", "--model", "joint", *AT], "2 models for 3 sigmas: give one model"),
    "thresholds": (
        ["--model", "joint", *AT, "--threshold", "0"],
        "thresholds: 1 for 3 sigmas; must be 2, one for",
    ),
    "thresholds of known sigmas": (["--model", "joint", "--threshold", "0"], "thresholds: 1 for 3 sigmas; must be 2"),
    "falling sigmas": (["--model", "joint", "--sigma", "1", "--sigma", "0.5"], "sigmas = [1.0, 0.5]: must increase"),
    "experts in another order": (["--model", "expert_0.5", "--model", "expert_0.25"], "sigmas = [0.5, 0.25]: must inc"),
    "experts of other sigmas": (
        ["--model", "expert_0.5", "--model", "expert_1.0", "--sigma", "0.25", "--sigma", "1"],
        "models: the one for sigma 0.25 was trained for 0.5; give base classifiers in the order of the sigmas",
    ),
    "both": (
        ["--model", "joint", "--threshold", "0", "--threshold", "0", "--thresholds", "certificates.json"],
        "certificates.json: has thresholds, and --threshold gives others; leave one of the two out",
    ),
    "no record": (["--model", "joint", "--thresholds", "none.json"], "none.json: no such file with the record of a c"),
    "weights": (["--model", "joint", "--no-final-norm"], "--weights and --no-final-norm are not for a cascade; leave"),
    "nan": (["--model", "joint", "--threshold", "nan", "--threshold", "0"], "must be finite, in pixel units"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_options_are_refused_in_one_line(case: str):
    options, problem = ERRORS[case]
    before = files_of(Path())
    refused(rrcm("images", "--cascade", *options, *SMALL), problem)
    assert files_of(Path()) == before


def test_options_of_a_cascade_are_refused_without_it():
    refused(rrcm("images", "--model", "joint", *AT), "several models or sigmas are a cascade; add --cascade")
    refused(rrcm("images", "--model", "joint", "--model", "expert_0.5"), "several models or sigmas are a cascade; add")
    refused(rrcm("images", "--model", "expert_0.5", "--threshold", "0"), "thresholds are for a cascade; leave them out")


def test_records_of_other_sigmas_and_of_no_cascade_are_refused():
    assert rrcm(*JOINT).exit_code == 0
    Path("certificates.json").rename("cascade.json")
    other = ["--sigma", "0.25", "--sigma", "0.5", "--thresholds", "cascade.json"]
    refused(rrcm(*JOINT, *other), "cascade.json: has thresholds for the sigmas [0.25, 0.5, 1.0], not for [0.25, 0.5]")
    assert rrcm("images", "--model", "expert_0.5", *SMALL).exit_code == 0
    refused(rrcm(*JOINT, "--thresholds", "certificates.json"), "certificates.json: is the record of a single sigma")


def test_models_of_other_classes_are_refused(models):
    torch.manual_seed(1)
    models.head = nn.Linear(32, 4)
    models.num_classes = 4
    save_model("more", models.at(0.5))
    options = ["images", "--cascade", "--model", "expert_0.25", "--model", "more", *SMALL]
    refused(rrcm(*options), "more: has another image size, other channels or other classes than expert_0.25; give")


def test_forged_files_are_found():
    assert rrcm(*JOINT).exit_code == 0
    path = Path("certificates.samples.tsv")
    samples = read_samples(path)
    row = int(np.argmax(samples["path"] != ""))
    path.write_text(path.read_text().replace(samples["path"][row], "0.25 binary"))
    answer = audited("joint")
    assert answer.exit_code == 1 and "is not the file that certificates.json describes" in answer.output
