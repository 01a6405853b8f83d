"""Atomic writes of files and folders, file locks, JSON, hashes, and paths in DVC's experiments.

Not every file system behaves like a local disk. Network file systems may lack locks, folders from a container's image
cannot be renamed, and nothing can be renamed over a mount point. This module handles these differences.
"""

import codecs
import csv
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from rrcm.utils.errors import RRCMError, one_line

LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Why a rename fails: a folder from a lower layer of overlayfs, another file system, a mount point, or no support.
NO_RENAME = {errno.EXDEV, errno.EBUSY, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
MAX_JSON_BYTES = 64 * 2**20
HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space")
HINTS |= dict.fromkeys((errno.EACCES, errno.EPERM), "get permission to write there")
HINTS |= {errno.EROFS: "mount it writable", errno.EMFILE: "raise the limit of open files (ulimit -n)"}
UNCHANGED = "nothing was overwritten"
ABANDONED = 24 * 3600  # seconds after which another machine's scratch file counts as left by a killed process


@contextmanager
def writing(path: Path | str, addition: str = "") -> Iterator[None]:
    """Turn an OSError of the body into an `RRCMError`: one line that names `path`, the reason and what to do.

    `addition` is appended to the line.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        if isinstance(error.filename, str | os.PathLike) and Path(error.filename).absolute() != Path(path).absolute():
            reason += f": {error.filename}"
        parts = [f"{path}: cannot write it ({reason})", HINTS.get(error.errno), addition]
        raise RRCMError("; ".join(part for part in parts if part)) from error


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success flush it to disk and rename it over `path`.

    A symbolic link is replaced, not followed: it may lead into DVC's cache. Several processes may write `path` at once:
    each has a temporary file of its own, and the last one wins. On any error the temporary file is removed and `path`
    stays unchanged. A failed write (disk full, file too large, no permission) raises an `RRCMError` that names `path`.
    """
    path = Path(path)
    with writing(path, UNCHANGED), _scratch_file(path) as scratch:
        yield scratch
        _flush_file(scratch)
        _put_file(scratch, path)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write all files of one run, so that files of two runs never lie side by side.

    Every new file is complete on disk before the first old one changes. Then all old files except the first are
    deleted, and the new files are renamed into place. Raises `RRCMError` as `atomic_path` does.
    """
    with claimed(*contents, wait=True), ExitStack() as stack:
        scratches = {}
        for path, content in contents.items():
            with writing(path, UNCHANGED):
                scratches[path] = stack.enter_context(_scratch_file(path))
                scratches[path].write_bytes(content)
                _flush_file(scratches[path])
        _, *others = scratches
        for path in others:
            with suppress(OSError):  # a mount point cannot be deleted; its content is replaced below
                path.unlink(missing_ok=True)
        for path, scratch in scratches.items():
            with writing(path, f"not all of {', '.join(map(str, scratches))} are of this run; run it again"):
                _put_file(scratch, path)


@contextmanager
def _scratch_file(path: Path) -> Iterator[Path]:
    """Yield a unique name beside `path` for a temporary file. The file is deleted at the end if it still exists."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RRCMError(f"{path}: is a device or a pipe; give the path of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}-{os.uname().nodename}.tmp")
    try:
        yield scratch
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _delete_abandoned(path: Path) -> None:
    """Delete the scratch files of processes that were killed while they wrote `path`.

    Scratch files of another machine are deleted when they have not grown for a day.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})-[0-9a-f]{{8}}-(.*)\.tmp")
    with suppress(OSError):
        for file, match in [(file, name.fullmatch(file.name)) for file in path.parent.iterdir()]:
            if match and (
                time.time() - file.stat().st_mtime > ABANDONED
                or (match[2] == os.uname().nodename and not _is_running(int(match[1])))
            ):
                file.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # the process may belong to another user
    return True


def check_output(path: Path | str) -> None:
    """Raise `RRCMError` if no file can be written at `path`. Call it before a long computation."""
    path = Path(path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if (path.exists() and not path.is_file()) or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RRCMError(f"{path}: no file can be written there; choose another path")


def _put_file(scratch: Path, path: Path) -> None:
    """Rename `scratch` to `path`. If that is impossible (a file mounted into a container), overwrite its content."""
    try:
        scratch.replace(path)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        kept = path.with_name(f"{path.name}.new")
        try:
            with scratch.open("rb") as source, path.open("r+b" if path.exists() else "wb") as target:
                shutil.copyfileobj(source, target)
                target.truncate()
            _flush_file(path)
        except OSError as failure:
            scratch.replace(kept)
            raise RRCMError(
                f"{path}: only a part could be written ({failure.strerror}); all of it is in {kept}"
            ) from failure


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Like `atomic_path` for a folder: yield an empty one beside `path`, then swap it into place.

    A symbolic link to a folder is followed. If the process is killed during the swap, or the swap fails, the new folder
    stays complete under its temporary name, and the next call first puts it into place.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    scratch, ready = (path.with_name(f".{path.name}{name}.tmp") for name in ("", ".ready"))
    complete = f"{scratch} is complete, the next run will put it into place"
    with claimed(path, wait=True):
        with writing(path, complete if ready.exists() else UNCHANGED):
            _swap(path, scratch, ready)
            _delete(scratch)
            scratch.mkdir()
        try:
            with writing(path, UNCHANGED):
                yield scratch
                _flush_tree(scratch)
                ready.touch()
            with writing(path, complete):
                _swap(path, scratch, ready)
        finally:
            if not ready.exists():
                shutil.rmtree(scratch, ignore_errors=True)


def finish_swap(path: Path) -> None:
    """Put the folder `path` into place if `atomic_directory(path)` was killed while it swapped a complete one in."""
    scratch, ready = (path.with_name(f".{path.name}{name}.tmp") for name in ("", ".ready"))
    with claimed(path, wait=True), writing(path, f"{scratch} is complete, the next run will put it into place"):
        _swap(path, scratch, ready)


def _swap(path: Path, scratch: Path, ready: Path) -> None:
    """Move `scratch` to `path` if the file `ready` exists, which says that the folder `scratch` is complete.

    The process may be killed at any point and call this again. `scratch` stays complete until it has been moved.
    """
    aside = path.with_name(f".{path.name}.old.tmp")
    if scratch.exists() and ready.exists():
        _flush_folder(path.parent)
        _delete(aside)
        _clear(path, aside)
        try:
            scratch.replace(path)
        except OSError as error:
            if error.errno not in NO_RENAME:
                if aside.exists():
                    aside.replace(path)
                raise
            shutil.copytree(scratch, path, symlinks=True, dirs_exist_ok=True)
            _flush_tree(path)
    elif aside.exists() and not path.exists():
        aside.replace(path)
    ready.unlink(missing_ok=True)
    for leftover in (scratch, aside):
        with suppress(OSError):
            _delete(leftover)


def _clear(path: Path, aside: Path) -> None:
    """Rename the old folder to `aside`, or delete it if folders cannot be renamed. A mount point is only emptied."""
    try:
        path.replace(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        for entry in path.iterdir():
            _delete(entry)
        with suppress(OSError):
            path.rmdir()


def _delete(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # rmtree names only the last part of a path


def _flush_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            _flush_file(Path(root) / name)
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, if the file system supports it."""
    with suppress(OSError):
        _flush_file(folder)


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(*paths: Path, wait: bool = False) -> Iterator[None]:
    """Claim `paths`: until the end, no other process that claims one of them can proceed. This process may claim again.

    A lock file lies beside each claimed path. Raises `RRCMError` if another process has claimed one; with `wait`, waits
    for it instead. Locks are taken in the order of their names, so two processes never wait for each other.
    """
    with ExitStack() as stack:
        for resolved, path in sorted((Path(os.path.realpath(path.parent)) / path.name, path) for path in paths):
            if resolved not in _claims:
                stack.enter_context(_claim(resolved, path, wait))
        yield


