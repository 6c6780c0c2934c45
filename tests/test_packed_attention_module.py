"""fastssl.nn.PackedAttention against the attention of timm's ViTs written out in plain PyTorch."""

import copy
import pickle

import pytest
import torch
from attentions import needs_library
from compare import assert_close
from tolerances import FORWARD, GRADIENT
from torch import nn

import fastssl
from fastssl import PackedTokens
from fastssl.nn import PackedAttention

DIM, HEADS = 24, 3


class Plain(nn.Module):
    """timm's and DINO's."""

    def __init__(self, dim=DIM, num_heads=HEADS, qkv_bias=True, proj_bias=True, scale=None):
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def attention(self, x, mask=None):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        logits = qkv[0] @ qkv[1].transpose(-2, -1) * self.scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
        return logits.softmax(-1), qkv[2]

    def forward(self, x, mask=None):
        attention, v = self.attention(x, mask)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


def pair(**kwargs):
    """Ours, and the plain one in float64 with the same parameters."""
    mine = PackedAttention(DIM, HEADS, **kwargs)
    for bias in (mine.qkv.bias, mine.proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    plain = Plain(**kwargs).double()
    plain.load_state_dict(mine.state_dict())
    return mine, plain


def compare(mine, plain, run_mine, run_plain, x):
    """Values and the gradients of x and of all parameters."""
    mine_x, plain_x = x.clone().requires_grad_(), x.double().requires_grad_()
    out, truth = run_mine(mine, mine_x), run_plain(plain, plain_x)
    assert_close(out, truth, FORWARD[torch.float32], "out")
    upstream = torch.randn(out.shape)
    got = torch.autograd.grad(out, [mine_x, *mine.parameters()], upstream)
    expected = torch.autograd.grad(truth, [plain_x, *plain.parameters()], upstream.double())
    for name, a, b in zip(["x", *dict(mine.named_parameters())], got, expected, strict=True):
        assert_close(a, b, GRADIENT[torch.float32], f"gradient of {name}")
    return out


def keep_some(batch=4, length=17):
    keep = torch.rand(batch, length) < 0.6
    keep[:, 0] = True
    return keep


BIASES = pytest.mark.parametrize(("qkv_bias", "proj_bias"), [(True, True), (False, True), (True, False)])
BACKEND = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_library)])


@BACKEND
@BIASES
@pytest.mark.parametrize("scale", [None, 0.3])
def test_dense(backend, qkv_bias, proj_bias, scale):
    mine, plain = pair(qkv_bias=qkv_bias, proj_bias=proj_bias, scale=scale)
    with fastssl.use_backend(backend):
        compare(mine, plain, lambda m, x: m(x), lambda m, x: m(x), torch.randn(4, 17, DIM))


@BACKEND
@BIASES
def test_masked(backend, qkv_bias, proj_bias):
    mine, plain = pair(qkv_bias=qkv_bias, proj_bias=proj_bias)
    keep = keep_some()
    with fastssl.use_backend(backend):
        out = compare(
            mine,
            plain,
            lambda m, x: m(x, keep=keep),
            lambda m, x: m(x, keep) * keep[..., None],
            torch.randn(4, 17, DIM),
        )
        assert not out[~keep].any()
        keep[2] = False
        x = torch.randn(4, 17, DIM, requires_grad=True)
        out = mine(x, keep=keep)
    assert not out[2].any()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert not gradient[~keep].any()


@BACKEND
def test_packed(backend):
    mine, plain = pair()
    shapes = [(3, 17), (5, 6), (0, 4), (9,)]
    sizes = [n for shape in shapes for n in [shape[-1]] * (shape[0] if len(shape) == 2 else 1)]

    def run_mine(m, x):
        parts = x.split([shape[0] * shape[-1] if len(shape) == 2 else shape[0] for shape in shapes])
        packed = fastssl.pack([p.view(*shape, DIM) for p, shape in zip(parts, shapes, strict=True)])
        out = m(packed)
        assert isinstance(out, PackedTokens)
        assert [o.shape[:-1] for o in out.unpack()] == shapes
        return out.values

    def run_plain(m, x):
        return torch.cat([m(part[None])[0] for part in x.split(sizes)])

    with fastssl.use_backend(backend):
        compare(mine, plain, run_mine, run_plain, torch.randn(sum(sizes), DIM))


