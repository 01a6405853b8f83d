"""Run `stages/repro.py` in small DVC repositories, for the tests of the scheduler and of warm stages."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "1",
    "SHELL": "/bin/sh",
    "CUDA_VISIBLE_DEVICES": "",
}


def init_dvc(folder: Path) -> Path:
    """Make `folder` a DVC repository without git."""
    subprocess.run(["dvc", "init", "--no-scm", "-q"], cwd=folder, env=ENVIRONMENT, check=True)
    return folder


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, REPOSITORY / "stages/repro.py", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What a scheduler that must end with `status` has printed."""
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, errors
    return output + errors


def repro(folder: Path, *arguments: str, status: int = 0, **environment: str) -> str:
    return finish(start(folder, *arguments, **environment), status)
