"""sample_tokens as an op: autograd, repeatability, torch.compile, raw operators, selection and errors."""

import pytest
import torch
from compare import gradients
from sampling import check, grid_sample, make, needs_library, points

import fastssl
from fastssl import _library, kernels
from fastssl._backends import OPS, Call, reasons_against

# ---- autograd and repeatability ------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("shape", [(1, 128, 64), (8, 50, 96), (4, 96, 10, 5)])
def test_same_bits_for_any_number_of_threads(cpu_path, shape):
    x, grid = make(shape), points(shape[0], 13)
    size = {128: (8, 16), 50: (10, 5), 96: (10, 5)}[shape[1]]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = fastssl.sample_tokens(x, grid, grid_size=size, backend="cpp")
        upstream = torch.ones_like(out) * torch.arange(out.shape[-1])
        results.append((out, *gradients(out, [x, grid], upstream)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("shape", [(2, 9, 3), (2, 3, 2, 4), (1, 1, 2)])
def test_gradcheck(shape):
    """Away from token centres, where the gradient of the grid jumps."""
    x = make(shape, torch.float64)
    grid = points(shape[0], 3, dtype=torch.float64)
    size = torch.tensor(shape[:1:-1] if len(shape) == 4 else [int(shape[1] ** 0.5)] * 2)
    with torch.no_grad():
        at = ((grid + 1) * size - 1) / 2
        at = at.floor() + (at - at.floor()).clamp(0.05, 0.95)
        grid.copy_((2 * at + 1) / size - 1)
    assert torch.autograd.gradcheck(lambda *args: fastssl.sample_tokens(*args, backend="cpp"), (x, grid))


@needs_library
@pytest.mark.parametrize("wanted", ["x", "grid"])
def test_only_the_wanted_gradient(wanted):
    x, grid = make((2, 9, 8)).requires_grad_(wanted == "x"), points(2, 4).requires_grad_(wanted == "grid")
    check(x, grid)


@needs_library
def test_nothing_is_written_to_and_the_graph_may_be_kept():
    x, grid, upstream = make((2, 9, 8)), points(2, 4), torch.randn(2, 16, 8)
    before = [t.detach().clone() for t in (x, grid, upstream)]
    out = fastssl.sample_tokens(x, grid, backend="cpp")
    first = torch.autograd.grad(out, [x, grid], upstream, retain_graph=True)
    second = torch.autograd.grad(out, [x, grid], upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(b, t) for b, t in zip(before, (x, grid, upstream), strict=True))


@needs_library
def test_second_derivatives_are_refused():
    x, grid = make((1, 4, 4)), points(1, 2)
    out = fastssl.sample_tokens(x, grid, backend="cpp")
    for grad in torch.autograd.grad(out.square().sum(), [x, grid], create_graph=True):
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            grad.sum().backward(retain_graph=True)


@needs_library
def test_forward_mode_is_refused_not_wrong():
    x, grid = torch.randn(1, 4, 4), points(1, 2).detach()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda v: fastssl.sample_tokens(v, grid, backend="cpp"), (x,), (torch.ones_like(x),))


# ---- compilation and raw operators -----------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("layout", ["tokens", "map", "grid_size"])
def test_compiled_whole_with_dynamic_batch(layout):
    shape = {"tokens": (9, 8), "map": (8, 3, 3), "grid_size": (6, 8)}[layout]
    size = (2, 3) if layout == "grid_size" else None

    def step(x, grid):
        return fastssl.sample_tokens(x * 2, grid, grid_size=size).square()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 3):
        x, grid = make((batch, *shape)), points(batch, 4)
        out, expected = compiled(x, grid), step(x, grid)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        got, wanted = (gradients(o, [x, grid], upstream) for o in (out, expected))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@needs_library