@BACKEND
def test_dense_masked_and_packed_agree(backend):
    attention, x, keep = PackedAttention(DIM, HEADS), torch.randn(4, 17, DIM), keep_some()
    with fastssl.use_backend(backend):
        dense = attention(x)
        torch.testing.assert_close(attention(x, keep=torch.ones(4, 17, dtype=torch.bool)), dense)
        torch.testing.assert_close(attention(fastssl.pack(x)).unpack(), dense)
        masked = attention(x, keep=keep)
        torch.testing.assert_close(attention(fastssl.pack(x, keep)).unpack(), masked)
        torch.testing.assert_close(attention(fastssl.pack(x, keep, int(keep.sum()))).unpack(), masked)
        empty = attention(fastssl.pack(x[:, :0]))
        assert empty.unpack().shape == (4, 0, DIM)
        assert attention(x[:0]).shape == (0, 17, DIM)


@needs_library
@pytest.mark.parametrize("kind", ["dense", "masked", "packed"])
def test_the_gradient_of_the_projection_is_the_kernels_own(kind, monkeypatch):
    """No buffers of zeros, no sum, no copy."""
    made = []
    op = f"{'packed' if kind == 'packed' else 'masked'}_attention_backward"
    real = getattr(torch.ops.fastssl, op)

    def spy(*call):
        made.append(real(*call))
        return made[-1]

    monkeypatch.setattr(torch.ops.fastssl, op, spy)
    attention, x = PackedAttention(DIM, HEADS), torch.randn(4, 17, DIM)
    seen = []
    attention.qkv.register_forward_hook(lambda _, args, out: out.register_hook(seen.append) and None)
    if kind == "packed":
        out = attention(fastssl.pack(x)).values
    else:
        out = attention(x, keep=keep_some() if kind == "masked" else None)
    out.square().sum().backward()
    assert seen[0].data_ptr() == made[0].data_ptr()
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    attention, x = PackedAttention(DIM, HEADS, dtype=dtype), torch.randn(2, 9, DIM).to(dtype)
    plain = Plain().double()
    plain.load_state_dict(attention.state_dict())
    assert_close(attention(x), plain(x.double()), FORWARD[dtype])
    assert_close(attention(fastssl.pack(x)).unpack(), plain(x.double()), FORWARD[dtype])


def test_under_autocast():
    attention, x, keep = PackedAttention(DIM, HEADS), torch.randn(2, 9, DIM), keep_some(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        outs = attention(x), attention(x, keep=keep), attention(fastssl.pack(x)).values
        rows = attention.attention_rows(x, [0], keep)
    for out in (*outs, rows):
        assert out.dtype == torch.bfloat16
    assert_close(outs[0], attention(x), FORWARD[torch.bfloat16])
    sum(out.float().square().sum() for out in outs).backward()
    assert attention.qkv.weight.grad.dtype == torch.float32


# ---- rows of the attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [[0], [0, 3, -1], (), torch.tensor([5, 0])])
def test_attention_rows(queries):
    mine, plain = pair()
    x, keep = torch.randn(4, 17, DIM), keep_some()
    keep[2] = False
    keep[1, 3] = False
    index = list(queries)
    full = plain.attention(x.double())[0][:, :, index]
    rows = mine.attention_rows(x, queries)
    assert rows.shape == (4, HEADS, len(index), 17)
    assert_close(rows, full, FORWARD[torch.float32])
    masked = plain.attention(x.double(), keep)[0] * keep[:, None, :, None]
    masked[2] = 0
    assert_close(mine.attention_rows(x, queries, keep), masked[:, :, index], FORWARD[torch.float32])


def test_attention_rows_of_packed_tokens():
    mine, plain = pair(qkv_bias=False)
    tokens = [torch.randn(3, 17, DIM), torch.randn(6, DIM), torch.randn(2, 6, DIM), torch.randn(0, 3, DIM)]
    packed = fastssl.pack(tokens)
    rows = mine.attention_rows(packed, [0, -1])
    assert len(rows) == len(packed)
    for got, sequence in zip(rows, packed, strict=True):
        assert_close(got, plain.attention(sequence[None].double())[0][0][:, [0, -1]], FORWARD[torch.float32])
    x, keep = torch.randn(4, 9, DIM), keep_some(4, 9)
    rows, full = mine.attention_rows(fastssl.pack(x, keep), [0]), mine.attention_rows(x, [0], keep)
    for i, got in enumerate(rows):
        torch.testing.assert_close(got, full[i][..., keep[i]])


def test_attention_rows_have_gradients_and_no_square():
    import memory

    attention, x = PackedAttention(DIM, HEADS), torch.randn(1, 400, DIM, requires_grad=True)
    rows = attention.attention_rows(x, [0])
    gradient, weight = torch.autograd.grad(rows.square().sum(), [x, attention.qkv.weight])
    assert gradient[0].any(1).all()
    assert not weight[2 * DIM :].any()

    class Step:
        prepare = staticmethod(lambda: None)
        run = staticmethod(lambda _: attention.attention_rows(x.detach(), [0]))

    Step.run(None)
    assert memory.extra_bytes(Step, "cpu") < 400 * 400


# ---- as a module -----------------------------------------------------------------------------------------------


def test_state_dicts_of_timm_and_dino():
    for options in (dict(), dict(qkv_bias=False), dict(proj_bias=False)):
        mine, plain = PackedAttention(DIM, HEADS, **options), Plain(**options)
        assert list(mine.state_dict()) == list(plain.state_dict())
        mine.load_state_dict(plain.state_dict())
        plain.load_state_dict(mine.state_dict())
        x = torch.randn(2, 5, DIM)
        torch.testing.assert_close(mine(x), plain(x))


def test_copies_pickles_and_shows():
    attention, x = PackedAttention(DIM, HEADS), torch.randn(2, 5, DIM)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(x), attention(x))
        assert other.qkv.weight is not attention.qkv.weight
    assert "num_heads=3, scale=0.3536" in repr(attention)
    assert PackedAttention(16).num_heads == 8
    assert PackedAttention(16, device="meta", dtype=torch.float16).qkv.weight.dtype == torch.float16


