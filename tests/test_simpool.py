"""simpool against its float64 reference, on every backend and code path of the CPU and on a GPU."""

import itertools

import pytest
import torch
from compare import assert_close, relative_error
from pooling import check, derivatives, in_doubles, make, parameters, plain, run, upstreams
from tolerances import POOLED

import fastssl
from fastssl import _library

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
#: How values are raised before they are averaged: the exponent, and the minimum that is subtracted.
POWERS = [(None, "batch"), (1.25, "batch"), (1.25, "channel"), (2, "batch"), (2, "channel")]
POWER = pytest.mark.parametrize(("gamma", "value_min"), POWERS, ids=[f"{g}-{m}" for g, m in POWERS])
HEADS = pytest.mark.parametrize("heads", [1, 3])


def power(gamma, value_min):
    return dict(gamma=gamma, value_min=value_min)


# ---- values and gradients --------------------------------------------------------------------------------------


def sizes():
    """Every length and width with everything else, but for the largest: float64 needs a second for one of those."""
    for length, width in itertools.product([1, 37, 196, 1024], [33, 384, 768]):
        for heads, (gamma, value_min) in itertools.product([1, 3], POWERS):
            if length * width < 100_000 or (heads == 3) == (value_min == "channel") != (gamma == 2):
                yield length, width, heads, gamma, value_min


@pytest.mark.parametrize(("length", "width", "heads", "gamma", "value_min"), list(sizes()))
def test_float32(backend, length, width, heads, gamma, value_min):
    tensors = parameters(width, beta=gamma is not None)
    check(make(2, length, width), tensors, backend, num_heads=heads, **power(gamma, value_min))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("attention", [False, True])
@POWER
def test_with_and_without(backend, biases, beta, attention, gamma, value_min):
    if beta and gamma is None:
        pytest.skip("beta needs gamma")
    tensors = parameters(48, biases=biases, beta=beta)
    check(make(3, 37, 48), tensors, backend, attention=attention, num_heads=3, **power(gamma, value_min))


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 3), (1, 37, 33), (5, 3, 2), (9, 65, 17), (2, 700, 24)])
@POWER
def test_odd_sizes(backend, shape, gamma, value_min):
    width = shape[2]
    heads = width if width < 4 else 1
    tensors = parameters(width, beta=gamma is not None)
    check(make(*shape), tensors, backend, num_heads=heads, **power(gamma, value_min))


