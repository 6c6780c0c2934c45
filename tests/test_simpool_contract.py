"""The contract around simpool: autograd, compilation, threads, memory and bad input."""

import subprocess
import sys

import pytest
import torch
from compare import assert_close
from pooling import derivatives, make, parameters, run, upstreams

import fastssl
from fastssl import _library, kernels
from fastssl._backends import OPS

needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")
POWERS = [(None, "batch"), (1.25, "batch"), (1.25, "channel")]
POWER = pytest.mark.parametrize(("gamma", "value_min"), POWERS, ids=[f"{g}-{m}" for g, m in POWERS])
NAMES = ("wq", "wk", "norm_weight", "norm_bias", "bq", "bk", "beta")


def setting(shape, gamma, value_min, **more):
    """Tokens, parameters, and the options of a call."""
    tensors = parameters(shape[2], beta=gamma is not None, **more)
    return make(*shape, **more), tensors, dict(gamma=gamma, value_min=value_min)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- repeatability and autograd --------------------------------------------------------------------------------


@POWER
@pytest.mark.parametrize("shape", [(1, 97, 66), (9, 50, 66), (2, 420, 192)], ids=["few", "many", "long"])
def test_same_bits_every_time_and_for_any_number_of_threads(backend, gamma, value_min, shape):
    x, tensors, options = setting(shape, gamma, value_min)
    upstream = torch.randn(shape[0], shape[2]), torch.randn(shape[0], 3, shape[1])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1) if backend != "reference" else (2, 2):
        torch.set_num_threads(threads)
        outputs = run(x, tensors, backend=backend, num_heads=3, **options)
        results.append([*outputs, *derivatives(outputs, x, tensors, upstream).values()])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert equal(results[0], other)


@POWER
def test_the_same_with_and_without_gradients(backend, gamma, value_min):
    x, tensors, options = setting((3, 37, 24), gamma, value_min)
    outputs = run(x, tensors, backend=backend, **options)
    with torch.no_grad():
        assert equal(outputs, run(x, tensors, backend=backend, **options))
    assert all(o.requires_grad for o in outputs)
    constants = {name: t.detach() for name, t in tensors.items()}
    alone = run(x.detach(), constants, backend=backend, **options)
    assert equal(outputs, alone)
    assert not any(o.requires_grad for o in alone)
    pooled = fastssl.simpool(x, **tensors, backend=backend, **options)
    assert torch.equal(pooled, outputs[0])


@POWER
@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck(backend, gamma, value_min, heads):
    x, tensors, options = setting((2, 5, 6), gamma, value_min, dtype=torch.float64)
    with torch.no_grad():
        y = torch.nn.functional.layer_norm(x, (6,), tensors["norm_weight"], tensors["norm_bias"], 1e-6)
        lowest = (y.flatten() if value_min == "batch" else y.transpose(0, 1).flatten(1)).sort(0).values
        assert (lowest[1] - lowest[0]).min() > 1e-4  # gradcheck's steps cross no kink
        options["eps"] = 1e-2  # nor do they meet the infinite slope of a power at 0

    def call(x, *of):
        return run(x, dict(zip(tensors, of, strict=True)), backend=backend, num_heads=heads, **options)

    assert torch.autograd.gradcheck(call, (x, *tensors.values()))


