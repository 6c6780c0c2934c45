"""Every path of the Triton kernels under Triton's interpreter, against float64, in float32 and float16.

bfloat16 is left to tests/test_triton_compile.py and to machines with a GPU: tl.dot of the interpreter multiplies its
raw bits. Where x and columns differ in dtype the product is float32, so there bfloat16 is tested too.
"""

import pytest
import torch
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.self_relation import self_relation as reference

pytestmark = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
KINDS = pytest.mark.parametrize("kind", ["pixel", "channel"])


def make(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def check(x, columns=None, *, upstream=None, tolerance=None, **kwargs):
    """Value and gradients of one call, which is returned."""
    out = fastssl.self_relation(x, columns=columns, backend="triton", **kwargs)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    x64, columns64 = doubles([x, columns])
    truth = reference(x64, columns=columns64, **kwargs)
    assert_close(out, truth, tolerance or FORWARD[x.dtype], "value")
    upstream = torch.randn_like(out) if upstream is None else upstream
    got = gradients(out, [x, columns], upstream)
    expected = gradients(truth, [x64, columns64], upstream.double())
    leaves = [t for t in (x, columns) if t is not None and t.requires_grad]
    for g, e, leaf in zip(got, expected, leaves, strict=True):
        assert g.dtype == leaf.dtype
        coarser = max(GRADIENT[leaf.dtype], GRADIENT[x.dtype])  # the relation that is saved has x's dtype
        assert_close(g, e, tolerance or coarser, "gradient")
    return out


# ---- values and gradients --------------------------------------------------------------------------------------


@DTYPES
@KINDS
@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize(("batch", "width", "heads"), [(2, 33, 1), (2, 33, 3), (1, 96, 6)])
def test_lengths_and_heads(dtype, kind, length, batch, width, heads):
    check(make(batch, length, width, dtype=dtype), kind=kind, num_heads=heads)


@DTYPES
@KINDS
@pytest.mark.parametrize(("length", "width", "heads"), [(197, 33, 1), (196, 64, 1), (300, 32, 1), (24, 192, 1)])
def test_larger(dtype, kind, length, width, heads):
    # A temperature that leaves rows unsaturated: half-precision gradients of one-hot rows are rounding alone.
    temp = (width / heads) ** 0.5 if kind == "pixel" else 1.0
    check(make(1, length, width, dtype=dtype), kind=kind, num_heads=heads, temp=temp)


def test_gradients_of_saturated_rows():
    """All but 1e-7 of each row lies in one element; without the shift by g the gradient would be 10 % off."""
    check(make(2, 37, 384))


def columns_per_tiles():
    """For each width of a row in registers, a number of columns that does not fill it; then one too many for any."""
    if kernels.why_not("cpu") is not None:
        return []
    from fastssl.kernels.self_relation import ROWS

    return [sum(tiles) - 3 for tiles in ROWS] + [513]


@DTYPES
@pytest.mark.parametrize("width", [32, 33], ids=["vectors", "no-vectors"])
@pytest.mark.parametrize("columns", columns_per_tiles())
def test_every_tile_of_columns(dtype, width, columns):
    check(make(1, 9, width, dtype=dtype), make(1, columns, width, dtype=dtype).detach())


@DTYPES
@pytest.mark.parametrize("columns", [32, 52])
@pytest.mark.parametrize("width", [16, 64, 100, 130, 300])
def test_depths(dtype, width, columns):
    """One block of depth, several, and what is left over; rows of the relation that are and are not vectors."""
    check(make(1, 16, width, dtype=dtype), make(1, columns, width, dtype=dtype))


@DTYPES
@KINDS
@pytest.mark.parametrize("given", [False, True], ids=["symmetric", "columns"])
def test_normalize(dtype, kind, given):
    others = 37 if kind == "channel" else 50
    columns = make(1, others, 66, dtype=dtype) if given else None
    check(make(1, 37, 66, dtype=dtype), columns, kind=kind, num_heads=3, normalize=True, scale=5.0)


@KINDS
def test_zero_rows_stay_zero(kind):
    with torch.no_grad():
        x = torch.randn(2, 20, 18)
        x[0, 3], x[1, :, 5] = 0, 0
    check(x.requires_grad_(), kind=kind, normalize=True)
    out = fastssl.self_relation(x, kind=kind, normalize=True, backend="triton")
    grad = gradients(out, [x], torch.randn_like(out))[0]
    alone = grad[0, 3] if kind == "pixel" else grad[1, :, 5]
    assert torch.equal(alone, torch.zeros_like(alone))


@KINDS
@pytest.mark.parametrize("dtypes", ["float32 float16", "float16 float32", "float32 bfloat16", "bfloat16 float32"])
@pytest.mark.parametrize("normalize", [False, True])
def test_mixed_dtypes(kind, dtypes, normalize):
    mine, other = (getattr(torch, name) for name in dtypes.split())
    x, columns = make(1, 21, 34, dtype=mine), make(1, 21, 34, dtype=other)
    check(x, columns, kind=kind, num_heads=2, normalize=normalize)


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("columns", [40, 520], ids=["registers", "streamed"])
def test_logits_of_ten_thousand_stay_finite(scale, columns):
    x, others = make(1, 20, 24), make(1, columns, 24)
    out = fastssl.self_relation(x, columns=others, normalize=True, scale=scale, backend="triton")
    # float32 keeps such logits to ±1e-3, which becomes the relative error of each share.
    assert_close(out, reference(x.double(), columns=others.double(), normalize=True, scale=scale), 1e-2)
    for grad in gradients(out, [x, others], torch.randn_like(out)):
        assert torch.isfinite(grad).all()


def test_scale_and_temperature():
    check(make(2, 20, 16), scale=-0.4, temp=0.2)


# ---- strides ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "map": lambda: torch.randn(2, 24, 3, 5),
    "even map": lambda: torch.randn(2, 32, 4, 4),
    "channels last": lambda: torch.randn(2, 24, 3, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 24, 15).transpose(1, 2),
    "batch second": lambda: torch.randn(15, 2, 24).transpose(0, 1),
    "sliced": lambda: torch.randn(3, 17, 50)[1:, 1:, 7:31],
    "expanded": lambda: torch.randn(1, 15, 24).expand(2, -1, -1),
    "strided": lambda: torch.randn(2, 30, 48)[:, ::2, ::2],
}


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", [False, True])
def test_any_strides(kind, layout, normalize):
    check(LAYOUTS[layout]().requires_grad_(), kind=kind, num_heads=2, normalize=normalize)


