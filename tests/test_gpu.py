"""`benchmarks/gpu.py`: its checks run here on the CPU, and a failed one fails the command."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from benchmarks import gpu
from rrcm.utils.errors import RRCMError


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_all_checks_run_on_a_cpu(tmp_path):
    command = [sys.executable, REPOSITORY / "benchmarks/gpu.py", "--device", "cpu", "--votes", "20000"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "FAILED" not in answer.stdout
    assert len(re.findall(r"\| ok +\|", answer.stdout)) > 15
    for check in gpu.CHECKS:
        assert f"({check.__name__.replace('_', ' ')})" in answer.stdout


def test_a_failed_check_is_told_and_fails_the_command(monkeypatch, capsys):
    def check_one(bench):
        yield gpu.at_most("the difference", 0.5, 0.1)
        yield gpu.at_most("another", 0.05, 0.1)

    monkeypatch.setattr(gpu, "CHECKS", [check_one])
    monkeypatch.setenv("RRCM_RUNS", "")  # which the command sets
    with pytest.raises(RRCMError, match="1 checks failed: the difference"):
        gpu.main("cpu")
    assert re.search(r"the difference +\| 0\.5 +\| at most 0\.1 +\| FAILED", capsys.readouterr().out)