@pytest.mark.parametrize("wanted", ["x", *NAMES])
def test_only_one_argument_wants_a_gradient(backend, wanted):
    x, tensors = make(3, 37, 24), parameters(24)
    outputs = run(x, tensors, backend=backend, gamma=1.25)
    upstream = upstreams(outputs)
    expected = derivatives(outputs, x, tensors, upstream)[wanted]
    alone = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
    x = x.detach().requires_grad_(wanted == "x")
    outputs = run(x, alone, backend=backend, gamma=1.25)
    upstream = [u if o.requires_grad else None for u, o in zip(upstream, outputs, strict=True)]
    got = derivatives(outputs, x, alone, upstream)
    assert list(got) == [wanted]
    if backend == "reference":
        torch.testing.assert_close(got[wanted], expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(got[wanted], expected)


@pytest.mark.parametrize("of", [0, 1], ids=["pooled", "attention"])
@POWER
def test_a_gradient_of_one_output_alone(backend, of, gamma, value_min):
    x, tensors, options = setting((3, 37, 24), gamma, value_min)
    outputs = run(x, tensors, backend=backend, **options)
    upstream = upstreams(outputs)
    with_zeros = [u if i == of else torch.zeros_like(u) for i, u in enumerate(upstream)]
    expected = derivatives(outputs, x, tensors, with_zeros)
    outputs = run(x, tensors, backend=backend, **options)
    got = derivatives(outputs, x, tensors, [u if i == of else None for i, u in enumerate(upstream)])
    for name, wanted in expected.items():
        if got[name] is None:  # the reference's graph does not lead there
            assert not wanted.any()
        else:
            torch.testing.assert_close(got[name], wanted)


@POWER
def test_nothing_is_written_to_and_the_graph_may_be_kept(backend, gamma, value_min):
    x, tensors, options = setting((3, 37, 24), gamma, value_min)
    outputs = run(x, tensors, backend=backend, **options)
    upstream = upstreams(outputs)
    given = [x, *tensors.values(), *upstream]
    before = [t.detach().clone() for t in given]
    outputs = run(x, tensors, backend=backend, **options)
    kept = [o.detach().clone() for o in outputs]
    first = torch.autograd.grad(outputs, [x, *tensors.values()], upstream, retain_graph=True)
    copies = [g.clone() for g in first]
    for gradient in first:
        gradient.mul_(7)  # as gradient clipping does; it must not reach the graph
    second = torch.autograd.grad(outputs, [x, *tensors.values()], upstream)
    assert equal(copies, second)
    assert equal(kept, outputs)
    assert equal(before, given)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(outputs, x, upstream)


@needs_library
@pytest.mark.parametrize("upstream", ["of an expression", "constant"])
def test_second_derivatives_are_refused(upstream):
    x, tensors = make(2, 4, 6), parameters(6)
    pooled = fastssl.simpool(x, **tensors, gamma=1.25, backend="cpp")
    loss = pooled.square().sum() if upstream == "of an expression" else pooled.sum()
    for grad in torch.autograd.grad(loss, [x, tensors["wq"]], create_graph=True):
        with pytest.raises(RuntimeError, match="simpool: second derivatives are not implemented"):
            (loss + grad.square().sum()).backward(retain_graph=True)


def test_the_reference_has_second_derivatives():
    x, tensors, _ = setting((2, 3, 4), None, "batch", dtype=torch.float64)

    def call(x, *of):
        return fastssl.simpool(x, **dict(zip(tensors, of, strict=True)), gamma=None, backend="reference")

    assert torch.autograd.gradgradcheck(call, (x, *tensors.values()))


@needs_library
def test_forward_mode_is_refused_not_wrong():
    x, tensors = make(2, 4, 6, grad=False), parameters(6, grad=False)

    def call(backend):
        return lambda v: fastssl.simpool(v, **tensors, gamma=2, backend=backend)

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(call("cpp"), (x,), (torch.ones_like(x),))
    _, tangent = torch.func.jvp(call("reference"), (x,), (torch.randn_like(x),))
    assert tangent.abs().max() > 0


@needs_library
def test_function_transforms_work_or_are_refused():
    x, tensors = make(3, 4, 6), parameters(6, grad=False)

    def call(x):
        return fastssl.simpool(x, **tensors, gamma=2, backend="cpp").sum()

    expected = torch.autograd.grad(call(x), x)[0]
    assert torch.equal(torch.func.grad(call)(x.detach()), expected)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda x: torch.func.grad(call)(x).square().sum())(x.detach())
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: call(x[None]))(x)


