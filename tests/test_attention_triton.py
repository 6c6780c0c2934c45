"""masked_attention's and packed_attention's Triton kernels under the interpreter, in float32 and float16.

Against float64; bfloat16 is left to tests/test_triton_compile.py and to machines with a GPU, see
tests/test_triton_interpreter.py.
"""

import pytest
import torch
from attention_triton import check_masked, check_packed, launched, masked, packed, run, starts
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.masked_attention import masked_attention as masked_reference
from fastssl.reference.packed_attention import packed_attention as packed_reference

pytestmark = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


# ---- packed sequences ------------------------------------------------------------------------------------------


@DTYPES
def test_lengths(dtype, monkeypatch):
    """With larger tiles of float32 than a GPU has registers for: with its own, these would be 10^4 of them."""
    from fastssl.kernels import packed_attention, packed_attention_backward

    for table in (packed_attention.ROWS, packed_attention_backward.QUERIES, packed_attention_backward.KEYS):
        monkeypatch.setitem(table, ("exact", 32), (128, 32, 128, 16, 4, 1))
    lengths = (0, 1, 37, 197, 0, 300, 1100, 16)
    check_packed(packed(sum(lengths), 1, 16, dtype), starts(*lengths), max_seqlen=1100)


@DTYPES
@pytest.mark.parametrize("depth", [16, 40, 64, 128])
@pytest.mark.parametrize("heads", [1, 6])
def test_widths_and_heads(dtype, depth, heads):
    lengths = (37, 0, 70, 1) if heads == 1 else (17, 0, 3)
    check_packed(packed(sum(lengths), heads, depth, dtype), starts(*lengths))


@pytest.mark.parametrize("length", [1, 16, 17, 32, 48, 64, 65, 80, 96, 97, 112, 128, 129, 197])
def test_whole_tiles_and_what_is_left_over(length):
    check_packed(packed(length, 1, 24, torch.float16), starts(length), max_seqlen=length)
    check_packed(packed(length + 200, 1, 24, torch.float16), starts(length, 200))


@DTYPES
@pytest.mark.parametrize("hint", [0, 1, 40, 70, 10**9])
def test_the_hint_may_be_wrong(dtype, hint):
    """It decides how many programs there are, and their tiles; each takes as many blocks as are left to it."""
    cu_seqlens, leaves = starts(3, 100, 20).int(), packed(123, 2, 16, dtype)
    out, lse = run("packed_attention_forward", *leaves, cu_seqlens, hint, 0.3)
    upstream = torch.randn_like(out)
    result = run("packed_attention_backward", upstream, out, lse, *leaves, cu_seqlens, hint, 0.3)
    exact = doubles(leaves)
    truth = packed_reference(*exact, cu_seqlens, scale=0.3)
    assert_close(out, truth, FORWARD[dtype])
    for got, expected in zip(result.unbind(1), gradients(truth, exact, upstream.double()), strict=True):
        assert_close(got, expected, GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "numbers", [(-7, 40, 20, 10**6), (-(2**31), 2**31 - 1), (45, 60, 50), (0, 50, 0, 50), (5, -(2**31), 50)]
)
def test_nothing_outside_is_touched_wherever_sequences_are_said_to_begin(dtype, numbers):
    around = torch.full((70, 3, 2, 16), float("nan"), dtype=dtype)
    around[10:60] = torch.randn(50, 3, 2, 16)
    leaves, cu_seqlens = around[10:60].unbind(1), torch.tensor(numbers, dtype=torch.int32)
    out, lse = run("packed_attention_forward", *leaves, cu_seqlens, 0, 0.3)
    out, lse = out.nan_to_num(), lse.nan_to_num()  # of rows in no sequence
    result = run("packed_attention_backward", torch.ones_like(out), out, lse, *leaves, cu_seqlens, 0, 0.3)
    first = min(max(numbers[0], 0), 50)
    assert result[first:].isfinite().all()


def test_cu_seqlens_of_any_stride():
    cu_seqlens = torch.stack([starts(20, 30), torch.full((3,), 99)], 1)[:, 0]
    check_packed(packed(50, 1, 16), cu_seqlens)


