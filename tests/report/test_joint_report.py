"""The report on joint methods: one model at several sigmas, whose cost is counted once."""

from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from invented_run import make_config, make_inputs, render

from rrcm.report import page
from rrcm.report.inputs import read_inputs
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple:
    """Settings and the folder of an invented run; whoever changes a file restores it."""
    config = make_config([], methods=["rrcm", "rrcm_joint", "rrcm_joint_third", "rrcm_joint_pass", "consistency_joint"])
    folder = tmp_path_factory.mktemp("joint")
    make_inputs(config, folder)
    return config, folder


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> tuple:
    """As `run`, with students of a joint teacher."""
    student = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["student"] | {"embed_dim": 16}
    config = make_config([], methods=["rrcm_joint", "distill", "distill_joint"], student=student)
    folder = tmp_path_factory.mktemp("students")
    make_inputs(config, folder)
    return config, folder


def test_each_sigma_bears_its_share_of_the_joint_training(run):
    budgets = read_inputs(*run).budgets.set_index(["method", "sigma"])
    model = read_json(run[1] / "models/rrcm_joint/joint/config.json")["compute"]
    for sigma in (0.25, 1.0):
        row = budgets.loc["rrcm_joint", sigma]
        assert row["finetune_passes"] == model["finetune"] / 2 and row["preparation_passes"] == 4e5
        assert row["finetune_seconds"] == 1.5 / 2 and budgets.loc["rrcm", sigma]["finetune_seconds"] == 1.5
    finetuning = read_inputs(*run).finetuning
    last = finetuning[finetuning["method"] == "rrcm_joint"].groupby("sigma")["compute"].last()
    assert last.tolist() == pytest.approx([model["finetune"] / 2 + 4e5] * 2)


def test_what_a_method_that_can_pass_continues_is_part_of_its_cost(run):
    """The fine-tuning and the seconds of the joint model, and those of its votes."""
    config, folder = run
    inputs = read_inputs(config, folder)
    row = inputs.budgets.set_index(["method", "sigma"]).loc["rrcm_joint_pass", 0.25]
    model = read_json(folder / "models/rrcm_joint_pass/joint/config.json")["compute"]
    before = inputs.budgets.set_index(["method", "sigma"]).loc["rrcm_joint", 0.25]
    assert row["preparation_passes"] == before["preparation_passes"] + model["joint"] / 2
    assert row["preparation_seconds"] == before["preparation_seconds"] + 3.0 / 2


def test_the_cost_of_a_teacher_is_part_of_that_of_its_students(students):
    """With all that came before the teacher. A student of one sigma bears the teacher's share at this sigma."""
    inputs = read_inputs(*students)
    budgets = inputs.budgets.set_index(["method", "sigma"])
    teacher = budgets.loc[("rrcm_joint", 0.25), ["finetune_seconds", "preparation_seconds"]].sum()
    for name in ("distill_joint", "distill"):
        assert budgets.loc[(name, 0.25), "preparation_seconds"] == pytest.approx(teacher)
    assert budgets.loc[("distill_joint", 0.25), "preparation_passes"] == 7e5 / 2
    assert budgets.loc[("distill", 0.25), "preparation_passes"] == 7e5


def test_students_are_explained_and_compared_at_any_cost(students):
    config, folder = students
    inputs = read_inputs(config, folder)
    text = render(config, folder, inputs, [str(i) for i in range(10)])
    assert "*Students* have networks of their own (Student and Student, joint; the teacher is rRCM, joint)" in text
    assert "A pass of a student counts in proportion to its multiply-adds" in text and "\n\n\n" not in text
    assert "  embed_dim: 16" in text and "student:" in text
    compared = {comparison.name for comparison in page._headline(config, inputs)}
    assert compared == {"any cost"}


def test_a_third_of_the_passes_is_not_compared_as_equal_and_no_more_than_all(run):
    inputs = read_inputs(*run)
    page_text = render(*run, inputs, [str(i) for i in range(10)])
    assert "rRCM, joint 1/3" in page_text and "rRCM, joint, pass" in page_text
    compared = {comparison.name: comparison.table for comparison in page._headline(run[0], inputs)}
    assert set(compared) == {"equal fine-tuning budget"}  # rRCM and its joint network alone are no comparison
    (table,) = compared.values()
    assert "rRCM, joint " in table and "joint 1/3" not in table and "joint, pass" not in table


def test_a_model_for_other_sigmas_is_refused(run):
    config, folder = run
    path: Path = folder / "models/rrcm_joint/joint/config.json"
    model = read_json(path)
    write_json(path, model | {"joint": {"sigmas": [0.25, 0.5], "interval": None}})
    try:
        with pytest.raises(
            RRCMError, match=r"joint differs from the settings .*run `dvc repro finetune@rrcm_joint-joint`"
        ):
            read_inputs(config, folder)
    finally:
        write_json(path, model)