@needs_library
@POWER
def test_arguments_made_in_inference_mode(gamma, value_min):
    """A frozen backbone's tokens."""
    x, tensors, options = setting((3, 9, 12), gamma, value_min)
    upstream = torch.randn(3, 12), torch.randn(3, 1, 9)
    expected = derivatives(run(x, tensors, backend="cpp", **options), x.detach(), tensors, upstream)
    with torch.inference_mode():
        frozen = x.clone()
    got = derivatives(run(frozen, tensors, backend="cpp", **options), frozen, tensors, upstream)
    assert equal(got.values(), expected.values())


# ---- compilation and raw operators -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("reference", "tokens"),
        pytest.param("cpp", "tokens", marks=needs_library),
        pytest.param("cpp", "map", marks=needs_library),
    ],
)
@pytest.mark.parametrize(("gamma", "value_min"), [(None, "batch"), (1.25, "channel")])
@pytest.mark.parametrize("all_given", [True, False])
def test_compiled_whole_with_dynamic_batch(name, layout, gamma, value_min, all_given):
    tensors = parameters(12, biases=all_given, beta=all_given and gamma is not None)

    def step(x, tensors):
        outputs = run(x * 2, tensors, backend=name, num_heads=3, gamma=gamma, value_min=value_min)
        return outputs[0].sin(), outputs[1] * 2

    torch._dynamo.reset()  # or the code compiled for other parameters counts as one more of this
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 3):
        x = make(batch, 6, 12)
        if layout == "map":
            x = torch.randn(batch, 12, 3, 2, requires_grad=True)
        got, expected = compiled(x, tensors), step(x, tensors)
        upstream = upstreams(expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        of_expected = derivatives(expected, x, tensors, upstream)
        for argument, gradient in derivatives(got, x, tensors, upstream).items():
            torch.testing.assert_close(gradient, of_expected[argument])


@needs_library
@pytest.mark.parametrize("gamma", [None, 1.25])
def test_compiled_by_inductor(gamma):
    x, tensors = make(3, 9, 12), parameters(12, beta=gamma is not None)

    def step(x, tensors):
        return fastssl.simpool(x + 1, **tensors, gamma=gamma, backend="cpp") * 3

    torch._dynamo.reset()
    got, expected = torch.compile(step, fullgraph=True)(x, tensors), step(x, tensors)
    torch.testing.assert_close(got, expected)
    upstream = [torch.randn_like(got)]
    of_expected = derivatives([expected], x, tensors, upstream)
    for name, gradient in derivatives([got], x, tensors, upstream).items():
        torch.testing.assert_close(gradient, of_expected[name])


def raw(batch, length, width, *, heads=2, gamma=1.25, channel_min=0, dtype=torch.float32, other=torch.float32):
    """Arguments of the raw forward operator; absent tensors have no elements."""
    t = parameters(width, dtype=other, grad=False)
    x = make(length, batch, width, dtype=dtype, grad=False).transpose(0, 1)
    beta = t["beta"] if gamma else x.new_empty(0)
    return (x, t["wq"], t["bq"], t["wk"], t["norm_weight"], t["norm_bias"], beta,
        heads, 0.5, gamma, channel_min, 1e-6, 1e-6)  # fmt: skip


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [torch.float32, torch.float64])
@pytest.mark.parametrize(("gamma", "channel_min"), [(0.0, 0), (1.25, 0), (1.25, 1)])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_opcheck(dtype, other, gamma, channel_min, batch):
    call = raw(batch, 7, 12, gamma=gamma, channel_min=channel_min, dtype=dtype, other=other)
    ops = torch.ops.fastssl
    torch.library.opcheck(ops.simpool_forward, call)
    pooled, attention, *kept = ops.simpool_forward(*call)
    for grad_attention in (torch.randn_like(attention), attention.new_empty(0)):
        for wanted in (1, 2, 3):
            given = (torch.randn_like(pooled), grad_attention, *kept, *call, wanted)
            torch.library.opcheck(ops.simpool_backward, given)


