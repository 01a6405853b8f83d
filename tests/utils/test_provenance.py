"""The record of the environment in which an output was computed."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from rrcm.utils import provenance


def test_the_revision_is_read_without_a_lock_that_a_kill_would_leave(tmp_path):
    """`git status` takes a lock to renew an index with old times."""

    def git(*words: str) -> None:
        options = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *options, *words], cwd=tmp_path, check=True)

    source: Path = tmp_path / "package/__init__.py"
    source.parent.mkdir()
    source.touch()
    git("init", "-q")
    git("add", "package")
    git("commit", "-qm", "t")
    os.utime(source, (0, 0))
    index = (tmp_path / ".git/index").read_bytes()
    assert provenance._revision(source.parent)["dirty"] is False
    assert (tmp_path / ".git/index").read_bytes() == index


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="a downloaded archive")
def test_the_revision_of_another_users_checkout_is_read(monkeypatch):
    """For example if it is mounted into a container. Git can be made to treat this user as another one."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    revision = provenance._revision(Path(provenance.__file__).parents[1])
    refused = subprocess.run(["git", "status"], cwd=REPOSITORY, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr and len(revision["revision"]) == 40


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),  # one and a half cores
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu.max": "unreadable"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, 8),
    ],
)
def test_the_quota_of_a_container_bounds_the_cores(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert provenance.available_cores(tmp_path) == cores


def test_limits_on_the_instructions_are_recorded(monkeypatch):
    """They make a CPU round like another one, so an audit must not expect equal counts."""
    plain = provenance.describe_environment("cpu")["hardware"]["instructions"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    limited = provenance.describe_environment("cpu")
    assert limited["hardware"]["instructions"] == f"{plain}, ONEDNN_MAX_CPU_ISA=AVX2"
    assert provenance.Environment.model_validate(limited).hardware.instructions == f"{plain}, ONEDNN_MAX_CPU_ISA=AVX2"