# ---- masked images ---------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("length", "heads", "depth"), [(37, 6, 16), (70, 1, 64), (40, 1, 128), (197, 1, 16)])
def test_kept_tokens(dtype, length, heads, depth):
    leaves = masked(4, length, heads, depth, dtype)
    keep = torch.rand(4, length) < torch.tensor([0.0, 0.25, 1.0, 0.7])[:, None]
    # What a dropped token holds counts for nothing.
    for x in leaves:
        x.data.transpose(1, 2)[~keep] = float("nan")
    out = fastssl.masked_attention(*leaves, keep, backend="triton")
    exact = [torch.where(keep[:, None, :, None], x, 0.0).detach().requires_grad_() for x in doubles(leaves)]
    upstream = torch.randn_like(out)
    upstream.transpose(1, 2)[~keep] = float("nan")
    got = gradients(out, leaves, upstream)
    truth = masked_reference(*exact, keep)
    expected = gradients(truth, exact, upstream.nan_to_num().double())
    assert_close(out, truth, FORWARD[dtype])
    for g, e in zip(got, expected, strict=True):
        assert_close(g, e, GRADIENT[dtype])
        assert not g.transpose(1, 2)[~keep].any()
    assert not out.transpose(1, 2)[~keep].any()


@DTYPES
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("length", [30, 100])
def test_keep_ratios(dtype, ratio, length):
    keep = None if ratio is None else torch.rand(2, length) < ratio
    check_masked(masked(2, length, 2, 32, dtype), keep)


@DTYPES
def test_all_kept_is_the_same_as_no_mask(dtype):
    leaves = masked(2, 50, 2, 32, dtype)
    upstream = torch.randn(2, 2, 50, 32, dtype=dtype)
    outs = [fastssl.masked_attention(*leaves, keep, backend="triton") for keep in (None, torch.ones(2, 50).bool())]
    assert torch.equal(*outs)
    for one, two in zip(*(gradients(out, leaves, upstream) for out in outs), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 37, 256, 257, 1024, 2100])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_the_index_of_kept_rows(rows, ratio):
    from fastssl.kernels.masked_attention import sequences_of

    keep = ratio > torch.rand(3, 2, rows).transpose(0, 2)[:, 1].T
    sequences = sequences_of(keep, 3, rows)
    assert torch.equal(sequences.lengths, keep.sum(1, dtype=torch.int32))
    for row, order in zip(keep, sequences.order, strict=True):
        assert torch.equal(order.long(), torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0]]))


def test_the_logarithm_of_sums_is_natural_and_zero_for_dropped_tokens():
    q, k, v = (x.detach() for x in masked(2, 40, 2, 16))
    keep = torch.rand(2, 40) < torch.tensor([0.6, 0.0])[:, None]
    _, lse = run("masked_attention_forward", q, k, v, keep, 0.5)
    logits = (0.5 * q @ k.mT).masked_fill(~keep[:, None, None, :], -torch.inf)
    torch.testing.assert_close(lse, torch.where(keep[:, None], logits.logsumexp(-1), 0.0))


# ---- strides ---------------------------------------------------------------------------------------------------

LAYOUTS = {
    "qkv": lambda: torch.randn(2, 40, 3, 2, 24).permute(2, 0, 3, 1, 4)[1],
    "heads first": lambda: torch.randn(2, 2, 40, 24),
    "without the class token": lambda: torch.randn(2, 41, 3, 2, 24).permute(2, 0, 3, 1, 4)[2, :, :, 1:],
    "every other token": lambda: torch.randn(2, 2, 80, 24)[:, :, ::2],
    "one for all images": lambda: torch.randn(1, 2, 40, 24).expand(2, -1, -1, -1),
    "channels before tokens": lambda: torch.randn(2, 2, 24, 40).mT,
    "every other channel": lambda: torch.randn(2, 2, 40, 48)[..., ::2],
    "odd rows": lambda: torch.randn(2, 2, 40, 27)[..., :24],
    "odd beginning": lambda: torch.randn(2 * 2 * 40 * 24 + 1)[1:].view(2, 2, 40, 24),
}
READ_IN_PLACE = ("qkv", "heads first", "without the class token", "every other token", "one for all images")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    from fastssl.kernels._attention import Rows

    leaves = [LAYOUTS[name]() for name in (layout, "qkv", layout)]
    assert (Rows.of(leaves[0]).tensor.data_ptr() == leaves[0].data_ptr()) == (layout in READ_IN_PLACE)
    check_masked([x.half().requires_grad_() for x in leaves], torch.rand(2, 40) < 0.7)
    for leaf in leaves:
        leaf.requires_grad_()
    check_masked(leaves, torch.rand(2, 40) < 0.7)