@pytest.mark.parametrize("layout", ["map", "batch second"])
@pytest.mark.parametrize("normalize", [False, True])
def test_strides_too_long_for_offsets_of_32_bits(monkeypatch, layout, normalize):
    """Such tokens are copied, and so are gradients on their way back; here every stride above 14 is too long."""
    from fastssl.kernels import common, self_relation_backward

    monkeypatch.setattr(common, "LONGEST_STRIDE", 14)
    monkeypatch.setattr(self_relation_backward, "LONGEST_STRIDE", 14)
    upstream = torch.randn(2, 2, 15, 15).transpose(2, 3)
    check(LAYOUTS[layout]().requires_grad_(), num_heads=2, normalize=normalize, upstream=upstream)


UPSTREAMS = {
    "contiguous": lambda *size: torch.randn(size),
    "from a scalar": lambda *size: torch.tensor(0.7).expand(size),
    "one per row": lambda *size: torch.randn(*size[:3], 1).expand(size),
    "one per column": lambda *size: torch.randn(size[-1]).expand(size),
    "transposed": lambda *size: torch.randn(*size[:2], size[3], size[2]).transpose(2, 3),
    "sliced": lambda *size: torch.randn(*size[:3], size[3] + 3)[..., 1:-2],
    "strided": lambda *size: torch.randn(*size[:3], 2 * size[3])[..., ::2],
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("length", [11, 12, 16], ids=["11-odd", "12-by-4", "16-by-16"])
@pytest.mark.parametrize("given", [False, True], ids=["symmetric", "columns"])
def test_upstream_gradients_of_any_strides(upstream, length, given):
    columns = make(2, length, 32) if given else None
    size = (2, 2, length, length)
    # Constant rows have no gradient at all: what is left is rounding, measured against the size of the terms.
    tolerance = 1e-5 if upstream in ("from a scalar", "one per row") else None
    check(make(2, length, 32), columns, num_heads=2, upstream=UPSTREAMS[upstream](*size), tolerance=tolerance)


# ---- sizes of nothing, and what is asked for ------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("normalize", [False, True])
def test_empty_batch(kind, normalize):
    x = make(0, 7, 6)
    out = check(x, kind=kind, normalize=normalize)
    assert out.numel() == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_no_tokens(normalize):
    assert check(make(2, 0, 6), normalize=normalize).shape == (2, 1, 0, 0)
    assert check(make(2, 0, 6), make(2, 5, 6), normalize=normalize).shape == (2, 1, 0, 5)
    uniform = check(make(2, 0, 6), kind="channel", normalize=normalize)
    torch.testing.assert_close(uniform, torch.full((2, 1, 6, 6), 1 / 6))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
@pytest.mark.parametrize("normalize", [0, 1])
def test_only_wanted_gradients_are_computed(wanted, normalize):
    x, columns, grad = torch.randn(1, 9, 6), torch.randn(1, 5, 6).half(), torch.randn(1, 1, 9, 5)
    arguments = (x, columns, 0, 1, 0.5, normalize, 0)
    relation = torch.ops.fastssl.self_relation_forward_triton(*arguments)
    run = torch.ops.fastssl.self_relation_backward_triton
    everything, parts = run(grad, relation, *arguments, 3), run(grad, relation, *arguments, wanted)
    for bit, tokens in ((0, x), (1, columns)):
        assert parts[bit].dtype == tokens.dtype
        assert torch.equal(parts[bit], everything[bit]) if wanted >> bit & 1 else parts[bit].shape == (0,)


def test_leaves_its_inputs_alone():
    x, columns, grad = make(1, 9, 6), make(1, 5, 6), torch.randn(1, 1, 9, 5)
    before = [t.detach().clone() for t in (x, columns, grad)]
    check(x, columns, upstream=grad, normalize=True)
    assert all(torch.equal(b, t) for b, t in zip(before, (x, columns, grad), strict=True))


# ---- the tables ------------------------------------------------------------------------------------------------


def test_tiles_fit_their_columns():
    from fastssl.kernels.self_relation import column_tiles

    assert column_tiles(197) == column_tiles(196) == (128, 64, 16)
    assert column_tiles(37) == (32, 16, 0)
    assert column_tiles(513) is None
    waste = {columns: sum(column_tiles(columns)) / columns for columns in range(1, 513)}
    assert min(waste.values()) == 1
    assert max(w for columns, w in waste.items() if columns >= 37) < 1.32


@pytest.mark.parametrize("exact", [False, True], ids=["16-bit", "float32"])
@pytest.mark.parametrize("smooth", [False, True], ids=["no-vectors", "vectors"])
def test_every_block_size_is_compiled_by_the_proofs(exact, smooth):
    """That is, whatever the tables choose is among the configurations."""
    from fastssl.kernels import self_relation, self_relation_backward

    def key(choice):
        return (choice.kernel.__name__, *sorted(choice.constexprs.items()), choice.num_warps, choice.num_stages)

    # The dtype is no constexpr: float32 configurations and others would look alike but for their descriptions.
    modules = (self_relation, self_relation_backward)
    compiled = {key(c) for m in modules for c in m.configurations() if ("fp32" in c.description) == exact}
    for size in range(1, 800):
        assert key(self_relation.forward_choice(size, exact, smooth, 1)) in compiled
        for direct, transposed in ((True, False), (False, True), (True, True)):
            choice = self_relation_backward.product_choice(size, direct, transposed, exact, smooth, 1)
            assert key(choice) in compiled