_claims: set[Path] = set()  # the paths that this process has claimed


@contextmanager
def _claim(resolved: Path, path: Path, wait: bool) -> Iterator[None]:
    with writing(path, UNCHANGED):
        name = resolved.with_name(f".{resolved.name}.lock.tmp")
        if (lock := open_locked(name)) is None and wait:
            print(f"note: waits until another process has written {path}", file=sys.stderr)
            lock = open_locked(name, wait=True)
    if lock is None:
        raise RRCMError(f"{path}: another process is writing it; wait for that, stop it, or choose another path")
    _claims.add(resolved)
    try:
        yield
    finally:
        _claims.remove(resolved)
        with suppress(OSError):
            Path(lock.name).unlink(missing_ok=True)  # before the lock is released
        lock.close()


def open_locked(path: Path, *, wait: bool = False) -> IO | None:
    """Create the file `path` and lock it until it is closed; None if another process holds the lock. Raises OSError."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        if not lock_file(file, wait=wait, unprotected="do not start the same run twice at once"):
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                _close_in_children(file)  # loader workers may live longer than this process
                return file
        file.close()  # the previous owner of the lock has deleted the file


def _close_in_children(file: IO) -> None:
    """Close `file` in every process that is forked while it is open here."""
    reference = weakref.ref(file)

    def close() -> None:
        if (inherited := reference()) is not None:
            inherited.close()

    os.register_at_fork(after_in_child=close)


def lock_file(file: IO, *, wait: bool = False, unprotected: str = "") -> bool:
    """Lock an open file for this process and its children, until all of them have closed it.

    Returns False if another process holds the lock; with `wait`, waits for it instead. On a file system without locks
    it returns True and prints a note once. The note ends with `unprotected`: what the user has to take care of.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in LOCKED and not wait:
            return False
        if error.errno not in NO_LOCKS:
            raise
        if unprotected:
            _note_once(f"note: {Path(file.name).parent} has no file locks ({error.strerror}); {unprotected}")
    return True


