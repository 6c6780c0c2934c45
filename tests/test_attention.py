"""masked_attention and packed_attention against their float64 references, on every code path of the CPU."""

import gpu_rehearsal
import pytest
import torch
import torch.nn.functional as F
from attentions import (
    BACKENDS,
    BOTH,
    DTYPES,
    LENGTHS,
    SHORT,
    check,
    heads_of,
    keep_of,
    needs_library,
    projection,
    reference,
    run,
    small,
    starts_of,
)
from compare import assert_close, doubles, gradients, relative_error
from tolerances import FORWARD, GRADIENT, of_logits

import fastssl

BACKEND = pytest.mark.parametrize("backend", BACKENDS)
RATIO = pytest.mark.parametrize("ratio", [0, 0.25, 1, None])
WIDTH = pytest.mark.parametrize(("heads", "depth"), [(1, 16), (1, 64), (1, 128), (6, 16), (6, 64), (6, 128), (6, 33)])


def where_of(op, tokens, ratio=0.25):
    return keep_of(*tokens, ratio) if op == "masked_attention" else starts_of(tokens)


# ---- values and gradients --------------------------------------------------------------------------------------


@needs_library
@RATIO
@WIDTH
def test_masked(cpu_path, ratio, heads, depth):
    qkv = projection("masked_attention", (3, 197), heads, depth)
    check("masked_attention", heads_of("masked_attention", qkv), keep_of(3, 197, ratio), wanted=qkv)


@needs_library
@pytest.mark.parametrize("length", [0, 1, 37, 300, 1100])
@pytest.mark.parametrize("ratio", [0.25, 1, None])
def test_masked_lengths(cpu_path, length, ratio):
    qkv = projection("masked_attention", (2, length), 2, 64)
    check("masked_attention", heads_of("masked_attention", qkv), keep_of(2, length, ratio), wanted=qkv)


@needs_library
@WIDTH
def test_packed(cpu_path, heads, depth):
    qkv = projection("packed_attention", LENGTHS, heads, depth)
    check("packed_attention", heads_of("packed_attention", qkv), starts_of(LENGTHS), wanted=qkv)


@needs_library
def test_images_that_keep_different_numbers(cpu_path):
    """One of them nothing: its output and gradients are zero."""
    keep = torch.rand(6, 90) < torch.tensor([0.0, 0.1, 0.4, 0.7, 1.0, 0.02])[:, None]
    keep[5], keep[5, 40] = False, True
    qkv = projection("masked_attention", (6, 90))
    out = check("masked_attention", heads_of("masked_attention", qkv), keep, wanted=qkv)
    (gradient,) = gradients(out, [qkv], torch.randn_like(out))
    assert not out[0].any()
    assert not out.transpose(1, 2)[~keep].any()
    assert not gradient[~keep].any()
    assert torch.equal(out[5, :, 40], qkv[5, 40, 2])  # it alone: its own value


@BACKEND
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [16, 33])
def test_dtypes(backend, op, dtype, depth):
    tensors, where = small(op, depth=depth, dtype=dtype)
    check(op, tensors, where, backend)


@needs_library
@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_on_every_path(cpu_path, op, dtype):
    tensors, where = small(op, depth=33, dtype=dtype)
    check(op, tensors, where)


@BOTH
def test_mixed_dtypes_are_for_the_reference(op):
    (q, k, v), where = small(op)
    with pytest.raises(ValueError, match="takes q, k and v of one dtype, got float32, float64, float32"):
        run(op, q, k.double(), v, where, backend="cpp")
    assert run(op, q, k.double(), v, where, backend="reference").dtype == torch.float32


@BACKEND
@BOTH
@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0, 2])
def test_scale(backend, op, scale):
    tensors, where = small(op)
    check(op, tensors, where, backend, scale=scale)


@needs_library
@BOTH
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk"])
def test_only_the_wanted_gradients(op, wanted):
    tensors, where = small(op)
    for name, x in zip("qkv", tensors, strict=True):
        x.requires_grad_(name in wanted)
    check(op, tensors, where)


@needs_library
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("longest", [None, 70, 1000])
def test_starts_of_both_dtypes_and_the_hint(dtype, longest):
    tensors, where = small("packed_attention")
    strided = torch.stack((where, where), 1).to(dtype)[:, 0]
    out = check("packed_attention", tensors, strided, max_seqlen=longest)
    assert torch.equal(out, fastssl.packed_attention(*tensors, where))
    assert out.is_contiguous()


