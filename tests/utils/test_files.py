"""Writing on file systems unlike a local disk: no locks, no renames, kills at any step, errors in one line."""

import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import files_of, in_own_mounts

from rrcm.utils import files
from rrcm.utils.errors import RRCMError
from rrcm.utils.files import (
    atomic_directory,
    atomic_path,
    claimed,
    has_locks,
    in_repository,
    lock_file,
    read_json,
    read_text,
    write_text,
    write_together,
    writing,
)

OLD, NEW = ({"a": word, "below/b": word} for word in (b"old", b"new"))


def fill(folder: Path, content: dict[str, bytes]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def replace_folder(path: Path) -> None:
    with atomic_directory(path) as folder:
        fill(folder, NEW)


def cannot_rename(monkeypatch: pytest.MonkeyPatch, place: str, path: Path) -> None:
    """Let renames of folders fail as they do on `place`."""
    replace, remove, inode = os.replace, os.rmdir, path.stat().st_ino
    refused = {
        "local disk": lambda source, target: 0,
        "overlayfs": lambda source, target: errno.EXDEV * (source.stat().st_ino == inode),
        "no folder can be renamed": lambda source, target: errno.EXDEV * source.is_dir(),
        "mount point": lambda source, target: errno.EBUSY * (path in (source, target)),
    }[place]

    def fails(source: Path, target: Path) -> None:
        if number := refused(Path(source), Path(target)):
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        replace(source, target)

    def rmdir(folder: Path, **options: object) -> None:
        if place == "mount point" and folder == path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))
        remove(folder, **options)

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(os, "rmdir", rmdir)


PLACES = ["local disk", "overlayfs", "no folder can be renamed", "mount point"]


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_is_replaced_wherever_it_is(tmp_path, monkeypatch, place):
    path = tmp_path / "out"
    fill(path, OLD | {"gone": b"old"})
    cannot_rename(monkeypatch, place, path)
    replace_folder(path)
    assert files_of(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}
    assert names(tmp_path) == ["out"]