@needs_library
def test_raw_operators_refuse_what_would_read_elsewhere():
    ops = torch.ops.fastssl
    good = raw(2, 5, 6)
    torn = torch.randn(2, 5)
    bad = [{0: good[0][0]}, {0: good[0][:, :0]}, {1: torch.randn(6, 5)}, {2: torn[0]}, {3: torn}, {4: torn[0]},
        {5: torn[0]}, {6: torch.randn(2)}, {7: 4}, {7: 0}]  # fmt: skip
    for change in bad:
        with pytest.raises(RuntimeError, match="simpool"):
            ops.simpool_forward(*(change.get(i, argument) for i, argument in enumerate(good)))
    pooled, attention, *kept = ops.simpool_forward(*good)
    given = (torch.randn_like(pooled), torch.randn_like(attention), *kept, *good, 3)
    bad = [{0: torn}, {1: attention[:, :1]}, {2: kept[0][:, :3]}, {2: kept[0].double()}, {3: kept[1][:1]},
        {4: kept[2][:0]}]  # fmt: skip
    for change in bad:
        with pytest.raises(RuntimeError, match="simpool"):
            ops.simpool_backward(*(change.get(i, argument) for i, argument in enumerate(given)))


@needs_library
def test_the_fast_backend_is_chosen_and_copies_no_tokens():
    x, tensors = make(2, 10, 24, grad=False)[:, 1:], parameters(24, grad=False)
    assert fastssl.explain("simpool", x, **tensors, gamma=2).chosen == "cpp"
    with torch.profiler.profile() as profile:
        fastssl.simpool(x, **tensors, gamma=2)
    names = {event.key for event in profile.key_averages()}
    assert "fastssl::simpool_forward" in names
    assert not {"aten::copy_", "aten::clone"} & names


