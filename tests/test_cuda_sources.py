"""CUDA sources without a GPU: the kernels run on the CPU (cuda_on_cpu.h) and compile without spills (nvcc).

Seen red: the kernel is broken in eight ways (test_broken_kernels_are_found), wrong kernels of many kinds run
(test_wrong_kernels_are_found), and ptxas records with spills, stack and calls are checked.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import cuda_sources
import pytest
import torch
from torch import Tensor

from fastssl.ops import self_relation as front
from fastssl.reference.self_relation import self_relation as reference

#: Largest error of the matrix against float64, in the norm. Measured worst: float32 2.5e-7 (eager 2.6e-7),
#: bfloat16 1.8e-3 and float16 2.3e-4, which is the rounding of the output.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = [torch.bfloat16, torch.float16]
ORDERS = {0: "ascending", 1: "descending", 2: "shuffled"}


class Array(ctypes.Structure):
    """A tensor as tests/cuda_self_relation.cpp sees it."""

    _fields_ = (
        ("storage", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
    )

    @classmethod
    def of(cls, x: Tensor) -> Array:
        storage = x.untyped_storage()
        offset = x.storage_offset() * x.element_size()
        triple = ctypes.c_int64 * 3
        sizes, strides = triple(*x.shape), triple(*x.stride())
        return cls(storage.data_ptr(), storage.nbytes(), offset, TYPES[x.dtype], sizes, strides)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return declared(cuda_sources.driver("cuda_self_relation.cpp"))


def declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    array, number, wide, pointer = ctypes.POINTER(Array), ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    lib.forward.argtypes = [array, array, pointer, wide, number, wide, ctypes.c_double, *[number] * 4]
    lib.forward.restype = ctypes.c_char_p
    lib.shared_bytes.argtypes, lib.shared_bytes.restype = [number, number, number], wide
    lib.row_splits.argtypes, lib.row_splits.restype = [wide, wide, number], wide
    lib.from_float32.argtypes = lib.to_float32.argtypes = [wide, pointer, pointer, wide]
    return lib


def run(
    lib: ctypes.CDLL,
    x: Tensor,
    *,
    kind: str = "pixel",
    num_heads: int = 1,
    scale: float | None = None,
    columns: Tensor | None = None,
    normalize: bool = False,
    multiprocessors: int = 1,
    order: int = 0,
) -> Tensor:
    """The kernel on the CPU, called as csrc/cuda/self_relation.cu calls it, into an output full of NaN."""
    args = front._check(x, kind, num_heads, scale, 1.0, columns, normalize)
    columns_read = args.x if args.columns is None else args.columns
    symmetric = args.columns is None
    out = front._fake_forward(args.x, columns_read, args.channel, num_heads, args.scale, normalize, symmetric)
    out.fill_(torch.nan)
    pointers = [ctypes.byref(Array.of(t)) for t in (args.x, columns_read)]
    where = (out.data_ptr(), out.numel() * out.element_size())
    rest = (args.channel, num_heads, args.scale, normalize, symmetric, multiprocessors, order)
    error = lib.forward(*pointers, *where, *rest).decode()
    if error:
        raise RuntimeError(error)
    return out


def distance(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖ in float64; NaN and infinity count as infinite."""
    ratio = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
    return ratio if ratio == ratio else float("inf")


def check(lib: ctypes.CDLL, x: Tensor, columns: Tensor | None = None, **how: Any) -> None:
    machine = {k: how.pop(k) for k in ("multiprocessors", "order") if k in how}
    got = run(lib, x, columns=columns, **how, **machine)
    wanted = reference(x.double(), columns=None if columns is None else columns.double(), **how)
    assert got.shape == wanted.shape
    assert distance(got, wanted) <= TOLERANCE[x.dtype]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize(
    ("length", "width", "num_heads"),
    [(1, 33, 1), (1, 66, 6), (37, 33, 3), (37, 66, 1), (37, 48, 3), (197, 66, 6), (197, 64, 1), (300, 66, 3)],
)
def test_matches_the_reference(library, kind, length, width, num_heads):
    check(library, noise(2, length, width), kind=kind, num_heads=num_heads)


