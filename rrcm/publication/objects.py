"""The run of a published result: where it lies, or fetched from the objects that DVC keeps.

DVC stores each file under the MD5 of its content, and a folder as a list of its files, in its cache and in a remote.
Reading these objects needs neither DVC nor git, and writes nothing into the repository.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from rrcm.publication.result import Result, files_below
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import read_json

STORES = (".dvc/cache/files/md5", "artifacts/files/md5")  # DVC's cache, and the remote in this repository


@contextmanager
def open_run(result: Result) -> Iterator[Path]:
    """The folder run/ of a result: as it lies there, or else a temporary one with the objects at hand.

    If these are not all here, `dvc pull` fetches the run from the remote, into its place. Raises `RRCMError` if that
    fails, or an object is damaged.
    """
    with open_local_run(result) as run:
        if run is None:
            pull(result)
        yield run or result.folder / "run"


@contextmanager
def open_local_run(result: Result, within: str = "") -> Iterator[Path | None]:
    """As `open_run`, with None in place of a pull. Of the objects, only files whose path starts with `within`."""
    run = result.folder / "run"
    with tempfile.TemporaryDirectory(prefix="rrcm_") as scratch:
        if not run.is_dir():
            run = Path(scratch) / "run"
            run = run if assemble(result, run, within) else None
        yield run


def assemble(result: Result, output: Path, within: str = "") -> bool:
    """Write the run's files to the folder `output` from the objects in STORES. False if one of these is not here.

    Raises `RRCMError` for a damaged object: its content has another hash than its name.
    """
    listing = _find_object(result.root, tracked_md5(result))
    if listing is None:
        return False
    for entry in _read_listing(listing):
        if entry["relpath"].startswith(within):
            found = _find_object(result.root, entry["md5"])
            if found is None:
                return False
            path = output / entry["relpath"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_checked(found, entry["md5"]))
    return True


def tracked_md5(result: Result) -> str:
    """The hash of the run in run.dvc, for DVC. Raises `RRCMError` if it has none."""
    path = result.folder / "run.dvc"
    try:
        (out,) = yaml.safe_load(path.read_text(encoding="utf-8"))["outs"]
        md5 = out["md5"]
        if not (isinstance(md5, str) and md5.endswith(".dir") and len(md5) == 36 and out["path"] == "run"):
            raise ValueError("it names no folder run")
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; restore it with git, or publish {result.name} again") from None
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise RRCMError(f"{path}: cannot be read ({one_line(error)}); restore it with git") from None
    return md5


def folder_md5(folder: Path) -> str:
    """The hash that DVC gives a folder: the MD5 of the list of its files, which has their MD5."""
    entries = [
        {"md5": hashlib.md5((folder / name).read_bytes()).hexdigest(), "relpath": name} for name in files_below(folder)
    ]
    return f"{hashlib.md5(json.dumps(entries).encode()).hexdigest()}.dir"


def pull(result: Result) -> None:
    """Fetch the run from DVC's remote into its place. Raises `RRCMError` in one line if that fails."""
    target = f"{result.label}/run.dvc"
    command = [sys.executable, "-m", "dvc", "pull", target]
    answer = subprocess.run(command, cwd=result.root, capture_output=True, text=True)
    if answer.returncode != 0 or not (result.folder / "run").is_dir():
        said = one_line(RuntimeError(answer.stderr.strip().rpartition("ERROR: ")[2] or answer.stdout))
        raise RRCMError(
            f"{result.label}/run: is not here, and DVC could not fetch it ({said}); "
            f"restore artifacts/ with git, or check the remote that .dvc/config names"
        )


def _find_object(root: Path, md5: str) -> Path | None:
    places = (root / store / md5[:2] / md5[2:] for store in STORES)
    return next((place for place in places if place.is_file()), None)


def _checked(path: Path, md5: str) -> bytes:
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != md5.removesuffix(".dir"):
        remedy = "restore it with git" if "artifacts" in path.parts else "delete it, and verify again"
        raise RRCMError(f"{path}: is damaged: its content has another hash than its name; {remedy}")
    return content


def _read_listing(path: Path) -> list[dict[str, str]]:
    """The files of a folder as DVC lists them. Raises `RRCMError` for a list that could lead out of the folder."""
    _checked(path, path.parent.name + path.name)
    entries = read_json(path)
    names = [entry.get("relpath", "") if isinstance(entry, dict) and "md5" in entry else "" for entry in entries]
    if not all(names) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise RRCMError(f"{path}: lists no files of a folder; restore it with git")
    return entries
