"""fastssl.pack and PackedTokens: there and back, indexing, gradients, tracing and errors."""

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

import fastssl
from fastssl import PackedTokens

MIXED = [(3, 7), (5,), (0, 4), (2, 0), (0,), (4, 2)]
LENGTHS = (7, 7, 7, 5, 0, 0, 0, 2, 2, 2, 2)


def mixed(width=6, dtype=torch.float32, grad=False):
    return [torch.randn(*shape, width).to(dtype).requires_grad_(grad) for shape in MIXED]


def masked(batch=4, length=9, width=6, dtype=torch.float32):
    keep = torch.rand(batch, length) < 0.5
    keep[1] = False
    return torch.randn(batch, length, width).to(dtype), keep


# ---- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_list(dtype):
    tokens = mixed(dtype=dtype)
    packed = fastssl.pack(tokens)
    assert torch.equal(packed.values, torch.cat([x.flatten(0, -2) for x in tokens]))
    assert packed.values.dtype == dtype
    assert packed.lengths == LENGTHS
    assert packed.max_seqlen == 7
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    assert len(packed) == len(LENGTHS)
    back = packed.unpack()
    assert type(back) is list
    assert all(torch.equal(a, b) for a, b in zip(tokens, back, strict=True))
    other = packed.replace(torch.randn(packed.values.shape[0], 2, 3)).unpack()
    assert [x.shape for x in other] == [(*shape, 2, 3) for shape in MIXED]


@pytest.mark.parametrize("shape", [(4, 9, 6), (0, 9, 6), (4, 0, 6), (1, 1, 1)])
def test_one_tensor(shape):
    x = torch.randn(shape)
    packed = fastssl.pack(x)
    assert packed.values.data_ptr() == x.data_ptr()
    assert packed.lengths == shape[1:2] * shape[0]
    assert packed.max_seqlen == max(packed.lengths, default=0)
    assert packed.cu_seqlens.tolist() == [i * shape[1] for i in range(shape[0] + 1)]
    assert torch.equal(packed.unpack(), x)
    assert fastssl.pack([x]).values.data_ptr() == x.data_ptr()
    assert fastssl.pack(x.transpose(0, 2)).unpack().shape == shape[::-1]


@pytest.mark.parametrize("told", [False, True])
def test_what_a_mask_keeps(told):
    x, keep = masked()
    packed = fastssl.pack(x, keep, int(keep.sum()) if told else None)
    assert torch.equal(packed.values, x[keep])
    assert packed.lengths == tuple(keep.sum(1).tolist())
    assert packed.max_seqlen == max(packed.lengths)
    assert packed.cu_seqlens.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert torch.equal(packed.kept, keep.flatten().nonzero()[:, 0])
    assert torch.equal(packed.unpack(), x * keep[..., None])
    wide = packed.replace(torch.ones(len(packed.values), 3)).unpack()
    assert torch.equal(wide, keep[..., None].expand(-1, -1, 3).float())
    assert packed.replace(torch.ones(len(packed.values))).unpack().shape == keep.shape


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_a_mask_that_keeps_nothing_or_all(kept):
    x = torch.randn(3, 5, 4)
    packed = fastssl.pack(x, torch.full((3, 5), kept).bool())
    assert packed.lengths == (5 * int(kept),) * 3
    assert torch.equal(packed.unpack(), x * kept)


def test_a_mask_of_any_strides():
    x, keep = masked(4, 4)
    assert torch.equal(fastssl.pack(x.transpose(0, 1), keep.T).values, x.transpose(0, 1)[keep.T])