@POWER
def test_one_channel(backend, gamma, value_min):
    """Its variance is none. Powers of two, of which float32 knows that too."""
    x = (2.0 ** torch.randint(-2, 3, (2, 9, 1))).requires_grad_()
    check(x, parameters(1, beta=gamma is not None), backend, **power(gamma, value_min))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 2.0])
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 2.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.7])
def test_numbers(backend, scale, eps, gamma):
    check(make(2, 19, 24), parameters(24), backend, scale=scale, eps=eps, gamma=gamma, norm_eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@HEADS
@POWER
@pytest.mark.parametrize("shape", [(2, 37, 66), (3, 196, 384)])
def test_dtypes(backend, dtype, heads, gamma, value_min, shape):
    tensors = parameters(shape[2], beta=gamma is not None, dtype=dtype)
    check(make(*shape, dtype=dtype), tensors, backend, num_heads=heads, **power(gamma, value_min))


@pytest.mark.parametrize(("dtype", "other"), list(itertools.permutations(DTYPES, 2)))
@pytest.mark.parametrize("gamma", [None, 1.25])
def test_mixed_dtypes(backend, dtype, other, gamma):
    check(make(2, 19, 33, dtype=dtype), parameters(33, beta=gamma is not None, dtype=other), backend, gamma=gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_in_a_dtype_of_its_own(backend, dtype):
    tensors = parameters(24)
    for name, other in zip(tensors, itertools.cycle([torch.float16, torch.float32, torch.bfloat16]), strict=False):
        tensors[name] = tensors[name].detach().to(other).requires_grad_()
    check(make(2, 19, 24, dtype=dtype), tensors, backend, gamma=1.25)


LAYOUTS = {
    "map": lambda: torch.randn(5, 24, 5, 7),
    "channels_last": lambda: torch.randn(5, 24, 5, 7).to(memory_format=torch.channels_last),
    "without class token": lambda: torch.randn(5, 36, 24)[:, 1:],
    "transposed": lambda: torch.randn(5, 24, 35).transpose(1, 2),
    "sliced": lambda: torch.randn(6, 37, 50)[1:, 1:-1, 7:31],
    "expanded": lambda: torch.randn(1, 35, 24).expand(5, -1, -1),
    "one token": lambda: torch.randn(5, 1, 24).expand(-1, 35, -1),
    "strided": lambda: torch.randn(5, 70, 48)[:, ::2, ::2],
    "batch second": lambda: torch.randn(35, 5, 24).transpose(0, 1),
    "strided map": lambda: torch.randn(5, 24, 10, 7)[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@POWER
def test_any_strides(backend, layout, dtype, gamma, value_min):
    x = LAYOUTS[layout]().to(dtype)
    tensors = parameters(24, beta=gamma is not None)
    tensors["wq"] = tensors["wq"].detach().t().requires_grad_()
    tensors["wk"] = torch.randn(24, 48)[:, ::2].requires_grad_()
    tensors["norm_weight"] = torch.ones(1).expand(24).requires_grad_()
    tensors["norm_bias"] = torch.randn(48)[::2].requires_grad_()
    pooled, attention, gradients = check(x.requires_grad_(), tensors, backend, num_heads=3, **power(gamma, value_min))
    assert pooled.is_contiguous()
    assert attention.is_contiguous()
    assert gradients["x"].shape == x.shape


@pytest.mark.parametrize("gamma", [None, 1.25])
def test_incoming_gradients_of_any_strides(backend, gamma):
    """What sum() and mean() send back is expanded: all strides are 0."""
    x, tensors = make(3, 37, 24), parameters(24, beta=gamma is not None)
    for upstream in (
        (torch.ones(()).expand(3, 24), torch.full((), 0.5).expand(3, 2, 37)),
        (torch.randn(24, 3).t(), torch.randn(3, 37, 2).transpose(1, 2)),
        (torch.randn(3, 48)[:, ::2], torch.randn(3, 2, 1).expand(3, 2, 37)),
    ):
        check(x, tensors, backend, upstream=upstream, num_heads=2, gamma=gamma)
    outputs = run(x, tensors, backend=backend, num_heads=2, gamma=gamma)
    outputs[0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 24), (0, 24, 3, 3)])
@POWER
def test_empty_batch(backend, shape, gamma, value_min):
    x, tensors = torch.randn(shape, requires_grad=True), parameters(24, beta=gamma is not None)
    outputs = run(x, tensors, backend=backend, num_heads=3, **power(gamma, value_min))
    assert outputs[0].shape == (0, 24)
    assert outputs[1].shape == (0, 3, 5 if len(shape) == 3 else 9)
    for name, gradient in derivatives(outputs, x, tensors, upstreams(outputs)).items():
        assert gradient.shape == (x if name == "x" else tensors[name]).shape
        assert (gradient == 0).all()


@POWER
def test_one_image_is_pooled_as_among_others(backend, gamma, value_min):
    """Whatever the batch, but for the minimum that the batch shares."""
    x, tensors = make(4, 37, 24, grad=False), parameters(24, beta=gamma is not None, grad=False)
    pooled, attention = run(x, tensors, backend=backend, **power(gamma, value_min))
    errors = []
    for i in range(4):
        alone, of_alone = run(x[i : i + 1], tensors, backend=backend, **power(gamma, value_min))
        assert alone.shape == (1, 24)
        assert_close(of_alone, attention[i : i + 1], POOLED[x.dtype])
        errors.append(relative_error(alone, pooled[i : i + 1]))
    apart = gamma is None or value_min == "channel"
    assert sum(error <= POOLED[x.dtype] for error in errors) == (4 if apart else 1)


# ---- minima, constants, large numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("value_min", ["batch", "channel"])
@pytest.mark.parametrize("gamma", [1.25, 2])
def test_ties_share_the_gradient_of_the_minimum(backend, gamma, value_min):
    x, tensors = make(3, 37, 24, grad=False), parameters(24)
    with torch.no_grad():
        y = torch.nn.functional.layer_norm(x, (24,), tensors["norm_weight"], tensors["norm_bias"], 1e-6)
        image, token, _ = (int(i) for i in torch.unravel_index(y.argmin(), y.shape))
        lowest = x[image, token].clone()
        x[image, (3, 30)] = lowest  # in one image, and in another
        x[(image + 1) % 3, 11] = lowest
    # Through the attention each of the equal tokens gets a gradient of its own.
    *_, gradients = check(x.requires_grad_(), tensors, backend, attention=False, gamma=gamma, value_min=value_min)
    for other in (3, 30):
        torch.testing.assert_close(gradients["x"][image, token], gradients["x"][image, other])


@pytest.mark.parametrize("level", [0.0, 0.5, -3.0, 0.7])
@pytest.mark.parametrize("value_min", ["batch", "channel"])
@pytest.mark.parametrize("gamma", [None, 1.25])
def test_constant_tokens(backend, level, gamma, value_min):
    x = torch.full((2, 37, 24), level, requires_grad=True)
    tensors = parameters(24, beta=gamma is not None)
    outputs = run(x, tensors, backend=backend, num_heads=3, **power(gamma, value_min))
    torch.testing.assert_close(outputs[1], torch.full((2, 3, 37), 1 / 37))
    assert outputs[0].isfinite().all()
    for gradient in derivatives(outputs, x, tensors, upstreams(outputs)).values():
        assert gradient.isfinite().all()
    if level == 0:
        check(x, tensors, backend, num_heads=3, **power(gamma, value_min))


@POWER
@pytest.mark.parametrize("batch", [1, 3])
def test_one_token(backend, gamma, value_min, batch):
    x, tensors = make(batch, 1, 24), parameters(24, beta=gamma is not None)
    _, attention, gradients = check(x, tensors, backend, num_heads=3, **power(gamma, value_min))
    assert (attention == 1).all()
    assert all(g.isfinite().all() for g in gradients.values())


@POWER
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(backend, gamma, value_min, sign):
    x, tensors = make(2, 37, 24), parameters(24, beta=gamma is not None)
    with torch.no_grad():
        y = torch.nn.functional.layer_norm(x, (24,), tensors["norm_weight"], tensors["norm_bias"], 1e-6)
        query = torch.nn.functional.linear(x.mean(1), tensors["wq"], tensors["bq"])
        dots = torch.einsum("bc,bnc->bn", query @ tensors["wk"], y)
    scale = sign * 1e4 / float(dots.abs().max())
    *outputs, gradients = check(x, tensors, backend, scale=scale, **power(gamma, value_min))
    assert all(t.isfinite().all() for t in (*outputs, *gradients.values()))
    torch.testing.assert_close(outputs[1].sum(-1), torch.ones(2, 1))


@pytest.mark.parametrize("where", ["x", "wq", "wk", "norm_weight", "norm_bias", "bq", "beta"])
@pytest.mark.parametrize("gamma", [None, 1.25])
def test_nan_is_not_hidden(backend, where, gamma):
    if where == "beta" and gamma is None:
        pytest.skip("beta needs gamma")
    x, tensors = make(2, 20, 8, grad=False), parameters(8, beta=gamma is not None, grad=False)
    given = {"x": x, **tensors}
    given[where].view(-1)[3 if given[where].numel() > 1 else 0] = float("nan")
    assert run(x, tensors, backend=backend, gamma=gamma)[0].isnan().any()


def test_many_tokens_lose_no_digits(backend):
    """Sums of as many small numbers: one float32 after the other would be off by 3e-5."""
    x, tensors = make(1, 65536, 8, grad=False), parameters(8, grad=False)
    _, attention = run(x, tensors, backend=backend, gamma=2)
    assert abs(attention.double().sum().item() - 1) < 4e-6


# ---- as exact as plain PyTorch ---------------------------------------------------------------------------------


def errors(x, tensors, backend, options):
    """Ours and the plain formula's, of pooled vectors, attention and every gradient, by name."""
    exact_x, exact = in_doubles(x, tensors)
    truths = plain(exact_x, **exact, **options)
    upstream = upstreams(truths)
    upstream = [u.to(x.dtype) for u in upstream]
    expected = derivatives(truths, exact_x, exact, upstream)
    found = []
    for outputs in (run(x, tensors, backend=backend, **options), plain(x, **tensors, **options)):
        of = {"pooled": relative_error(outputs[0], truths[0]), "attention": relative_error(outputs[1], truths[1])}
        got = derivatives(outputs, x, tensors, upstream)
        found.append(of | {name: relative_error(got[name], expected[name]) for name in got})
    return found


@pytest.mark.parametrize("mean", [0.0, 100.0])
@HEADS
@POWER
@pytest.mark.parametrize("shape", [(2, 37, 66), (1, 120, 192)])
def test_error_at_most_twice_that_of_plain_pytorch(backend, mean, heads, gamma, value_min, shape):
    """Also where the mean of a token is large against its variance. Of several calls: one error is a random number."""
    options = dict(num_heads=heads, **power(gamma, value_min))
    ours, theirs = [], []
    for _ in range(6):
        x = (make(*shape, grad=False) + mean).requires_grad_()
        tensors = parameters(shape[2], beta=gamma is not None)
        if mean:  # a query of a sensible size, so that attention is not one-hot
            tensors["wq"] = (tensors["wq"].detach() / mean).requires_grad_()
        for side, of in zip((ours, theirs), errors(x, tensors, backend, options), strict=True):
            side.append(list(of.values()))
            names = list(of)
    rms = [torch.tensor(side).square().mean(0).sqrt() for side in (ours, theirs)]
    for name, mine, other in zip(names, *(r.tolist() for r in rms), strict=True):
        assert mine <= 2 * other + 1.2e-7, f"{name}: {mine:.1e}, plain PyTorch {other:.1e}"


@pytest.mark.parametrize("dtype", HALVES)
@POWER
def test_error_of_half_precision_at_most_twice_that_of_plain_pytorch(backend, dtype, gamma, value_min):
    x = make(2, 196, 96, dtype=dtype)
    tensors = parameters(96, beta=gamma is not None, dtype=dtype)
    ours, theirs = errors(x, tensors, backend, dict(num_heads=3, **power(gamma, value_min)))
    for name, mine in ours.items():
        assert mine <= 2 * theirs[name] + 1e-7, f"{name}: {mine:.1e}, plain PyTorch {theirs[name]:.1e}"


# ---- on a GPU -----------------------------------------------------------------------------------------------


def on_gpu(backend):
    return pytest.param(backend, marks=[] if not CUDA or backend == "triton" or not _library.why_no_cuda else
        pytest.mark.skip(reason=_library.why_no_cuda))  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("gpu", [on_gpu("cpp"), on_gpu("triton")])
@pytest.mark.parametrize("length", [1, 37, 196, 1024])
@pytest.mark.parametrize(("width", "heads"), [(33, 1), (33, 3), (384, 6), (768, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@POWER
def test_on_gpu(gpu, length, width, heads, dtype, gamma, value_min):
    x = make(2, length, width, dtype=dtype, device="cuda")
    tensors = parameters(width, beta=gamma is not None, dtype=dtype, device="cuda")
    check(x, tensors, gpu, num_heads=heads, **power(gamma, value_min))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("gpu", [on_gpu("cpp"), on_gpu("triton")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_gpu_any_strides(gpu, layout, dtype):
    x = LAYOUTS[layout]().cuda().to(dtype).requires_grad_()
    check(x, parameters(24, device="cuda"), gpu, num_heads=3, gamma=1.25)


def test_the_key_bias_changes_nothing(backend):
    x, tensors = make(2, 37, 24), parameters(24)
    without = {name: t for name, t in tensors.items() if name != "bk"}
    for a, b in zip(*(run(x, t, backend=backend, gamma=2) for t in (tensors, without)), strict=True):
        if backend == "reference":
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    outputs = run(x, tensors, backend=backend, gamma=2)
    gradient = derivatives(outputs, x, tensors, upstreams(outputs))["bk"]
    if backend == "reference":
        assert gradient.abs().max() < 1e-5
    else:
        assert (gradient == 0).all()


def test_the_docstring_equivalent_is_true(backend):
    x, t = make(2, 9, 12, grad=False), parameters(12, grad=False)
    y = torch.nn.functional.layer_norm(x, (12,), t["norm_weight"], t["norm_bias"], 1e-6)
    q = torch.nn.functional.linear(x.mean(1), t["wq"], t["bq"]).unflatten(-1, (3, -1))
    k = torch.nn.functional.linear(y, t["wk"], t["bk"]).unflatten(-1, (3, -1))
    a = (0.7 * torch.einsum("bhd,bnhd->bhn", q, k)).softmax(-1)
    v = y.unflatten(-1, (3, -1))
    options = dict(num_heads=3, scale=0.7, return_attention=True, backend=backend)
    plain_mean = {name: of for name, of in t.items() if name != "beta"}
    out, attention = fastssl.simpool(x, **plain_mean, **options)
    torch.testing.assert_close(out, torch.einsum("bhn,bnhd->bhd", a, v).flatten(1))
    torch.testing.assert_close(attention, a)
    for value_min, smallest in (("batch", v.amin()), ("channel", v.amin(1, keepdim=True))):
        expected = torch.einsum("bhn,bnhd->bhd", a, (v - smallest + 1e-6) ** 1.5) ** (1 / 1.5) + t["beta"]
        out, _ = fastssl.simpool(x, **t, gamma=1.5, value_min=value_min, **options)
        torch.testing.assert_close(out, expected.flatten(1))
