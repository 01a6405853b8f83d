"""The Makefile makes the environment again when it is half-made, and says in one line what it cannot do.

The Python here is a shell script that makes environments with another such script. Both record their arguments.
"""

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from conftest import REPOSITORY

INNER = """#!/bin/sh
case "$*" in
    "-m pip --version") exit $(cat "$(dirname "$0")/../no_pip" 2>/dev/null || echo 0) ;;
    "-m pip install "*) echo "pip $PYTHONPATH$PYTHONHOME" >> calls; exit $(cat pip_fails 2>/dev/null || echo 0) ;;
    *) echo "$*" >> calls ;;
esac
"""
OUTER = """#!/bin/sh
case "$*" in
    *version_info*) exit $(cat too_old 2>/dev/null || echo 0) ;;
    *ensurepip*) exit $(cat no_ensurepip 2>/dev/null || echo 0) ;;
    "-m venv --clear .venv")
        echo venv >> calls; rm -rf .venv; mkdir -p .venv/bin; cp inner .venv/bin/python ;;
esac
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the Makefile, a name that has to be quoted, and a git repository."""
    folder = tmp_path / "a folder's näme"
    (folder / ".git").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    for name, script in (("inner", INNER), ("outer", OUTER)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def make(folder: Path, python: str = "./outer") -> tuple[int, str, list[str]]:
    """Exit status, standard error and calls of `make install`."""
    (folder / "calls").write_text("")
    environment = os.environ | {"PYTHONPATH": "/elsewhere", "PYTHONHOME": "/nowhere"}
    environment |= {"MAKEFLAGS": "-j4", "MAKELEVEL": "0"}  # the tests may run under `make test`
    command = ["make", "install", f"PYTHON={python}"]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return answer.returncode, answer.stderr, (folder / "calls").read_text().splitlines()


def test_the_environment_is_made_once(folder):
    assert make(folder) == (0, "", ["venv", "pip "])  # without the PYTHONPATH of another environment
    assert make(folder) == (0, "", [])


@pytest.mark.parametrize(
    ("python", "problem", "said"),
    [
        ("./nowhere", None, "error: ./nowhere is not Python 3.11 or newer; choose one with PYTHON=python3.12"),
        ("./outer", "too_old", "error: ./outer is not Python 3.11 or newer; choose one with PYTHON=python3.12"),
        ("./outer", "no_ensurepip", "error: ./outer lacks ensurepip, which brings pip; on Debian: apt install"),
    ],
)
def test_a_python_that_cannot_make_it_is_named(folder, python, problem, said):
    if problem:
        (folder / problem).write_text("1")
    status, stderr, calls = make(folder, python)
    first, second = stderr.splitlines()
    assert status and first.startswith(said) and second.startswith("make: ***")
    assert not calls and not (folder / ".venv/bin").exists()
    if problem:
        (folder / problem).unlink()
        assert make(folder) == (0, "", ["venv", "pip "])


def test_a_half_made_environment_is_made_again(folder):
    """Debian's Python without python3-venv leaves one without pip."""
    (folder / ".venv/bin").mkdir(parents=True)
    shutil.copy(folder / "inner", folder / ".venv/bin/python")
    (folder / ".venv/no_pip").write_text("1")
    assert make(folder) == (0, "", ["venv", "pip "])


def test_a_stopped_installation_goes_on(folder):
    (folder / "pip_fails").write_text("130")
    status, _, calls = make(folder)
    assert status and calls == ["venv", "pip "]
    (folder / "pip_fails").unlink()
    assert make(folder) == (0, "", ["pip "])


def test_dvc_is_told_that_there_is_no_git(folder):
    (folder / ".git").rmdir()  # a downloaded archive
    assert make(folder) == (0, "", ["venv", "pip ", "-m dvc config --local core.no_scm true"])


def test_each_test_runs_in_make_test_or_in_make_test_thorough():
    """And `make test-fast` runs a part of `make test`."""
    text = (REPOSITORY / "Makefile").read_text()
    chosen = dict(re.findall(r"^(test\S*): .*\n.* -m '?([a-z ]+)'?$", text, flags=re.MULTILINE))
    assert set(chosen) == {"test", "test-fast", "test-thorough"}
    for slow, thorough in product([False, True], repeat=2):
        runs = {name: eval(which, {}, {"slow": slow, "thorough": thorough}) for name, which in chosen.items()}
        assert runs["test"] != runs["test-thorough"] and runs["test-fast"] == (runs["test"] and not slow)


def test_all_places_name_the_same_python():
    (version,) = re.findall(r'requires-python = ">=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert f"Python {version} or newer" in (REPOSITORY / "README.md").read_text()
    for name in ("Makefile", "stages/environment.py"):
        text = (REPOSITORY / name).read_text()
        assert f"{version} or newer" in text and f"sys.version_info < ({version.replace('.', ', ')})" in text
