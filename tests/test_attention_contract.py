"""The contract around masked_attention and packed_attention: autograd, compilation, threads, memory and bad input."""

import subprocess
import sys

import pytest
import torch
from attentions import (
    BACKENDS,
    BOTH,
    LENGTHS,
    heads_of,
    keep_of,
    needs_library,
    projection,
    run,
    small,
    starts_of,
)
from compare import gradients

import fastssl
from fastssl import _library
from fastssl.reference.packed_attention import packed_attention as packed_reference

RAW = torch.ops.fastssl


def raw(op, pass_name):
    return getattr(RAW, f"{op}_{pass_name}")


# ---- repeatability, autograd, compilation ----------------------------------------------------------------------


@needs_library
@BOTH
@pytest.mark.parametrize("heads", [1, 6])
def test_same_bits_for_any_number_of_threads(cpu_path, op, heads):
    tokens = (3, 300) if op == "masked_attention" else LENGTHS
    where = keep_of(3, 300, 0.7) if op == "masked_attention" else starts_of(LENGTHS)
    qkv = projection(op, tokens, heads, 33)
    upstream = torch.randn(heads_of(op, qkv)[0].shape)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out = run(op, *heads_of(op, qkv), where, backend="cpp")
        results.append((out, *gradients(out, [qkv], upstream)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@BOTH
def test_the_same_with_and_without_gradients(op):
    tensors, where = small(op)
    assert torch.equal(run(op, *tensors, where), run(op, *(x.detach() for x in tensors), where))


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH
def test_the_result_may_be_changed_in_place(op, backend):
    """As that of scaled_dot_product_attention may."""
    tensors, where = small(op)
    upstream = torch.randn(tensors[0].shape)
    expected = gradients(run(op, *tensors, where, backend=backend) * 2, tensors, upstream)
    out = run(op, *tensors, where, backend=backend)
    out.mul_(2)
    for got, truth in zip(gradients(out, tensors, upstream), expected, strict=True):
        assert torch.equal(got, truth)


@needs_library
@BOTH
def test_forward_keeps_its_inputs_and_one_number_per_row(op):
    tensors, where = small(op)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        run(op, *tensors, where)
    inputs = {x.data_ptr() for x in (*tensors, where)}
    (lse,) = (x for x in kept if x.data_ptr() not in inputs)
    assert lse.numel() == tensors[0].numel() // tensors[0].shape[-1]


@needs_library
@BOTH
@pytest.mark.parametrize("mask", [True, False])
def test_gradcheck(op, mask):
    qkv = projection(op, (2, 5) if op == "masked_attention" else (3, 0, 1, 4), 2, 3, torch.float64)
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    where = (keep if mask else None) if op == "masked_attention" else starts_of((3, 0, 1, 4))
    leaves = [x.detach().clone().requires_grad_() for x in heads_of(op, qkv)]
    for backend in BACKENDS:
        assert torch.autograd.gradcheck(lambda *x, b=backend: run(op, *x, where, backend=b), leaves)


@needs_library
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(op, dtype):
    cases = [small(op, dtype=dtype, grad=False)]
    if op == "masked_attention":
        cases += [(cases[0][0], torch.empty(0, dtype=torch.bool)), ([x[:0] for x in cases[0][0]], cases[0][1][:0])]
    else:
        cases += [([x[:0] for x in cases[0][0]], starts_of(())), ([x[:0] for x in cases[0][0]], starts_of((0, 0)))]
    for tensors, where in cases:
        arguments = (*tensors, where, 0.25)
        torch.library.opcheck(raw(op, "forward"), arguments)
        _, lse = raw(op, "forward")(*arguments)
        torch.library.opcheck(raw(op, "backward"), (torch.randn_like(tensors[0]), lse, *arguments))


def steps(op):
    """A step, and its inputs for several batches and lengths."""

    def step(qkv, where):
        return run(op, *heads_of(op, qkv * 2), where).square()

    if op == "masked_attention":
        sizes = [(2, 9), (5, 9), (3, 20), (7, 33)]
        return step, [(projection(op, s, 2, 8), keep_of(*s, 0.5)) for s in sizes]
    return step, [(projection(op, s, 2, 8), starts_of(s)) for s in [(9, 5), (3, 0, 20), (1, 2, 3, 4), (50, 2, 11)]]


def assert_same(compiled, step, qkv, where):
    out, expected = compiled(qkv, where), step(qkv, where)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(gradients(out, [qkv], upstream), gradients(expected, [qkv], upstream))


@needs_library
@BOTH
def test_compiled_whole_with_dynamic_batch_and_lengths(op):
    torch._dynamo.reset()
    step, inputs = steps(op)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in inputs:
        assert_same(compiled, step, *case)


@needs_library
@BOTH
def test_compiled_by_inductor(op):
    step, inputs = steps(op)
    assert_same(torch.compile(step, fullgraph=True), step, *inputs[0])


@needs_library
@BOTH
def test_second_derivatives_are_refused(op):
    (q, k, v), where = small(op)
    out = run(op, q, k, v, where, backend="cpp").square()
    for gradient in torch.autograd.grad(out.sum(), [q, k, v], create_graph=True):
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            gradient.sum().backward(retain_graph=True)
    exact = [x.detach().double()[..., :3].requires_grad_() for x in (q, k, v)]
    loss = run(op, *exact, where, backend="reference").square().sum()
    (gradient,) = torch.autograd.grad(loss, exact[0], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), exact[1])[0].any()


@needs_library
@BOTH
def test_transforms_work_or_are_refused(op):
    (q, k, v), where = small(op)
    upstream = torch.randn(q.shape)

    def loss(q, backend="cpp"):
        return (run(op, q, k.detach(), v.detach(), where, backend=backend) * upstream).sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    assert torch.equal(torch.func.grad(loss)(q.detach()), expected)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(q.detach())
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: run(op, x, k, v, where, backend="cpp"))(torch.stack((q, q)))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(loss, (q.detach(),), (torch.ones_like(q),))
    _, tangent = torch.func.jvp(lambda x: loss(x, "reference"), (q.detach(),), (torch.randn_like(q),))
    assert tangent.abs() > 0


