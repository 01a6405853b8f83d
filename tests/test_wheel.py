"""A wheel of this repository holds the whole package; an editable installation would hide a file that is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = [pytest.mark.thorough, pytest.mark.xdist_group("wheel")]  # built once
pytestmark += [pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="git lists the files to copy")]

IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module
from pathlib import Path

import rrcm

for module in pkgutil.walk_packages(rrcm.__path__, "rrcm."):
    import_module(module.name)
for name in rrcm.__all__:
    getattr(rrcm, name)
modules = {name: Path(module.__file__) for name, module in sys.modules.items() if name.split(".")[0] == "rrcm"}
for name, path in modules.items():  # an editable installation also finds modules that the wheel lacks
    assert path.resolve().is_relative_to(Path(sys.argv[1]).resolve()), f"{name} came from {path}"
print(*modules)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    answer = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, f"{answer.stdout[-2000:]}\n{answer.stderr[-2000:]}"
    return answer.stdout


def package_files() -> list[str]:
    """Files of the package that git knows or would add."""
    names = run("git", "ls-files", "-co", "--exclude-standard", "rrcm", cwd=REPOSITORY).splitlines()
    return [name for name in names if (REPOSITORY / name).is_file()]


def install(folder: Path, files: list[str]) -> Path:
    """Build a wheel from a copy of `files` and install it without dependencies into an otherwise empty folder."""
    source = folder / "source"
    for name in ["pyproject.toml", "README.md", "LICENSE", *files]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    offline = ("--quiet", "--no-deps", "--no-index")
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("rrcm-*.whl")
    run(*pip, "install", *offline, "--target", folder / "target", wheel, cwd=folder)
    shutil.rmtree(source)
    return folder / "target"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("wheel"), package_files())


def import_all(target: Path) -> set[str]:
    """Names of the modules of rrcm in `target`, all of which were imported from there."""
    # -P keeps the working directory off the path; PYTHONPATH comes before the editable installation
    return set(run(sys.executable, "-P", "-c", IMPORT_ALL, target, cwd=target.parent, PYTHONPATH=str(target)).split())


def test_every_module_is_imported_from_the_wheel(installed):
    sources = [name for name in package_files() if name.endswith(".py")]
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in sources}
    assert import_all(installed) == modules and len(modules) > 40


def test_every_other_file_of_the_package_is_in_the_wheel(installed):
    others = [name for name in package_files() if not name.endswith((".py", "README.md"))]
    missing = [name for name in others if not (installed / name).is_file()]
    assert "rrcm/py.typed" in others  # type checkers then read the annotations
    assert not missing, f"add them to package-data under [tool.setuptools] in pyproject.toml: {missing}"
    for name in others:
        assert (installed / name).read_bytes() == (REPOSITORY / name).read_bytes()


def test_the_wheel_has_the_command(installed):
    (entry_points,) = installed.glob("rrcm-*.dist-info/entry_points.txt")
    assert "rrcm = rrcm.cli:main" in entry_points.read_text()


def test_a_missing_package_would_be_noticed(tmp_path):
    """Neither the repository nor an editable installation takes its place."""
    target = install(tmp_path, [name for name in package_files() if not name.startswith("rrcm/objectives/")])
    with pytest.raises(AssertionError, match=r"rrcm\.objectives.* came from|No module named 'rrcm\.objectives"):
        import_all(target)
