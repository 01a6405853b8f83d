"""Which stages DVC reruns after an edit. The edits are made in a copy of a checkout whose stages are all up to date.

    python benchmarks/edits.py
    python benchmarks/edits.py ../earlier    # another checkout, such as a worktree of an earlier commit

The outputs of the stages are dummies, so nothing is trained. Each edit is made alone. If the checkout has a stage
`fingerprint`, it runs before the others are compared and is not counted.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from dvc.repo import Repo

from rrcm.utils.app import exit_on_error, make_app

REPOSITORY = Path(__file__).resolve().parents[1]
COPIED = ("rrcm", "stages", "conf", "dvc.yaml", ".dvcignore")
SETTINGS = ["methods=[rrcm,consistency,consistency_matched,gaussian,dds]"]


class Edit(NamedTuple):
    """A change to a copy of the repository, and overrides of settings."""

    name: str
    change: Callable[[Path], None] | None = None
    settings: list[str] = []  # noqa: RUF012 (never changed)


def replace(file: str, pattern: str, replacement: str) -> Callable[[Path], None]:
    """An edit that replaces every match of the pattern in one file. There must be at least one."""

    def change(folder: Path) -> None:
        path = folder / file
        text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert count, f"{file}: has no {pattern}"
        path.write_text(text, encoding="utf-8")

    return change


def add_loss(folder: Path) -> None:
    """Add a new loss in its own file, and its registry entry."""
    (folder / "rrcm/objectives/new.py").write_text("class New:\n    terms = ()\n", encoding="utf-8")
    lazy = "Registry" in (folder / "rrcm/objectives/__init__.py").read_text(encoding="utf-8")
    entry = '"rrcm.objectives.new:New"' if lazy else "Gaussian"
    replace("rrcm/objectives/__init__.py", r'("gaussian": )', rf'"new": {entry},\n    \1')(folder)


def add_data_set(folder: Path) -> None:
    """Add a new data set, in its own file if the checkout has rrcm/sources, and its registry entry."""
    lazy = (folder / "rrcm/sources").is_dir()
    entry = '"rrcm.sources.new:read_new"' if lazy else "read_digits"
    if lazy:
        (folder / "rrcm/sources/new.py").write_text("def read_new(data):\n    pass\n", encoding="utf-8")
    lists = [name for name in ("rrcm/sources/__init__.py", "rrcm/data/datasets.py") if (folder / name).is_file()]
    registry = next(name for name in lists if '"digits": ' in (folder / name).read_text(encoding="utf-8"))
    replace(registry, r'("digits": )', rf'"new": {entry},\n    \1')(folder)


def add_row(folder: Path) -> None:
    """Add a row to the method table. In earlier checkouts the table was a dictionary of dictionaries."""
    row = {"initial_weights": None, "objective": "gaussian", "matched": False, "classifier": "classifier"}
    row |= {"base": None, "family": "noise", "label": "New", "colour": "#123456"}
    if "TABLE = {" in (folder / "rrcm/methods.py").read_text(encoding="utf-8"):
        replace("rrcm/methods.py", r"^TABLE = \{", f'TABLE = {{\n    "new": {row},')(folder)
    else:
        replace("rrcm/methods.py", r"^(  gaussian  )", r"  new  -  gaussian  classifier  #123456  New\n\1")(folder)


EDITS = [
    Edit("a comment in the random streams", replace("rrcm/utils/rng.py", r"\Z", "# a comment\n")),
    Edit(
        "a docstring of the consistency loss", replace("rrcm/objectives/consistency.py", r'\A""".*?"""', '"""New."""')
    ),
    Edit("a type hint in the random streams", replace("rrcm/utils/rng.py", r"-> np.random.Generator", "-> object")),
    Edit(
        "the order of imports of the trainer",
        replace("rrcm/training/optim.py", r"^import math\n(from collections.abc[^\n]*\n)", r"\1import math\n"),
    ),
    Edit("a new loss", add_loss),
    Edit("a new data set", add_data_set),
    Edit("a new row of the method table", add_row),
    Edit(
        "the formula of the consistency loss",
        replace("rrcm/objectives/consistency.py", r"= -entropy - ", "= -entropy + "),
    ),
    Edit("the noise of certification", replace("rrcm/certification/noise.py", r"\Z", "OTHER = 1\n")),
    Edit("a colour of the report", replace("rrcm/report/figures.py", "#56B4E9", "#56B4EA")),
    Edit("a test", lambda folder: (folder / "tests").mkdir()),
    Edit("a setting of one method", settings=["finetune.objectives.gaussian.num_noise={default: 3, sigma_0.001: 1}"]),
    Edit("a setting of a method that is not run", settings=["finetune.objectives.macer.gamma=9.0"]),
    Edit("a setting of all fine-tunings", settings=["finetune.weight_decay=0.01"]),
    Edit("a setting of certification", settings=["certify.n=1500"]),
]


def make_committed(checkout: Path, folder: Path, settings: list[str]) -> None:
    """Make `folder` a DVC repository with the code of `checkout`, in which all stages are up to date."""
    for name in COPIED:
        source = checkout / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "external").mkdir()
    (folder / "external/empty").touch()
    run(folder, "compose", *settings)
    repo = Repo.init(str(folder), no_scm=True)
    for stage in repo.index.stages:
        for out in stage.outs:
            path = Path(out.fs_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.write_text(out.def_path, encoding="utf-8")
            else:
                path.mkdir()
                (path / "file").write_text(out.def_path, encoding="utf-8")
    renew(folder)
    with contextlib.chdir(folder):
        repo.commit(force=True)
        assert repo.status() == {}


def renew(folder: Path) -> None:
    """Write the fingerprints of the current code."""
    if (folder / "stages/fingerprint.py").exists():
        run(folder, "fingerprint")


def run(folder: Path, stage: str, *arguments: str) -> None:
    """Run a script of stages/ in the copy."""
    command = [sys.executable, f"stages/{stage}.py", *arguments]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def changed_stages(folder: Path) -> set[str]:
    """The stages that DVC would rerun because their own code or settings changed, without `fingerprint`."""
    with contextlib.chdir(folder), Repo() as repo:
        status = repo.status()
    return {name for name, what in status.items() if any("changed deps" in each for each in what)} - {"fingerprint"}


def stages_after(edit: Edit, committed: Path, folder: Path, settings: list[str]) -> set[str]:
    """The stages that rerun after an edit, made in a new copy `folder` of `committed`."""
    shutil.copytree(committed, folder)
    if edit.change:
        edit.change(folder)
    if edit.settings:
        run(folder, "compose", *settings, *edit.settings)
    renew(folder)
    return changed_stages(folder)


def measure(checkout: Annotated[Path, typer.Argument(help="The checkout to copy and edit.")] = REPOSITORY) -> None:
    """Print a table of edits and the stages that DVC reruns."""
    print("| edit | stages that rerun |\n|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        committed = Path(scratch) / "committed"
        committed.mkdir()
        make_committed(checkout.resolve(), committed, SETTINGS)
        for number, edit in enumerate(EDITS):
            stages = stages_after(edit, committed, Path(scratch) / str(number), SETTINGS)
            kinds = Counter(name.partition("@")[0] for name in stages)
            text = ", ".join(f"{kind} {count}" if count > 1 else kind for kind, count in kinds.items())
            print(f"| {edit.name} | {len(stages)}{f': {text}' if text else ''} |", flush=True)


if __name__ == "__main__":
    app = make_app()
    app.command()(exit_on_error(measure))
    app()
