"""Compiled functions: several processes at once, killed compilers, and caches that are damaged or cannot be written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from rrcm.utils import c_library
from rrcm.utils.c_library import COMPILERS, cache_folder, load_library
from rrcm.utils.errors import RRCMError

SOURCE = "int answer(void) { return 42; }\n"
LOAD = f"from rrcm.utils.c_library import load_library; print(load_library('f', {SOURCE!r}, compile=True).answer())"
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C compiler here")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Put a shell script in the place of the compiler."""

    def replace(script: str) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/cc").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/cc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return replace


@needs_compiler
def test_a_library_is_compiled_once_and_kept(cache, compiler):
    assert load_library("f", SOURCE, compile=False) is None and not cache.exists()
    assert load_library("f", SOURCE, compile=True).answer() == 42
    (kept,) = cache.iterdir()
    compiler("exit 1")
    assert load_library("f", SOURCE, compile=False).answer() == 42
    assert load_library("f", SOURCE, compile=True).answer() == 42
    assert load_library("f", SOURCE.replace("42", "43"), compile=False) is None
    content = kept.read_bytes()
    for damaged in (b"", content[:-1], content[:99] + bytes([content[99] ^ 1]) + content[100:]):
        kept.write_bytes(damaged)
        assert load_library("f", SOURCE, compile=False) is None


@needs_compiler
def test_a_damaged_library_is_compiled_again(cache):
    cache.mkdir(parents=True)
    load_library("f", SOURCE, compile=True)
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    kept.unlink()  # it is mapped here
    kept.write_bytes(content[:1000])
    assert load_library("f", SOURCE, compile=True).answer() == 42
    assert [path.read_bytes() for path in cache.iterdir()] == [content]


@needs_compiler
@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    assert load_library("f", SOURCE, compile=False) is None
    assert load_library("f", SOURCE, compile=True).answer() == 42
    assert not cache_folder().exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no room >&2; exit 1", "cc fails: no room"),
        ("exit 0", "cannot open shared object file"),
        ("echo text > $(echo $* | sed 's/.* //')", "file too short|invalid ELF header"),
        ("sleep 9", "timed out"),
    ],
)
def test_a_compiler_that_fails_is_an_error_of_one_line(monkeypatch, cache, compiler, script, said):
    compiler(script)
    monkeypatch.setattr(c_library, "TIMEOUT", 0.3)
    with pytest.raises(RRCMError, match=said) as raised:
        load_library("f", SOURCE, compile=True)
    assert "\n" not in str(raised.value) and not cache.exists()


@pytest.mark.thorough
@needs_compiler
def test_two_processes_at_once_and_one_that_is_killed(cache, compiler, tmp_path):
    """All find the compiler slow. The killed one leaves nothing in the cache, and the others agree."""
    command, real = [sys.executable, "-c", LOAD], next(filter(None, map(shutil.which, COMPILERS)))
    compiler(f"echo $$ >> {tmp_path}/started; sleep 3; exec {real} $*")
    killed, *others = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [other.communicate()[0] for other in others] == ["42\n", "42\n"]
    (kept,) = cache.iterdir()
    assert load_library("f", SOURCE, compile=False).answer() == 42 and kept.suffix == ".so"
