"""What every op keeps on a GPU, whatever it computes: values, streams, devices, graphs, no waiting, 64-bit offsets.

The shapes and options of each op are in its own tests marked `gpu`. Without a GPU these run as `make gpu-rehearsal`
has them: on the CPU, where streams, devices and graphs are none.
"""

import gpu_rehearsal
import pytest
import torch
from compare import assert_close
from small_calls import SIZES, SMALL_CALLS, arguments_for
from tolerances import FORWARD, GRADIENT, POOLED, POOLED_GRADIENT

from fastssl import _library
from fastssl._backends import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WHAT = pytest.mark.parametrize("what", SMALL_CALLS)
NO_CUDA_SOURCE = pytest.mark.skipif(_library.why_no_cuda is not None, reason=_library.why_no_cuda or "")
BACKENDS = pytest.mark.parametrize("backend", ["triton", pytest.param("cpp", marks=NO_CUDA_SOURCE)])
#: In float32, and as models are trained.
KINDS = pytest.mark.parametrize(("size", "dtype"), [(SIZES[1], torch.float32), (SIZES[3], torch.bfloat16)])
#: A tensor of this many elements has some at which 32-bit offsets wrap around.
MANY = 2**31 if not gpu_rehearsal.ASKED else 2**12


def call_of(what, backend, size=SIZES[1], dtype=torch.float32):
    call = SMALL_CALLS[what]
    arguments, reasons = arguments_for(call, backend, size, "cuda", dtype)
    if reasons:
        pytest.skip(f"{backend} {'; '.join(reasons)}")
    return call, arguments


def test_every_op_is_here():
    assert {call.op for call in SMALL_CALLS.values()} == set(OPS)


@BACKENDS
@WHAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(what, backend, dtype, size):
    call, arguments = call_of(what, backend, size, dtype)
    exact = arguments.to("cpu", torch.float64)
    out = call(arguments, backend)
    # A mean's gradient is scaled, as in training with float16, of which it would be a subnormal number.
    upstream = torch.randn(out.shape).to(out.dtype) if out.dim() else torch.tensor(1000.0)
    truth = call.step(exact, "reference", upstream.double())
    got = call.step(arguments, backend, upstream.to(out))
    forward, gradient = (POOLED, POOLED_GRADIENT) if call.op == "simpool" else (FORWARD, GRADIENT)
    assert_close(got[0], truth[0], forward[dtype], "value")
    for one, other in zip(got[1:], truth[1:], strict=True):
        assert_close(one, other, gradient[dtype], "gradient")


@BACKENDS
@WHAT
@KINDS
def test_runs_on_the_current_stream(what, backend, size, dtype):
    """Its inputs get there late: whatever ran on another stream would have missed them."""
    call, arguments = call_of(what, backend, size, dtype)
    expected = call.step(arguments, backend)
    late = arguments.to()
    for x in (*late.images, *late.shared):
        x.data.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, values in zip(late.all(), arguments.all(), strict=True):
            x.data.copy_(values.data)
        got = call.step(late, backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@BACKENDS
@WHAT
@KINDS
def test_waits_for_nothing(what, backend, size, dtype):
    call, arguments = call_of(what, backend, size, dtype)
    call.step(arguments, backend)  # what is compiled and loaded once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.step(arguments, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
@WHAT
@KINDS
def test_in_a_graph(what, backend, size, dtype):
    """Captured with its gradients, then replayed on other values."""
    call, arguments = call_of(what, backend, size, dtype)
    replay, results = captured(lambda: call.step(arguments, backend))
    for _ in range(2):
        for x in (*arguments.images, *arguments.shared):
            x.data.mul_(-0.9)
        replay()
        expected = call.step(arguments, backend)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def captured(step):
    """A function that runs `step` again, and its results, which stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if gpu_rehearsal.ASKED:
        return gpu_rehearsal.replay_of(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


@BACKENDS
@WHAT
@KINDS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_on_another_device_than_the_current(what, backend, size, dtype):
    call, arguments = call_of(what, backend, size, dtype)
    expected = call.step(arguments, backend)
    assert torch.cuda.current_device() == 0
    got = call.step(arguments.to("cuda:1"), backend)
    assert all(x.device == torch.device("cuda:1") or gpu_rehearsal.ASKED for x in got)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, expected, strict=True))


@pytest.mark.xdist_group("large")  # one after the other
@BACKENDS
@pytest.mark.parametrize("what", [name for name, call in SMALL_CALLS.items() if call.independent])
def test_more_than_2_31_elements(what, backend):
    """The first, some and the last of many images are as eight alone."""
    size = (8, 256, 256) if not gpu_rehearsal.ASKED else (8, 16, 32)
    dtype = torch.bfloat16 if not gpu_rehearsal.ASKED else torch.float32
    call, few = call_of(what, backend, size, dtype)
    torch.cuda.empty_cache()
    repeat = MANY // few.images[0].numel() + 1
    need = 7 * repeat * few.images[0].numel() * few.images[0].element_size() * len(few.images)
    if not gpu_rehearsal.ASKED and torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 1e9:.0f} GB of free memory")
    many = call.arguments(size, "cuda", dtype, repeat, grad=bool(few.leaves()))
    for x, values in zip((*many.images, *many.shared), (*few.images, *few.shared), strict=True):
        x.data.view(-1, *values.shape).copy_(values.data.expand(x.numel() // values.numel(), *values.shape))
    assert many.images[0].numel() > MANY
    out = call(few, backend)
    upstream = torch.randn_like(out) if out.dim() else None
    expected = call.step(few, backend, upstream)
    repeated = None if upstream is None else upstream.repeat(repeat, *[1] * (upstream.dim() - 1))
    got = call.step(many, backend, repeated)
    mean = upstream is None  # of all images: a gradient is that of eight, divided
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape == b.shape:
            of_shared = i > 0 and not mean
            assert_close(a, b * repeat if of_shared else b, GRADIENT[dtype], "value or gradient of all")
            continue
        assert a.numel() == b.numel() * repeat
        for part in (0, repeat // 2, repeat - 1):
            rows = a[part * b.shape[0] : (part + 1) * b.shape[0]]
            assert_close(rows.float() * (repeat if mean and i > 0 else 1), b, GRADIENT[dtype], f"images of part {part}")