# ---- layouts ---------------------------------------------------------------------------------------------------


def layouts(shape):
    """Tensors of `shape` in every way they may lie in memory."""
    last = len(shape) - 1
    yield torch.randn([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]
    yield torch.randn(*shape[: last - 1], shape[last], shape[last - 1]).transpose(-1, -2)
    yield torch.randn(shape[::-1]).permute(*range(last, -1, -1))
    yield torch.randn([1 if i == 1 else n for i, n in enumerate(shape)]).expand(shape)  # one for all heads
    yield torch.randn([n + 2 for n in shape])[tuple(slice(1, -1) for _ in shape)]


@needs_library
@BOTH
def test_any_strides(cpu_path, op):
    (q, _, _), where = small(op)
    shape = tuple(q.shape)
    kinds = list(layouts(shape))
    for i, q in enumerate(kinds):
        check(op, [x.detach().requires_grad_() for x in (q, kinds[i - 1], kinds[i - 2])], where)


@needs_library
@BOTH
def test_any_strides_of_the_incoming_gradient(cpu_path, op):
    tensors, where = small(op)
    shape = tuple(tensors[0].shape)
    for upstream in layouts(shape):
        check(op, tensors, where, upstream=upstream)
    check(op, tensors, where, upstream=torch.ones(()).expand(shape))
    check(op, tensors, where, upstream=torch.randn(shape[-1]).expand(shape))


@needs_library
def test_a_mask_of_any_strides():
    tensors, keep = small("masked_attention")
    wide = torch.zeros(70, 6, dtype=torch.bool)
    wide[:, ::2] = keep.T
    check("masked_attention", tensors, wide[:, ::2].T)
    check("masked_attention", tensors, keep[:1].expand(3, -1))


@needs_library
def test_the_output_lies_as_the_projection_wants_it():
    tensors, keep = small("masked_attention")
    out = fastssl.masked_attention(*tensors, keep)
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@needs_library
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("depth", [16, 40, 33])
def test_results_too_large_for_the_caches(cpu_path, op, dtype, depth):
    """Written past the caches, to the same bits as a part of them alone, which is not."""
    images, length, kept, heads = 1 + (9 << 20) // (200 * 2 * depth * dtype.itemsize), 200, 9, 2
    if op == "masked_attention":
        where = keep_of(images, length, kept / length)
        few, first = where[:2], (slice(0, 2),)
        tokens = (images, length)
    else:
        tokens = (length,) * 2 + (kept,) * ((images - 2) * length // kept)
        where, few, first = starts_of(tokens), starts_of(tokens[:2]), (slice(0, 2 * length),)
    qkv = projection(op, tokens, heads, depth, dtype)
    assert qkv.nbytes > 3 * (8 << 20)
    out = run(op, *heads_of(op, qkv), where, backend="cpp")
    upstream = torch.randn(out.shape).to(dtype)
    (grad,) = gradients(out, [qkv], upstream)
    part = qkv.detach()[first].requires_grad_()
    alone = run(op, *heads_of(op, part), few, backend="cpp")
    assert torch.equal(out[first], alone)
    (grad_alone,) = gradients(alone, [part], upstream[first])
    assert torch.equal(grad[first], grad_alone)
    assert grad.isfinite().all()
    if op == "masked_attention":
        assert not out.transpose(1, 2)[~where].any()
        assert not grad[~where].any()


# ---- values that are hard --------------------------------------------------------------------------------------


@needs_library
@BOTH
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_dropped_does_not_leak(cpu_path, op, poison):
    """Dropped tokens, and for packed sequences their neighbours."""
    tensors, where = small(op)
    if op == "masked_attention":
        gone = ~where[:, None, :, None].expand_as(tensors[0])
    else:
        gone = torch.zeros(tensors[0].shape, dtype=torch.bool)
        gone[where[2] : where[3]] = True
    clean = check(op, tensors, where)
    upstream = torch.randn(clean.shape).masked_fill_(gone, 0.0)
    expected = gradients(clean, tensors, upstream)
    dirty = [x.detach().masked_fill(gone, poison).requires_grad_() for x in tensors]
    out = run(op, *dirty, where, backend="cpp")
    assert torch.equal(out[~gone], clean[~gone])
    if op == "masked_attention":  # not even what comes for their rows counts
        upstream = upstream.masked_fill(gone, poison)
        assert not out[gone].any()
    for got, truth in zip(gradients(out, dirty, upstream), expected, strict=True):
        assert torch.equal(got[~gone], truth[~gone])
        if op == "masked_attention":
            assert not got[gone].any()


@BACKEND
def test_what_is_dropped_does_not_leak_in_the_reference_either(backend):
    tensors, keep = small("masked_attention")
    gone = ~keep[:, None, :, None]
    dirty = [x.detach().masked_fill(gone, float("nan")).requires_grad_() for x in tensors]
    out = fastssl.masked_attention(*dirty, keep, backend=backend)
    assert out.isfinite().all()
    for gradient in gradients(out, dirty, torch.randn_like(out)):
        assert gradient.isfinite().all()


@needs_library
@BOTH
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("bits", [0x7FC00000, -1, 0x7F800001, 0x7FC00123])
def test_nan_among_the_kept_is_not_hidden(cpu_path, op, name, bits):
    """Whichever NaN it is: memory that nobody wrote may be full of 0xFF."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    tensors, where = small(op, grad=False)
    at = "qkv".index(name)
    if op == "masked_attention":
        where[0, 3] = True
        tensors[at][0, 1, 3, 2] = nan
        row = run(op, *tensors, where)[0, 1, where[0]]
    else:
        tensors[at][3, 1, 2] = nan
        row = run(op, *tensors, where)[:5, 1]
    assert row.isnan().any()
    if name == "k":
        assert row.isnan().all()


@needs_library
@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(cpu_path, op, sign):
    """Finite, and as accurate as logits of that size are."""
    (q, k, v), where = small(op, depth=16)
    with torch.no_grad():
        q.copy_(F.normalize(q, dim=-1) * 100)
        k.copy_(F.normalize(k, dim=-1) * 100 * sign)
    check(op, [q, k, v], where, scale=1.0, tolerances=(of_logits(1e4), of_logits(1e4)))
    peak = torch.full_like(k.detach(), 100.0 / 4)  # every logit of a row the same
    out = check(op, [peak * sign, peak.requires_grad_(), v], where, scale=1.0)
    assert out.isfinite().all()


@needs_library
@BOTH
@pytest.mark.parametrize("largest", [1e6, 1e8, 3e9, 1e12])
def test_gradients_stay_finite_where_the_logarithm_of_sums_has_no_digits_left(cpu_path, op, largest):
    (q, k, v), where = small(op, depth=16)
    with torch.no_grad():
        q.mul_(largest**0.5)
        k.mul_(largest**0.5)
    out = run(op, q, k, v, where, scale=1.0, backend="cpp")
    upstream = torch.randn(out.shape)
    assert out.isfinite().all()
    got = gradients(out, [q, k, v], upstream)
    assert all(g.isfinite().all() for g in got)
    # The columns of P sum to the sum of dV: nothing of the incoming gradient is lost.
    torch.testing.assert_close(got[2].sum(-2 if op == "masked_attention" else 0), _arrives(op, upstream, where))


def _arrives(op, upstream, where):
    """The incoming gradient of what takes part, summed over the tokens."""
    if op == "masked_attention":
        return (upstream * where[:, None, :, None]).sum(-2)
    return upstream.sum(0)


@needs_library
@BOTH
@pytest.mark.parametrize("tokens", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [True, False])
def test_nothing_at_all(op, tokens, masked):
    if op == "packed_attention":
        tokens = {(0, 5): (), (2, 0): (0, 0), (0, 0): (0,)}[tokens]
    where = where_of(op, tokens, 1 if masked else None)
    qkv = projection(op, tokens)
    for backend in BACKENDS:
        out = check(op, heads_of(op, qkv), where, backend, wanted=qkv)
        assert out.numel() == 0
    heads = projection(op, (2, 5) if op == "masked_attention" else SHORT, heads=0)
    check(op, heads_of(op, heads), where_of(op, (2, 5) if op == "masked_attention" else SHORT), wanted=heads)


# ---- against plain PyTorch -------------------------------------------------------------------------------------


def plain(op, q, k, v, where):
    """As users write it, in the inputs' dtype."""

    def attend(q, k, v):
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v

    if op == "packed_attention":
        parts = zip(*(x.transpose(0, 1).split(where.diff().tolist(), 1) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*part) for part in parts], 1).transpose(0, 1)
    logits = (q * q.shape[-1] ** -0.5 @ k.mT).masked_fill(~where[:, None, None, :], torch.finfo(q.dtype).min)
    return (logits.softmax(-1) @ v) * where[:, None, :, None]


@needs_library
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [33, 64])
def test_error_at_most_twice_that_of_plain_pytorch(cpu_path, op, dtype, depth):
    tokens = (2, 197) if op == "masked_attention" else (37, 197, 70, 300)
    where = where_of(op, tokens, 0.5)
    tensors = heads_of(op, projection(op, tokens, 2, depth, dtype))
    tensors = [x.detach().requires_grad_() for x in tensors]
    upstream = torch.randn(tensors[0].shape).to(dtype)
    exact = doubles(tensors)
    truth = reference(op, *exact, where)
    ours, theirs = run(op, *tensors, where, backend="cpp"), plain(op, *tensors, where)
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)
    wanted = gradients(truth, exact, upstream.double())
    ours, theirs = gradients(ours, tensors, upstream), gradients(theirs, tensors, upstream)
    for mine, plains, expected in zip(ours, theirs, wanted, strict=True):
        assert relative_error(mine, expected) <= 2 * relative_error(plains, expected)


