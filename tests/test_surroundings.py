"""Commands in bare surroundings, as in a container under a user without a name: they run, or say what they need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, compose, files_of

from rrcm.utils.app import name_user

NAMELESS = "import pwd\ndef getpwuid(number):\n    raise KeyError(number)\npwd.getpwuid = getpwuid\n"
VARIABLES = ("HOME", "LOGNAME", "USER", "TMPDIR", "TMP", "XDG_CACHE_HOME", "RRCM_RUNS", "OMP_NUM_THREADS", "WORLD_SIZE")
SURROUNDINGS = [
    {},
    dict.fromkeys(VARIABLES, "") | {"PATH": "", "LANG": "C", "PYTHONSAFEPATH": "1"},
    {"HOME": "/nowhere", "TMPDIR": "/nowhere", "LC_ALL": "tr_TR.ISO-8859-9", "TERM": "none"},
]


def run(folder: Path, environment: dict[str, str], command: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a stage as a user without a name, with this environment and no more."""
    (folder / "sitecustomize.py").write_text(NAMELESS)
    words = [sys.executable, str(REPOSITORY / "stages" / f"{command}.py"), *map(str, arguments)]
    environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
@pytest.mark.parametrize("environment", SURROUNDINGS, ids=["bare", "empty", "wrong"])
def test_a_stage_runs_as_elsewhere(tmp_path, tiny_shards, environment):
    compose(tmp_path / "params.yaml")
    answer = run(tmp_path, environment, "shard_data")
    assert answer.returncode == 0, answer.stderr
    assert files_of(tmp_path / "data/shards") == files_of(tiny_shards)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "params.yaml", "sitecustomize.py"}


@pytest.mark.thorough
@pytest.mark.parametrize("environment", SURROUNDINGS, ids=["bare", "empty", "wrong"])
def test_so_do_the_commands_that_use_dvc(tmp_path, environment):
    assert run(tmp_path, environment, "compose").returncode == 0
    assert (tmp_path / "params.yaml").read_bytes() == (REPOSITORY / "params.yaml").read_bytes()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    site_cache_dir = .site\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  one:\n    cmd: echo 1 > one\n    outs: [one]\n")
    answer = run(tmp_path, environment, "repro")
    assert answer.returncode == 0 and "1 ran" in answer.stderr, answer.stderr
    assert (tmp_path / "runs/logs").is_dir() and not (tmp_path / "logs").exists()  # an empty RRCM_RUNS is none


@pytest.mark.parametrize(
    ("named", "before", "after"),
    [
        (False, {}, {"HOME": "/", "LOGNAME": str(os.getuid())}),
        (False, {"HOME": ""}, {"HOME": "/", "LOGNAME": str(os.getuid())}),
        (False, {"HOME": "/here", "LOGNAME": "me"}, {"HOME": "/here", "LOGNAME": "me"}),
        (False, {"HOME": "/here", "LOGNAME": ""}, {"HOME": "/here", "LOGNAME": str(os.getuid())}),
        (True, {"HOME": "", "LOGNAME": ""}, {}),  # Python asks the list of users
        (True, {"HOME": "/here"}, {"HOME": "/here"}),
    ],
)
def test_an_unnamed_user_gets_a_name_and_a_home(monkeypatch, named, before, after):
    monkeypatch.setattr("os.environ", dict(before))
    monkeypatch.setattr("pwd.getpwuid", {os.getuid(): "me"}.__getitem__ if named else {}.__getitem__)
    name_user()
    assert os.environ == after


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["stages/certify.py", "stages/repro.py", "rrcm/cli.py", "benchmarks/latency.py"])
def test_a_working_directory_that_was_deleted_is_said(tmp_path, command):
    leave = 'mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    words = ["sh", "-c", leave, "sh", sys.executable, str(REPOSITORY / command), "--help"]
    answer = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr == "error: the working directory was deleted; change to another one\n"
