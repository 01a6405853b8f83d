"""`stages/warm.py`: which stages are forked with their imports done, and that they behave like new processes."""

import os
import subprocess
from pathlib import Path

import pytest
import warm
import yaml
from conftest import REPOSITORY
from small_pipelines import ENVIRONMENT, init_dvc, repro
from warm import is_python

WHOLE = """\
import os, sys
from pathlib import Path

imported = "torch" in sys.modules
name, *words = sys.argv[1:]
Path(name).write_text(f"{imported} {words} {os.environ['DVC_STAGE']} {__name__} {Path.cwd().name}")
sys.exit({"good": None, "bad": 3, "ugly": "it went wrong"}[words[0]])
"""


def scripts(folder: Path, ending: str) -> Path:
    """Three stages that are Python scripts. `ending` is how the last one ends."""
    names = {"one": "good", "two": "good", "three": ending}
    stages = {n: {"cmd": f"python stages/whole.py {n} {w} -x", "outs": [n]} for n, w in names.items()}
    (folder / "stages").mkdir(parents=True)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (folder / "stages/whole.py").write_text(WHOLE)
    return init_dvc(folder)


@pytest.mark.thorough
def test_python_scripts_are_forked_with_the_imports_done_and_else_as_dvc_runs_them(tmp_path):
    folder = scripts(tmp_path / "pipeline", "good")
    repro(folder, "--jobs", "1")
    for name in ("one", "two", "three"):
        assert (folder / name).read_text() == f"True ['good', '-x'] {name} __main__ pipeline"
    subprocess.run(["dvc", "repro", "-f", "one"], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    assert (folder / "one").read_text() == "False ['good', '-x'] one __main__ pipeline"


@pytest.mark.thorough
@pytest.mark.parametrize("ending", ["bad", "ugly", "unknown"])
def test_a_forked_script_that_fails_is_named(tmp_path, ending):
    folder = scripts(tmp_path, ending)
    printed = repro(folder, "--jobs", "1", status=1)
    assert "error: stage three failed" in printed
    if ending != "bad":
        assert {"ugly": "it went wrong", "unknown": "KeyError: 'unknown'"}[ending] in printed


def test_other_commands_are_not_forked():
    for command in ("torchrun stages/whole.py", "python stages/a.py; rm b", "python other.py", "python stages/a.py $X"):
        assert not is_python(command)


@pytest.mark.parametrize("changed", ["nothing", "a file", "a new file", "the checkout"])
def test_a_stage_is_forked_from_what_was_imported_in_its_own_checkout_alone(tmp_path, monkeypatch, changed):
    imported, started = warm.own_sources(), []
    path = next(iter(imported))
    if changed == "a file":
        imported[path] -= 1
    if changed == "a new file":
        del imported[path]
    if changed == "the checkout":
        (tmp_path / "rrcm/utils").mkdir(parents=True)
        (tmp_path / "rrcm/utils/app.py").touch()
    monkeypatch.setattr(os, "fork", lambda: started.append("warm") or 1)
    monkeypatch.setattr(os, "waitpid", lambda *_: (1, 0))
    cold = lambda *_, **__: started.append("cold")  # noqa: E731
    cwd = str(tmp_path if changed == "the checkout" else REPOSITORY)
    warm.run_forked(imported, cold, "sh", "python stages/certify.py rrcm 0.5", cwd=cwd, env={})
    assert started == ["warm" if changed == "nothing" else "cold"]
