"""Start-up: importing a stage loads no package that only some runs need, and switches garbage collection off first."""

import json
import os
import subprocess
import sys

import pytest
from conftest import COMMANDS, REPOSITORY

SLOW = {"timm", "diffusers", "torchvision", "sklearn", "matplotlib", "webdataset", "dvclive", "dvc"}
LOADED = """
import json, runpy, sys
runpy.run_path(sys.argv[1], run_name="stage")
print(json.dumps(list(sys.modules)))
"""


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["shard_data", "pretrain", "finetune", "certify", "clean_accuracy", "latency"])
def test_a_stage_imports_no_slow_package(stage):
    path = REPOSITORY / "stages" / f"{stage}.py"
    command = [sys.executable, "-c", LOADED, str(path)]
    modules = json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout)
    assert not SLOW & set(modules)
    assert modules.index("rrcm.utils.app") < modules.index("torch")  # collection is off while torch loads


DRAWING = [
    "stages/plot.py",
    "stages/attack.py",
    "benchmarks/trajectories.py",
    "benchmarks/certify.py",
]


@pytest.mark.thorough
@pytest.mark.parametrize("command", DRAWING)
def test_a_command_that_draws_needs_no_backend(command):
    """A notebook tells its child processes a backend that may not be installed here."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", LOADED, command], cwd=REPOSITORY, env=environment, check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_outside_the_environment_says_so(command):
    """As `dvc repro` starts it, when the environment is not active, with the system's Python."""
    bare = [sys.executable, "-E", "-S", str(REPOSITORY / "stages" / command)]  # without the installed packages
    answer = subprocess.run(bare, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: ") and len(answer.stderr.splitlines()) == 1
    assert "No module named 'typer'; activate the environment with `source .venv/bin/activate`" in answer.stderr


def test_a_python_that_is_too_old_is_named():
    code = "import sys; sys.version_info = (3, 9, 2); sys.path.insert(0, 'stages'); import environment"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (1, 1)
    assert answer.stderr.startswith("error: this is Python 3.9.2, rrcm needs 3.11 or newer; activate the")
