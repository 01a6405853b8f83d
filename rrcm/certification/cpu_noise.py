"""Philox noise on a CPU: the bits of `philox_normal`, from a kernel in C once a process has drawn enough to gain by it.

Eager Philox runs about 120 kernels, and takes three quarters of the time of noise. The kernel in C has only integer
operations and correctly rounded sums and products, so it gives the same uniform numbers. Their logarithms and sines,
which each library rounds in its own way, stay with torch. Certificates therefore do not depend on a compiler.
"""

import ctypes
import math
import sys
from collections.abc import Callable
from functools import cache

import torch

from rrcm.utils.c_library import load_library
from rrcm.utils.errors import RRCMError
from rrcm.utils.philox import CHUNK, UINT32, box_muller, philox_normal, uniforms

# The rule of when the kernel pays. How many numbers a job needs is not known when it starts, since stopping rules stop
# early, so what counts is how many this process has drawn. Eager, LOAD_FROM numbers take 20 ms, and looking for the
# kernel in the cache takes 2 ms. COMPILE_FROM numbers take 4 s, and compiling it takes 0.3 s, once on a machine.
LOAD_FROM, COMPILE_FROM = 1 << 20, 1 << 28

Uniforms = tuple[torch.Tensor, ...]  # the two pairs of `uniforms`, each (rows, quads)
Draw = Callable[[list[torch.Tensor], int, int], Uniforms]  # from three words per row, the number of quads, and the key

# AVX2 multiplies the lower halves of 64-bit lanes. The words lie there, and the upper halves are garbage.
SOURCE = """
#include <stdint.h>
enum { LANES = 4, BLOCK = 64 };
typedef uint64_t lanes __attribute__((vector_size(8 * LANES), may_alias));

static inline __attribute__((always_inline)) lanes product(lanes a, uint32_t b) {
#if defined(__AVX2__) && !defined(__clang__) /* clang finds this instruction by itself */
  typedef int half __attribute__((vector_size(8 * LANES)));
  return (lanes)__builtin_ia32_pmuludq256((half)a, (half)((lanes){0} + b));
#else
  return (a & UINT32_MAX) * b;
#endif
}

static void convert(const uint64_t *words, int64_t count, float shift, float factor, float *restrict out) {
  for (int64_t i = 0; i < count; i++) out[i] = ((float)(uint32_t)words[i] + shift) * factor;
}

void philox_uniforms(const int64_t *word1, const int64_t *word2, const int64_t *word3, int64_t rows, int64_t quads,
                     uint32_t key0, uint32_t key1, float angle, float *uniform0, float *angle0, float *uniform1,
                     float *angle1) {
  uint64_t words[4][BLOCK] __attribute__((aligned(64)));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t first = 0; first < quads; first += BLOCK) {
      int64_t count = quads - first < BLOCK ? quads - first : BLOCK, place = row * quads + first;
      for (int64_t i = 0; i < count; i += LANES) {
        lanes c0 = (lanes){0, 1, 2, 3} + (uint64_t)(first + i);
        lanes c1 = (lanes){0} + (uint64_t)word1[row];
        lanes c2 = (lanes){0} + (uint64_t)word2[row];
        lanes c3 = (lanes){0} + (uint64_t)word3[row];
        uint32_t k0 = key0, k1 = key1;
        for (int round = 0; round < 10; round++) {
          lanes product0 = product(c0, 0xD2511F53), product1 = product(c2, 0xCD9E8D57);
          c0 = (product1 >> 32) ^ c1 ^ k0;
          c2 = (product0 >> 32) ^ c3 ^ k1;
          c1 = product1;
          c3 = product0;
          k0 += 0x9E3779B9;
          k1 += 0xBB67AE85;
        }
        *(lanes *)(words[0] + i) = c0;
        *(lanes *)(words[1] + i) = c1;
        *(lanes *)(words[2] + i) = c2;
        *(lanes *)(words[3] + i) = c3;
      }
      convert(words[0], count, 0.5f, 0x1p-32f, uniform0 + place);
      convert(words[1], count, 0, angle, angle0 + place);
      convert(words[2], count, 0.5f, 0x1p-32f, uniform1 + place);
      convert(words[3], count, 0, angle, angle1 + place);
    }
}
"""