@pytest.mark.parametrize("length", [7, 8, 9, 31, 32, 33, 63, 65, 255, 256, 257, 512, 513])
def test_tails_of_rows_and_columns(library, length):
    check(library, noise(1, length, 5))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 128, 131])
def test_tails_of_the_depth(library, width):
    check(library, noise(1, 12, width))


def test_channels_in_two_passes(library):
    check(library, noise(1, 10, 270), kind="channel")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["pixel", "channel"])
def test_half_precision(library, kind, dtype):
    check(library, noise(2, 37, 66, dtype=dtype), kind=kind, num_heads=3)
    check(library, noise(1, 37, 64, dtype=dtype), kind=kind)


@pytest.mark.parametrize("others", [1, 50, 300])
@pytest.mark.parametrize("normalize", [False, True])
def test_other_columns(library, others, normalize):
    check(library, noise(2, 37, 66), noise(2, others, 66, seed=1), num_heads=3, normalize=normalize)


def test_other_columns_of_channels(library):
    check(library, noise(2, 37, 66), noise(2, 37, 66, seed=1), kind="channel", num_heads=3)


@pytest.mark.parametrize(("x_type", "y_type"), list(itertools.permutations(TYPES, 2)))
def test_columns_of_another_dtype(library, x_type, y_type):
    check(library, noise(1, 20, 36, dtype=x_type), noise(1, 9, 36, dtype=y_type, seed=1), num_heads=3)


@pytest.mark.parametrize("kind", ["pixel", "channel"])
def test_normalize(library, kind):
    x = noise(2, 37, 66) * 10
    x[0, 3] = 0  # a zero token, a zero channel: they stay zero
    x[1, :, 5] = 0
    x[1, 4] *= 1e-14 if kind == "pixel" else 1.0  # below the norm that counts as zero
    check(library, x, kind=kind, num_heads=3, normalize=True, scale=3.0)
    # All-zero vectors give the uniform row exactly.
    if kind == "pixel":
        assert torch.equal(run(library, x, normalize=True)[0, 0, 3], torch.full((37,), 1 / 37))


@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(library, kind, dtype):
    feature_map = noise(2, 36, 5, 7, dtype=dtype)
    check(library, feature_map, kind=kind, num_heads=3)
    check(library, feature_map.contiguous(memory_format=torch.channels_last), kind=kind, num_heads=3)
    with_class_token = noise(2, 36, 36, dtype=dtype)
    check(library, with_class_token[:, 1:], kind=kind, num_heads=3)
    check(library, with_class_token[:, ::2, 3:33], kind=kind, num_heads=3)
    check(library, with_class_token[:1].expand(3, -1, -1), kind=kind, num_heads=3)
    check(library, with_class_token[:, :1].expand(-1, 6, -1), kind=kind)
    columns = feature_map[:, :, 1:, :6] if kind == "pixel" else feature_map.flip(0)
    check(library, feature_map, columns, kind=kind, num_heads=3)


@pytest.mark.parametrize("length", [37, 300])
def test_logits_of_ten_thousand_stay_finite(library, length):
    x = noise(1, length, 8)
    x = x / x.norm(dim=-1, keepdim=True)
    for scale in (1e4, -1e4):
        got = run(library, x, scale=scale)
        assert got.isfinite().all()
        assert torch.allclose(got.sum(-1), torch.ones(()), atol=1e-5)
    # A logit that overflows to -inf is a zero, not NaN, also in the first of two passes.
    y = torch.cat([torch.full((1, length, 2), -3e19), torch.zeros(1, 3, 2)], dim=1)
    got = run(library, torch.full((1, 1, 2), 3e19), columns=y, scale=1.0)
    assert torch.equal(got[0, 0, 0], torch.cat([torch.zeros(length), torch.full((3,), 1 / 3)]))