@needs_library
@BOTH
def test_keys_made_in_inference_mode(op):
    (q, k, v), where = small(op)
    with torch.inference_mode():
        keys, values = k.clone(), v.clone()
    upstream = torch.randn(q.shape)
    got = gradients(run(op, q, keys, values, where), [q], upstream)
    expected = gradients(run(op, q, k.detach(), v.detach(), where), [q], upstream)
    assert torch.equal(got[0], expected[0])


@needs_library
@BOTH
def test_nothing_is_written_to_and_the_graph_may_be_kept(op):
    tensors, where = small(op)
    upstream = torch.randn(tensors[0].shape)
    everything = [*tensors, where, upstream]
    before = [x.detach().clone() for x in everything]
    out = run(op, *tensors, where, backend="cpp")
    first = torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.mul_(7)  # as gradient clipping does; it must not reach the graph
    second = torch.autograd.grad(out, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, tensors, upstream)


@needs_library
def test_raw_operators_refuse_what_would_read_elsewhere():
    (q, k, v), keep = small("masked_attention", grad=False)
    with pytest.raises(RuntimeError, match="q, k and v must have one shape and dtype"):
        RAW.masked_attention_forward(q, k[:, :, 1:], v, keep, 1.0)
    with pytest.raises(RuntimeError, match=r"keep must be \(B, N\) bool or empty"):
        RAW.masked_attention_forward(q, k, v, keep[:, 1:], 1.0)
    out, lse = RAW.masked_attention_forward(q, k, v, keep, 1.0)
    with pytest.raises(RuntimeError, match="grad must have q's shape and dtype"):
        RAW.masked_attention_backward(q[1:], lse, q, k, v, keep, 1.0)
    with pytest.raises(RuntimeError, match=r"lse must be \(B, H, N\)"):
        RAW.masked_attention_backward(q, lse[:, :, 1:], q, k, v, keep, 1.0)
    assert out.shape == (3, 70, 2, 16)
    (q, k, v), starts = small("packed_attention", grad=False)
    with pytest.raises(RuntimeError, match="q, k and v must have one shape and dtype"):
        RAW.packed_attention_forward(q, k, v.double(), starts, 1.0)
    with pytest.raises(RuntimeError, match="cu_seqlens must begin with 0 and end with T"):
        RAW.packed_attention_forward(q, k, v, starts + 1, 1.0)
    with pytest.raises(RuntimeError, match="cu_seqlens must not fall"):
        RAW.packed_attention_forward(q, k, v, torch.tensor([0, 50, 40, 85], dtype=torch.int32), 1.0)
    _, lse = RAW.packed_attention_forward(q, k, v, starts, 1.0)
    with pytest.raises(RuntimeError, match=r"lse must be \(H, T\)"):
        RAW.packed_attention_backward(q, lse.double(), q, k, v, starts, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_docstring_equivalents_are_true(backend):
    (q, k, v), keep = small("masked_attention", grad=False)
    keep[1, 0] = True  # the formula has NaN where an image keeps nothing
    scale = 16**-0.5
    logits = (scale * q @ k.mT).masked_fill(~keep[:, None, None, :], -torch.inf)
    expected = (logits.softmax(-1) @ v) * keep[:, None, :, None]
    torch.testing.assert_close(fastssl.masked_attention(q, k, v, keep, backend=backend), expected)
    (q, k, v), starts = small("packed_attention", grad=False)
    parts = zip(*(x.split(starts.diff().tolist()) for x in (q, k, v)), strict=True)
    heads = [[x.transpose(0, 1) for x in part] for part in parts]
    expected = torch.cat([((scale * q @ k.mT).softmax(-1) @ v).transpose(0, 1) for q, k, v in heads])
    torch.testing.assert_close(fastssl.packed_attention(q, k, v, starts, backend=backend), expected)


# ---- memory ----------------------------------------------------------------------------------------------------


@needs_library
@BOTH
@pytest.mark.parametrize("train", [False, True])
def test_tensors_are_the_output_a_number_per_row_and_the_gradient(op, train):
    """To the byte: what torch allocates in forward and backward together."""
    import memory

    def extra(length):
        tokens = (2, length) if op == "masked_attention" else (length, length)
        where = keep_of(2, length, 0.25) if op == "masked_attention" else starts_of(tokens)
        qkv = projection(op, tokens, 2, 32, grad=train)
        views = [x.detach().requires_grad_(train) for x in heads_of(op, qkv)]
        upstream = torch.randn(views[0].shape)

        class Step:
            prepare = staticmethod(lambda: None)

            @staticmethod
            def run(_):
                out = run(op, *views, where, backend="cpp")
                return (out, torch.autograd.grad(out, views, upstream)) if train else out

        Step.run(None)
        return memory.extra_bytes(Step, "cpu")

    for length in (100, 400):
        rows = 2 * 2 * length * 4
        assert extra(length) <= rows * (32 * (1 + 3 * train) + 1) + 1024


PEAK = """
import sys, torch, fastssl
torch.set_num_threads(1)
op, length, train = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def step(n):
    if op == "masked_attention":  # a quarter kept
        q, k, v = (x.transpose(1, 2) for x in qkv.view(1, 4 * length, 3, 1, 64)[:, : 4 * n].unbind(2))
        out = fastssl.masked_attention(q, k, v, keep[:, : 4 * n], backend="cpp")
    else:
        q, k, v = qkv[: 4 * n].unbind(1)
        starts = torch.tensor([0, n, 2 * n, 3 * n, 4 * n], dtype=torch.int32)
        out = fastssl.packed_attention(q, k, v, starts, backend="cpp")
    if train:
        out.backward(out.detach())

qkv = torch.randn(4 * length, 3, 1, 64, requires_grad=train)
keep = (torch.arange(4 * length) % 4 == 0)[None]
step(4)  # what torch allocates once
before = peak()
step(length)
print(peak() - before)
"""


@needs_library
@BOTH
@pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_grows_with_the_tokens_and_not_with_their_square(op, train):
    """The whole process's peak, scratch memory included, with 1024 and 4096 tokens that attend to each other among
    four times as many: at 4096 one matrix of logits alone would be 64 MB, at 16384 a gigabyte."""

    def kilobytes(length):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, op, str(length), str(train)],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        return int(done.stdout)

    small, large = kilobytes(1024), kilobytes(4096)
    assert large <= 8 * small + 1024  # 4 times the tokens; their square would be 16 times as much
    of_four = 4 * 4 * 4096 * 64 * 4 / 1024  # the output and the gradients, for all tokens
    assert large <= 3 * of_four