def test_with_num_kept_no_value_is_read():
    """Meta tensors have none: what would wait for a device fails on them."""
    x, keep = torch.empty(3, 5, 4, device="meta"), torch.empty(3, 5, dtype=torch.bool, device="meta")
    packed = fastssl.pack(x, keep, 7)
    assert packed.values.shape == (7, 4)
    assert packed.cu_seqlens.shape == (4,)
    assert packed.cu_seqlens.dtype == torch.int32
    assert (packed.lengths, packed.max_seqlen) == (None, 5)
    assert packed.unpack().shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_a_gpu():
    x, keep = masked()
    count = int(keep.sum())
    lists, x, on_gpu = [t.cuda() for t in mixed()], x.cuda(), keep.cuda()
    fastssl.pack(x, on_gpu, count)  # what torch loads once
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed = [fastssl.pack(lists), fastssl.pack(x), fastssl.pack(x, keep), fastssl.pack(x, on_gpu, count)]
        back = [p.unpack() for p in packed]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if packed[3].values.is_cuda:  # a rehearsal is on the CPU, where the host knows them
        assert packed[3].lengths is None
        assert packed[3].max_seqlen == 9
    assert torch.equal(back[2], back[3])
    assert torch.equal(packed[2].cu_seqlens, packed[3].cu_seqlens)
    assert packed[3][2].shape == packed[2][2].shape
    assert fastssl.pack(x, on_gpu).lengths == packed[2].lengths


# ---- as a sequence of sequences --------------------------------------------------------------------------------


def unknown(packed):
    """The same where the host knows no lengths."""
    return PackedTokens(packed.values, packed.cu_seqlens, 100)


@pytest.mark.parametrize("known", [True, False])
def test_indexing(known):
    packed = fastssl.pack(mixed())
    expected = packed.values.split(LENGTHS)
    packed = packed if known else unknown(packed)
    for i, sequence in enumerate(expected):
        assert torch.equal(packed[i], sequence)
        assert torch.equal(packed[i - len(LENGTHS)], sequence)
        assert len(packed[i]) == 0 or packed[i].data_ptr() == sequence.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))
    for a, b in ((0, 3), (2, 8), (3, 3), (-4, None), (None, -9), (5, 2), (None, None)):
        part, wanted = packed[a:b], expected[a:b]
        assert len(part) == len(wanted)
        assert part.lengths == LENGTHS[a:b]
        assert part.max_seqlen == max(LENGTHS[a:b], default=0)
        assert part.cu_seqlens.tolist() == [0, *torch.tensor(LENGTHS[a:b]).cumsum(0).tolist()]
        assert all(torch.equal(x, y) for x, y in zip(part.unpack(), wanted, strict=True))
    with pytest.raises(IndexError, match="PackedTokens: an index must be one of 11 sequences, got 11"):
        packed[11]
    with pytest.raises(IndexError, match="got -12"):
        packed[-12]
    with pytest.raises(ValueError, match="PackedTokens: a slice must have a step of 1, got 2"):
        packed[::2]
    with pytest.raises(TypeError, match="PackedTokens: an index must be an int or a slice, got str"):
        packed["x"]


def test_to_another_dtype_and_device():
    x, keep = masked()
    packed = fastssl.pack(x, keep)
    for half in (packed.to(torch.bfloat16), packed.to(dtype=torch.bfloat16), packed.to("cpu", torch.bfloat16, True)):
        assert half.values.dtype == torch.bfloat16
        assert half.cu_seqlens.dtype == torch.int32
        assert half.kept.dtype == torch.int64
        assert half.lengths == packed.lengths
    away = packed.to("meta")
    assert {t.device.type for t in (away.values, away.cu_seqlens, away.kept)} == {"meta"}
    assert away.unpack().shape == x.shape
    assert fastssl.pack(mixed()).to("meta").unpack()[0].shape == (3, 7, 6)


# ---- gradients and tracing -------------------------------------------------------------------------------------