CALLS = {
    "dense": lambda m, x, keep: m(x),
    "masked": lambda m, x, keep: m(x, keep=keep),
    "packed": lambda m, x, keep: m(fastssl.pack([x, x[0]])).values,
    "packed mask": lambda m, x, keep: m(fastssl.pack(x, keep)).unpack(),
    "rows": lambda m, x, keep: m.attention_rows(x, (0,), keep),
    "packed rows": lambda m, x, keep: torch.cat(m.attention_rows(fastssl.pack([x, x[:, 1:]]), [0, 2]), -1),
}


@needs_library
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(kind, backend):
    torch._dynamo.reset()
    attention = PackedAttention(DIM, HEADS)
    compiled = copy.copy(attention)
    compiled.forward = torch.compile(attention.forward, fullgraph=True, backend=backend)
    compiled.attention_rows = torch.compile(attention.attention_rows, fullgraph=True, backend=backend)
    for batch, length in ((2, 9), (3, 9), (3, 12)) if backend == "aot_eager" else ((2, 9),):
        x, keep = torch.randn(batch, length, DIM, requires_grad=True), keep_some(batch, length)
        results = []
        for module in (attention, compiled):
            out = CALLS[kind](module, x, keep)
            wanted = [x, attention.qkv.weight, attention.qkv.bias]
            results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("mask", [False, True])
def test_lengths_that_change_from_batch_to_batch_are_not_compiled_anew(mask):
    torch._dynamo.reset()
    compiled = torch.compile(PackedAttention(DIM, HEADS), fullgraph=True, backend="eager")

    def make(n):
        x = torch.randn(3, n, DIM)
        return fastssl.pack(x, keep_some(3, n)) if mask else fastssl.pack([x, x[0, 1:]])

    for n in (9, 12):
        compiled(make(n))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(13, 30):
            assert compiled(make(n)).values.isfinite().all()


@needs_library
def test_exported():
    attention, packed = PackedAttention(DIM, HEADS), fastssl.pack(torch.randn(3, 9, DIM), keep_some(3, 9))
    program = torch.export.export(attention, (packed,))
    torch.testing.assert_close(program.module()(packed).values, attention(packed).values)