UPSTREAMS = {
    "as out lies": lambda: torch.randn(2, 40, 2, 24).transpose(1, 2),
    "contiguous": lambda: torch.randn(2, 2, 40, 24),
    "from a scalar": lambda: torch.tensor(0.7).expand(2, 2, 40, 24),
    "one per token": lambda: torch.randn(2, 1, 40, 1).expand(2, 2, 40, 24),
    "one per channel": lambda: torch.randn(24).expand(2, 2, 40, 24),
    "one for all images": lambda: torch.randn(2, 40, 24).expand(2, 2, 40, 24),
    "sliced": lambda: torch.randn(2, 2, 40, 29)[..., 2:26],
}


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("keep", [False, True])
def test_upstream_gradients_of_any_strides(upstream, keep):
    mask = torch.rand(2, 40) < 0.7 if keep else None
    for dtype in (torch.float32, torch.float16):
        check_masked(masked(2, 40, 2, 24, dtype), mask, upstream=UPSTREAMS[upstream]().to(dtype))
    sum_of_heads = torch.tensor(1.3).expand(40, 2, 24)
    check_packed(packed(40, 2, 24), starts(15, 25), upstream=sum_of_heads)


# ---- numbers ---------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("scale", [0.0, -0.4, 1.0])
def test_scales(dtype, scale):
    check_packed(packed(90, 1, 32, dtype), starts(70, 20), scale=scale)


@DTYPES
@pytest.mark.parametrize("scale", [1e3, -1e3])
@pytest.mark.parametrize("length", [40, 100])
def test_logits_of_ten_thousand_stay_finite(dtype, scale, length):
    leaves = packed(length, 1, 64, dtype)
    for x in leaves[:2]:
        x.data = (x.data / x.data.norm(dim=-1, keepdim=True) * 10**0.5).contiguous()
    out = fastssl.packed_attention(*leaves, starts(length), scale=scale, backend="triton")
    exact = doubles(leaves)
    # float32 keeps such logits to ±1e-3, which becomes the relative error of each share.
    assert_close(out, packed_reference(*exact, starts(length), scale=scale), 1e-2)
    for grad in gradients(out, leaves, torch.randn_like(out)):
        assert grad.isfinite().all()


@DTYPES
def test_repeatable_and_leaves_its_inputs_alone(dtype):
    leaves, keep = masked(2, 75, 2, 16, dtype), torch.rand(2, 75) < 0.9
    flat, cu_seqlens = packed(75, 2, 16, dtype), starts(5, 70).int()
    grad = torch.randn(2, 2, 75, 16, dtype=dtype)
    for name, tensors, rest, upstream in (
        ("masked_attention", leaves, (keep, 0.3), grad),
        ("packed_attention", flat, (cu_seqlens, 70, 0.3), grad[0].transpose(0, 1)),
    ):
        before = [x.detach().clone() for x in (*tensors, rest[0], upstream)]
        results = []
        for _ in range(2):
            out, lse = run(f"{name}_forward", *tensors, *rest)
            results.append((out, lse, run(f"{name}_backward", upstream, out, lse, *tensors, *rest)))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
        assert all(x.isfinite().all() for x in results[0])
        assert all(torch.equal(b, x) for b, x in zip(before, (*tensors, rest[0], upstream), strict=True))


