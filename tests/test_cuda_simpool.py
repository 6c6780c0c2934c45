"""simpool's CUDA kernels without a GPU: in the launch sequence of simpool.cu on the CPU (cuda_on_cpu.h), and by nvcc.

Every result lies in memory full of NaN, every part of the workspace in guarded memory of its own, and a test fails if
an input is written to. Seen red: the kernels are broken in ten ways (test_broken_kernels_are_found).
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import compare
import cuda_sources
import pytest
import torch
from torch import Tensor

from fastssl._backends import Call as BackendCall
from fastssl.ops import simpool as front
from fastssl.reference.simpool import simpool as reference

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALVES = [torch.bfloat16, torch.float16]
ORDERS = {0: "ascending", 1: "descending", 2: "shuffled"}
FORWARD = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GRADIENT = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
PARAMETERS = ("wq", "bq", "wk", "norm_weight", "norm_bias", "beta")
POWERS = [
    pytest.param({}, id="mean"),
    pytest.param({"gamma": 1.25, "value_min": "batch"}, id="1.25-batch"),
    pytest.param({"gamma": 2.0, "value_min": "channel"}, id="2-channel"),
]


class Array(ctypes.Structure):
    """A tensor as tests/cuda_simpool.cpp sees it."""

    _fields_ = (
        ("storage", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
    )

    @classmethod
    def of(cls, x: Tensor) -> Array:
        storage = x.untyped_storage()
        offset = x.storage_offset() * x.element_size()
        triple = ctypes.c_int64 * 3
        where = (storage.data_ptr(), storage.nbytes(), offset, TYPES[x.dtype], x.numel())
        return cls(*where, triple(*x.shape), triple(*x.stride()))


class Numbers(ctypes.Structure):
    """What a call has beside tensors, and how it is split and run."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "channel_minimum", "multiprocessors", "order")),
        *((name, ctypes.c_double) for name in ("scale", "gamma", "eps", "norm_eps")),
    )


def arrays(tensors: Any) -> Any:
    values = [Array.of(t) for t in tensors]
    return (Array * len(values))(*values)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return declared(cuda_sources.driver("cuda_simpool.cpp"))


def declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    array, number, wide = ctypes.POINTER(Array), ctypes.c_int, ctypes.c_int64
    lib.forward.argtypes = [array, array, ctypes.POINTER(Numbers)]
    lib.backward.argtypes = [*lib.forward.argtypes, number, ctypes.POINTER(number)]
    lib.product.argtypes = [array] * 4 + [number]
    lib.forward.restype = lib.backward.restype = lib.product.restype = ctypes.c_char_p
    lib.split.argtypes, lib.split.restype = [wide] * 4 + [number] * 3 + [ctypes.POINTER(wide)], None
    return lib


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(channels: int, *, bias: bool = False, beta: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return {
        "wq": noise(channels, channels, seed=1, dtype=dtype) * channels**-0.5,
        "wk": noise(channels, channels, seed=2, dtype=dtype) * channels**-0.5,
        "norm_weight": 1 + 0.2 * noise(channels, seed=3, dtype=dtype),
        "norm_bias": 0.3 * noise(channels, seed=4, dtype=dtype),
        "bq": noise(channels, seed=5, dtype=dtype) if bias else None,
        "beta": noise(1, seed=6, dtype=dtype)[0] if beta else None,
    }


class Call:
    """One call of the kernels, forward and backward, as csrc/cuda/simpool.cu makes it."""

    def __init__(self, lib: ctypes.CDLL, x: Tensor, given: dict, *, multiprocessors=2, order=0, **how: Any) -> None:
        self.lib = lib
        names = ("num_heads", "scale", "gamma", "value_min", "eps", "norm_eps")
        defaults = {"num_heads": 1, "scale": None, "gamma": None, "value_min": "batch", "eps": 1e-6, "norm_eps": 1e-6}
        heads, scale, gamma, value_min, eps, norm_eps = ({**defaults, **how}[name] for name in names)
        p = given
        inputs = (x, p["wq"], p["wk"], p["norm_weight"], p["norm_bias"], p["bq"], None)
        args = front._check(*inputs, heads, scale, gamma, p["beta"], value_min, eps, norm_eps, False)
        self.tensors, self.raw = args.tensors, args.numbers
        n = args.numbers
        numbers = (n.num_heads, n.channel_min, multiprocessors, order, n.scale, n.gamma, n.eps, n.norm_eps)
        self.numbers = Numbers(*numbers)
        self.results = [t.fill_(torch.nan) for t in front._fake_forward(*args.tensors, *n)]
        self._raise(lib.forward(arrays(args.tensors), arrays(self.results), self.numbers))

    @staticmethod
    def _raise(error: bytes) -> None:
        if error:
            raise RuntimeError(error.decode())

    def backward(self, grad: Tensor, grad_attention: Tensor | None = None, wanted: int = 3) -> dict[str, Tensor]:
        kept = self.results[2:]
        if grad_attention is None:
            grad_attention = grad.new_empty(0)
        results = front._fake_backward(grad, grad_attention, *kept, *self.tensors, *self.raw, wanted)
        results = [t.fill_(torch.nan) for t in results]
        inputs = arrays([*self.tensors, grad, grad_attention, *kept])
        launches = ctypes.c_int()
        self._raise(self.lib.backward(inputs, arrays(results), self.numbers, wanted, launches))
        self.launches = launches.value
        return dict(zip(("x", *PARAMETERS), results, strict=True))


#: The largest errors that `check` has seen: printed with -s, for the record.
WORST: dict[tuple[str, torch.dtype], float] = {}


@pytest.fixture(scope="module", autouse=True)
def _report():
    yield
    for (what, dtype), error in sorted(WORST.items(), key=str):
        print(f"\nworst {what} {dtype}: {error:.1e}", end="")


def close(got: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    error = compare.relative_error(got, truth)
    kind = "forward" if what in ("out", "attention") else "gradient"
    WORST[kind, got.dtype] = max(error, WORST.get((kind, got.dtype), 0.0))
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def upstreams(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    out, attention = call.results[:2]
    grad = noise(*out.shape, seed=7).to(x.dtype)
    # A gradient through the attention of the size that matters: a is about 1/N.
    return grad, (noise(*attention.shape, seed=8) * attention.shape[2] ** 0.5).to(x.dtype)


def check(
    lib: ctypes.CDLL,
    x: Tensor,
    given: dict,
    *,
    wanted: int = 3,
    attention: bool = False,
    factor: float = 1.0,
    **how: Any,
) -> Call:
    """Results and gradients against the reference in float64; `factor` times the tolerances."""
    call = Call(lib, x, given, **how)
    leaves = {k: v.detach().double().requires_grad_() for k, v in {"x": x, **given}.items() if v is not None}
    numbers = {k: v for k, v in how.items() if k not in ("multiprocessors", "order")}
    truth = reference(**leaves, **numbers)
    close(call.results[0], truth[0], factor * FORWARD[x.dtype], "out")
    close(call.results[1], truth[1], factor * FORWARD[x.dtype], "attention")
    grad, grad_attention = upstreams(x, call)
    got = call.backward(grad, grad_attention if attention else None, wanted)
    loss = (truth[0] * grad.double()).sum()
    if attention:
        loss = loss + (truth[1] * grad_attention.double()).sum()
    wants = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for name, found in got.items():
        if not wanted & (1 if name == "x" else 2) or name not in wants:
            assert found.numel() == 0
            continue
        want = wants[name]
        if name == "x" and x.ndim == 4:
            want = want.flatten(2).transpose(1, 2)
        # What a half-precision x leaves of a gradient is its rounding, not that of the parameters.
        tolerance = max(GRADIENT[found.dtype], GRADIENT[x.dtype])
        close(found, want, factor * tolerance, f"gradient of {name}")
    return call


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("channels", [33, 48, 384])
@pytest.mark.parametrize("length", [1, 37, 196])
def test_sizes(library, length, channels, power):
    heads = 3 if length == 37 else 1
    check(library, noise(2, length, channels), parameters(channels, bias=True), num_heads=heads, **power)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("length", "channels", "heads"), [(196, 33, 3), (196, 48, 3), (20, 48, 6), (9, 24, 24)])
def test_heads(library, length, channels, heads, power):
    check(library, noise(2, length, channels), parameters(channels), num_heads=heads, attention=True, **power)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("length", "channels", "heads"), [(37, 33, 3), (37, 48, 1), (196, 64, 1)])
def test_half_precision(library, length, channels, heads, power, dtype):
    x = noise(2, length, channels, dtype=dtype)
    check(library, x, parameters(channels, bias=True), num_heads=heads, attention=True, **power)
    check(library, x, parameters(channels, dtype=dtype), num_heads=heads, **power)


@pytest.mark.parametrize("value_min", ["batch", "channel"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.25, 2.0])
def test_powers(library, gamma, value_min):
    given = parameters(48, bias=True, beta=True)
    check(library, noise(3, 21, 48), given, num_heads=3, gamma=gamma, value_min=value_min, attention=True)


def test_parameters_of_other_dtypes_and_strides(library):
    given = parameters(48, bias=True, beta=True)
    given["wq"] = given["wq"].t()
    given["wk"] = torch.stack([given["wk"]] * 2, dim=-1).to(torch.bfloat16)[..., 0]
    given["norm_weight"] = torch.stack([given["norm_weight"]] * 2, dim=-1).half()[..., 1]
    given["norm_bias"] = given["norm_bias"].flip(0).to(torch.bfloat16)
    check(library, noise(2, 21, 48), given, num_heads=3, gamma=1.25)
    check(library, noise(2, 21, 48), {**given, "beta": None}, num_heads=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power", POWERS)
def test_strided_inputs(library, power, dtype):
    given = parameters(48)
    for side in (5, 6):  # rows of a feature map that are whole quads, and that are not
        feature_map = noise(2, 48, side, 6 + side % 2, dtype=dtype)
        check(library, feature_map, given, num_heads=3, **power)
        check(library, feature_map.contiguous(memory_format=torch.channels_last), given, **power)
    with_class_token = noise(2, 38, 48, dtype=dtype)
    check(library, with_class_token[:, 1:], given, num_heads=3, **power)
    check(library, with_class_token[:, ::2, :33], parameters(33), num_heads=3, **power)
    check(library, noise(2, 38, 100, dtype=dtype)[:, :, 3:99:2], given, **power)
    check(library, with_class_token[:1].expand(3, -1, -1), given, **power)
    check(library, with_class_token.transpose(0, 1), given, **power)


def test_upstream_gradients_of_any_strides(library):
    given = parameters(48)
    call = Call(library, noise(2, 21, 48), given, num_heads=3)
    grad, grad_attention = noise(48, 2, seed=7), noise(21, 3, 2, seed=8)
    got = call.backward(grad.t(), grad_attention.permute(2, 1, 0))
    wanted = call.backward(grad.t().contiguous(), grad_attention.permute(2, 1, 0).contiguous())
    assert all(torch.equal(got[name], wanted[name]) for name in got)
    got = call.backward(torch.ones(()).expand(2, 48))
    wanted = call.backward(torch.ones(2, 48))
    assert all(torch.equal(got[name], wanted[name]) for name in got)


@pytest.mark.parametrize("power", POWERS)
def test_what_is_wanted(library, power):
    x, given = noise(2, 21, 48), parameters(48, bias=True, beta=bool(power))
    launches = [check(library, x, given, wanted=wanted, **power).launches for wanted in (1, 2, 3)]
    assert launches == [4, 4, 5]


def test_what_does_not_fit_is_refused_before_a_call():
    def reasons(dtype=torch.float32, device="cuda", **sizes):
        sizes = {"tokens": 196, "channels": 384, "heads": 1, **sizes}
        return front._cpp_limits(BackendCall(front._OP, device, (("x", dtype), ("wq", torch.float32)), True, sizes))

    assert reasons() == reasons(torch.bfloat16, channels=4096, heads=128) == []
    assert reasons(torch.float64, "cpu", channels=8192, heads=512) == []
    assert reasons(torch.float64) == ["its CUDA kernels take no float64 x"]
    assert reasons(channels=8192) == ["its CUDA kernels take at most 4096 channels, got 8192"]
    assert reasons(heads=192) == ["its CUDA kernels take at most 128 heads, got 192"]


@pytest.mark.parametrize("power", POWERS)
def test_batches_of_one_and_none(library, power):
    check(library, noise(1, 50, 48), parameters(48), **power)
    # No image launches nothing: csrc/cuda/simpool.cu returns before it describes a call.
    split = (ctypes.c_int64 * 4)()
    library.split(0, 50, 48, 1, 4, 0, 132, split)
    assert split[2] == 0


@pytest.mark.parametrize("power", POWERS)
def test_ties_share_the_gradient_of_the_minimum(library, power):
    x = noise(2, 20, 48)
    x[:, 5:8] = x[:, 4:5]  # tokens alike: their values tie, and among them are minima
    x[0, 6, 11] = x[0, 4:8, 11] = -9.0
    check(library, x, parameters(48), num_heads=3, **power)
    given = parameters(48)
    given["norm_weight"] = torch.zeros(48)  # y is the bias of the channel
    given["norm_bias"] = torch.arange(48).div(6, rounding_mode="floor") / 8
    check(library, x, given, num_heads=3, **power)


@pytest.mark.parametrize("power", POWERS)
def test_constant_inputs(library, power):
    given = parameters(48)
    for value in (0.0, 0.5, 3.0):
        x = torch.full((2, 20, 48), value)
        check(library, x, given, num_heads=3, **power)
        call = Call(library, x, given, **power)
        assert torch.equal(call.results[1], torch.full((2, 1, 20), 1 / 20))


@pytest.mark.parametrize("power", POWERS)
def test_large_means(library, power):
    check(library, noise(2, 37, 48) + 100, parameters(48), scale=0.01, **power)
    check(library, noise(2, 37, 384) + 100, parameters(384), scale=0.01, num_heads=3, **power)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("length", [21, 100])
def test_logits_of_ten_thousand_stay_finite(library, length, power):
    for scale in (1e4, -1e4):
        call = Call(library, noise(2, length, 48), parameters(48, bias=True), num_heads=3, scale=scale, **power)
        assert call.results[2][:, 2:5].abs().max() > 1e4
        assert all(t.isfinite().all() for t in call.results)
        assert torch.allclose(call.results[1].sum(-1), torch.ones(()), atol=1e-5)
        grad, grad_attention = upstreams(noise(1), call)
        assert all(t.isfinite().all() for t in call.backward(grad, grad_attention).values())


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("multiprocessors", [0, 1, 132])
def test_every_split(library, multiprocessors, power):
    # One chunk of many tiles, a few chunks of several, and chunks of eight tokens.
    given = parameters(33, bias=True)
    check(library, noise(1, 300, 33), given, num_heads=3, multiprocessors=multiprocessors, attention=True, **power)
    check(library, noise(2, 33, 40, 5).to(torch.bfloat16), given, multiprocessors=multiprocessors, **power)


@pytest.mark.parametrize("power", POWERS)
def test_every_order_gives_the_same_bits(library, power):
    x, given = noise(2, 60, 48), parameters(48, bias=True, beta=bool(power))
    found = []
    for order in ORDERS:
        call = check(library, x, given, num_heads=3, multiprocessors=4, order=order, attention=True, **power)
        found.append([*call.results, *call.backward(*upstreams(x, call)).values()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("power", POWERS)
def test_heads_that_share_the_folded_queries_memory(library, power):
    # 768 channels leave room for five of six heads' folded queries at a time.
    check(library, noise(1, 9, 768), parameters(768), num_heads=6, **power)


def test_splits(library):
    def split(images, tokens, channels, heads=1, size=2, power=False, multiprocessors=132):
        found = (ctypes.c_int64 * 4)()
        library.split(images, tokens, channels, heads, size, power, multiprocessors, found)
        return tuple(found)[:3]

    assert split(64, 196, 384) == (24, 24, 9)
    assert split(256, 196, 768) == (24, 72, 3)
    assert split(1000, 196, 768) == (32, 224, 1)
    assert split(1, 196, 384) == (8, 8, 25)
    assert split(1, 1, 384) == (8, 8, 1)


def test_every_call_within_the_limits_fits_into_shared_memory(library):
    assert (library.max_channels(), library.max_heads()) == tuple(front.CUDA_LARGEST.values())
    found = (ctypes.c_int64 * 4)()
    sizes = ((1, 1), (33, 3), (384, 128), (768, 12), (1536, 24), (2048, 128), (4095, 65), (4096, 1), (4096, 128))
    for (channels, heads), size, power in itertools.product(sizes, (2, 4), (False, True)):
        library.split(4, 1000, channels, heads, size, power, 132, found)
        tile, chunk, chunks, shared = found
        assert tile >= 1
        assert chunk % tile == 0
        assert (chunks - 1) * chunk < 1000 <= chunks * chunk
        assert 0 < shared <= 99 * 1024  # what every GPU from sm_80 on gives one block


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("order", ORDERS, ids=ORDERS.values())
def test_small_products(library, dtype, order):
    for rows, columns, depth in ((1, 1, 1), (33, 31, 65), (40, 70, 130), (32, 64, 64)):
        left, bias = noise(3, rows, depth), noise(3, 1, columns, seed=2)
        right = noise(3, depth, columns, seed=1, dtype=dtype)
        out = torch.full((3, rows, columns), torch.nan)
        kept = (left, left.transpose(1, 2).contiguous().transpose(1, 2))
        others = (right, right.transpose(1, 2).contiguous().transpose(1, 2))
        for a, b in itertools.product(kept, others):
            error = library.product(arrays([a]), arrays([b]), arrays([bias]), arrays([out]), order)
            assert error == b""
            compare.assert_close(out, left.double() @ right.double() + bias, 1e-6)


def mutant(tmp_path, file: str, old: str, new: str) -> ctypes.CDLL:
    """The driver on copies of the kernels in which the first `old` of one file reads `new`."""
    (tmp_path / "cuda").mkdir()
    for path in (cuda_sources.CSRC / "cuda").glob("*.cuh"):
        text = path.read_text()
        if path.name == file:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / "cuda" / path.name).write_text(text)
    return declared(cuda_sources.driver("cuda_simpool.cpp", include=tmp_path))


@pytest.mark.proof
@pytest.mark.parametrize(
    ("file", "old", "new", "symptom"),
    [
        pytest.param(
            "simpool.cuh", "__syncthreads();\n    for (int n = warp", "for (int n = warp", "relative", id="tile"
        ),
        pytest.param("simpool.cuh", "if (Power) __syncthreads();", "", "relative", id="statistics of other warps"),
        pytest.param("simpool.cuh", "total[h] * factor[h]", "total[h]", "relative", id="sums of tiles not rescaled"),
        pytest.param("simpool.cuh", "* expf(__ldcg(chunk) - peak)", "", "relative", id="chunks not rescaled"),
        pytest.param(
            "simpool_tiles.cuh", "x[n * strides.token", "x[(n + 1) * strides.token", "out of bounds of x", id="x"
        ),
        pytest.param("simpool_tiles.cuh", "strides.token % vector == 0", "true", "misaligned", id="unaligned vectors"),
        pytest.param("simpool_tiles.cuh", "== count - 1", "== 0", "relative", id="the first block gathers"),
        pytest.param(
            "simpool_backward.cuh", "tile, x + first", "tile, x + at.first", "relative", id="first tile again"
        ),
        pytest.param("simpool_gradients.cuh", "shift + width", "shift + 2 * width", "of dynamic shared", id="shared"),
        pytest.param("small_products.cuh", "__syncthreads();\n    if", "if", "relative", id="product without barrier"),
    ],
)
def test_broken_kernels_are_found(tmp_path, file, old, new, symptom):
    lib = mutant(tmp_path, file, old, new)
    found = []
    cases = [noise(2, 70, 48), noise(2, 70, 51)[..., :48], noise(1, 8, 48)]
    for order, x, power in itertools.product(ORDERS, cases, ({}, {"gamma": 1.25})):
        given = parameters(48)
        try:
            check(lib, x, given, scale=2.0, multiprocessors=1, order=order, **power)
        except (RuntimeError, AssertionError) as error:
            found.append(str(error))
    assert any(symptom in f for f in found), found


KERNELS = 5 * 3 * 2 + 1  # of storage types of x, with a power and without; the product
PROOF = pytest.mark.proof


@pytest.mark.parametrize("arch", ["sm_90", pytest.param("sm_80", marks=PROOF), pytest.param("sm_100", marks=PROOF)])
def test_compiles_without_spills(arch):
    kernels = cuda_sources.ptxas_records("simpool.cu", arch)
    cuda_sources.check_no_spills(kernels)
    assert len({k.name for k in kernels}) == KERNELS
    assert {k.arch for k in kernels} == {arch}
    # Three blocks of 256 threads share the 65536 registers of a multiprocessor, eight at a time; two of them where
    # x is float32 and there is a power.
    few = ("multiply", "input_gradientsIfLb1")
    assert max(k.registers for k in kernels if not any(f in k.name for f in few)) <= 65536 // (3 * 256) // 8 * 8
    assert max(k.registers for k in kernels if few[1] in k.name) <= 65536 // (2 * 256)
