"""Resuming: a stage that is killed with SIGKILL and run again ends with the bytes of an undisturbed run."""

import errno
import fcntl
import importlib
import os
import shutil
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from conftest import Answer, change, files_of, in_own_mounts, stage, start

from benchmarks.gpu import resume_lenet
from rrcm.models.convnets import LeNet
from rrcm.utils import code, resume
from rrcm.utils.errors import RRCMError
from rrcm.utils.resume import RunState, fingerprint, runs_directory
from rrcm.utils.tensors import write_tensors


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
    """The stderr of a successful stage."""
    assert answer.returncode == 0, answer.stderr
    return answer.stderr


def kill_while_writing(folder: Path, name: str, arguments: list[str], pattern: str, output: Path) -> None:
    """Kill a stage while a short-lived file that matches `pattern` exists; try again if the stage was too fast."""
    for _ in range(10):
        if kill_when(folder, name, arguments, pattern):
            return
        shutil.rmtree(output)
    pytest.fail(f"never caught {name} with {pattern}")


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.slow
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


HELPER = "rrcm.utils.errors"  # a short module that imports nothing


@pytest.fixture
def own_code(monkeypatch, tmp_path) -> Path:
    """A package of the user: `net` has the network and imports `maths`, which imports `values`."""
    package = tmp_path / "users_package"
    package.mkdir()
    files = {
        "__init__": "",
        "net": "from torch import nn\nfrom users_package import maths\nclass Net(nn.Module):\n    f = maths.f\n",
        "maths": "from . import values\ndef f(self, x):\n    return values.SCALE * x\n",
        "values": "SCALE = 2\n",
        "unused": "",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(files):
        monkeypatch.delitem(sys.modules, f"users_package.{name}", raising=False)
    monkeypatch.delitem(sys.modules, "users_package", raising=False)
    return package


@pytest.mark.parametrize(("file", "counts"), [("net", True), ("maths", True), ("values", True), ("unused", False)])
def test_the_code_that_a_model_runs_belongs_to_the_mark(own_code, file, counts):
    """This holds for any author and any way of importing it."""
    network = importlib.import_module("users_package.net").Net()
    before = fingerprint({}, {}, HELPER, network)
    source = own_code / f"{file}.py"
    source.write_text(source.read_text() + "# a comment\n")
    assert fingerprint({}, {}, HELPER, network) == before
    source.write_text(source.read_text() + "VERSION = 2\n")
    assert (fingerprint({}, {}, HELPER, network) != before) == counts


def test_settings_inputs_module_and_objects_belong_to_the_mark():
    marks = [
        fingerprint(*each)
        for each in (
            ({}, {}, HELPER),
            ({"a": 1}, {}, HELPER),
            ({}, {"a": "1"}, HELPER),
            ({}, {}, "rrcm.utils.philox"),
            ({}, {}, HELPER, torch.nn.ReLU()),
            ({}, {}, HELPER, torch.nn.ReLU(), torch.nn.ReLU()),
        )
    ]
    assert len(set(marks)) == len(marks) and all(len(mark) == 16 for mark in marks)


@pytest.mark.parametrize("name", ["models.kinds", "models.convnets", "certification.stopping", "utils.philox"])
def test_every_module_that_certification_runs_belongs_to_the_mark(monkeypatch, name):
    """This includes the network's module, which certification does not import by name."""
    network = LeNet(16, 1, 2)
    before = fingerprint({}, {}, "rrcm.certification.certify", network)
    read = code.read_module

    def changed(module: str, path: Path) -> code.Module:
        found = read(module, path)
        return found._replace(fingerprint="other") if module == f"rrcm.{name}" else found

    monkeypatch.setattr(code, "read_module", changed)
    assert fingerprint({}, {}, "rrcm.certification.certify", network) != before


def test_a_model_that_is_nested_too_deeply_is_refused_in_one_line():
    network = torch.nn.Identity()
    for _ in range(1000):
        network = torch.nn.Sequential(network)
    with pytest.raises(RRCMError, match="nested too deeply"):
        fingerprint({}, {}, HELPER, network)


@pytest.fixture
def state(monkeypatch, tmp_path) -> RunState:
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "runs"))
    return RunState("train", "0")