def test_no_tokens_give_uniform_channels(library):
    got = run(library, torch.empty(2, 0, 6), kind="channel", num_heads=2)
    assert torch.equal(got, torch.full((2, 2, 3, 3), 1 / 3))


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.values())
@pytest.mark.parametrize("multiprocessors", [1, 5, 132])
def test_every_order_and_every_split_gives_the_same_bits(library, order, multiprocessors):
    x, columns = noise(1, 100, 33), noise(1, 40, 33, seed=1)
    for how in ({}, {"columns": columns, "normalize": True}):
        check(library, x, num_heads=3, order=order, multiprocessors=multiprocessors, **how)
        got = run(library, x, num_heads=3, order=order, multiprocessors=multiprocessors, **how)
        assert torch.equal(got, run(library, x, num_heads=3, **how))


def test_rows_are_split_only_where_pairs_are_few(library):
    assert [library.row_splits(pairs, 197, 132) for pairs in (1, 6, 100, 132, 384)] == [7, 7, 4, 1, 1]
    assert library.row_splits(1, 10**9, 132) == 396
    assert library.row_splits(1, 1, 132) == 1


def test_shared_memory_formula_is_pythons(library):
    sizes = itertools.product((1, 7, 8, 37, 196, 197, 608), (0, 1, 3, 4, 5, 11, 64, 196), (False, True))
    for columns, depth, symmetric in sizes:
        wanted = library.shared_bytes(columns, depth, symmetric)
        assert front.cuda_shared_bytes(columns, depth, symmetric) == wanted


