"""What this machine can do at best, measured once per session: copy, write, multiply-add, exponentials.

CPU rates are the better of torch's own kernels and a small vectorised C program, built on the spot and run
on as many threads as torch uses; without a C++ compiler they are torch's, and `how` says so. The library's
matrix product is not the ceiling of a CPU: it is listed beside the multiply-add rate. CUDA: see
ceilings_cuda.py.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

#: Bytes of one buffer; two of them are far larger than any cache of one socket.
BUFFER = 256 << 20
#: Short calls, many times: the best of them is likely to have had the machine to itself.
REPEATS = 30

SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, SUMS = 24 };
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8, SUMS = 12 };
#else
enum { LANES = 4, SUMS = 16 };
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

static inline void stream(float* to, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)v);
#else
  memcpy(to, &v, sizeof v);
#endif
}

extern "C" {

int lanes() { return LANES; }

// Stores past the cache; pointers aligned to 64 bytes, n a multiple of 16.
void fill(float* to, size_t n, float value) {
  Floats v = value - (Floats){};
  for (size_t i = 0; i < n; i += LANES) stream(to + i, v);
}

void copy(float* to, const float* from, size_t n) {
  for (size_t i = 0; i < n; i += LANES) {
    Floats v;
    memcpy(&v, from + i, sizeof v);
    stream(to + i, v);
  }
}

// 2 * LANES * SUMS * rounds flops in independent chains that fill the registers.
float multiply_add(size_t rounds, float factor, float term) {
  Floats s[SUMS], f = factor - (Floats){}, t = term - (Floats){};
#pragma GCC unroll 24
  for (int k = 0; k < SUMS; ++k) s[k] = (float)k - (Floats){};
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (int k = 0; k < SUMS; ++k) s[k] = s[k] * f + t;
  }
  float sum = 0;
  for (int k = 0; k < SUMS; ++k)
    for (int l = 0; l < LANES; ++l) sum += s[k][l];
  return sum;
}

// e^x of a buffer that stays in L1: x·log2(e) = n + r, a polynomial of degree 5 for 2^r, n into the exponent.
void exponential(float* to, const float* from, size_t n, size_t rounds) {
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 4
    for (size_t j = 0; j < n; j += LANES) {
      Floats x;
      memcpy(&x, from + j, sizeof x);
      Floats shifted = x * 1.44269504f + magic;
      Floats r = x * 1.44269504f - (shifted - magic);
      Floats p = r * 1.3398874e-3f + 9.6184372e-3f;
      p = p * r + 5.5503324e-2f;
      p = p * r + 2.4022648e-1f;
      p = p * r + 6.9314721e-1f;
      p = p * r + 1.0f;
      Ints bits = (Ints)p + ((Ints)shifted << 23);
      memcpy(to + j, &bits, sizeof bits);
    }
    __asm__ volatile("" ::: "memory");
  }
}
}
"""


def measure(device: str) -> dict[str, Any]:
    """Rates: copy_gbs counts bytes read plus written, gflops is per dtype, gexps in 1e9 per second."""
    if device == "cuda":
        import ceilings_cuda

        return ceilings_cuda.measure()
    return _measure_cpu()