def test_compiled_by_inductor():
    x, grid = make((2, 9, 8)), points(2, 4)
    compiled = torch.compile(lambda x, g: fastssl.sample_tokens(x + 1, g * 0.9).square().sum(), fullgraph=True)
    expected = fastssl.sample_tokens(x + 1, grid * 0.9).square().sum()
    torch.testing.assert_close(compiled(x, grid), expected)
    got, wanted = (gradients(o, [x, grid], None) for o in (compiled(x, grid), expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (0, 3, 4, 6), (2, 1, 1, 1)])
def test_opcheck(dtype, shape):
    for x in (torch.randn(shape), torch.randn(shape[0], shape[3], *shape[1:3]).permute(0, 2, 3, 1)):
        x, grid = x.to(dtype), points(shape[0], 5).detach().flatten(1, 2)
        torch.library.opcheck(torch.ops.fastssl.sample_tokens_forward, (x, grid))
        grad = torch.randn_like(torch.ops.fastssl.sample_tokens_forward(x, grid))
        for wanted in (0, 1, 2, 3):
            torch.library.opcheck(torch.ops.fastssl.sample_tokens_backward, (grad, x, grid, wanted))


@needs_library
def test_raw_operators_refuse_what_would_read_elsewhere():
    forward, backward = torch.ops.fastssl.sample_tokens_forward, torch.ops.fastssl.sample_tokens_backward
    x, grid = torch.randn(1, 2, 3, 4), torch.zeros(1, 5, 2)
    with pytest.raises(RuntimeError, match=r"x must be \(B, h, w, C\)"):
        forward(x[0], grid)
    with pytest.raises(RuntimeError, match="at least one token"):
        forward(x[:, :0], grid)
    for bad in (grid.expand(2, -1, -1), grid[..., :1], grid[0]):
        with pytest.raises(RuntimeError, match=r"grid must be \(B, P, 2\)"):
            forward(x, bad)
    for bad in (torch.randn(1, 5, 3), torch.randn(1, 4, 4), torch.randn(1, 5, 4).double()):
        with pytest.raises(RuntimeError, match=r"grad must be \(B, P, C\) in x's dtype"):
            backward(bad, x, grid, 1)


# ---- selection and errors --------------------------------------------------------------------------------------


def call(device="cpu", x=torch.float32, grid=torch.float32, grad=True):
    sizes = {"height": 14, "width": 14, "channels": 384, "points": 169}
    return Call("sample_tokens", device, (("x", x), ("grid", grid)), grad, sizes)


@pytest.mark.parametrize(
    ("backend", "facts"),
    [
        ("reference", dict(device="mps", x=torch.float16)),
        ("cpp", dict()),
        ("cpp", dict(x=torch.bfloat16, grid=torch.float64)),
        ("cpp", dict(x=torch.float64, grid=torch.float16)),
        ("triton", dict(device="cuda")),
        ("triton", dict(device="cuda", x=torch.bfloat16, grid=torch.float16)),
    ],
)
def test_must_accept(backend, facts, monkeypatch):
    monkeypatch.setattr(_library, "why_not", None)
    monkeypatch.setattr(kernels, "_installed", True)
    assert reasons_against(OPS["sample_tokens"].backend(backend), call(**facts)) == []


@pytest.mark.parametrize(
    ("backend", "facts", "reason"),
    [
        ("cpp", dict(device="cuda"), "takes tensors on cpu, got cuda"),
        ("triton", dict(device="cuda", x=torch.float64), "takes x of dtype float32, bfloat16, float16, got float64"),
        ("triton", dict(device="cuda", grid=torch.float64), "takes grid of dtype float32, bfloat16, float16, got"),
        ("triton", dict(device="mps"), "takes tensors on cuda or cpu, got mps"),
    ],
)
def test_must_refuse(backend, facts, reason):
    assert reason in "; ".join(reasons_against(OPS["sample_tokens"].backend(backend), call(**facts)))