@pytest.mark.parametrize("dtype", HALVES)
def test_stand_in_types_convert_as_torch_does(library, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = torch.empty(2**16)
    library.to_float32(TYPES[dtype], every.data_ptr(), values.data_ptr(), 2**16)
    assert torch.equal(values.nan_to_num(7.0), every.view(dtype).float().nan_to_num(7.0))
    # Representable values, the halfway points between neighbours, and a little to either side of them.
    finite = values[values.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beside = [halfway * (1 + 1e-6), halfway * (1 - 1e-6), torch.tensor([1e30, -1e30])]
    floats = torch.cat([finite, halfway, *beside])
    got = torch.empty(floats.numel(), dtype=torch.int16)
    library.from_float32(TYPES[dtype], floats.data_ptr(), got.data_ptr(), floats.numel())
    assert torch.equal(got.view(dtype), floats.to(dtype))


def mutant(tmp_path, old: str, new: str) -> ctypes.CDLL:
    """The driver on a copy of the kernel in which the first `old` reads `new`."""
    (tmp_path / "cuda").mkdir()
    for path in (cuda_sources.CSRC / "cuda").glob("*.cuh"):
        text = path.read_text()
        if path.name == "self_relation.cuh":
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "cuda" / path.name).write_text(text)
    return declared(cuda_sources.driver("cuda_self_relation.cpp", include=tmp_path))


@pytest.mark.proof
@pytest.mark.parametrize(
    ("old", "new", "symptom"),
    [
        pytest.param("__syncthreads();", "", "wrong", id="a block barrier left out"),
        pytest.param("__syncwarp();\n      if", "if", "wrong", id="a warp barrier left out"),
        pytest.param("__syncthreads();", "if (warp < 3) __syncthreads();", "waits at __syncthreads", id="divergence"),
        pytest.param("+ warp * kRows)", "+ (warp + 1) * kRows)", "out of bounds of dynamic shared", id="shared"),
        pytest.param("first + v, limit - 1", "first + v, limit", "out of bounds of x", id="past the input"),
        pytest.param("strides.vector % 4 == 0", "true", "misaligned", id="quads of unaligned vectors"),
        pytest.param("row + r < rows", "row + r <= rows", "out of bounds of out", id="past the output"),
        pytest.param("sum * exp2f(before - peak)", "sum", "wrong", id="sums of chunks not rescaled"),
    ],
)
def test_broken_kernels_are_found(tmp_path, old, new, symptom):
    lib = mutant(tmp_path, old, new)
    # 300 rows of 36: the last row tile is cut, the input ends at a page, and quads are loaded whole.
    x, columns = noise(1, 300, 36), noise(1, 290, 36, seed=1)
    found = []
    cases = [(x, None), (x, columns), (noise(1, 300, 35)[..., :32], None)]
    for order, (rows, other) in itertools.product(ORDERS, cases):
        try:
            check(lib, rows, other, order=order)
        except RuntimeError as error:
            found.append(str(error))
        except AssertionError:
            found.append("wrong")
    assert any(symptom in f for f in found), found


# Kernels for cuda_on_cpu.h itself: 64 threads, 80 bytes of dynamic shared memory, two blocks.
WRONG_KERNELS = r"""
#include "cuda_on_cpu.h"
#include "cuda/common.cuh"
using namespace fastssl::cuda;

int deep(int n, volatile char* above) {
  volatile char frame[1024];
  frame[0] = above[0];
  return n == 0 ? frame[0] : deep(n - 1, frame) + frame[0];
}

void kernel(int which, float* out) {  // out (16)
  FASTSSL_DYNAMIC_SHARED(float, shared);
  FASTSSL_SHARED(float, sums, 2);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  volatile char zero = 0;
  switch (which) {
    case 0: {  // right: sum of 0 … 63 by warps, then over warps, and how many threads are even
      const float sum = warp_sum(float(t));
      const int even = __builtin_popcount(__ballot_sync(kFullMask, t % 2 == 0));
      if (lane == 0) sums[warp] = sum;
      __syncthreads();
      if (t == 0) out[0] = sums[0] + sums[1], out[1] = even;
      if (t == 1) out[2] = __any_sync(2u, false) || !__all_sync(2u, true);
      out[3] = __shfl_down_sync(kFullMask, lane, 1, 16) + __shfl_up_sync(kFullMask, lane, 1, 16);
      break;
    }
    case 1: if (t < 32) __syncthreads(); break;
    case 2: if (t < 32) { __syncthreads(); } else {
              __syncthreads(); }
            break;
    case 3: if (lane < 16) __shfl_xor_sync(kFullMask, 1.f, 1); break;
    case 4: if (lane < 16) { __syncwarp(); } else { __syncthreads(); } break;
    case 5: if (lane < 16) __syncwarp(0xffff0000u); break;
    case 6: out[0] = __shfl_sync(0x0000ffffu << (lane / 16 * 16), 1.f, 31 - lane); break;
    case 7: shared[t % 20] = 1.f; out[0] = shared[20]; break;
    case 8: shared[-(1 << 12)] = 1.f; break;
    case 9: shared[-1] = 1.f; break;
    case 10: sums[2] = 1.f; break;
    case 11: out[16] = 1.f; break;
    case 12: out[0] = deep(1000, &zero); break;
    case 13: if (lane == 0) { sums[warp] = 1.f; out[warp] = sums[1 - warp]; } break;
    case 15: out[0] = to_float4(*reinterpret_cast<Quad<float>*>(out + 1 + lane % 2)).x; break;
    case 16: { float tile[8] = {}; tile[t] = 1.f; out[0] = tile[which]; break; }
    case 14: if (blockIdx.x == 0) shared[0] = 1.f; if (t == 0) out[blockIdx.x] = shared[0]; break;
  }
}

extern "C" const char* run(int which, int order, float* out) {
  static std::string error;
  const cuda_on_cpu::Guarded memory("out", out, 16 * sizeof(float));
  error = cuda_on_cpu::launch(2, 64, 80, order, [&] { kernel(which, static_cast<float*>(memory.data())); });
  memcpy(out, memory.data(), 16 * sizeof(float));
  return error.c_str();
}
"""


@pytest.fixture(scope="module")
def wrong_kernels(tmp_path_factory) -> ctypes.CDLL:
    source = tmp_path_factory.mktemp("wrong") / "cuda_wrong.cpp"
    source.write_text(WRONG_KERNELS)
    lib = cuda_sources.driver(source)
    lib.run.argtypes, lib.run.restype = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p], ctypes.c_char_p
    return lib


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.values())
def test_a_right_kernel_runs(wrong_kernels, order):
    out = torch.zeros(16)
    assert wrong_kernels.run(0, order, out.data_ptr()) == b""
    assert out[:3].tolist() == [2016.0, 16.0, 0.0]


