"""Open the run of a published result, in its folder or from the objects that DVC keeps.

DVC stores each file under the MD5 of its content, and a folder as a list of its files, in its cache and in a remote.
Reading these objects requires neither DVC nor git, and writes nothing into the repository.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from rrcm.publication.result import Result, files_below
from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import read_json, write_text

HASH = re.compile(r"\b[0-9a-f]{32}(?:\.dir)?\b")  # of an object in a file of DVC
STORES = (".dvc/cache/files/md5", "artifacts/files/md5")  # DVC's cache, and the remote in this repository


@contextmanager
def open_run(result: Result) -> Iterator[Path]:
    """The folder run/ of a result, or else a temporary folder that is assembled from local objects.

    If some objects are missing, `dvc pull` fetches run/ from the remote. Raises `RRCMError` if that fails, or if an
    object is damaged.
    """
    with open_local_run(result) as run:
        if run is None:
            pull(result)
        yield run or result.folder / "run"


@contextmanager
def open_local_run(result: Result, within: str | tuple[str, ...] = "") -> Iterator[Path | None]:
    """Like `open_run`, but None instead of a pull. Only files whose path starts with one of `within` are assembled."""
    run = result.folder / "run"
    with tempfile.TemporaryDirectory(prefix="rrcm_") as scratch:
        if not run.is_dir():
            run = Path(scratch) / "run"
            run = run if assemble(result, run, within) else None
        yield run


def find_file(path: Path, stack: ExitStack, opened: dict[Path, Path]) -> Path:
    """The path at which the content of a file lies. A published file need not lie in its folder.

    If `path` is results/NAME/seed_S/run/... and missing, the certificates and timings of the run are assembled in a
    temporary folder, which `stack` removes. `opened` keeps these folders. Raises `RRCMError` if objects are missing.
    """
    folder = next((parent for parent in path.parents if parent.name == "run"), None)
    if path.exists() or folder is None or not folder.with_suffix(".dvc").is_file():
        return path
    if folder not in opened:
        name, seed = folder.parts[-3:-1]
        result = Result(folder.parents[3], name, int(seed.removeprefix("seed_")))
        run = stack.enter_context(open_local_run(result, ("certificates/", "timings/")))
        if run is None:
            raise RRCMError(f"{folder}: is not here; fetch it with `dvc pull {result.label}/run.dvc`")
        opened[folder] = run
    return opened[folder] / path.relative_to(folder)


def assemble(result: Result, output: Path, within: str | tuple[str, ...] = "") -> bool:
    """Write the run's files to the folder `output` from the objects in STORES. False if an object is missing.

    Raises `RRCMError` for a damaged object, whose content has another hash than its name.
    """
    listing = _find_object(result.root, tracked_md5(result))
    if listing is None:
        return False
    for entry in _read_listing(listing):
        if entry["relpath"].startswith(within):
            source = _find_object(result.root, entry["md5"])
            if source is None:
                return False
            path = output / entry["relpath"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_checked(source, entry["md5"]))
    return True


def tracked_md5(result: Result) -> str:
    """The hash of the run in run.dvc. Raises `RRCMError` if the file is missing or names no run."""
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
    """DVC's hash of a folder: the MD5 of the list of its files, in which each file has its own MD5."""
    entries = [
        {"md5": hashlib.md5((folder / name).read_bytes()).hexdigest(), "relpath": name} for name in files_below(folder)
    ]
    return f"{hashlib.md5(json.dumps(entries).encode()).hexdigest()}.dir"


def write_tracked(folder: Path) -> None:
    """Bring run.dvc up to date with run/, both in the `folder` of a result. The files may be new to DVC."""
    path, names = folder / "run.dvc", files_below(folder / "run")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    size = sum((folder / "run" / name).stat().st_size for name in names)
    values["outs"][0] |= {"md5": folder_md5(folder / "run"), "size": size, "nfiles": len(names)}
    write_text(path, yaml.safe_dump(values, sort_keys=False))


def list_objects(result: Result) -> set[str]:
    """The hashes of a run's files and of the list of these files. Without the list, only its own hash is known."""
    return _named(result.root, tracked_md5(result))


def delete_unnamed(root: Path, candidates: Iterable[str]) -> None:
    """Delete those `candidates` from the remote in this repository that the repository no longer names.

    Published results, other DVC files and dvc.lock name objects.
    """
    trackers = [
        path for path in (*root.glob("*.dvc"), *root.glob("[!.]*/**/*.dvc"), root / "dvc.lock") if path.is_file()
    ]
    roots = {md5 for path in trackers for md5 in HASH.findall(path.read_text(encoding="utf-8"))}
    named = set().union(*(_named(root, md5) for md5 in roots))
    for md5 in set(candidates) - named:
        path = root / STORES[1] / md5[:2] / md5[2:]
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other objects are in the folder
            path.parent.rmdir()


def _named(root: Path, md5: str) -> set[str]:
    """An object. If it is the list of a folder's files and can be read, the objects of these files follow."""
    listing = _find_object(root, md5) if md5.endswith(".dir") else None
    return {md5} | ({entry["md5"] for entry in _read_listing(listing)} if listing is not None else set())


def pull(result: Result) -> None:
    """Fetch run/ from DVC's remote. Raises `RRCMError` if that fails."""
    answer = run_dvc(result.root, "pull", f"{result.label}/run.dvc")
    if answer.returncode != 0 or not (result.folder / "run").is_dir():
        raise RRCMError(
            f"{result.label}/run: is not here, and DVC could not fetch it ({dvc_error(answer)}); "
            f"restore artifacts/ with git, or check the remote that .dvc/config names"
        )


def run_dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a command of DVC in the repository `root` and capture its output."""
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, capture_output=True, text=True)


def dvc_error(answer: subprocess.CompletedProcess) -> str:
    """The error message of a command of DVC, in one line."""
    return one_line(RuntimeError(answer.stderr.strip().rpartition("ERROR: ")[2] or answer.stdout))


def _find_object(root: Path, md5: str) -> Path | None:
    paths = (root / store / md5[:2] / md5[2:] for store in STORES)
    return next((path for path in paths if path.is_file()), None)


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
