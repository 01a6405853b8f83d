"""Start-up: importing a stage loads no package that only some runs need, and switches garbage collection off first."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SLOW = {"timm", "torchvision", "sklearn", "matplotlib", "webdataset", "dvclive", "dvc"}
LOADED = """
import json, runpy, sys
runpy.run_path(sys.argv[1], run_name="stage")
print(json.dumps(list(sys.modules)))
"""


@pytest.mark.parametrize("stage", ["shard_data", "pretrain", "finetune", "certify", "latency"])
def test_a_stage_imports_no_slow_package(stage):
    path = REPOSITORY / "stages" / f"{stage}.py"
    command = [sys.executable, "-c", LOADED, str(path)]
    modules = json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout)
    assert not SLOW & set(modules)
    assert modules.index("rrcm.utils.app") < modules.index("torch")  # collection is off while torch loads


DRAWING = ["stages/plot.py", "stages/attack.py", "benchmarks/trajectories.py", "benchmarks/certify.py"]


@pytest.mark.parametrize("command", DRAWING)
def test_a_command_that_draws_needs_no_backend(command):
    """A notebook tells its child processes a backend that may not be installed here."""
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", LOADED, command], cwd=REPOSITORY, env=environment, check=True)