def best(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Seconds of the fastest call: a ceiling is what the machine can do when nothing else is in the way."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def build_flags() -> list[str]:
    """Flags for the widest vectors that this CPU has and that torch's own kernels would use."""
    capability = torch.backends.cpu.get_cpu_capability()
    if "AVX512" in capability:
        return ["-mavx512f", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
    if "AVX2" in capability:
        return ["-mavx2", "-mfma"]
    return []


def build(folder: Path) -> ctypes.CDLL | None:
    """Compiles and loads SOURCE, None where that cannot be done."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None or platform.system() == "Windows":
        return None
    source, library = folder / "ceilings.cpp", folder / "ceilings.so"
    source.write_text(SOURCE)
    flags = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC", *build_flags()]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True, check=False)
    if done.returncode != 0:
        return None
    loaded = ctypes.CDLL(str(library))
    pointer, size, real = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
    loaded.fill.argtypes = [pointer, size, real]
    loaded.copy.argtypes = [pointer, pointer, size]
    loaded.multiply_add.argtypes = [size, real, real]
    loaded.multiply_add.restype = real
    loaded.exponential.argtypes = [pointer, pointer, size, size]
    return loaded


class Team:
    """As many threads as torch uses; each calls C, which releases the GIL, for its own part."""

    def __init__(self) -> None:
        self.size = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.size)

    def run(self, call: Callable[[int], Any]) -> None:
        list(self._pool.map(call, range(self.size)))


def _measure_cpu() -> dict[str, Any]:
    target, source = torch.zeros(BUFFER // 4), torch.ones(BUFFER // 4)
    square = torch.rand(1024, 1024)
    product = torch.empty_like(square)
    many = torch.rand(1 << 16)
    copies = {"torch": best(lambda: target.copy_(source))}
    writes = {"torch": best(lambda: target.fill_(1.0))}
    exps = {"torch": many.numel() / best(lambda: many.exp(), 50)}
    matmul = 2 * 1024**3 / best(lambda: torch.matmul(square, square, out=product))
    flops = {"torch.matmul": matmul}
    output = torch.zeros(4 << 20)
    cached = 4 * output.numel() / best(lambda: output.fill_(1.0))
    with tempfile.TemporaryDirectory() as folder:
        native = build(Path(folder))
        if native is not None:
            _measure_native(native, target, source, copies, writes, flops, exps)
    how = {
        "copy": min(copies, key=copies.__getitem__),
        "write": min(writes, key=writes.__getitem__),
        "flops": max(flops, key=flops.__getitem__),
        "exps": max(exps, key=exps.__getitem__),
    }
    rate = max(flops.values()) / 1e9
    return {
        "copy_gbs": 2 * BUFFER / min(copies.values()) / 1e9,
        "write_gbs": BUFFER / min(writes.values()) / 1e9,
        "gflops": {"float32": rate, "bfloat16": rate, "float16": rate, "float64": rate / 2},
        "gexps": max(exps.values()) / 1e9,
        "matmul_gflops": matmul / 1e9,
        "cached_write_gbs": cached / 1e9,  # 16 MiB, the size of an output: for reading shares above 100 %
        "threads": torch.get_num_threads(),
        "how": how,
    }


def _measure_native(
    native: ctypes.CDLL,
    target: torch.Tensor,
    source: torch.Tensor,
    copies: dict[str, float],
    writes: dict[str, float],
    flops: dict[str, float],
    exps: dict[str, float],
) -> None:
    """Adds the C program's figures. A part of a buffer is a whole number of 64-byte lines."""
    team = Team()
    part = BUFFER // 4 // team.size // 16 * 16
    to, start = target.data_ptr(), source.data_ptr()
    whole = BUFFER / (4 * part * team.size)  # the few lines left over by the division
    copies["C"] = whole * best(lambda: team.run(lambda i: native.copy(to + 4 * part * i, start + 4 * part * i, part)))
    writes["C"] = whole * best(lambda: team.run(lambda i: native.fill(to + 4 * part * i, part, 1.0)))
    lanes = native.lanes()
    sums = {16: 24, 8: 12, 4: 16}[lanes]
    rounds = 500_000
    seconds = best(lambda: team.run(lambda i: native.multiply_add(rounds, 0.999, 0.001)))
    flops["C"] = 2.0 * lanes * sums * rounds * team.size / seconds
    length, rounds = 2048, 4_000
    inputs = torch.randn(team.size, length)
    outputs = torch.empty_like(inputs)
    seconds = best(
        lambda: team.run(lambda i: native.exponential(outputs[i].data_ptr(), inputs[i].data_ptr(), length, rounds))
    )
    torch.testing.assert_close(outputs, inputs.exp(), rtol=1e-5, atol=0)  # a wrong loop has no rate
    exps["C"] = length * rounds * team.size / seconds
