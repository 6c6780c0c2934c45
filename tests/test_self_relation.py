"""self_relation against its float64 reference, on every backend of this machine, and the contract around it."""

import itertools

import pytest
import torch
from compare import assert_close, doubles, gradients, relative_error
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import _library
from fastssl.reference.self_relation import self_relation as reference

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")


def make(shape, dtype=torch.float32, device="cpu", grad=True):
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def check(x, columns=None, *, backend="cpp", tolerance=None, upstream=None, **kwargs):
    """Value and gradients of one call against float64."""
    out = fastssl.self_relation(x, columns=columns, backend=backend, **kwargs)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    x64, c64 = doubles([x, columns])
    truth = reference(x64, columns=c64, **kwargs)
    assert_close(out, truth, FORWARD[x.dtype], "value")
    upstream = torch.randn_like(out) if upstream is None else upstream
    got = gradients(out, [x, columns], upstream)
    expected = gradients(truth, [x64, c64], upstream.cpu().double())
    for name, g, e, leaf in zip(("x", "columns"), got, expected, (x, columns), strict=False):
        assert g.dtype == leaf.dtype
        coarser = max(GRADIENT[leaf.dtype], GRADIENT[x.dtype])  # the relation that is saved has x's dtype
        assert_close(g, e, tolerance or coarser, f"gradient of {name}")
    return out


# ---- values and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("length", [1, 37, 197, 300])
@pytest.mark.parametrize(("width", "heads"), [(33, 1), (33, 3), (384, 1), (384, 3), (384, 6)])
@pytest.mark.parametrize("normalize", [False, True])
def test_float32(cpu_path, kind, length, width, heads, normalize):
    check(make((2, length, width)), kind=kind, num_heads=heads, normalize=normalize)


@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("length", [1, 37, 197])
def test_columns(cpu_path, kind, normalize, length):
    others = length if kind == "channel" else length + 12
    check(make((3, length, 66)), make((3, others, 66)), kind=kind, num_heads=3, normalize=normalize)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dtypes(cpu_path, dtype, kind, normalize):
    check(make((2, 37, 66), dtype), kind=kind, num_heads=3, normalize=normalize)


@needs_library
@pytest.mark.parametrize(("dtype", "other"), list(itertools.permutations(DTYPES, 2)))
def test_mixed_dtypes(dtype, other):
    check(make((2, 19, 33), dtype), make((2, 23, 33), other), num_heads=3)


@needs_library
@pytest.mark.parametrize("heads", [1, 2])
def test_larger_than_scratch_memory(cpu_path, heads):
    """N above what is kept in scratch: the matrix is built in the output; with a short batch, by whole rows."""
    check(make((5, 701, 16 * heads)), num_heads=heads)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_need_their_own_maximum(cpu_path, dtype):
    """Lengths from 0.01 to 30: one shift for all rows would lose the short ones."""
    x = torch.randn(2, 67, 32) * torch.logspace(-2, 1.5, 67)[:, None]
    check(x.to(dtype).requires_grad_(), num_heads=2, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-4)


@needs_library
def test_negative_scale(cpu_path):
    check(make((2, 41, 24)), num_heads=2, scale=-0.3, temp=0.5)


@needs_library
def test_scale_and_temperature():
    x = make((2, 20, 16))
    check(x, scale=0.4, temp=0.2)
    default = fastssl.self_relation(x, num_heads=2, temp=0.5)
    torch.testing.assert_close(default, fastssl.self_relation(x, num_heads=2, scale=2 * 8**-0.5))


@needs_library
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("layout", ["map", "channels_last", "transposed", "sliced", "expanded", "strided"])
def test_any_strides(cpu_path, kind, layout):
    x = {
        "map": lambda: torch.randn(2, 24, 5, 7),
        "channels_last": lambda: torch.randn(2, 24, 5, 7).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(2, 24, 35).transpose(1, 2),
        "sliced": lambda: torch.randn(3, 37, 50)[1:, 1:, 7:31],
        "expanded": lambda: torch.randn(1, 35, 24).expand(2, -1, -1),
        "strided": lambda: torch.randn(2, 70, 48)[:, ::2, ::2],
    }[layout]()
    check(x.requires_grad_(), kind=kind, num_heads=2)