# ---- sizes of nothing, and raw operators -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 7, 16), (2, 0, 7, 16), (2, 2, 0, 16)])
@pytest.mark.parametrize("keep", [False, True])
def test_no_images_heads_or_tokens(shape, keep):
    leaves = [torch.randn(shape).requires_grad_() for _ in range(3)]
    mask = torch.ones(shape[0], shape[2], dtype=torch.bool) if keep else None
    out = fastssl.masked_attention(*leaves, mask, backend="triton")
    assert out.shape == shape
    assert all(grad.shape == shape for grad in gradients(out, leaves, torch.ones_like(out)))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_rows(lengths):
    leaves = packed(0, 2, 16)
    out = fastssl.packed_attention(*leaves, starts(*lengths), backend="triton")
    assert out.shape == (0, 2, 16)
    assert all(grad.shape == out.shape for grad in gradients(out, leaves, torch.ones_like(out)))


def test_opcheck():
    q, k, v = (x.detach() for x in masked(2, 20, 2, 16))
    for keep in (torch.rand(2, 20) < 0.5, torch.empty(0, dtype=torch.bool)):
        arguments = (q, k, v, keep, 0.25)
        torch.library.opcheck(torch.ops.fastssl.masked_attention_forward_triton, arguments)
        out, lse = run("masked_attention_forward", *arguments)
        arguments = (torch.randn_like(q), out, lse, *arguments)
        torch.library.opcheck(torch.ops.fastssl.masked_attention_backward_triton, arguments)
    q, k, v = (x.detach() for x in packed(20, 2, 16))
    arguments = (q, k, v, starts(5, 15).int(), 15, 0.25)
    torch.library.opcheck(torch.ops.fastssl.packed_attention_forward_triton, arguments)
    out, lse = run("packed_attention_forward", *arguments)
    arguments = (torch.randn_like(out), out, lse, *arguments)
    torch.library.opcheck(torch.ops.fastssl.packed_attention_backward_triton, arguments)


# ---- launches and tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [50, 70])
@pytest.mark.parametrize("keep", [False, True])
def test_launches(monkeypatch, length, keep):
    names = launched(monkeypatch)
    leaves = masked(1, length, 1, 16, torch.float16)
    mask = torch.ones(1, length, dtype=torch.bool) if keep else None
    out = fastssl.masked_attention(*leaves, mask, backend="triton")
    assert names == ["kept_rows"] * keep + ["attention_rows"]
    names.clear()
    gradients(out, leaves, torch.ones_like(out))
    keys = ["attention_grad_keys"] * (length > 64)  # else the first kernel has done it all
    assert names == ["kept_rows"] * keep + ["attention_grad_queries"] + keys


def test_every_block_size_is_compiled_by_the_proofs():
    """That is, whatever the tables choose is among the configurations."""
    from fastssl.kernels import masked_attention, packed_attention, packed_attention_backward
    from fastssl.kernels.masked_attention import order_choice
    from fastssl.kernels.packed_attention import rows_choice
    from fastssl.kernels.packed_attention_backward import Kind, keys_choice, queries_choice

    def key(choice):
        return (choice.kernel.__name__, *sorted(choice.constexprs.items()), choice.num_warps, choice.num_stages)

    modules = (masked_attention, packed_attention, packed_attention_backward)
    configurations = [c for module in modules for c in module.configurations()]
    assert len({c.description for c in configurations}) == len(configurations)
    for exact in (False, True):
        # The dtype is no constexpr: float32 configurations and others would look alike but for their descriptions.
        compiled = {key(c): c.archs or (0, 80, 90, 100) for c in configurations if ("fp32" in c.description) == exact}
        for longest in (0, 1, 37, 48, 49, 64, 65, 128, 129, 197, 256, 257, 512, 513, 1100):
            for depth in range(16, 129, 8):
                for indexed in (0, 1):
                    about = (longest, depth, exact, indexed)
                    assert key(rows_choice(*about)) in compiled
                    for arch in (0, 80, 90, 100):
                        kind = Kind(*about, arch)
                        for choice in (queries_choice(kind), keys_choice(kind)):
                            assert arch in compiled[key(choice)] or (not arch and compiled[key(choice)])
            assert exact or key(order_choice(longest)) in compiled
