"""The method table: what its rows mean, and that a wrong cell is named before any work."""

import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import REPOSITORY, compose
from omegaconf.errors import OmegaConfBaseException

from rrcm import methods
from rrcm.config import load_config, parse_config
from rrcm.methods import METHODS, Method, check_methods, continued_method, expert_of, model_name, read_methods
from rrcm.models import TRAINED_CLASSIFIERS
from rrcm.utils.errors import RRCMError

SCRATCH = {"gaussian", "stability", "consistency", "macer", "smoothadv", "smoothmix", "cat_rs"}


@pytest.mark.parametrize(
    ("name", "initial_weights", "objective", "matched", "classifier", "family", "label", "colour"),
    [
        ("rrcm", "rrcm", "consistency", False, "classifier", "rRCM", "rRCM", "#0072B2"),
        ("timm", "timm", "consistency", False, "classifier", "other pre-training", "timm", "#CC79A7"),
        ("gaussian", None, "gaussian", False, "classifier", "noise", "Gaussian", "#009E73"),
        (
            "consistency_matched",
            None,
            "consistency",
            True,
            "classifier",
            "regularization",
            "Consistency, matched compute",
            "#D55E00",
        ),
        ("cat_rs_matched", None, "cat_rs", True, "classifier", "adversarial", "CAT-RS, matched compute", "#A0522D"),
        ("rrcm_ensemble", "rrcm", "consistency", False, "ensemble", "ensemble", "rRCM, ensemble", "#2166AC"),
        ("dds", "gaussian", None, False, "dds", "denoise, then classify", "DDS", "#CC6677"),
    ],
)
def test_rows_of_the_table(name, initial_weights, objective, matched, classifier, family, label, colour):
    row = METHODS[name]
    assert row == Method(initial_weights, objective, classifier, colour, label, family=family, matched=matched)
    decisive = {
        "initial_weights": initial_weights,
        "objective": objective,
        "matched": matched,
        "classifier": classifier,
    }
    assert row.identity == decisive


def test_methods_from_random_weights_also_get_the_compute_of_pretraining():
    experts = {name: row for name, row in METHODS.items() if row.joint is None}
    written = {name: row for name, row in experts.items() if not row.matched}
    unfit = {name for name, row in written.items() if row.is_ensemble or row.is_student}
    scratch = {name for name, row in written.items() if row.initial_weights is None} - unfit
    assert experts.keys() - written.keys() == {f"{name}_matched" for name in scratch} and scratch >= SCRATCH


def test_every_trained_method_also_exists_as_a_joint_one():
    """With all passes of its experts, or a third. An expert's identity, which is hashed, does not mention it."""
    experts = {name: row for name, row in METHODS.items() if row.joint is None}
    trained = {name for name, row in experts.items() if not row.denoises}
    joint = {f"{name}_{end}" for name in trained for end in ("joint", "joint_third")}
    assert {name for name, row in METHODS.items() if row.joint is not None and not row.can_pass} == joint
    for ending, share in (("joint", 1.0), ("joint_third", 1 / 3)):
        row = METHODS[f"consistency_matched_{ending}"]
        assert row == replace(METHODS["consistency_matched"], joint=share, label=row.label)
        assert row.identity == METHODS["consistency_matched"].identity | {"joint": share}
        assert expert_of(f"consistency_matched_{ending}") == "consistency_matched" == expert_of("consistency_matched")
        assert model_name(f"consistency_matched_{ending}", 0.5) == "joint"
    assert METHODS["rrcm_joint_third"].label == "rRCM, joint 1/3" and "joint" not in METHODS["rrcm"].identity
    assert model_name("rrcm", 1) == "sigma_1.0"


def test_single_classifiers_also_exist_with_an_output_for_pass():
    passing = {name for name, row in METHODS.items() if row.can_pass}
    unfit = {name for name, row in METHODS.items() if row.denoises or row.is_ensemble or row.is_student}
    experts = {name for name, row in METHODS.items() if row.joint is None}
    assert passing == {f"{name}_joint_pass" for name in experts - unfit}
    row = METHODS["consistency_matched_joint_pass"]
    assert row.identity == METHODS["consistency_matched_joint"].identity | {"can_pass": True}
    assert row.label == "Consistency, matched, joint, pass"
    assert continued_method("consistency_matched_joint_pass") == "consistency_matched_joint"
    assert expert_of("rrcm_joint_pass") == "rrcm" and model_name("rrcm_joint_pass", 0.5) == "joint"
    assert not any("can_pass" in row.identity for name, row in METHODS.items() if name not in passing)


def test_the_table_that_is_shipped_is_right():
    check_methods()


