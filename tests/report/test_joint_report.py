"""The report on joint methods: one model at several sigmas, whose cost is counted once."""

from pathlib import Path

import pytest
from invented_run import make_config, make_inputs, render

from rrcm.report import page
from rrcm.report.inputs import read_inputs
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import read_json, write_json


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple:
    """Settings and the folder of an invented run; whoever changes a file restores it."""
    config = make_config([], methods=["rrcm", "rrcm_joint", "rrcm_joint_third", "consistency_joint"])
    folder = tmp_path_factory.mktemp("joint")
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


def test_a_third_of_the_passes_is_not_compared_as_equal(run):
    inputs = read_inputs(*run)
    assert "rRCM, joint 1/3" in render(*run, inputs, [str(i) for i in range(10)])
    compared = {comparison.name: comparison.table for comparison in page._headline(run[0], inputs)}
    assert set(compared) == {"equal fine-tuning budget", "equal total compute"}
    assert all("rRCM, joint " in table and "joint 1/3" not in table for table in compared.values())


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