@needs_library
def test_a_feature_map_is_its_tokens():
    x = torch.randn(2, 24, 5, 7)
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(fastssl.self_relation(x), fastssl.self_relation(tokens.contiguous()))


@needs_library
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
def test_upstream_gradient_of_any_strides(cpu_path, layout):
    x = make((2, 35, 24))
    upstream = {
        "expanded": lambda: torch.randn(2, 3, 35, 1).expand(-1, -1, -1, 35),
        "transposed": lambda: torch.randn(2, 3, 35, 35).transpose(2, 3),
        "sliced": lambda: torch.randn(2, 3, 36, 40)[:, :, 1:, 5:],
    }[layout]()
    check(x, num_heads=3, upstream=upstream)


@needs_library
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (1, 1, 1), (1, 5, 8)])
def test_empty_and_tiny(kind, shape):
    x = make(shape)
    out = check(x, kind=kind)
    assert out.shape == ((shape[0], 1, shape[1], shape[1]) if kind == "pixel" else (shape[0], 1, shape[2], shape[2]))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_stay_finite(cpu_path, dtype):
    x = (100 * torch.randn(2, 37, 16)).to(dtype).requires_grad_()
    out = fastssl.self_relation(x, scale=1.0)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()
    assert_close(out.sum(-1), torch.ones(2, 1, 37), 1e-2)
    same = fastssl.self_relation(x, scale=1.0, columns=x.detach().clone())
    assert_close(out, reference(x.double(), scale=1.0), 1e-2)
    assert_close(same, reference(x.double(), scale=1.0), 1e-2)


@needs_library
@pytest.mark.parametrize("logit", [1e6, 1e10, 1e12, 1e30])
@pytest.mark.parametrize("tokens", ["one", "alike", "different"])
def test_logits_of_any_finite_size(cpu_path, logit, tokens):
    x = {"one": torch.ones(2, 1, 384), "alike": torch.ones(2, 8, 64), "different": torch.randn(2, 40, 16)}[tokens]
    x = x * (logit / x.square().sum(-1).max()).sqrt()
    out = fastssl.self_relation(x, scale=1.0, backend="cpp")
    torch.testing.assert_close(out.sum(-1), torch.ones(out.shape[:-1]))
    if tokens != "different":  # where logits differ, they differ by more than float32 resolves
        torch.testing.assert_close(out, reference(x, scale=1.0))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(-1, dtype=torch.int32).view(torch.float32)])
def test_nan_is_not_hidden(backend, normalize, value):
    """The last one as memory full of 0xFF has it."""
    if backend == "cpp" and not _library.loaded():
        pytest.skip(_library.why_not)
    x = torch.randn(1, 20, 8)
    x[0, 3, 2] = value
    assert torch.isnan(fastssl.self_relation(x, normalize=normalize, backend=backend)[0, 0, 3]).any()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("size", [1e-11, 1e15, 3e18])
def test_normalize_does_not_overflow(backend, size):
    if backend == "cpp" and not _library.loaded():
        pytest.skip(_library.why_not)
    x = (torch.randn(2, 20, 8) * size).requires_grad_()
    (x64,) = doubles([x])
    assert_close(
        fastssl.self_relation(x, normalize=True, backend=backend), reference(x64, normalize=True), FORWARD[x.dtype]
    )


@needs_library
def test_zero_vectors_are_uniform_and_get_no_gradient():
    x = torch.randn(2, 12, 8)
    x[:, 4] = 0
    x.requires_grad_()
    out = check(x, normalize=True)
    torch.testing.assert_close(out[:, :, 4], torch.full((2, 1, 12), 1 / 12))
    (grad,) = torch.autograd.grad(fastssl.self_relation(x, normalize=True).square().sum(), x)
    assert (grad[:, 4] == 0).all()