@BACKEND
@pytest.mark.parametrize("ratio", [0.25, None])
def test_masked_is_scaled_dot_product_attention_with_a_mask(backend, ratio):
    q, k, v = (
        x.detach().requires_grad_() for x in heads_of("masked_attention", projection("masked_attention", (3, 70)))
    )
    keep = keep_of(3, 70, ratio)
    mask = None if keep is None else keep[:, None, None, :]
    rows = torch.ones(1, 1, 1, 1) if keep is None else keep[:, None, :, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * rows
    out = fastssl.masked_attention(q, k, v, keep, backend=backend)
    assert_close(out, expected, FORWARD[torch.float32])
    upstream = torch.randn_like(out)
    for got, wanted in zip(gradients(out, [q, k, v], upstream), gradients(expected, [q, k, v], upstream), strict=True):
        assert_close(got, wanted, GRADIENT[torch.float32])


@BACKEND
def test_packed_is_scaled_dot_product_attention_of_each_sequence(backend):
    (q, k, v), where = small("packed_attention")
    parts = zip(*(x.transpose(0, 1).split(SHORT, 1) for x in (q, k, v)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts], 1)
    expected = expected.transpose(0, 1)
    out = fastssl.packed_attention(q, k, v, where, backend=backend)
    assert_close(out, expected, FORWARD[torch.float32])
    upstream = torch.randn_like(out)
    for got, wanted in zip(gradients(out, [q, k, v], upstream), gradients(expected, [q, k, v], upstream), strict=True):
        assert_close(got, wanted, GRADIENT[torch.float32])


@BACKEND
def test_masked_and_packed_agree(backend):
    """What is kept, one image behind the other."""
    tensors, keep = small("masked_attention", grad=False)
    rows = [x.transpose(1, 2)[keep] for x in tensors]
    packed = fastssl.packed_attention(*rows, starts_of(keep.sum(1).tolist()), backend=backend)
    masked = fastssl.masked_attention(*tensors, keep, backend=backend).transpose(1, 2)[keep]
    assert_close(packed, masked, 1e-6)
    if backend == "cpp":
        assert torch.equal(packed, masked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [16, 40, 64, 128])
def test_triton_on_gpu(op, dtype, depth):
    tokens_of_calls = [(3, 197), (2, 1100)] if op == "masked_attention" else [LENGTHS]
    if gpu_rehearsal.ASKED:  # the interpreter would take minutes
        tokens_of_calls = [(2, 37) if op == "masked_attention" else SHORT]
    for tokens in tokens_of_calls:
        where = where_of(op, tokens).cuda()
        tensors = [x.detach().cuda().requires_grad_() for x in heads_of(op, projection(op, tokens, 2, depth, dtype))]
        out = run(op, *tensors, where, backend="triton")
        exact = doubles(tensors)
        truth = reference(op, *exact, where.cpu())
        assert_close(out, truth, FORWARD[dtype])
        upstream = torch.randn(out.shape).to(dtype)
        wanted = gradients(truth, exact, upstream.double())
        for got, expected in zip(gradients(out, tensors, upstream.cuda()), wanted, strict=True):
            assert_close(got, expected, GRADIENT[dtype])