def test_gradients():
    tokens = mixed(dtype=torch.float64, grad=True)

    def there_and_back(*tokens):
        packed = fastssl.pack(list(tokens))
        return tuple(packed.replace(packed.values.sin()).unpack())

    assert torch.autograd.gradcheck(there_and_back, tokens)
    x, keep = masked(3, 4, 2, torch.float64)
    x.requires_grad_()

    def kept(x):
        packed = fastssl.pack(x, keep)
        return packed.values.sin(), packed.replace(packed.values.square()).unpack()

    assert torch.autograd.gradcheck(kept, x)
    assert torch.autograd.gradgradcheck(kept, x)
    (gradient,) = torch.autograd.grad(fastssl.pack(x, keep).values.sum(), x)
    assert torch.equal(gradient, keep[..., None].expand_as(x).double())
    assert torch.equal(torch.func.grad(lambda x: kept(x)[1].sum())(x.detach()), 2 * x.detach() * keep[..., None])
    hessian = torch.func.hessian(lambda x: fastssl.pack(x, keep).values.pow(3).sum())(x.detach())
    expected = 6 * (x.detach() * keep[..., None]).flatten()
    torch.testing.assert_close(hessian.reshape(x.numel(), x.numel()), torch.diag(expected))
    doubled = torch.vmap(lambda x: fastssl.pack(x, keep).values)(torch.stack((x, 2 * x)))
    assert torch.equal(doubled[1], 2 * doubled[0])


def test_it_is_a_pytree_a_dataclass_and_a_value():
    x, keep = masked()
    for packed in (fastssl.pack(x, keep), fastssl.pack(mixed()), fastssl.pack(x)):
        doubled = pytree.tree_map(lambda t: t * 2, packed)
        assert torch.equal(doubled.values, packed.values * 2)
        leaves, structure = pytree.tree_flatten(packed)
        assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == (3 if packed.kept is not None else 2)
        again = pytree.tree_unflatten(leaves, structure)
        for other in (again, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert other.lengths == packed.lengths
            assert torch.equal(other.values, packed.values)
            assert torch.equal(other[2], packed[2])
    keys = [str(path[0]) for path, _ in pytree.tree_flatten_with_path(fastssl.pack(x, keep))[0]]
    assert keys == [".values", ".cu_seqlens", ".kept"]
    from torch.nn.parallel.distributed import _find_tensors

    assert len(list(_find_tensors(fastssl.pack(x, keep)))) == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend):
    torch._dynamo.reset()

    def block(packed):
        return packed.replace(packed.values.sin() * packed.max_seqlen)

    compiled = torch.compile(block, fullgraph=True, backend=backend)
    x, keep = masked()
    for packed in (fastssl.pack(mixed()), fastssl.pack(mixed()[:2]), fastssl.pack(x), fastssl.pack(x, keep)):
        out, expected = compiled(packed), block(packed)
        assert isinstance(out, PackedTokens)
        torch.testing.assert_close(out.values, expected.values)
        assert out.lengths == packed.lengths
        torch.testing.assert_close(out.unpack(), expected.unpack())


def test_other_sequences_are_not_compiled_anew():
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: p.replace(p.values.sin() * p.max_seqlen), fullgraph=True, backend="eager")
    for make in (lambda n: fastssl.pack([torch.randn(n, 9, 4), torch.randn(n + 1, 4)]), lambda n: masked_pack(n)):
        for n in (2, 3):  # the second time with symbols for sizes
            compiled(make(n))
            compiled(make(n + 3))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n in (4, 5, 7):
                packed = make(n)
                out = compiled(packed)
                assert out.lengths == packed.lengths
                assert [len(x) for x in out] == [len(x) for x in packed]


def masked_pack(batch):
    return fastssl.pack(*masked(batch))


