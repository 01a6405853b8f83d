"""Resuming: a stage that is killed with SIGKILL and run again ends with the bytes of an undisturbed run."""

import os
import shutil
import signal
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from conftest import Answer, change, files_of, stage, start


def kill_when(folder: Path, name: str, arguments: list[str], pattern: str, count: int = 1, later: int = 0) -> bool:
    """Start a stage and kill it when `count` files in `folder` match `pattern`, or `later` polls (of 1 ms) after that.

    Returns False if the stage ended first."""
    process = start(folder, name, *arguments)
    while process.is_alive():
        if len(list(folder.glob(pattern))) >= count:
            later -= 1
        if later < 0:
            process.kill()
        wait([process.sentinel], timeout=0.001)
    process.join()
    return process.exitcode == -signal.SIGKILL


def messages(answer: Answer) -> str:
    """What a successful stage printed to stderr."""
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def kill_while_writing(folder: Path, name: str, arguments: list[str], pattern: str, output: Path) -> None:
    """Kill a stage while a short-lived file that matches `pattern` exists; try again if the stage was too fast."""
    for _ in range(10):
        if kill_when(folder, name, arguments, pattern):
            return
        shutil.rmtree(output)
    pytest.fail(f"never caught {name} with {pattern}")


@pytest.mark.slow
def test_pre_training_resumes_after_kills_at_its_weak_points(project, trained):
    checkpoints, output = "runs/pretrain-*/*.safetensors", project / "models/pretrain/rrcm"
    kill_while_writing(project, "pretrain", [], "runs/pretrain-*/.*.tmp", output)  # while writing a checkpoint
    assert kill_when(project, "pretrain", [], "runs/pretrain-*/lock")  # at the start
    assert kill_when(project, "pretrain", [], checkpoints)  # right after a checkpoint
    assert kill_when(project, "pretrain", [], checkpoints, count=2, later=5)  # between two
    if kill_when(project, "pretrain", [], "models/pretrain/.rrcm.tmp"):  # while writing the output, if we catch it
        assert not output.exists()
        assert "resuming" in messages(stage(project, "pretrain"))
    assert files_of(output) == files_of(trained / "models/pretrain/rrcm")
    assert [p.name for p in (project / "models").iterdir()] == ["pretrain"]  # no scratch folder is left
    assert not list((project / "runs").glob("*"))


@pytest.mark.slow
def test_fine_tuning_resumes_after_kills_at_its_weak_points(project, trained):
    (project / "models/pretrain").mkdir(parents=True)
    (project / "models/pretrain/rrcm").symlink_to(trained / "models/pretrain/rrcm")
    output = project / "models/rrcm"
    kill_while_writing(project, "finetune", ["rrcm", "0.5"], "runs/finetune-*/.*.tmp", output)
    for count in (1, 2):
        assert kill_when(project, "finetune", ["rrcm", "0.5"], "runs/finetune-*/*.safetensors", count=count)
    assert "resuming" in messages(stage(project, "finetune", "rrcm", "0.5"))
    assert files_of(output) == files_of(trained / "models/rrcm")


def test_the_older_checkpoint_replaces_a_damaged_one(project, trained):
    assert kill_when(project, "pretrain", [], "runs/pretrain-*/*.safetensors", count=2, later=1)
    *_, newest = sorted(project.glob("runs/pretrain-*/[0-9]*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    printed = messages(stage(project, "pretrain"))
    assert f"{newest.name}: damaged checkpoint skipped" in printed and "resuming" in printed
    assert files_of(project / "models/pretrain/rrcm") == files_of(trained / "models/pretrain/rrcm")


@pytest.mark.slow
def test_changed_settings_or_data_start_a_new_run(project):
    change(project, pretrain__steps=12, pretrain__max_levels=40)
    assert kill_when(project, "pretrain", [], "runs/pretrain-*/*.safetensors")
    change(project, pretrain__lr=5e-4)
    assert "resuming" not in messages(stage(project, "pretrain"))
    change(project, pretrain__lr=1e-3)
    shards = project / "data/shards"
    shards.unlink()
    change(project, data__shard_size=300)
    messages(stage(project, "shard_data"))
    assert "resuming" not in messages(stage(project, "pretrain"))


def test_a_run_is_locked_while_it_is_running(project):
    first = start(project, "pretrain")
    while not list(project.glob("runs/pretrain-*/[0-9]*.safetensors")):
        assert first.is_alive()
        wait([first.sentinel], timeout=0.01)
    os.kill(first.pid, signal.SIGSTOP)
    second = stage(project, "pretrain")
    first.kill()
    first.join()
    assert second.returncode == 1 and "another process" in second.stderr


def test_runs_of_dvc_experiments_are_kept_in_the_repository(monkeypatch, tmp_path):
    from rrcm.utils.resume import runs_directory

    monkeypatch.delenv("RRCM_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs_directory() == tmp_path / "runs"
    queued = tmp_path / ".dvc/tmp/exps/tmpabc"
    queued.mkdir(parents=True)
    monkeypatch.chdir(queued)
    assert runs_directory() == tmp_path / "runs"
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "elsewhere"))
    assert runs_directory() == tmp_path / "elsewhere"