def normal(shape: tuple[int, ...], key: int, words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`philox_normal`, in less time if this process has already drawn so many numbers on the CPU that it pays."""
    draw = _kernel_for(len(words[0]) * math.prod(shape)) if words[0].device.type == "cpu" else None
    return philox_normal(shape, key, words) if draw is None else fused_normal(draw, shape, key, words)


def fused_normal(draw: Draw, shape: tuple[int, ...], key: int, words: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`philox_normal` on a CPU by the kernel. `box_muller` gets tensors of the same values, shapes and strides."""
    size = math.prod(shape)
    quads = -(-size // 4)
    normals = torch.empty(len(words[0]), 4, quads, dtype=torch.float32, device="cpu")
    rows = max(1, CHUNK // quads)
    for first in range(0, len(normals), rows):
        chunk = slice(first, first + rows)
        uniform0, angle0, uniform1, angle1 = draw([word[chunk] for word in words], quads, key)
        normals[chunk, 0], normals[chunk, 1] = box_muller(uniform0, angle0)
        normals[chunk, 2], normals[chunk, 3] = box_muller(uniform1, angle1)
    return normals.flatten(1)[:, :size].reshape(len(normals), *shape)


_drawn = 0  # numbers on the CPU by this process


def _kernel_for(numbers: int) -> Draw | None:
    """The kernel, or None as long as it does not pay. `numbers` are those to draw now."""
    global _drawn
    _drawn += numbers
    return None if _drawn < LOAD_FROM else find_kernel(compile=_drawn >= COMPILE_FROM)


@cache
def find_kernel(*, compile: bool) -> Draw | None:
    """The kernel from the cache, or with `compile` a new one if it is not there. None if there is none.

    The kernel is compared with `uniforms` first. If none can be made, a line on stderr says why.
    """
    try:
        library = load_library("philox", SOURCE, compile=compile)
        if library is None:
            return None
        draw = _kernel_of(library)
        if not all(map(torch.equal, draw(*_probe()), _eager(*_probe()))):
            raise RRCMError("it gives other bits")
    except RRCMError as error:
        if compile:
            print(f"noise takes longer: its kernel cannot be used ({error})", file=sys.stderr)
        return None
    return draw


def _kernel_of(library: ctypes.CDLL) -> Draw:
    function, pointer, integer = library.philox_uniforms, ctypes.c_void_p, ctypes.c_int64
    key_types = [ctypes.c_uint32, ctypes.c_uint32]
    function.argtypes = [*[pointer] * 3, integer, integer, *key_types, ctypes.c_float, *[pointer] * 4]
    function.restype = None

    def draw(words: list[torch.Tensor], quads: int, key: int) -> Uniforms:
        """`uniforms` of the counters (0 ... quads - 1, *words), each (len(words[0]), quads)."""
        words, rows = [word.contiguous() for word in words], len(words[0])
        results = tuple(torch.empty(rows, quads, dtype=torch.float32, device="cpu") for _ in range(4))
        sizes = rows, quads, key & UINT32, key >> 32, 2 * math.pi * 2**-32
        function(*(word.data_ptr() for word in words), *sizes, *(result.data_ptr() for result in results))
        return results

    return draw


def _eager(words: list[torch.Tensor], quads: int, key: int) -> Uniforms:
    counter = (torch.arange(quads, device="cpu"), *(word[:, None] for word in words))
    return uniforms(counter, (key & UINT32, key >> 32))


def _probe() -> tuple[list[torch.Tensor], int, int]:
    """Words with all and with no bits set, and others; more quads than a block, and some over."""
    words = torch.tensor([0, UINT32, 0x243F6A88, 0x85A308D3], device="cpu")
    return [words, words.flip(0), words.roll(1)], 131, 0xA4093822299F31D0
