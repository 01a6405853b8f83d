"""Commands run the code of their own checkout, and its files keep their bytes, whatever is installed or configured."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMANDS, REPOSITORY

import rrcm
from rrcm import cli

OWN = "import sys; sys.exit('own code')\n"  # in place of a module of another checkout: it shows that it was imported
SPAWNING = """
import multiprocessing
import environment

def work():
    import rrcm.methods

if __name__ == "__main__":
    process = multiprocessing.get_context({!r}).Process(target=work)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.fixture
def other(tmp_path) -> Path:
    """Another checkout. Its environment is not active; this checkout's environment is, through PYTHONPATH."""
    folder = tmp_path / "other"
    for name in ("stages", "conf", "benchmarks"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "rrcm/utils").mkdir(parents=True)
    for name in ("__init__.py", "derived.py", "methods.py", "utils/__init__.py", "utils/app.py"):
        (folder / "rrcm" / name).write_text(OWN if name not in ("__init__.py", "utils/__init__.py") else "")
    return folder


def run(folder: Path, *command: object, **environment: str) -> str:
    """The last line printed by a command that must exit with status 1, run in this checkout's environment."""
    everything = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    answer = subprocess.run(list(map(str, command)), cwd=folder, env=everything, capture_output=True, text=True)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr, answer.stderr
    return answer.stderr.splitlines()[-1]


def test_the_tests_import_this_checkout():
    assert Path(rrcm.__file__).parent.parent == REPOSITORY
    ask = [sys.executable, "-P", "-c", "import rrcm; print(rrcm.__file__)"]
    printed = subprocess.run(ask, cwd="/", capture_output=True, text=True).stdout  # what the tests start does so too
    assert printed.strip() == rrcm.__file__


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("safe", ["", "1"])
def test_a_command_runs_the_code_of_its_own_checkout(other, command, safe):
    assert run(other, sys.executable, f"stages/{command}", PYTHONSAFEPATH=safe) == "own code"


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("stages", ["certify.py"]),
        ("stages", ["./certify.py"]),
        ("conf", ["../stages/certify.py"]),
        (".", ["link/certify.py"]),
        (".", ["-I", "stages/certify.py"]),
        (".", ["-m", "stages.certify"]),
        (".", ["-c", "import runpy; runpy.run_path('stages/certify.py', run_name='__main__')"]),
        (".dvc/tmp/exps/standalone/abc", ["stages/certify.py"]),
    ],
)
def test_so_it_does_from_anywhere(other, folder, command):
    """Through a link, with the interpreter isolated, or in the checkout that DVC makes for an experiment."""
    (other / "link").symlink_to(other / "stages")
    if folder.startswith(".dvc"):
        (other / folder).mkdir(parents=True)
        for name in ("stages", "rrcm"):
            (other / name).rename(other / folder / name)
        shutil.copytree(REPOSITORY / "rrcm", other / "rrcm")  # the workspace, with other code
    assert run(other / folder, sys.executable, *command) == "own code"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_so_do_the_processes_that_it_starts(other, method):
    """As the workers of a loader are started."""
    script = (other / "stages/certify.py").read_text().partition("from environment")[0] + SPAWNING.format(method)
    (other / "stages/certify.py").write_text(script)
    for name in ("app", "errors"):
        shutil.copy(REPOSITORY / f"rrcm/utils/{name}.py", other / "rrcm/utils")
    assert run(other, sys.executable, "stages/certify.py") == "own code"


def test_a_package_that_was_imported_before_is_refused(other):
    (other / "sitecustomize.py").write_text("import rrcm.utils.app")
    said = run(other, sys.executable, "stages/certify.py", PYTHONPATH=f"{REPOSITORY}:{other}")
    assert (
        said.startswith("error: ") and f"stages/environment.py: rrcm was imported from {REPOSITORY}; activate" in said
    )


def test_a_benchmark_with_another_checkouts_package_is_refused(other):
    said = run(other, sys.executable, "benchmarks/latency.py", "--help")
    assert said.startswith("error: ") and f"latency.py: rrcm was imported from {REPOSITORY}; activate" in said
    assert said.endswith(f"environment of {other} (`make install` makes it)")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_every_benchmark_imports_the_module_that_refuses(path):
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert any(node.module == "rrcm.utils.app" for node in imports)


def test_settings_are_composed_by_the_checkout_that_has_them(other):
    """`dvc exp run` in another checkout: its settings are derived by its own table of methods."""
    compose = f"from dvc.utils.hydra import compose_and_dump; conf = {str(other / 'conf')!r}\n"
    compose += "compose_and_dump('params.yaml', conf, None, 'config', conf + '/plugins', [])"
    assert run(other, sys.executable, "-P", "-c", compose) == "own code"


@pytest.mark.parametrize(("place", "notes"), [("other", 1), ("other/conf", 1), ("here", 0), ("nowhere", 0)])
def test_the_console_command_says_that_another_checkouts_code_does_not_run(other, monkeypatch, capsys, place, notes):
    folders = {"here": REPOSITORY / "tests", "nowhere": other.parent}
    monkeypatch.chdir(folders.get(place, other.parent / place))
    monkeypatch.setattr(cli, "run_app", lambda app: None)
    cli.main()
    said = capsys.readouterr().err.splitlines()
    assert said == notes * [f"note: this is the rrcm of {REPOSITORY}; the code of {other} does not run"]


@pytest.mark.parametrize("autocrlf", ["true", "input", "false"])
def test_git_keeps_the_bytes_whatever_it_is_told_about_line_ends(tmp_path, autocrlf):
    """DVC compares hashes of the files, shells read no CR, and DVC's remote names files by their content."""
    names = ("stages/slurm.sh", "Makefile", "params.yaml", ".ci/run", ".gitattributes")
    files = {name: (REPOSITORY / name).read_bytes() for name in names}
    files |= {"artifacts/files/md5/00/4b": b"a,b\r\n1,2\r\n", "x.png": b"\x89PNG\r\n\x1a\n", "rrcm/x.py": b"1\n"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    git = ["git", "-c", f"core.autocrlf={autocrlf}", "-c", "core.safecrlf=false"]
    git += ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "t"], cwd=tmp_path, check=True)
    for name in files:
        (tmp_path / name).unlink()
    subprocess.run([*git, "checkout", "-q", "."], cwd=tmp_path, check=True)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