# ---- bad input -------------------------------------------------------------------------------------------------

Q, KEEP = torch.randn(2, 3, 5, 4), torch.ones(2, 5, dtype=torch.bool)
T, STARTS = torch.randn(6, 3, 4), starts_of((2, 4))
ALIKE = [  # for both ops; `x` stands for a tensor that is right
    (dict(q=[1.0]), TypeError, "q must be a Tensor, got list"),
    (dict(k=None), TypeError, "k must be a Tensor, got NoneType"),
    (dict(q=lambda x: x.long()), TypeError, "q must have dtype .*, got dtype int64"),
    (dict(v=lambda x: x.bool()), TypeError, "v must have dtype .*, got dtype bool"),
    (dict(q=lambda x: x.to_sparse()), ValueError, "q must be a dense"),
    (dict(k=lambda x: x.to("meta")), ValueError, "k must be on the device of q .cpu., got meta"),
    (dict(k=lambda x: x[1:]), ValueError, r"k must have q's shape \(.*\), got \("),
    (dict(v=lambda x: x[..., 1:]), ValueError, r"v must have q's shape \(.*\), got \("),
    (dict(k=lambda x: x[0]), ValueError, r"k must be \(.*, d\), got \("),
    (dict(q=lambda x: x[None]), ValueError, r"q must be \(.*, d\), got \(1, "),
    (dict(scale="1"), TypeError, "scale must be a finite number, got str"),
    (dict(scale=1e39), ValueError, r"scale must be at most 1e\+38 in size, got 1e\+39"),
    (dict(scale=float("nan")), ValueError, "scale must be a finite number, got nan"),
    (dict(backend="cuda"), ValueError, "backend must be one of .*, got 'cuda'"),
]
OF_ONE = {
    "masked_attention": [
        (dict(keep=[True]), TypeError, "keep must be None or a Tensor, got list"),
        (dict(keep=KEEP.float()), TypeError, "keep must have dtype bool, got dtype float32"),
        (dict(keep=KEEP[:1]), ValueError, r"keep must be \(B, N\) = \(2, 5\) of q, got \(1, 5\)"),
        (dict(keep=KEEP[0]), ValueError, r"keep must be \(B, N\) = \(2, 5\) of q, got \(5,\)"),
        (dict(keep=KEEP.to_sparse()), ValueError, "keep must be a dense"),
        (dict(keep=KEEP.to("meta")), ValueError, "keep must be on the device of q .cpu., got meta"),
    ],
    "packed_attention": [
        (dict(cu_seqlens=[0, 6]), TypeError, "cu_seqlens must be a Tensor, got list"),
        (dict(cu_seqlens=STARTS.float()), TypeError, "cu_seqlens must have dtype int32 or int64, got dtype float32"),
        (dict(cu_seqlens=STARTS.to_sparse()), ValueError, "cu_seqlens must be a dense"),
        (dict(cu_seqlens=STARTS[:1]), ValueError, r"cu_seqlens must end with T = 6, got \(1,\)"),
        (dict(cu_seqlens=STARTS.to("meta")), ValueError, "cu_seqlens must be on the device of q .cpu., got meta"),
        (dict(cu_seqlens=STARTS[None]), ValueError, r"cu_seqlens must be \(S \+ 1,\), got \(1, 3\)"),
        (dict(cu_seqlens=STARTS[:0]), ValueError, r"cu_seqlens must be \(S \+ 1,\), got \(0,\)"),
        (dict(cu_seqlens=STARTS[1:]), ValueError, "must begin with 0 and end with T = 6, got 2 and 6"),
        (dict(cu_seqlens=STARTS[:2]), ValueError, "must begin with 0 and end with T = 6, got 0 and 2"),
        (dict(cu_seqlens=starts_of((4, -1, 3))), ValueError, "cu_seqlens must not fall, got 4 before 3"),
        (dict(max_seqlen=3), ValueError, "max_seqlen must be at least the longest sequence's 4 tokens, got 3"),
        (dict(max_seqlen=0), ValueError, "max_seqlen must be an int of at least 1, got 0"),
        (dict(max_seqlen=4.0), TypeError, "max_seqlen must be an int of at least 1, got float"),
    ],
}
BAD = [(op, *case) for op, cases in OF_ONE.items() for case in (*ALIKE, *cases)]


