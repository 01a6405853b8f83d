"""The noise of certificates by a kernel in C: the same bits, no cost for short jobs, and no need of a compiler."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

from rrcm.certification import cpu_noise
from rrcm.certification.noise import counter_normal
from rrcm.utils.c_library import COMPILERS, cache_folder
from rrcm.utils.philox import UINT32, philox_normal

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C compiler here")
DRAW = """
import sys, torch
from rrcm.certification import cpu_noise
from rrcm.utils.philox import philox_normal
kernel = cpu_noise.find_kernel(compile=True)
assert kernel is not None
for shape in ((), (1, 1, 1), (3, 5, 7), (1, 28, 28), (3, 224, 224)):
    words = torch.randint(0, 2**32, (3, 200 if len(shape) and shape[-1] < 99 else 3)).unbind()
    assert torch.equal(cpu_noise.fused_normal(kernel, shape, 2**63 - 5, words), philox_normal(shape, 2**63 - 5, words))
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, cache):
    """A process that has drawn nothing yet, and a cache of this module's own."""
    find_kernel = cpu_noise.find_kernel
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(cpu_noise, "_drawn", 0)
    find_kernel.cache_clear()
    yield
    find_kernel.cache_clear()


def rows(count: int) -> tuple[torch.Tensor, ...]:
    words = torch.randint(0, 2**32, (3, count), generator=torch.Generator().manual_seed(0))
    words[:, 0], words[:, -1] = UINT32, 0
    return words.unbind()


@needs_compiler
def test_the_kernel_gives_the_same_bits():
    """For rows in several chunks, sizes that fill no quad or block, words that are not contiguous, and any thread."""
    kernel, threads = cpu_noise.find_kernel(compile=True), torch.get_num_threads()
    for shape, count, key in (((1, 28, 28), 700, 2**63 - 1), ((3, 5, 7), 300, 0), ((), 3, 0xDEADBEEF00000001)):
        words = tuple(torch.stack([word, word], 1)[:, 0] for word in rows(count))
        eager = philox_normal(shape, key, words)
        for number in (1, 2):
            torch.set_num_threads(number)
            fused = cpu_noise.fused_normal(kernel, shape, key, words)
            torch.set_num_threads(threads)
            assert fused.shape == (count, *shape) and fused.dtype == torch.float32 and fused.stride() == eager.stride()
            assert torch.equal(fused, eager)
    assert cpu_noise.fused_normal(kernel, (1, 8, 8), 0, tuple(word[:0] for word in rows(2))).shape == (0, 1, 8, 8)


@needs_compiler
def test_the_noise_of_certificates_comes_from_the_kernel(monkeypatch):
    """Once it pays, and with the bits that it had before."""
    monkeypatch.setattr(cpu_noise, "LOAD_FROM", 2 * 64 * 9)
    monkeypatch.setattr(cpu_noise, "COMPILE_FROM", 2 * 64 * 9)
    used, plain = [], cpu_noise.fused_normal
    monkeypatch.setattr(cpu_noise, "fused_normal", lambda *each: used.append(1) or plain(*each))
    noises = [counter_normal((1, 8, 8), 5, *rows(9)) for _ in range(3)]
    assert len(used) == 2 and torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


def test_short_jobs_neither_load_nor_compile(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_noise, "find_kernel", lambda *, compile: asked.append(compile))
    monkeypatch.setattr(cpu_noise, "LOAD_FROM", 300)
    monkeypatch.setattr(cpu_noise, "COMPILE_FROM", 500)
    for _ in range(6):
        cpu_noise.normal((1, 5, 5), 0, rows(4))  # 100 numbers
    assert asked == [False, False, True, True]


def test_without_a_compiler_the_noise_is_the_same_and_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_noise, "LOAD_FROM", 0)
    monkeypatch.setenv("PATH", "")
    assert torch.equal(cpu_noise.normal((1, 5, 5), 3, rows(4)), philox_normal((1, 5, 5), 3, rows(4)))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cpu_noise, "COMPILE_FROM", 0)
    for _ in range(2):
        assert torch.equal(cpu_noise.normal((1, 5, 5), 3, rows(4)), philox_normal((1, 5, 5), 3, rows(4)))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("noise takes longer: its kernel cannot be used (there is no C compiler; install cc or gcc")


@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0xCD9E8D57", "0xCD9E8D59"),
        pytest.param("k0 += 0x9E3779B9", "k0 += 0x9E3779BB", marks=pytest.mark.thorough),
        pytest.param("0.5f", "0.25f", marks=pytest.mark.thorough),
    ],
)
def test_a_kernel_with_other_bits_is_not_used(monkeypatch, capsys, old, new):
    monkeypatch.setattr(cpu_noise, "SOURCE", cpu_noise.SOURCE.replace(old, new))
    assert cpu_noise.find_kernel(compile=True) is None
    assert capsys.readouterr().err == "noise takes longer: its kernel cannot be used (it gives other bits)\n"


@pytest.mark.thorough
@needs_compiler
def test_the_bits_are_the_same_with_any_instructions(monkeypatch, tmp_path):
    """Each set of instructions has a kernel of its own in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = set()
    for capability in ("default", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", DRAW]
        answer = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        found.add(answer.stdout)
    assert len(list(cache_folder().iterdir())) == len(found)
