"""Atomic writes of files and folders, JSON, and hashes."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rrcm.utils.errors import RRCMError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    On any error the temporary file is removed and `path` is unchanged. A failed write (disk full, file too large, no
    permission) raises `RRCMError` naming `path`.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.tmp")  # a fixed name: the next run overwrites what a killed one left
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise RRCMError(f"{path}: cannot write it ({error.strerror or error}); nothing was overwritten") from error
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Like `atomic_path` for a folder: yield an empty one beside `path`, then swap it into place."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.tmp")  # a fixed name: the next run overwrites what a killed one left
    aside = path.with_name(f".{path.name}.old.tmp")  # the old folder, until the new one is in place
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        if path.exists():
            path.replace(aside)
        scratch.replace(path)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if aside.exists() and not path.exists():
            aside.replace(path)
        raise RRCMError(f"{path}: cannot write it ({error.strerror or error}); nothing was overwritten") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def expand_user(path: Path | str) -> Path:
    """`path` with the home directory in place of a leading ~, which shells leave as it is in `--option=~/path`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write `value` atomically as indented JSON with a final newline. Keys keep their order; NaN is an error."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """Write `rows` atomically as CSV. The columns are the keys of the first row; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: Path | str) -> dict:
    """Read a JSON file. Raises `RRCMError` if it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; run the stage that writes it first (dvc repro)") from None
    except (OSError, ValueError) as error:
        raise RRCMError(f"{path}: cannot be read as JSON ({error})") from None


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