@pytest.mark.parametrize(("op", "change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(op, change, error, message):
    if op == "masked_attention":
        given, right = {"q": Q, "k": Q, "v": Q, "keep": KEEP}, Q
    else:
        given, right = {"q": T, "k": T, "v": T, "cu_seqlens": STARTS}, T
    given |= {name: value(right) if callable(value) else value for name, value in change.items()}
    with pytest.raises(error, match=message) as caught:
        getattr(fastssl, op)(**given)
    assert str(caught.value).startswith(f"{op}: ")
    assert "\n" not in str(caught.value)
    if "backend" not in given:
        with pytest.raises(error, match=message):
            fastssl.explain(op, **given)


@pytest.mark.parametrize("numbers", [(1, 2, 6), (0, 2, 5), (0, 4, 2, 6)])
def test_the_reference_checks_what_it_reads(numbers):
    """Also where the front door cannot: on a GPU, and while compiling."""
    with pytest.raises(ValueError, match=r"^packed_attention: cu_seqlens must rise from 0 to T = 6, got \["):
        packed_reference(T, T, T, torch.tensor(numbers))


@BOTH
def test_meta_tensors_have_no_fast_backend(op):
    tensors, where = small(op, grad=False)
    tensors, where = [x.to("meta") for x in tensors], where.to("meta")
    if _library.loaded():
        with pytest.raises(ValueError, match=r"'cpp' cannot take this call: takes tensors on cpu, got meta"):
            run(op, *tensors, where, backend="cpp")
    with pytest.raises(ValueError, match=rf"{op}: q must have at least one channel, got"):
        run(op, *(x[..., :0] for x in tensors), where)