def fail(number: int):
    """A function that raises an error of the system."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fails


def test_without_locks_a_run_goes_on_with_a_note(monkeypatch, state, capsys):
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    state.lock()
    assert capsys.readouterr().err.splitlines() == [
        f"note: {state.folder} has no file locks (No locks available); do not start the same run twice at once"
    ]


@pytest.mark.parametrize(("where", "number"), [("mkdir", errno.EROFS), ("open", errno.EACCES)])
def test_a_runs_folder_that_cannot_be_written_is_one_line(monkeypatch, state, where, number):
    """A read-only mount; a lock file that another user has left."""
    monkeypatch.setattr(Path, where, fail(number))
    with pytest.raises(RRCMError, match=rf"{state.folder}: cannot write it \({os.strerror(number)}.*set RRCM_RUNS to"):
        state.lock()


def test_a_full_disk_keeps_the_checkpoint_before(monkeypatch, state, capsys):
    state.save(1, {"a": torch.ones(2)}, {})
    monkeypatch.setattr(resume, "write_tensors", fail(errno.ENOSPC))
    with pytest.raises(
        RRCMError, match=r"000000002.safetensors: cannot write it \(No space .*; free some space; nothing"
    ):
        state.save(2, {"a": torch.ones(2)}, {})
    assert state.load()[0] == 1 and len(list(state.folder.iterdir())) == 2


def test_weights_can_be_read_by_whom_the_umask_lets(tmp_path):
    """A group may share models and runs, but safetensors writes files that only the owner can read."""
    (tmp_path / "other").touch()
    write_tensors(tmp_path / "weights", {"a": torch.ones(2)})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


SMALL = """\
mount -t tmpfs -o size=16k tmpfs "$1" || exit 77
exec "$2" -c '
import sys, torch
from pathlib import Path
from rrcm.utils.errors import RRCMError
from rrcm.utils.tensors import save_tensors
try:
    save_tensors(Path(sys.argv[1]) / "weights", {"a": torch.ones(10_000)})
except RRCMError as error:
    print(error)
' "$1"
"""


@pytest.mark.thorough
def test_a_disk_that_is_really_full_is_one_line(tmp_path):
    """safetensors raises an error of its own."""
    answer = in_own_mounts(SMALL, tmp_path, sys.executable)
    assert answer.stdout == (
        f"{tmp_path}/weights: cannot write it (No space left on device); free some space; nothing was overwritten\n"
    )


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(monkeypatch, state):
    """It may belong to another user. If it were skipped silently, the run would start again and delete it."""
    state.save(1, {"a": torch.ones(2)}, {})
    monkeypatch.setattr(resume, "sha256_file", fail(errno.EACCES))
    with pytest.raises(RRCMError, match=r"1.safetensors: cannot be read \(Permission denied\)"):
        state.load()
    monkeypatch.setattr(resume, "sha256_file", fail(errno.EIO))
    assert state.load() is None


def test_runs_of_dvc_experiments_are_kept_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.delenv("RRCM_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert runs_directory() == tmp_path / "runs"
    queued = tmp_path / ".dvc/tmp/exps/tmpabc"
    queued.mkdir(parents=True)
    monkeypatch.chdir(queued)
    assert runs_directory() == tmp_path / "runs"
    monkeypatch.setenv("RRCM_RUNS", str(tmp_path / "elsewhere"))
    assert runs_directory() == tmp_path / "elsewhere"


def test_a_process_that_outlives_the_run_does_not_hold_its_lock(state):
    """Loader workers outlive a killed main process by some seconds."""
    state.lock()
    (ready, says_ready), (end, says_end) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(says_end)
        os.write(says_ready, b"1")
        os.read(end, 1)  # until the test ends
        os._exit(0)
    try:
        os.read(ready, 1)
        state._lock.close()  # as the kernel does for a killed process
        state.lock()
    finally:
        os.close(says_end)
        os.waitpid(child, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_moments_keep_the_memory_layout_of_their_weights(tmp_path, optimizer):
    """Files do not keep it. Fused optimizers traverse weights and moments in memory order, or refuse them on a GPU."""
    (network, _), (resumed, moments_of) = resume_lenet(torch.device("cpu"), optimizer, tmp_path)
    for weight, moments in moments_of.state.items():
        assert all(m.stride() == weight.stride() for m in moments.values() if m.shape == weight.shape)
    for name, weight in network.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