@pytest.mark.parametrize(
    ("column", "cell", "said"),
    [
        ("family", "nois", "own has family 'nois'; choose one of rRCM, other pre-training, noise, regularization,"),
        ("colour", "orange-ish", "own has colour 'orange-ish'; write it as #0072B2"),
        ("objective", "gausian", "own has objective 'gausian'; choose one of gaussian, stability, consistency,"),
        ("objective", None, "own has objective '-'; choose one of gaussian, stability, consistency,"),
        ("initial_weights", "rcm", "own has initial_weights 'rcm'; choose one of -, timm, rrcm, rrcm_without"),
        ("initial_weights", "gaussian", "own has initial_weights 'gaussian'; choose one of -, timm, rrcm"),
        ("classifier", "clasifier", "own has classifier 'clasifier'; choose one of classifier, "),
        ("classifier", "unloadable", "own has classifier 'unloadable'; choose one of classifier, "),
        ("classifier", "dds", "own has initial_weights '-'; choose one of rrcm, rrcm_without_contrastive"),
        ("label", "Gaussian", "has the label 'Gaussian' of another method; give each its own"),
    ],
)
def test_a_wrong_cell_is_named_when_settings_are_read(project, monkeypatch, column, cell, said):
    """Also of a method that is not among the settings: nothing is trained beside it, then."""
    monkeypatch.setitem(TRAINED_CLASSIFIERS, "unloadable", object)  # without an entry in FOLDER_LOADERS
    row = Method(None, "gaussian", "classifier", "#123456", "Own", family="noise")
    monkeypatch.setitem(METHODS, "own", replace(row, **{column: cell}))
    with pytest.raises(RRCMError) as caught:
        load_config(project / "params.yaml")
    assert str(caught.value).startswith("rrcm/methods.py: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_classifier_is_blamed_before_the_cells_that_depend_on_it(monkeypatch):
    monkeypatch.setitem(METHODS, "dds", replace(METHODS["dds"], classifier="ddss"))
    with pytest.raises(RRCMError, match=r"^rrcm/methods\.py: dds has classifier 'ddss'; choose one of classifier, "):
        check_methods()


@pytest.mark.parametrize("column", ["family", "classifier"])
def test_a_wrong_cell_is_named_when_settings_are_composed(monkeypatch, tmp_path, column):
    """By `dvc exp run`, which validates nothing itself, and by `make params`."""
    row = Method(None, "gaussian", "classifier", "#123456", "Own", family="noise")
    monkeypatch.setitem(METHODS, "own", replace(row, **{column: "dds"}))
    with pytest.raises(OmegaConfBaseException, match=r"rrcm/methods\.py: own has "):
        compose(tmp_path / "params.yaml", "methods=[own]")
    command = runpy.run_path(str(REPOSITORY / "stages/compose.py"))["compose"]
    with pytest.raises(RRCMError, match=r"^rrcm/methods\.py: own has "):
        command(["methods=[own]"], tmp_path / "params.yaml")


HEAD = "  method  initial_weights  objective  classifier  colour  label\n\nnoise\n"
GAUSSIAN = "  gaussian  -  gaussian  classifier  #009E73  Gaussian\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("  own  -  gaussian  #123456  Own\n", "own has 4 cells after its name; write 5, with two spaces between"),
        (
            "  own\n",
            "own has 0 cells after its name; write 5, with two spaces between them: initial_weights, objective,",
        ),
        ("  own  -  gaussian  classifier  #123456  Own  noise\n", "own has 6 cells after its name; write 5, with two"),
        ("own  -  gaussian  classifier  Own\n", "own has 4 cells after its name; write 5, with two"),
        ("  gaussian  -  macer  classifier  #123456  Own\n", "2 methods are called gaussian; give each its own"),
        ("  gaussian_matched  -  macer  classifier  #123456  Own\n", "2 methods are called gaussian_matched; give"),
        ("  gaussian_joint  -  macer  classifier  #123456  Own\n", "2 methods are called gaussian_joint; give each"),
        ("  my.own  -  gaussian  classifier  #123456  Own\n", "'my.own' names files and stages; write it with a-z"),
        (
            "  own  -  macer  classifier  #009e73  Own\n",
            "gaussian has the colour #009E73 of another method; give each its",
        ),
        (
            "  own  -  macer  classifier  #123456  Seventeen letters\n",
            "own_matched has label 'Seventeen letters, matched compute', too long for a legend; shorten it to 33 char",
        ),
        ("nose\n  own  -  gaussian  classifier  #123456  Own\n", "own has family 'nose'; choose one of rRCM, other"),
    ],
)
def test_a_wrong_line_is_named(monkeypatch, rows, said):
    monkeypatch.setattr(methods, "TABLE", HEAD + GAUSSIAN + rows)
    monkeypatch.setattr(methods, "METHODS", read_methods(methods.TABLE))
    with pytest.raises(RRCMError) as caught:
        parse_config({})
    assert str(caught.value).startswith(f"rrcm/methods.py: {said}") and "\n" not in str(caught.value)


def test_the_table_is_checked_without_torch():
    code = "import sys; from rrcm.methods import check_methods; check_methods(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_a_new_row_is_a_method_and_its_matched_one():
    own = "  own  -  macer  classifier  #123456  Own, with a comma\n"
    found = read_methods(HEAD + GAUSSIAN + own)
    experts = ["gaussian", "own", "gaussian_matched", "own_matched"]
    endings = ("joint", "joint_third", "joint_pass")
    assert [*found] == experts + [f"{name}_{end}" for name in experts for end in endings]
    assert found["own"] == Method(None, "macer", "classifier", "#123456", "Own, with a comma", family="noise")
    assert found["own_matched"].matched