def test_packing_compiled_whole():
    torch._dynamo.reset()

    def there_and_back(a, b):
        packed = fastssl.pack([a, b])
        return packed.replace(packed.values.sin()).unpack()

    def kept(x, keep, count):
        packed = fastssl.pack(x, keep, count)
        return packed.values, packed.cu_seqlens, packed.replace(packed.values.sin()).unpack()

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for shapes in (((2, 3, 4), (5, 4)), ((3, 2, 4), (7, 4))):
        a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
        torch.testing.assert_close(compiled(a, b), there_and_back(a, b))
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    for batch in (4, 6):
        x, keep = masked(batch)
        x.requires_grad_()
        out, expected = (f(x, keep, int(keep.sum())) for f in (compiled, kept))
        torch.testing.assert_close(out, expected)
        got, wanted = (torch.autograd.grad(o[2].square().sum(), x)[0] for o in (out, expected))
        torch.testing.assert_close(got, wanted)


# ---- bad input -------------------------------------------------------------------------------------------------

X, KEEP = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
BAD = [
    (dict(tokens=3), TypeError, "tokens must be a Tensor or a list of them, got int"),
    (dict(tokens=[]), ValueError, "tokens must have at least one element, got an empty list"),
    (dict(tokens=[X, None]), TypeError, r"tokens\[1\] must be a Tensor, got NoneType"),
    (dict(tokens=[X, X.long()]), TypeError, r"tokens\[1\] must have dtype .*, got dtype int64"),
    (dict(tokens=[X, X.double()]), TypeError, r"tokens\[1\] must have dtype float32 of tokens\[0\], got dtype float64"),
    (dict(tokens=[X, X[..., 1:]]), ValueError, r"tokens\[1\] must have C = 4 of tokens\[0\], got \(2, 5, 3\)"),
    (dict(tokens=[X, X[0, 0]]), ValueError, r"tokens\[1\] must be \(N, C\) or \(B, N, C\), got \(4,\)"),
    (dict(tokens=[X, X.to("meta")]), ValueError, r"tokens\[1\] must be on the device of tokens\[0\] .cpu., got meta"),
    (dict(tokens=[X], keep=KEEP), ValueError, "keep must be None for a list of tokens, got Tensor"),
    (dict(tokens=[X], num_kept=3), ValueError, "num_kept must be None for a list of tokens, got int"),
    (dict(tokens=X[0]), ValueError, r"tokens must be \(B, N, C\) or a list, got \(5, 4\)"),
    (dict(tokens=X.int()), TypeError, "tokens must have dtype .*, got dtype int32"),
    (dict(tokens=X, num_kept=3), ValueError, "num_kept must be None where keep is, got 3"),
    (dict(tokens=X, keep=[True]), TypeError, "keep must be None or a Tensor, got list"),
    (dict(tokens=X, keep=KEEP.int()), TypeError, "keep must have dtype bool, got dtype int32"),
    (dict(tokens=X, keep=KEEP[:1]), ValueError, r"keep must be \(B, N\) = \(2, 5\) of tokens, got \(1, 5\)"),
    (dict(tokens=X, keep=KEEP.to("meta")), ValueError, "keep must be on the device of tokens .cpu., got meta"),
    (dict(tokens=X, keep=KEEP, num_kept=9), ValueError, "num_kept must be the 10 tokens that keep keeps, got 9"),
    (dict(tokens=X, keep=KEEP, num_kept=11), ValueError, "num_kept must be from 0 to B·N = 10, got 11"),
    (dict(tokens=X, keep=KEEP, num_kept=1.0), TypeError, "num_kept must be None or an int, got float"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(given, error, message):
    with pytest.raises(error, match=message) as caught:
        fastssl.pack(**given)
    assert str(caught.value).startswith("pack: ")
    assert "\n" not in str(caught.value)


def test_replace_refuses_another_number_of_tokens():
    packed = fastssl.pack(X)
    with pytest.raises(ValueError, match=r"PackedTokens.replace: values must be \(T, …\) with T = 10, got \(9, 4\)"):
        packed.replace(torch.randn(9, 4))
    with pytest.raises(TypeError, match=r"PackedTokens.replace: values must be a Tensor, got list"):
        packed.replace([1.0])