@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.values())
@pytest.mark.parametrize(
    ("which", "message"),
    [
        pytest.param(1, "has returned", id="barrier in half of the block"),
        pytest.param(2, "waits at __syncthreads", id="barriers at two lines"),
        pytest.param(3, "has returned", id="shuffle in half of the warp"),
        pytest.param(4, "for its warp at", id="warp barrier against block barrier"),
        pytest.param(5, "the mask leaves out", id="mask without the caller"),
        pytest.param(7, "out of bounds of dynamic shared memory: byte 80 of 80", id="past shared memory"),
        pytest.param(8, "out of bounds of dynamic shared memory: byte -16384 of 80", id="far before shared memory"),
        pytest.param(9, "written outside of dynamic shared memory", id="just before shared memory"),
        pytest.param(10, "written outside of shared array sums", id="past a static array"),
        pytest.param(11, "out of bounds of out: byte 64 of 64", id="past a global array"),
        pytest.param(12, "overflows its stack", id="endless recursion"),
        pytest.param(15, "misaligned access", id="misaligned quad"),
        pytest.param(16, "index outside of an array", id="register array"),
    ],
)
def test_wrong_kernels_are_found(wrong_kernels, which, message, order):
    assert message in wrong_kernels.run(which, order, torch.zeros(16).data_ptr()).decode()


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(6, id="lane outside of the mask"),
        pytest.param(13, id="no barrier"),
        pytest.param(14, id="left by another block"),
    ],
)
def test_what_was_not_written_reads_as_nan(wrong_kernels, which):
    seen = []
    for order in ORDERS:
        out = torch.zeros(16)
        assert wrong_kernels.run(which, order, out.data_ptr()) == b""
        seen.append(bool(out.isnan().any()))
    assert any(seen)


KERNELS = 3  # storage types of x
PROOF = pytest.mark.proof


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=PROOF), pytest.param("sm_100", marks=PROOF)])
def test_compiles_without_spills(arch):
    kernels = cuda_sources.ptxas_records("self_relation.cu", arch)
    cuda_sources.check_no_spills(kernels)
    assert len({k.name for k in kernels}) == KERNELS
    assert {k.arch for k in kernels} == {arch}
    # Three blocks of 128 threads share the 65536 registers of a multiprocessor, eight at a time.
    assert max(k.registers for k in kernels) <= 65536 // (3 * 128) // 8 * 8


RECORD = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_90'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 4.648 ms
"""
BAD_RECORDS = {
    "spill stores": RECORD.replace("0 bytes spill stores", "8 bytes spill stores"),
    "spill loads": RECORD.replace("0 bytes spill loads", "12 bytes spill loads"),
    "stack": RECORD.replace("0 bytes stack frame", "256 bytes stack frame"),
    "second kernel": RECORD + RECORD.replace("good", "bad").replace("0 bytes stack", "24 bytes stack"),
    "a function that is called": RECORD
    + "ptxas info    : Function properties for _Z1gfi\n"
    + "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n",
    "nothing": "ptxas info    : 0 bytes gmem\n",
}


def test_ptxas_records_are_read():
    assert cuda_sources.parse_ptxas(RECORD) == [cuda_sources.Kernel("_Z4goodPf", "sm_90", 40, 512, 0, 0, 0)]
    cuda_sources.check_no_spills(cuda_sources.parse_ptxas(RECORD))


@pytest.mark.parametrize("text", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_spills_fail_the_check(text):
    with pytest.raises(AssertionError, match=r"local memory|no kernel"):
        cuda_sources.check_no_spills(cuda_sources.parse_ptxas(text))
