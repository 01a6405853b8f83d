"""The preset flagship: its rows have equal total compute, and at smoke size all its stages run."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPOSITORY, TINY
from dvc.utils.hydra import compose_and_dump
from test_pipeline import copy_repository, run

from rrcm.config import load_config
from rrcm.methods import METHODS, model_name
from rrcm.training.budget import plan_budget, pretraining_compute

JOINT = ["rrcm", "rrcm_smoothadv", "dmae_smoothadv"]
JOINT += ["smoothadv_matched", "cat_rs_matched", "consistency_matched", "gaussian_matched"]
JOINT = [f"{name}_joint" for name in JOINT]
IMAGES = 57_600  # of Fashion-MNIST's training split


def test_every_row_of_the_flagship_has_the_same_total_compute(tmp_path):
    config = load_config(compose_flagship(tmp_path / "params.yaml", "profile=fashion_mnist"))
    assert config.methods == [*JOINT, "gaussian", "dds"] and config.cascade.methods == JOINT
    for name in config.pretrain.objectives:
        (tmp_path / name).mkdir()
        record = {"compute": {"pretrain": pretraining_compute(config, name)}}
        (tmp_path / name / "config.json").write_text(json.dumps(record))
    budgets = {name: plan_budget(config, name, "joint", IMAGES, tmp_path) for name in JOINT}
    passes = {name: sum(budget.account.values()) for name, budget in budgets.items()}
    assert max(passes.values()) < 1.002 * min(passes.values()), passes


def test_the_flagship_certifies_as_print_does_and_names_every_stage(tmp_path):
    config = load_config(compose_flagship(tmp_path / "params.yaml", "profile=fashion_mnist"))
    settings = config.certify
    assert (settings.n, settings.alpha, settings.every, settings.max_images) == (100_000, 0.001, 10, 1000)
    assert config.denoised.max_images["dds"] == 100
    assert config.derived["finetune"].keys() == {
        *(f"{name}-joint" for name in JOINT),
        *(f"{name}-{sigma}" for name in ("gaussian", "dds") for sigma in config.sigmas),
        "gaussian-0.001",
    }
    assert len(config.derived["certify"]) == 3 * 9 and [*config.derived["soft_labels"]] == ["gaussian-0.25"]


def compose_flagship(path: Path, *overrides: str) -> Path:
    """Write the settings of the preset with these overrides to `path`; returns `path`."""
    conf = REPOSITORY / "conf"
    compose_and_dump(path, str(conf), None, "config", str(conf / "plugins"), ["preset=flagship", *overrides])
    return path


@pytest.mark.thorough
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="git lists the files to copy")
def test_all_stages_of_the_flagship_run_at_smoke_size(tmp_path):
    """On the digits, with a hundredth of its budget or less."""
    (tmp_path / "repository").mkdir()
    folder = copy_repository(tmp_path / "repository")
    small = [override for override in TINY if not override.startswith("methods=")]
    small += ["finetune.epochs=2", "pretrain.steps=10", "certify.n=100", "certify.radius_step=0.25"]
    small += ["cascade.choose_n=20", "denoised.max_images={dds: 5}", "latency.rounds=1", "soft_labels.n=2"]
    compose_flagship(folder / "params.yaml", *small)
    run(folder, sys.executable, "stages/repro.py", "--jobs", "2")
    config, report = load_config(folder / "params.yaml"), folder / "reports/digits_flagship"
    assert all((folder / f"models/{name}/{model_name(name, 0.25)}").is_dir() for name in config.methods)
    deployments = pd.read_csv(report / "deployment.csv")
    assert set(deployments["method"]) == set(JOINT) and "cascade" in set(deployments["deployment"])
    assert set(pd.read_csv(report / "best_sigma.csv")["method"]) == set(config.methods)
    assert METHODS["dmae_smoothadv_joint"].label in (report / "report.md").read_text()