def killed_at(step: int, write: Callable[[], None]) -> bool:
    """Write in a child that is killed before its `step`-th change of the disk. False if it makes fewer changes."""
    pid = os.fork()
    if pid == 0:
        changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
        left = step

        def count(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in changes or (event == "open" and arguments[2] & os.O_CREAT):
                left -= 1
                if left == 0:
                    os._exit(9)

        status = 1
        try:
            sys.addaudithook(count)
            write()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_any_step_loses_neither_folder(tmp_path, monkeypatch, place):
    """The next run stops early, so that its output cannot replace what was lost."""
    path, kept, step = tmp_path / "out", set(), 0
    while True:
        fill(path, OLD)
        cannot_rename(monkeypatch, place, path)
        step += 1
        if not killed_at(step, lambda: replace_folder(path)):
            break
        with pytest.raises(RuntimeError), atomic_directory(path):
            raise RuntimeError("stopped early")
        assert files_of(tmp_path) in [{f"out/{n}": text for n, text in each.items()} for each in (OLD, NEW)], step
        kept |= set(files_of(path).values())
        monkeypatch.undo()
        shutil.rmtree(tmp_path)
    assert step > 10 and kept == {b"old", b"new"}


def test_an_error_in_the_swap_keeps_the_new_folder_for_the_next_run(tmp_path, monkeypatch):
    path = tmp_path / "out"
    fill(path, OLD)
    cannot_rename(monkeypatch, "no folder can be renamed", path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(full))
    with pytest.raises(RRCMError, match=r"No space left.*free some space; .*\.out\.tmp is complete, the next run will"):
        replace_folder(path)
    with pytest.raises(RRCMError, match=r"\.out\.tmp is complete"):  # still full: reported before any work
        replace_folder(path)
    monkeypatch.undo()
    with pytest.raises(RuntimeError), atomic_directory(path):
        raise RuntimeError("stopped early")
    assert files_of(tmp_path) == {f"out/{name}": text for name, text in NEW.items()}


OVERLAY = """\
mount -t overlay overlay -o lowerdir="$1/lower",upperdir="$1/upper",workdir="$1/work" "$1/merged" || exit 77
cd "$1/merged" && exec "$2" -c '
import os
from rrcm.utils.files import atomic_directory
try:
    os.rename("out", "other")
except OSError as error:
    print(error.strerror)
with atomic_directory("out") as folder:
    (folder / "a").write_text("new")
print(sorted(os.listdir()), sorted(os.listdir("out")), open("out/a").read())
'
"""


@pytest.mark.slow
def test_a_folder_of_a_container_image_is_replaced(tmp_path):
    """On a real overlayfs, whose lower layer has the old folder."""
    for name in ("lower/out", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    fill(tmp_path / "lower/out", OLD)
    answer = in_own_mounts(OVERLAY, tmp_path, sys.executable)
    assert answer.stdout.splitlines() == ["Invalid cross-device link", "['out'] ['a'] new"], answer.stderr


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_file_that_is_mounted_is_rewritten(tmp_path, monkeypatch, number):
    path = tmp_path / "file"
    path.write_text("a longer old text")
    inode, replace = path.stat().st_ino, os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_ino == inode and names(tmp_path) == ["file"]
    monkeypatch.setattr(shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
    with pytest.raises(RRCMError, match=r"only a part could be written \(disk full\); all of it is in .*file\.new"):
        write_text(path, "newer")
    assert (tmp_path / "file.new").read_text() == "newer"


def test_a_linked_folder_stays_a_link_and_a_linked_file_is_not_written_through(tmp_path):
    (tmp_path / "big").mkdir()
    fill(tmp_path / "big/out", OLD)
    (tmp_path / "out").symlink_to("big/out")
    (tmp_path / "new").symlink_to("big/new")  # its target does not exist yet
    for name in ("out", "new"):
        replace_folder(tmp_path / name)
        assert (tmp_path / name).is_symlink() and files_of(tmp_path / "big" / name) == NEW
    assert names(tmp_path) == ["big", "new", "out"] and names(tmp_path / "big") == ["new", "out"]
    (tmp_path / "cache").write_text("DVC's")
    (tmp_path / "file").symlink_to("cache")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "cache").read_text() == "DVC's" and (tmp_path / "file").read_text() == "new"


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    """For example by the administrator's `--output /dev/null`."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RRCMError, match="pipe: is a device or a pipe; give the path of a file"):
        write_text(tmp_path / "pipe", "text")
    assert names(tmp_path) == ["pipe"] and not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize(
    ("process", "node", "age", "stays"),
    [("dead", "here", 0, False), ("alive", "here", 0, True), ("dead", "there", 0, True), ("alive", "there", 1, False)],
)
def test_what_a_killed_run_left_is_deleted_and_what_another_is_writing_is_not(tmp_path, process, node, age, stays):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    pid, name = child if process == "dead" else os.getppid(), os.uname().nodename if node == "here" else "node2"
    left = tmp_path / f".file.{pid}-0123abcd-{name}.tmp"
    left.write_text("a part")
    if age:
        os.utime(left, (0, 0))
    others = [tmp_path / ".file.2.7-0123abcd-x.tmp", tmp_path / ".file.lock.tmp", tmp_path / ".other.7-0123abcd-x.tmp"]
    for other in others:
        other.touch()
    with atomic_path(tmp_path / "file") as scratch:
        scratch.write_text("new")
        assert scratch != left
    assert (tmp_path / "file").read_text() == "new" and left.exists() == stays
    assert {path for path in tmp_path.iterdir() if path not in (left, tmp_path / "file")} == set(others)


def fail(number: int, name: str | None = None):
    """A function that raises an error of the system about the file `name`, by default its argument."""

    def fails(path: object = None, *_: object, **__: object) -> None:
        culprit = [] if number == errno.ENOSPC else [name or str(path)]
        raise OSError(number, os.strerror(number), *culprit)

    return fails


@pytest.mark.parametrize("write", [lambda path: write_text(path, "new"), replace_folder], ids=["file", "folder"])
@pytest.mark.parametrize(
    ("module", "step", "number", "line"),
    [
        (os, "fsync", errno.ENOSPC, r"\(No space left on device\); free some space"),
        (Path, "open", errno.EROFS, r"\(Read-only file system: \S*\.out\.\S*tmp\); mount it writable"),
        (Path, "mkdir", errno.EACCES, r"\(Permission denied: \S*\); get permission to write there"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, write, module, step, number, line):
    """A full disk is noticed when data are flushed."""
    path = tmp_path / "out"
    fill(path, OLD) if write is replace_folder else path.write_bytes(b"old")
    before = files_of(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RRCMError) as caught:
        patch.setattr(module, step, fail(number))
        write(path)
    assert re.fullmatch(f"{path}: cannot write it {line}; nothing was overwritten", str(caught.value))
    assert files_of(tmp_path) == before


def test_leftovers_of_another_user_are_named(tmp_path, monkeypatch):
    path, left = tmp_path / "out", tmp_path / ".out.tmp"
    fill(left, OLD)
    monkeypatch.setattr(shutil, "rmtree", fail(errno.EACCES, "a"))  # it names only the last part of a path
    with pytest.raises(RRCMError, match=rf"^{path}: cannot write it \(Permission denied: {left}\); get permission"):
        replace_folder(path)
    assert left.exists() and not path.exists()


@pytest.mark.slow
def test_a_kill_at_any_step_leaves_no_files_of_two_runs_side_by_side(tmp_path):
    """Nor does it leave anything else once another run has written."""
    paths, seen, step = [tmp_path / name for name in ("a.tsv", "a.files.tsv", "b.png")], set(), 0
    while True:
        for path in paths:
            path.write_bytes(b"old")
        step += 1
        killed = killed_at(step, lambda: write_together(dict.fromkeys(paths, b"new")))
        found = {path.read_bytes() for path in paths if path.exists()}
        assert len(found) == 1, step
        seen |= found
        write_together(dict.fromkeys(paths, b"newer"))
        assert files_of(tmp_path) == {path.name: b"newer" for path in paths}
        if not killed:
            break
    assert step > 5 and seen == {b"old", b"new"}


def test_an_error_before_the_first_file_changes_leaves_all(tmp_path):
    """The message of a later error does not say that nothing was overwritten."""
    contents = {tmp_path / name: b"new" for name in ("a", "b", "folder")}
    for path in contents:
        path.mkdir() if path.name == "folder" else path.write_bytes(b"old")
    (tmp_path / "folder/file").touch()  # it cannot be replaced by a file
    with pytest.raises(RRCMError, match=r"folder: cannot write it .*; not all of .* are of this run; run it again$"):
        write_together(contents)
    assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"new"}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RRCMError, match="pipe: is a device or a pipe"):
        write_together({tmp_path / "a": b"newer", tmp_path / "pipe": b"newer"})
    assert names(tmp_path) == ["a", "b", "folder", "pipe"] and (tmp_path / "a").read_bytes() == b"new"


class Child:
    """A forked process that reports when it has reached a point, and waits there until it is released."""

    def __init__(self, work: Callable[[Callable[[], None]], None]):
        (here, says), (waits, self.go) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.go)
            status = 1
            try:
                work(lambda: (os.write(says, b"1"), os.read(waits, 1)))
                status = 0
            finally:
                os._exit(status)
        os.close(says)
        assert os.read(here, 1) == b"1"

    def end(self) -> int:
        os.close(self.go)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_what_another_process_has_claimed_is_refused_until_it_ends(tmp_path):
    """This holds for every name of its folder. Other paths are not affected."""
    (tmp_path / "link").symlink_to(".")

    def hold(pause: Callable[[], None]) -> None:
        with claimed(tmp_path / "a", tmp_path / "b"):
            pause()

    child = Child(hold)
    for path in (tmp_path / "b", tmp_path / "link/a"):
        complaint = pytest.raises(
            RRCMError, match=f"^{path}: another process is writing it; wait for that, stop it, or"
        )
        with complaint, claimed(tmp_path / "c", path):
            pass
    with claimed(tmp_path / "c"), claimed(tmp_path / "c"):  # a process may claim its own paths again
        pass
    assert child.end() == 0
    with claimed(tmp_path / "a", tmp_path / "b"):
        assert names(tmp_path) == [".a.lock.tmp", ".b.lock.tmp", "link"]
    assert names(tmp_path) == ["link"]


def test_files_of_one_process_wait_for_those_of_another(tmp_path, capsys):
    paths = [tmp_path / "a", tmp_path / "b"]

    def write_slowly(pause: Callable[[], None]) -> None:
        with claimed(*paths):
            paths[0].write_bytes(b"theirs")
            pause()
            paths[1].write_bytes(b"theirs")

    child = Child(write_slowly)
    with claimed(tmp_path / "c"):  # both continue at the same time
        os.write(child.go, b"1")
        write_together(dict.fromkeys(paths, b"ours"))
    assert child.end() == 0 and {path.read_bytes() for path in paths} == {b"ours"}


def test_two_processes_have_scratch_files_of_their_own(tmp_path):
    """The one that ends last wins, with a complete file."""
    path = tmp_path / "file"

    def write(pause: Callable[[], None]) -> None:
        with atomic_path(path) as scratch:
            scratch.write_bytes(b"the")
            pause()
            scratch.write_bytes(b"theirs")

    child = Child(write)
    with atomic_path(path) as scratch:
        scratch.write_bytes(b"ours")
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b"ours"
    assert child.end() == 0 and path.read_bytes() == b"theirs" and names(tmp_path) == ["file"]


def test_a_lock_that_was_deleted_meanwhile_is_not_held(tmp_path, monkeypatch):
    """Its last holder deletes it after the next one has opened it and before it locks it."""
    path, locked, deleted = tmp_path / "lock", files.lock_file, []

    def lock_late(file, **options) -> bool:
        if not deleted:
            deleted.append(path.unlink())
        return locked(file, **options)

    monkeypatch.setattr(files, "lock_file", lock_late)
    with files.open_locked(path) as file:
        assert deleted and os.path.samestat(os.fstat(file.fileno()), path.stat())


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    files._note_once.cache_clear()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_without_locks_it_goes_on_with_one_note(tmp_path, monkeypatch, capsys, number):
    refuse_locks(monkeypatch, number)
    with (tmp_path / "lock").open("w") as file:
        assert not has_locks(file)
        for wait in (False, True, False):
            assert lock_file(file, wait=wait, unprotected="be careful")
    note = capsys.readouterr().err
    assert note == f"note: {tmp_path} has no file locks ({os.strerror(number)}); be careful\n"


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_another_process_holds(tmp_path, monkeypatch, capsys, number):
    refuse_locks(monkeypatch, number)
    with (tmp_path / "lock").open("w") as file:
        assert has_locks(file) and not lock_file(file, unprotected="never said")
    assert capsys.readouterr().err == ""


def test_another_error_of_a_lock_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.EIO)
    with (
        (tmp_path / "lock").open("w") as file,
        pytest.raises(RRCMError, match="Input/output error"),
        writing(file.name),
    ):
        lock_file(file)


def test_a_relative_path_is_found_from_a_copy_that_dvc_makes(tmp_path, monkeypatch):
    for name in ("pictures", "both", ".dvc/tmp/exps/standalone/tmpabc/both"):
        (tmp_path / name).mkdir(parents=True)
    for here, found in [
        (tmp_path, Path("pictures")),
        (tmp_path / ".dvc/tmp/exps/standalone/tmpabc", tmp_path / "pictures"),
    ]:
        monkeypatch.chdir(here)
        assert in_repository("pictures") == found
        assert in_repository("both") == Path("both")  # files in git or DVC come from the experiment's own revision
        assert in_repository("/anywhere") == Path("/anywhere")
    assert in_repository("new") == tmp_path / "new"


WINDOWS = ["utf-8", "utf-8-sig", "utf-16"]  # as its programs save text


@pytest.mark.parametrize("encoding", [*WINDOWS, "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_that_was_saved_anywhere_is_read(tmp_path, encoding, end):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a").write_bytes(f'{mark}{{"é":{end}1}}{end}'.encode(encoding))
    assert read_text(tmp_path / "a") == '{"é":\n1}\n'
    assert read_json(tmp_path / "a") == {"é": 1}


@pytest.mark.parametrize("content", ["é".encode("latin-1"), b"\xff\xfe\x00", b"\xff\xfe\x00\xd8"])
def test_other_bytes_are_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="decode"):
        read_text(tmp_path / "a")
    with pytest.raises(RRCMError, match="cannot be read as JSON"):
        read_json(tmp_path / "a")