def has_locks(file: IO) -> bool:
    """Whether the file system of an open file has locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


@functools.cache
def _note_once(text: str) -> None:
    print(text, file=sys.stderr)


def in_repository(path: Path | str) -> Path:
    """Resolve a relative path against the repository in which an experiment was started.

    Experiments with `--temp` or `--queue` run in a temporary copy of the repository below .dvc/tmp/exps, which lacks
    the files that git ignores. A relative path that the copy lacks is taken from the repository itself. Any other path
    is returned unchanged, except that a leading ~ is expanded.
    """
    path = expand_user(path)
    if not path.is_absolute() and not path.exists():
        for folder in Path.cwd().parents:
            if folder.parts[-3:] == (".dvc", "tmp", "exps"):
                return folder.parents[2] / path
    return path


def expand_user(path: Path | str) -> Path:
    """`path` with the home directory in place of a leading ~, which shells leave as it is in `--option=~/path`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def read_text(path: Path | str) -> str:
    """Read a text file that may have been saved on any system. Its line ends become \\n.

    It is UTF-8, or UTF-16 with a byte order mark, as Windows writes it. Raises OSError, and ValueError for other bytes.
    """
    return _decode(Path(path).read_bytes())


def _decode(content: bytes) -> str:
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return io.StringIO(content.decode("utf-16" if wide else "utf-8-sig"), newline=None).read()


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write `value` atomically, in the format of `json_bytes`."""
    with atomic_path(path) as scratch:
        scratch.write_bytes(json_bytes(value))


def json_bytes(value: object) -> bytes:
    """Indented JSON with a final newline. Keys keep their order; NaN is an error."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_csv(path: Path | str, rows: list[dict]) -> None:
    """Write `rows` atomically as CSV. The columns are the keys of the first row; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file to read its bytes. Raises OSError for a pipe or a device, which may never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return file


def read_json(path: Path | str) -> dict:
    """Read a JSON file. Raises `RRCMError` if it is missing, not JSON, or larger than MAX_JSON_BYTES."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(_decode(content))
    except FileNotFoundError:
        raise RRCMError(f"{path}: no such file; run the stage that writes it first (dvc repro)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RRCMError(f"{path}: cannot be read as JSON ({one_line(error)})") from None


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: Path | str) -> str:
    """Hexadecimal SHA-256 of the names and the bytes of all files in a folder and below."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    text = json.dumps([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files])
    return hashlib.sha256(text.encode()).hexdigest()
