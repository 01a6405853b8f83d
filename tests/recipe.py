"""Take the steps of a README's recipe in a copy of the repository.

The first line of each block of code names a file, and is not part of the file. `# PATH` begins a new file. In
`# PATH, below: LINE` and `# PATH, above: LINE` the block belongs beside this line of a file that is there.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY, TINY

CODE = ("rrcm", "stages", "conf", "tests", "docs", "pyproject.toml", "dvc.yaml", "params.yaml", "Makefile", "README.md")
BLOCK = re.compile(r"^( *)```(?!sh)\w+\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
TITLE = re.compile(r"# ([\w./]+)(?:, (below|above): (.*))?")


def copy_code(folder: Path) -> Path:
    """Copy the code of this repository into `folder`; returns `folder`."""
    for name in CODE:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def follow(readme: str, heading: str, folder: Path) -> list[str]:
    """Apply all blocks of the section `heading` of `readme` to the copy in `folder`; returns the files they name."""
    text = (REPOSITORY / readme).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        apply(re.sub(f"^{indent}", "", block, flags=re.MULTILINE), folder) for indent, block in BLOCK.findall(section)
    ]


def apply(block: str, folder: Path) -> str:
    """Write one block to the file that its first line names; returns this name."""
    title, _, content = block.partition("\n")
    name, side, anchor = TITLE.fullmatch(title).groups()
    path = folder / name
    if side is None:
        assert not path.exists(), f"{name} is there already"
        path.write_text(content, encoding="utf-8")
        return name
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (place,) = (number for number, line in enumerate(lines) if line.split() == anchor.split())
    lines.insert(place + (side == "below"), content)
    path.write_text("".join(lines), encoding="utf-8")
    return name


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run Python in the copy, with its code."""
    environment = os.environ | {"PYTHONPATH": str(folder), "RRCM_RUNS": str(folder / "runs")}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def train_and_certify(folder: Path, shards: Path, method: str, *overrides: str) -> None:
    """Take a method through the stages at sigma 0.5, with the tiny settings."""
    (folder / "data").mkdir()
    (folder / "data/shards").symlink_to(shards)
    settings = ["sigmas=[0.5]", f"methods=[{method}]", "finetune.epochs=3", "finetune.evaluate_every=3", *overrides]
    settings = [
        text for text in TINY if text.partition("=")[0] not in {s.partition("=")[0] for s in settings}
    ] + settings
    pretrained = [] if "pretrain.objectives=[]" in overrides else [["stages/pretrain.py", "rrcm"]]
    for command in (
        ["stages/compose.py", *settings],
        *pretrained,
        ["stages/finetune.py", method, "0.5"],
        ["stages/certify.py", method, "0.5"],
    ):
        answer = run(folder, *command)
        assert answer.returncode == 0, answer.stderr