@needs_library
def test_long_depth_of_alike_terms(cpu_path):
    """Nearly constant features: one chain of additions would round the same way at each of its 3000 steps."""
    x = torch.randn(1, 3000, 6) * 0.01 + 1 + (torch.rand(1, 3000, 6) > 0.999) * 30
    check(x.requires_grad_(), kind="channel", normalize=True, scale=10.0, tolerance=1e-4)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_error_at_most_twice_that_of_plain_pytorch(dtype, kind, scale):
    """The same formula in plain PyTorch in the same dtype, saturated rows (scale 1) included."""

    def plain(x):
        rows = x.unflatten(-1, (2, 32)).permute((0, 2, 1, 3) if kind == "pixel" else (0, 2, 3, 1))
        factor = scale or (32**-0.5 if kind == "pixel" else 1 / 97)
        return (factor * (rows @ rows.transpose(-1, -2))).softmax(-1)

    x = make((2, 97, 64), dtype)
    (x64,) = doubles([x])
    ours = fastssl.self_relation(x, kind=kind, num_heads=2, scale=scale)
    theirs, truth = plain(x), plain(x64)
    upstream = torch.randn_like(ours)
    floor = torch.finfo(dtype).eps  # below one unit in the last place there is nothing to compare
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + floor
    (expected,) = gradients(truth, [x64], upstream.double())
    mine, plains = (relative_error(gradients(o, [x], upstream)[0], expected) for o in (ours, theirs))
    assert mine <= 2 * plains + floor


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_rows_keep_their_gradient(cpu_path, dtype):
    """A_ii within 1e-6 of 1: the gradient is what is left after everything cancels, and plain PyTorch loses it.

    Not in float16, where the saved A_ij of such rows are below the smallest number.
    """
    check(make((2, 50, 384), dtype))


# ---- repeatability, autograd, compilation ----------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(1, 197, 64), (8, 50, 96)])
def test_same_bits_for_any_number_of_threads(cpu_path, kind, columns, shape):
    x = make(shape)
    y = make(shape) if columns else None
    results = []
    for threads in (1, 2, 3, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out = fastssl.self_relation(x, kind=kind, num_heads=2, columns=y)
        upstream = torch.ones_like(out) * torch.arange(out.shape[-1])
        results.append((out, *gradients(out, [x, y], upstream)))
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(kind, columns, normalize):
    x = make((2, 5, 6), torch.float64)
    y = make((2, 5 if kind == "channel" else 7, 6), torch.float64) if columns else None
    leaves = [t for t in (x, y) if t is not None]

    def run(x, y=None):
        return fastssl.self_relation(x, kind=kind, num_heads=2, columns=y, normalize=normalize, backend="cpp")

    assert torch.autograd.gradcheck(run, leaves)


@needs_library
@pytest.mark.parametrize("columns", ["x", "other"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 9, 6), (0, 9, 6)])
@pytest.mark.parametrize("channel", [0, 1])
def test_opcheck(columns, dtype, shape, channel):
    x = torch.randn(shape).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    y = x if columns == "x" else torch.randn(shape).to(dtype)
    common = (channel, 2, 0.3, 1, int(columns == "x"))
    torch.library.opcheck(torch.ops.fastssl.self_relation_forward, (x, y, *common))
    relation = torch.ops.fastssl.self_relation_forward(x, y, *common)
    grad = torch.randn_like(relation)
    for wanted in (1,) if columns == "x" else (1, 2, 3):
        torch.library.opcheck(torch.ops.fastssl.self_relation_backward, (grad, relation, x, y, *common, wanted))