@needs_library
def test_the_fast_backend_is_chosen_and_used():
    x, grid = torch.randn(2, 9, 6), points(2, 3)
    assert fastssl.explain("sample_tokens", x, grid).chosen == "cpp"
    with torch.profiler.profile() as profile:
        fastssl.sample_tokens(x, grid)
    names = {event.key for event in profile.key_averages()}
    assert "fastssl::sample_tokens_forward" in names
    assert not {"aten::copy_", "aten::clone"} & names


def test_the_docstring_equivalent_is_true():
    x, grid = torch.randn(2, 6, 2, 3), points(2, 4).detach()
    tokens = x.flatten(2).transpose(1, 2)
    expected = grid_sample(x, grid)
    for backend in ("reference", *(["cpp"] if _library.loaded() else [])):
        torch.testing.assert_close(fastssl.sample_tokens(x, grid, backend=backend), expected)
        got = fastssl.sample_tokens(tokens, grid, grid_size=(2, 3), backend=backend)
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(fastssl.sample_tokens(x, grid, grid_size=(2, 3)), expected)


X, GRID = torch.randn(2, 9, 6), torch.zeros(2, 4, 5, 2)
BAD = [
    (dict(x=[1.0]), TypeError, "sample_tokens: x must be a Tensor, got list"),
    (dict(x=X.int()), TypeError, "sample_tokens: x must have dtype .*, got dtype int32"),
    (dict(x=X[0]), ValueError, r"sample_tokens: x must be \(B, N, C\) or \(B, C, h, w\), got \(9, 6\)"),
    (dict(x=X[:, :8]), ValueError, "sample_tokens: x must have N = h² tokens where grid_size is None, got N = 8"),
    (dict(x=X[:, :0]), ValueError, r"x must have at least one token, got \(2, 0, 6\)"),
    (dict(x=torch.randn(2, 6, 0, 3)), ValueError, r"x must have at least one token, got \(2, 6, 0, 3\)"),
    (dict(x=X.to_sparse()), ValueError, "x must be a dense .* got layout"),
    (dict(grid=None), TypeError, "sample_tokens: grid must be a Tensor, got NoneType"),
    (dict(grid=GRID.long()), TypeError, "sample_tokens: grid must have dtype .*, got dtype int64"),
    (dict(grid=GRID[0]), ValueError, r"sample_tokens: grid must be \(B, k, k', 2\), got \(4, 5, 2\)"),
    (dict(grid=GRID[..., :1]), ValueError, r"sample_tokens: grid must be \(B, k, k', 2\), got \(2, 4, 5, 1\)"),
    (dict(grid=GRID[:1]), ValueError, r"grid must have x's batch \(B = 2\), got \(1, 4, 5, 2\)"),
    (dict(grid=GRID.to("meta")), ValueError, "grid must be on the device of x .cpu., got meta"),
    (dict(grid_size=3), TypeError, r"grid_size must be None or two ints \(h, w\), got 3"),
    (dict(grid_size=(3.0, 3)), TypeError, r"grid_size must be None or two ints \(h, w\), got \(3.0, 3\)"),
    (dict(grid_size=(9,)), ValueError, r"grid_size must be None or two ints \(h, w\) of at least 1, got \(9,\)"),
    (dict(grid_size=(-3, -3)), ValueError, r"of at least 1, got \(-3, -3\)"),
    (dict(grid_size=(2, 4)), ValueError, r"grid_size must be \(h, w\) with h·w = N = 9 of x, got \(2, 4\)"),
    (
        dict(x=torch.randn(2, 6, 3, 4), grid_size=(4, 3)),
        ValueError,
        r"grid_size must be None or \(h, w\) = \(3, 4\) of x, got \(4, 3\)",
    ),
    (dict(backend="cuda"), ValueError, "sample_tokens: backend must be one of .*, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_is_one_sentence(change, error, message, backend):
    arguments = {"x": X, "grid": GRID, "backend": backend} | change
    with pytest.raises(error, match=message):
        fastssl.sample_tokens(arguments.pop("x"), arguments.pop("grid"), **arguments)
