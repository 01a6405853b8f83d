"""Start-up: importing a stage loads no package that only some runs need, and switches garbage collection off first."""

import json
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
