"""Philox: published test vectors, the same bits when compiled, and rows that depend only on their position."""

import math
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from rrcm.utils import philox
from rrcm.utils.philox import UINT32, _angle, _unit, box_muller, fused_uniforms, philox4x32, uniforms
from rrcm.utils.rng import philox_per_sample


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((UINT32,) * 4, (UINT32, UINT32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    """The vectors that its authors publish with Random123."""
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_the_extreme_words_are_finite():
    words = torch.tensor([0, 1, 2**31, UINT32])
    one, other = (side.flatten() for side in torch.meshgrid(words, words, indexing="ij"))
    normals = torch.stack(box_muller(_unit(one), _angle(other)))
    assert normals.isfinite().all() and normals.abs().max() < 6.8


@pytest.mark.thorough
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_the_fused_kernel_gives_the_same_bits():
    """Compiled here for the CPU, as it is for a GPU; once for all shapes, keys and numbers of samples."""
    generator, fused = torch.Generator().manual_seed(0), fused_uniforms(torch.device("cpu"))
    assert fused is not uniforms
    for samples, quads, key in ((3, 5, (1, 2)), (64, 196, (UINT32, 0x7FFFFFFF)), (17, 2352, (0xDEADBEEF, 0))):
        words = [torch.randint(0, 2**32, (samples, 1), generator=generator) for _ in range(3)]
        words[0][0], words[1][1], words[2][-1] = UINT32, UINT32, 0
        counter = (torch.arange(quads), *words)
        for eager, compiled in zip(uniforms(counter, key), fused(counter, key), strict=True):
            assert eager.shape == (samples, quads) and eager.dtype == torch.float32
            assert torch.equal(eager, compiled)


def test_noise_does_not_need_a_compiler(monkeypatch):
    def fails(*_):  # at its first call, not when it is created
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(philox.torch, "compile", lambda *_, **__: fails)
    fused_uniforms.cache_clear()
    with pytest.warns(UserWarning, match="no C compiler"):
        assert fused_uniforms(torch.device("cpu")) is uniforms
    fused_uniforms.cache_clear()


def test_rows_of_training_noise_depend_on_their_position_alone():
    """The noise of training on a GPU, drawn here on the CPU. It is the same in any split, and differs between steps."""
    names = [f"{copy} {position}" for copy in range(2) for position in range(8)]

    def rows(positions: list, step: int = 3) -> torch.Tensor:
        return philox_per_sample((3, 8, 8), 0, "noise", step, positions=positions, device="cpu")

    together = rows(names)
    assert together.shape == (16, 3, 8, 8) and together.dtype == torch.float32
    assert torch.equal(torch.cat([rows(names[:5]), rows(names[5:])]), together)
    others = torch.cat([together, rows(names, step=4), rows(list(range(8)))]).flatten(1)
    assert np.abs(np.corrcoef(others) - np.eye(len(others))).max() < 5.5 / math.sqrt(others.shape[1])
    assert philox_per_sample((), 0, "level", positions=names, device="cpu").shape == (16,)
    assert kstest(rows(list(range(2000))).flatten().numpy(), "norm").pvalue > 1e-6