@pytest.mark.skipif(kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "interpreted")
def test_triton_interpreted_is_repeatable_and_refuses_second_derivatives():
    x, tensors = make(2, 9, 12), parameters(12)
    results = []
    for _ in range(2):
        outputs = run(x, tensors, backend="triton", gamma=2)
        upstream = [torch.ones_like(o) for o in outputs]
        results.append([*outputs, *derivatives(outputs, x, tensors, upstream).values()])
    assert equal(*results)
    (grad,) = torch.autograd.grad(run(x, tensors, backend="triton", gamma=2)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


# ---- memory ----------------------------------------------------------------------------------------------------


@needs_library
@POWER
@pytest.mark.parametrize("heads", [1, 4])
def test_tensors_are_the_gradients_and_a_few_numbers_per_token(gamma, value_min, heads):
    """What torch allocates in forward and backward together: no second (B, N, C) beside the gradient of x."""
    import memory

    def extra(batch, length, width):
        x, tensors, options = setting((batch, length, width), gamma, value_min)

        class Step:
            prepare = staticmethod(lambda: None)

            @staticmethod
            def run(_):
                pooled = fastssl.simpool(x, **tensors, num_heads=heads, backend="cpp", **options)
                return torch.autograd.grad(pooled.sum(), [x, *tensors.values()])

        Step.run(None)
        return memory.extra_bytes(Step, "cpu")

    for batch, length, width in ((4, 196, 96), (8, 400, 96)):
        gradients = batch * length * width + 2 * width * width + 5 * width
        kept = batch * ((2 + 4 * heads) * length + (8 + 2 * heads) * width)
        assert extra(batch, length, width) <= 4 * (gradients + 2 * kept + 2 * width * width) + 4096


PEAK = """
import sys, torch, fastssl
torch.set_num_threads(1)
length, width, train = int(sys.argv[1]), 64, int(sys.argv[2])
x = torch.randn(4, length, width)
t = {"wq": torch.randn(width, width), "wk": torch.randn(width, width), "norm_weight": torch.ones(width)}
t |= {"norm_bias": torch.zeros(width)}
if train:
    t = {name: p.requires_grad_() for name, p in t.items()}

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def step(n):
    pooled = fastssl.simpool(x[:, :n], **t, gamma=1.25, backend="cpp")
    if train:
        pooled.sum().backward()

step(16)  # what torch allocates once
before = peak()
step(length)
print(peak() - before)
"""


@needs_library
@pytest.mark.parametrize("train", [False, True], ids=["forward", "parameters"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_holds_no_second_copy_of_the_tokens(train):
    """The whole process's peak, scratch memory included, of a pooling layer on a frozen backbone."""
    length = 16384
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(length), str(int(train))],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    tokens = 4 * length * 64 * 4 / 1024
    assert int(done.stdout) <= 0.5 * tokens


# ---- bad input -------------------------------------------------------------------------------------------------

X = torch.randn(2, 5, 6)
GOOD = {name: t.detach() for name, t in parameters(6, biases=False, beta=False).items()}
BAD = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
    (dict(x=X[0]), ValueError, r"x must be \(B, N, C\) or \(B, C, h, w\), got \(5, 6\)"),
    (dict(x=X[None, None]), ValueError, r"x must be \(B, N, C\) or \(B, C, h, w\), got \(1, 1, 2, 5, 6\)"),
    (dict(x=X.long()), TypeError, "x must have dtype .*, got dtype int64"),
    (dict(x=X.to(torch.complex64)), TypeError, "x must have dtype .*, got dtype complex64"),
    (dict(x=X.to_sparse()), ValueError, "x must be a dense"),
    (dict(x=X[:, :0]), ValueError, r"x must have at least one token and one channel, got \(2, 0, 6\)"),
    (dict(x=X[..., :0]), ValueError, r"x must have at least one token and one channel, got \(2, 5, 0\)"),
    (dict(x=torch.randn(2, 6, 0, 3)), ValueError, r"x must have at least one token .*, got \(2, 6, 0, 3\)"),
    (dict(x=X[..., :4]), ValueError, r"wq must be \(C, C\) = \(4, 4\) for C = 4 of x, got \(6, 6\)"),
    (dict(wq=None), TypeError, "wq must be a Tensor, got NoneType"),
    (dict(wq=torch.randn(6, 5)), ValueError, r"wq must be \(C, C\) = \(6, 6\) for C = 6 of x, got \(6, 5\)"),
    (dict(wk=torch.randn(6)), ValueError, r"wk must be \(C, C\) = \(6, 6\) for C = 6 of x, got \(6,\)"),
    (dict(wk=GOOD["wk"].int()), TypeError, "wk must have dtype .*, got dtype int32"),
    (dict(wk=GOOD["wk"].to("meta")), ValueError, "wk must be on the device of x .cpu., got meta"),
    (dict(norm_weight=torch.randn(6, 1)), ValueError, r"norm_weight must be \(C,\) = \(6,\) .*, got \(6, 1\)"),
    (dict(norm_bias=torch.randn(5)), ValueError, r"norm_bias must be \(C,\) = \(6,\) .*, got \(5,\)"),
    (dict(norm_bias=None), TypeError, "norm_bias must be a Tensor, got NoneType"),
    (dict(norm_bias=torch.ones(6, device="meta")), ValueError, "norm_bias must be on the device of x"),
    (dict(bq=torch.randn(7)), ValueError, r"bq must be \(C,\) = \(6,\) for C = 6 of x, got \(7,\)"),
    (dict(bk=0.0), TypeError, "bk must be a Tensor, got float"),
    (dict(bk=torch.ones(6, dtype=torch.bool)), TypeError, "bk must have dtype .*, got dtype bool"),
    (dict(num_heads=4), ValueError, "num_heads must divide the C channels of x, got 4 for C = 6"),
    (dict(num_heads=0), ValueError, "num_heads must be an int of at least 1, got 0"),
    (dict(num_heads=2.0), TypeError, "num_heads must be an int of at least 1, got float"),
    (dict(num_heads=True), TypeError, "num_heads must be an int of at least 1, got bool"),
    (dict(scale="1"), TypeError, "scale must be a finite number, got str"),
    (dict(scale=float("inf")), ValueError, "scale must be a finite number, got inf"),
    (dict(gamma=0), ValueError, "gamma must be a finite number greater than 0, got 0"),
    (dict(gamma=-1.25), ValueError, "gamma must be a finite number greater than 0, got -1.25"),
    (dict(gamma=float("nan")), ValueError, "gamma must be a finite number greater than 0, got nan"),
    (dict(gamma=torch.tensor(2.0)), TypeError, "gamma must be a finite number greater than 0, got Tensor"),
    (dict(gamma=7), ValueError, r"gamma must be at most 6\.3\d* where eps is 1e-06 \(or eps\*\*gamma is 0\), got 7"),
    (dict(gamma=2, eps=1e-20), ValueError, r"gamma must be at most 1\.8\d* where eps is 1e-20"),
    (dict(gamma=2, eps=1e-39), ValueError, "eps must be at least 1.18e-38, got 1e-39"),
    (dict(gamma=2, eps=0), ValueError, "eps must be a finite number greater than 0, got 0"),
    (dict(eps=-1e-6), ValueError, "eps must be a finite number greater than 0, got -1e-06"),
    (dict(norm_eps=0.0), ValueError, "norm_eps must be a finite number greater than 0, got 0.0"),
    (dict(norm_eps=None), TypeError, "norm_eps must be a finite number greater than 0, got NoneType"),
    (dict(beta=torch.zeros(())), ValueError, "beta must be None where gamma is None, got a Tensor"),
    (dict(gamma=2, beta=0.5), TypeError, "beta must be a Tensor, got float"),
    (dict(gamma=2, beta=torch.zeros(6)), ValueError, r"beta must have one element, got \(6,\)"),
    (dict(gamma=2, beta=torch.zeros((), dtype=torch.int64)), TypeError, "beta must have dtype .*, got dtype int64"),
    (dict(gamma=2, beta=torch.zeros((), device="meta")), ValueError, "beta must be on the device of x .cpu., got meta"),
    (dict(value_min="image"), ValueError, "value_min must be one of 'batch', 'channel', got 'image'"),
    (dict(value_min=None), ValueError, "value_min must be one of 'batch', 'channel', got None"),
    (dict(return_attention=1), TypeError, "return_attention must be True or False, got int"),
    (dict(backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(change, error, message):
    given = {"x": X, **GOOD, **change}
    with pytest.raises(error, match=message) as caught:
        fastssl.simpool(given.pop("x"), **given)
    assert str(caught.value).startswith("simpool: ")
    assert "\n" not in str(caught.value)
    given = {"x": X, **GOOD, **change}
    if "backend" not in given:
        with pytest.raises(error, match=message):
            fastssl.explain("simpool", given.pop("x"), **given)


def test_a_large_gamma_for_float64():
    """eps**gamma is a number there."""
    options = dict(gamma=20, eps=1e-6, backend="reference")
    assert fastssl.simpool(X.double(), **GOOD, **options).isfinite().all()
    with pytest.raises(ValueError, match="gamma must be at most 6"):
        fastssl.simpool(X, **GOOD, **options)


def test_a_beta_of_one_element_in_any_shape(backend):
    def call(beta):
        return fastssl.simpool(X, **GOOD, gamma=2, beta=beta, backend=backend)

    first = call(torch.full((), 0.5))
    for dimensions in (1, 3, 4, 8):
        beta = torch.full((1,) * dimensions, 0.5, requires_grad=True)
        out = call(beta)
        assert torch.equal(out, first)
        (gradient,) = torch.autograd.grad(out.sum(), beta)
        assert_close(gradient, torch.full_like(beta, out.numel()), 1e-6)
    assert_close(first, call(None) + 0.5, 1e-6)


def test_every_backend_is_declared():
    assert [b.name for b in OPS["simpool"].backends] == ["cpp", "triton", "reference"]
