"""Functions in C, compiled at run time and kept in the user's cache. Several processes may do so at once.

The name of a library has its hash, so that a damaged one is not loaded but compiled again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from rrcm.utils.errors import RRCMError, one_line
from rrcm.utils.files import atomic_path, sha256_file

COMPILERS = ("cc", "gcc", "clang")
# Without contraction every product and every sum is rounded, as in torch. AVX2 is used where torch uses it.
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
AVX2 = ("-mavx2",) if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ()
TIMEOUT = 60  # seconds to compile


def load_library(name: str, source: str, *, compile: bool) -> ctypes.CDLL | None:
    """The functions of `source`. Those that are not in the cache are compiled, or without `compile` the answer is None.

    A cache that cannot be used is done without. Raises `RRCMError` if `source` cannot be compiled.
    """
    identity = repr((source, FLAGS, AVX2, platform.system(), platform.machine()))
    stem = f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    for path in _intact_files(stem):
        with suppress(OSError):  # for example where nothing may be executed
            return ctypes.CDLL(str(path))
    if not compile:
        return None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            built = Path(folder) / f"{stem}.so"
            _compile(source, built)
            library = ctypes.CDLL(str(built))
            _keep(built)
            return library
    except (OSError, subprocess.SubprocessError) as error:
        raise RRCMError(one_line(error)) from error


def cache_folder() -> Path:
    """The folder of the libraries. Raises `RuntimeError` if this user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rrcm" / "libraries"


def _intact_files(stem: str) -> Iterator[Path]:
    with suppress(OSError, RuntimeError):
        for path in cache_folder().glob(f"{stem}-*.so"):
            if path.stem == f"{stem}-{sha256_file(path)}":
                yield path


def _compile(source: str, path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RRCMError(f"there is no C compiler; install {' or '.join(COMPILERS)}")
    command = [compiler, *FLAGS, *AVX2, "-x", "c", "-", "-o", str(path)]
    answer = subprocess.run(command, input=source, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    if answer.returncode:
        raise RRCMError(f"{compiler} fails: {one_line(RuntimeError(answer.stderr))}")


def _keep(built: Path) -> None:
    """Copy a new library into the cache. Where that is impossible each process compiles for itself."""
    with suppress(RRCMError, OSError, RuntimeError):
        path = cache_folder() / f"{built.stem}-{sha256_file(built)}.so"
        with atomic_path(path) as scratch:
            shutil.copyfile(built, scratch)