@needs_library
@pytest.mark.parametrize("columns", [False, True])
def test_compiled_whole_with_dynamic_batch(columns):
    def step(x, y):
        return fastssl.self_relation(x * 2, num_heads=2, columns=y if columns else None, temp=0.7).square()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 3):
        x, y = make((batch, 11, 8)), make((batch, 11, 8))
        leaves = [x, y] if columns else [x]
        out, expected = compiled(x, y), step(x, y)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            gradients(out, leaves, torch.ones_like(out)),
            gradients(expected, leaves, torch.ones_like(out)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@needs_library
def test_compiled_with_a_temperature_schedule():
    compiled = torch.compile(lambda x, temp: fastssl.self_relation(x, temp=temp), fullgraph=True, backend="aot_eager")
    x = make((2, 11, 8))
    for temp in (0.1, 0.2, 0.35, 1.0):
        torch.testing.assert_close(compiled(x, temp), fastssl.self_relation(x, temp=temp))


@needs_library
def test_compiled_by_inductor():
    x = make((2, 11, 8))
    compiled = torch.compile(
        lambda x: fastssl.self_relation(x + 1, kind="channel").sum(-1).square().sum(), fullgraph=True
    )
    expected = fastssl.self_relation(x + 1, kind="channel").sum(-1).square().sum()
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(gradients(compiled(x), [x], None), gradients(expected, [x], None))


@needs_library
def test_second_derivatives_are_refused():
    x = make((1, 4, 4))
    (grad,) = torch.autograd.grad(fastssl.self_relation(x, backend="cpp").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@needs_library
def test_forward_mode_is_refused_not_wrong():
    x = torch.randn(1, 4, 4)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda v: fastssl.self_relation(v, backend="cpp"), (x,), (torch.ones_like(x),))
    _, tangent = torch.func.jvp(lambda v: fastssl.self_relation(v, backend="reference"), (x,), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0


@needs_library
def test_raw_backward_refuses_what_would_read_elsewhere():
    x = torch.randn(1, 5, 4)
    common = (x, x, 0, 1, 0.5, 0, 1)
    relation = torch.ops.fastssl.self_relation_forward(*common)
    backward = torch.ops.fastssl.self_relation_backward
    with pytest.raises(RuntimeError, match="in x's dtype"):
        backward(relation.double(), relation.double(), *common, 1)
    with pytest.raises(RuntimeError, match=r"must be \(B, H, R, M\)"):
        backward(relation.reshape(1, 1, 1, 25), relation, *common, 1)
    with pytest.raises(RuntimeError, match="have no gradient"):
        backward(relation, relation, *common, 3)
    with pytest.raises(RuntimeError, match="must have x's tokens"):
        torch.ops.fastssl.self_relation_forward(x, x[:, :3], 0, 1, 0.5, 0, 1)


@needs_library
def test_nothing_is_written_to_and_the_graph_may_be_kept():
    x, upstream = make((2, 9, 8)), torch.randn(2, 1, 9, 9)
    before = x.detach().clone(), upstream.clone()
    out = fastssl.self_relation(x)
    first = torch.autograd.grad(out, x, upstream, retain_graph=True)[0]
    second = torch.autograd.grad(out, x, upstream)[0]
    assert torch.equal(first, second)
    assert torch.equal(x, before[0])
    assert torch.equal(upstream, before[1])


@needs_library
def test_columns_being_x_is_the_same_as_none():
    x = make((2, 9, 8))
    a, b = fastssl.self_relation(x, columns=x), fastssl.self_relation(x)
    assert torch.equal(a, b)
    assert torch.equal(
        gradients(a, [x], torch.ones_like(a).cumsum(-1))[0],
        gradients(b, [x], torch.ones_like(a).cumsum(-1))[0],
    )


@needs_library
@pytest.mark.parametrize("wanted", ["x", "columns"])
def test_only_the_wanted_gradient(wanted):
    x, y = make((2, 9, 8), grad=wanted == "x"), make((2, 7, 8), grad=wanted == "columns")
    check(x, y)


def test_the_docstring_equivalent_is_true():
    x, columns, num_heads, scale, temp = torch.randn(2, 9, 8), torch.randn(2, 7, 8), 2, 0.4, 0.5
    rows = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    cols = columns.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    expected = ((scale / temp) * rows @ cols.mT).softmax(-1)
    for backend in ("reference", *(["cpp"] if _library.loaded() else [])):
        got = fastssl.self_relation(x, num_heads=num_heads, scale=scale, temp=temp, columns=columns, backend=backend)
        torch.testing.assert_close(got, expected)


# ---- bad input -------------------------------------------------------------------------------------------------

X = torch.randn(2, 5, 6)
BAD = [
    (dict(x=[1.0]), TypeError, "self_relation: x must be a Tensor, got list"),
    (dict(x=X[0]), ValueError, r"self_relation: x must be \(B, N, C\) or \(B, C, h, w\), got \(5, 6\)"),
    (dict(x=X.long()), TypeError, "self_relation: x must have dtype .*, got dtype int64"),
    (dict(x=X.to(torch.complex64)), TypeError, "x must have dtype .*, got dtype complex64"),
    (dict(x=X.to_sparse()), ValueError, "x must be a dense .* got layout"),
    (
        dict(num_heads=4),
        ValueError,
        "self_relation: num_heads must divide the C channels of x, got 4 for C = 6",
    ),
    (dict(num_heads=0), ValueError, "num_heads must be an int of at least 1, got 0"),
    (dict(num_heads=2.0), TypeError, "num_heads must be an int of at least 1, got float"),
    (dict(kind="token"), ValueError, "kind must be one of 'pixel', 'channel', got 'token'"),
    (dict(backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
    (dict(temp=0.0), ValueError, "temp must be a finite number greater than 0, got 0.0"),
    (dict(temp=-1), ValueError, "temp must be a finite number greater than 0, got -1"),
    (dict(temp=float("nan")), ValueError, "temp must be a finite number greater than 0, got nan"),
    (dict(temp=float("inf")), ValueError, "temp must be a finite number greater than 0, got inf"),
    (dict(temp="1"), TypeError, "temp must be a finite number greater than 0, got str"),
    (dict(scale=float("inf")), ValueError, "scale must be a finite number, got inf"),
    (dict(scale=1e300, temp=1e-300), ValueError, "scale / temp must be a finite number, got"),
    (dict(normalize=1), TypeError, "normalize must be True or False, got int"),
    (
        dict(columns=X[:1]),
        ValueError,
        r"columns must have x's batch and channels \(B = 2, C = 6\), got \(1, 5, 6\)",
    ),
    (dict(columns=X[..., :3]), ValueError, r"columns must have x's batch and channels .* got \(2, 5, 3\)"),
    (dict(columns=X[0]), ValueError, "columns must be"),
    (dict(columns=X[:, :0]), ValueError, r"columns must have at least one token, got \(2, 0, 6\)"),
    (dict(columns=X[:, :3], kind="channel"), ValueError, r"columns must have x's number of tokens \(N = 5\)"),
    (dict(columns=X.int()), TypeError, "columns must have dtype"),
    (dict(columns=X.to("meta")), ValueError, "columns must be on the device of x .cpu., got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(change, error, message):
    arguments = {"x": X, **change}
    with pytest.raises(error, match=message) as caught:
        fastssl.self_relation(arguments.pop("x"), **arguments)
    assert str(caught.value).startswith("self_relation: ")
    assert "\n" not in str(caught.value)
    arguments = {"x": X, **change}
    if arguments.pop("backend", None) is None:
        with pytest.raises(error, match=message):
            fastssl.explain("self_relation", arguments.pop("x"), **arguments)


# ---- on a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("length", [1, 37, 197, 300, 700])
@pytest.mark.parametrize(("width", "heads"), [(33, 1), (384, 6), (384, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_triton_on_gpu(kind, length, width, heads, dtype, normalize):
    x = make((2, length, width), dtype, "cuda")
    # A temperature that leaves rows unsaturated: half-precision gradients of one-hot rows are rounding alone.
    temp = (width / heads) ** 0.5 if kind == "pixel" and not normalize else 1.0
    check(x, kind=kind, num_heads=heads, normalize=normalize, temp=temp, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["columns", "map", "expanded upstream"])
def test_triton_on_gpu_layouts(kind, dtype, layout):
    x = make((2, 24, 5, 7) if layout == "map" else (2, 35, 24), dtype, "cuda")
    columns = make((2, 35, 24), dtype, "cuda") if layout == "columns" else None
    size = 35 if kind == "pixel" else 8
    upstream = torch.randn(2, 3, size, 1, device="cuda").to(dtype).expand(-1, -1, -1, size)
    check(x, columns, kind=kind, num_heads=3, backend="triton", upstream=upstream if "up" in layout else None)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or _library.why_no_cuda is not None, reason=f"no CUDA device, or {_library.why_no_cuda}")
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 37, 197])
@pytest.mark.parametrize("columns", [False, True])
def test_cuda_kernel_on_gpu(kind, dtype, length, columns):
    x = make((2, length, 384 if kind == "pixel" else 66), dtype, "cuda", grad=False)
    y = torch.randn_like(x) if columns else None
    out = fastssl.self_relation(x, kind=kind, num_heads=6, columns=y, backend="cpp")
    truth = reference(x.double(), kind=kind, num_heads=6, columns=None if y is None else y.double())
    assert_close(out, truth, FORWARD[dtype])