class Adapted(nn.Module):
    """A linear layer with something of low rank beside it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down = linear, nn.Linear(linear.in_features, 2)
        self.up = nn.Linear(2, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_attention_rows_of_an_adapted_projection():
    attention, x = PackedAttention(DIM, HEADS), torch.randn(2, 9, DIM)
    attention.qkv = Adapted(attention.qkv)
    q, k, _ = attention.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    expected = (attention.scale * q @ k.mT).softmax(-1)[:, :, [0, 4]]
    torch.testing.assert_close(attention.attention_rows(x, [0, 4]), expected)


def test_attention_rows_under_autocast_have_logits_of_float32():
    attention, x = PackedAttention(DIM, HEADS), torch.randn(2, 9, DIM) * 600
    with torch.autocast("cpu", torch.float16):
        rows = attention.attention_rows(x, [0])
        q, k, _ = attention.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    logits = attention.scale * q.float() @ k.float().mT
    assert logits.abs().max() > 65504
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows, logits.softmax(-1)[:, :, :1].half())


X, KEEP = torch.randn(2, 5, DIM), torch.ones(2, 5, dtype=torch.bool)
PACKED = fastssl.pack(X)
BAD_CALLS = [
    (dict(x=[1.0]), TypeError, "x must be a Tensor or PackedTokens, got list"),
    (dict(x=X.long()), TypeError, "x must have dtype .*, got dtype int64"),
    (dict(x=X[0]), ValueError, r"x must be \(B, N, C\) with C = 24, got \(5, 24\)"),
    (dict(x=X[..., 1:]), ValueError, r"x must be \(B, N, C\) with C = 24, got \(2, 5, 23\)"),
    (dict(x=X, keep=[True]), TypeError, "keep must be None or a Tensor of dtype bool, got list"),
    (dict(x=X, keep=KEEP.int()), TypeError, "keep must be None or a Tensor of dtype bool, got dtype int32"),
    (dict(x=X, keep=KEEP[:, 1:]), ValueError, r"keep must be \(B, N\) = \(2, 5\) of x, got \(2, 4\)"),
    (dict(x=X, keep=KEEP.to("meta")), ValueError, "keep must be on the device of x .cpu., got meta"),
    (
        dict(x=X, keep=KEEP.to_sparse()),
        ValueError,
        r"keep must be a dense \(strided\) tensor, got layout torch.sparse_coo",
    ),
    (dict(x=PACKED, keep=KEEP), ValueError, "keep must be None for PackedTokens, got Tensor"),
    (dict(x=PACKED.replace(X[0, :, 0].repeat(2))), ValueError, r"x.values must be \(T, C\) with C = 24, got \(10,\)"),
]
BAD_ROWS = [
    (dict(queries=[5]), ValueError, "queries must be tokens of 5, got 5"),
    (dict(queries=[0, -6]), ValueError, "queries must be tokens of 5, got -6"),
    (dict(queries=torch.tensor([7])), ValueError, "queries must be tokens of 5, got 7"),
    (dict(queries=torch.tensor([0]).to("meta")), ValueError, "queries must be on the device of x .cpu., got meta"),
    (dict(queries=0), TypeError, r"queries must be ints or a \(k,\) int64 tensor, got 0"),
    (dict(queries=[0.5]), TypeError, r"queries must be ints or a \(k,\) int64 tensor, got \[0.5\]"),
    (dict(queries=torch.tensor(0)), ValueError, r"queries must be ints or .*, got \(\) of dtype int64"),
    (dict(queries=KEEP[0]), ValueError, r"queries must be ints or .*, got \(5,\) of dtype bool"),
    (dict(x=fastssl.pack([X, X[0, :0]]), queries=[0]), ValueError, "queries must be tokens of 0, got 0"),
]
BAD_MODULES = [
    (dict(dim=0), ValueError, "dim must be an int of at least 1, got 0"),
    (dict(dim=10), ValueError, "num_heads must divide dim = 10, got 8"),
    (dict(dim=8, num_heads=2.0), TypeError, "num_heads must be an int of at least 1, got float"),
    (dict(dim=8, qkv_bias=1), TypeError, "qkv_bias must be True or False, got int"),
    (dict(dim=8, proj_bias=None), TypeError, "proj_bias must be True or False, got NoneType"),
    (dict(dim=8, scale="x"), TypeError, "scale must be a finite number, got str"),
]
BAD = [
    *((lambda given: PackedAttention(DIM, HEADS)(**given), *case) for case in BAD_CALLS),
    *((lambda given: PackedAttention(DIM, HEADS).attention_rows(**({"x": X} | given)), *case) for case in BAD_ROWS),
    *((lambda given: PackedAttention(**given), *case) for case in BAD_MODULES),
]


@pytest.mark.parametrize(("call", "given", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input_is_one_sentence(call, given, error, message):
    with pytest.raises(error, match=f"^PackedAttention: {message}") as caught:
        call(given)
    assert "\n" not in str(caught.value)
