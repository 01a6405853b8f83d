"""Stages killed with SIGKILL and run again: the same bytes as if nothing had happened."""

import os
import shutil
import signal
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from conftest import Answer, change, files_of, stage, start


def kill_when(folder: Path, name: str, arguments: list[str], pattern: str, count: int = 1, later: int = 0) -> bool:
    """Start a stage and SIGKILL it when `count` files match `pattern` in `folder`, `later` polls (1 ms) after that.

    Returns whether it was killed (it may have ended before)."""
    process = start(folder, name, *arguments)
    while process.is_alive():
        if len(list(folder.glob(pattern))) >= count:
            later -= 1
        if later < 0:
            process.kill()
        wait([process.sentinel], timeout=0.001)
    process.join()
    return process.exitcode == -signal.SIGKILL


def finished(answer: Answer) -> str:
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def kill_while_writing(folder: Path, name: str, arguments: list[str], pattern: str, output: Path) -> None:
    """SIGKILL a stage while the short-lived file `pattern` is there; a run that got away is undone and tried again."""
    for _ in range(10):
        if kill_when(folder, name, arguments, pattern):
            return
        shutil.rmtree(output)
    pytest.fail(f"never caught {name} with {pattern}")


def test_pretrain(project, trained):
    checkpoints, output = "runs/pretrain-*/*.safetensors", project / "models/pretrain/rrcm"
    kill_while_writing(project, "pretrain", [], "runs/pretrain-*/.*.tmp", output)  # while writing a checkpoint
    assert kill_when(project, "pretrain", [], "runs/pretrain-*/lock")  # at the very start
    assert kill_when(project, "pretrain", [], checkpoints)  # right after a checkpoint
    assert kill_when(project, "pretrain", [], checkpoints, count=2, later=5)  # between two
    if kill_when(project, "pretrain", [], "models/.pretrain.tmp"):  # while writing the output, if it can be caught
        assert not output.exists()
        assert "resuming" in finished(stage(project, "pretrain"))
    assert files_of(output) == files_of(trained / "models/pretrain/rrcm")
    assert [p.name for p in (project / "models").iterdir()] == ["pretrain"]  # nothing half-done is left
    assert not list((project / "runs").glob("*"))


def test_finetune(project, trained):
    (project / "models").mkdir()
    (project / "models/pretrain/rrcm").symlink_to(trained / "models/pretrain/rrcm")
    output = project / "models/rrcm"
    kill_while_writing(project, "finetune", ["rrcm", "0.5"], "runs/finetune-*/.*.tmp", output)
    for count in (1, 2):
        assert kill_when(project, "finetune", ["rrcm", "0.5"], "runs/finetune-*/*.safetensors", count=count)
    assert "resuming" in finished(stage(project, "finetune", "rrcm", "0.5"))
    assert files_of(output) == files_of(trained / "models/rrcm")


def test_a_damaged_newest_checkpoint_gives_way_to_the_older(project, trained):
    assert kill_when(project, "pretrain", [], "runs/pretrain-*/*.safetensors", count=2, later=1)
    *_, newest = sorted(project.glob("runs/pretrain-*/[0-9]*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    said = finished(stage(project, "pretrain"))
    assert f"{newest.name}: damaged checkpoint skipped" in said and "resuming" in said
    assert files_of(project / "models/pretrain/rrcm") == files_of(trained / "models/pretrain/rrcm")


def test_state_is_not_resumed_under_changed_settings_or_data(project, tmp_path):
    assert kill_when(project, "pretrain", [], "runs/pretrain-*/*.safetensors")
    change(project, pretrain__lr=5e-4)
    assert "resuming" not in finished(stage(project, "pretrain"))
    change(project, pretrain__lr=1e-3)
    shards = project / "data/shards"
    shards.unlink()
    change(project, data__shard_size=300)
    finished(stage(project, "shard_data"))
    assert "resuming" not in finished(stage(project, "pretrain"))


def test_one_run_is_not_done_twice_at_once(project):
    first = start(project, "pretrain")
    while not list(project.glob("runs/pretrain-*/[0-9]*.safetensors")):
        assert first.is_alive()
    os.kill(first.pid, signal.SIGSTOP)
    second = stage(project, "pretrain")
    first.kill()
    first.join()
    assert second.returncode == 1 and "another process is doing this very run" in second.stderr


def test_the_place_of_runs(monkeypatch, tmp_path):
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
