"""Gradients of one (sequence, head) in one program, under the interpreter as each architecture's tables have them."""

import pytest
import torch
from attention_triton import check_masked, check_packed, launched, masked, packed, run, starts
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import kernels
from fastssl.reference.packed_attention import packed_attention as packed_reference

pytestmark = pytest.mark.skipif(
    kernels.why_not("cpu") is not None, reason=kernels.why_not("cpu") or "triton runs under its interpreter"
)

#: Blocks are those of sm_80 on sm_100 too.
ARCHS = pytest.mark.parametrize("arch", [80, 90])


@pytest.fixture
def on(monkeypatch):
    """Choose as on an architecture."""
    from fastssl.kernels import packed_attention_backward

    return lambda arch: monkeypatch.setattr(packed_attention_backward, "architecture", lambda tensor: arch)


@ARCHS
@pytest.mark.parametrize("depth", [16, 40, 64, 128])
@pytest.mark.parametrize("longest", [128, 256])
def test_lengths(on, arch, depth, longest):
    on(arch)
    lengths = [n for n in (0, 1, 37, 64, 65, 100, 0, 128, 129, 197, 256) if n <= longest]
    check_packed(packed(sum(lengths), 2, depth, torch.float16), starts(*lengths), max_seqlen=longest)


@ARCHS
@pytest.mark.parametrize("ratios", [(0.0, 0.25, 0.5, 1.0), (0.2,), (0.0,)])
def test_kept_tokens(on, arch, ratios):
    """What dropped tokens hold counts for nothing, and their gradients are zero."""
    on(arch)
    keep = torch.rand(len(ratios), 197) < torch.tensor(ratios)[:, None]
    leaves = masked(len(ratios), 197, 2, 64, torch.float16)
    upstream = torch.randn(len(ratios), 2, 197, 64, dtype=torch.float16)
    check_masked(leaves, keep, upstream=upstream)
    clean = gradients(fastssl.masked_attention(*leaves, keep, backend="triton"), leaves, upstream)
    for x in (*(leaf.data for leaf in leaves), upstream):
        x.transpose(1, 2)[~keep] = float("nan")
    dirty = gradients(fastssl.masked_attention(*leaves, keep, backend="triton"), leaves, upstream)
    assert all(torch.equal(one, two) for one, two in zip(clean, dirty, strict=True))


@ARCHS
def test_kept_tokens_of_long_images(on, arch):
    on(arch)
    keep = torch.rand(4, 400) < torch.tensor([0.1, 0.3, 0.5, 1.0])[:, None]
    check_masked(masked(4, 400, 1, 64, torch.float16), keep)


@ARCHS
@pytest.mark.parametrize("hint", [65, 100, 128, 200, 256])
def test_sequences_longer_than_the_hint(on, arch, hint):
    on(arch)
    lengths = (30, 100, 140, 300)
    leaves, cu_seqlens = packed(sum(lengths), 1, 64, torch.float16), starts(*lengths).int()
    out, lse = run("packed_attention_forward", *leaves, cu_seqlens, hint, 0.3)
    upstream = torch.randn_like(out)
    result = run("packed_attention_backward", upstream, out, lse, *leaves, cu_seqlens, hint, 0.3)
    exact = doubles(leaves)
    truth = packed_reference(*exact, cu_seqlens, scale=0.3)
    assert_close(out, truth, FORWARD[torch.float16])
    for got, expected in zip(result.unbind(1), gradients(truth, exact, upstream.double()), strict=True):
        assert_close(got, expected, GRADIENT[torch.float16])


@ARCHS
def test_nothing_outside_is_touched(on, arch):
    on(arch)
    around = torch.full((170, 3, 1, 16), float("nan"), dtype=torch.float16)
    around[10:160] = torch.randn(150, 3, 1, 16)
    leaves = around[10:160].unbind(1)
    for numbers in ((-7, 100, 20, 10**6), (-(2**31), 2**31 - 1), (45, 60, 150)):
        cu_seqlens = torch.tensor(numbers, dtype=torch.int32)
        out, lse = run("packed_attention_forward", *leaves, cu_seqlens, 200, 0.3)
        out, lse = out.nan_to_num(), lse.nan_to_num()  # of rows in no sequence
        result = run("packed_attention_backward", torch.ones_like(out), out, lse, *leaves, cu_seqlens, 200, 0.3)
        assert result[min(max(numbers[0], 0), 150) :].isfinite().all()


@ARCHS
def test_repeatable(on, arch):
    on(arch)
    leaves, upstream = packed(277, 2, 64, torch.float16), torch.randn(277, 2, 64, dtype=torch.float16)
    results = []
    for _ in range(2):
        out = fastssl.packed_attention(*leaves, starts(197, 80), max_seqlen=197, backend="triton")
        results.append(gradients(out, leaves, upstream))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("length", "keep", "dtype", "arch", "names"),
    [
        (197, False, torch.float16, 90, ["keys"]),
        (197, True, torch.float16, 90, ["queries", "keys"]),  # the first one does images that keep 64 tokens or fewer
        (257, False, torch.float16, 90, ["queries", "keys"]),
        (257, True, torch.float16, 90, ["queries", "keys"]),
        (50, False, torch.float16, 90, ["queries"]),
        (197, False, torch.float32, 90, ["queries", "keys"]),
        (197, False, torch.float16, 0, ["queries", "keys"]),
    ],
)
def test_launches(on, monkeypatch, length, keep, dtype, arch, names):
    on(arch)
    leaves = masked(1, length, 1, 16, dtype)
    mask = torch.ones(1, length, dtype=torch.bool) if keep else None
    out = fastssl.masked_attention(*leaves, mask, backend="triton")
    found = launched(monkeypatch)
    gradients(out, leaves, torch.ones_like(out))
    assert found == ["kept_rows"] * keep + [f"attention_grad_{name}" for name in names]


@pytest.mark.parametrize("arch", [0, 80, 90])
@pytest.mark.parametrize("length", [40, 100, 200, 300])
@pytest.mark.parametrize("scale", [1e9, -1e12])
def test_huge_logits(on, arch, length, scale):
    """float32 keeps them to ±64 and more: without a bound, exponents would be positive and shares infinite."""
    on(arch)
    q, k, v = packed(length, 1, 64, torch.float16)
    out = fastssl.packed_attention(q, k, v, starts(length), scale=scale, max_seqlen=length, backend="triton")
    dq, dk, dv = gradients(out, (q, k, v), torch.full_like(out, 0.5))
    assert dv.isfinite().all()
    assert not dq.isnan().any()  # they have the factor scale, beyond float16
    assert not dk.isnan().any()


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("length", [40, 70, 150])
def test_keys_beyond_the_last_add_nothing(on, arch, length):
    """Where every logit is far below zero they would have large shares, and their dS would not fit into float16."""
    on(arch)
    q, k, v = packed(length, 1, 64, torch.float16)
    for x, of in ((q, 1.6), (k, -1.6), (v, 10.0)):
        x.data = (x.data * 0.01 + of).contiguous()
    upstream = torch.full((length, 1, 64), 110.0, dtype=torch.float16)
    out = fastssl.packed_attention(q, k, v, starts(length), max_seqlen=length, backend="triton")
    for grad in gradients(out, (q, k, v), upstream):
        assert grad.isfinite().all()


def test_nan_stays_nan(on):
    on(90)
    leaves = packed(200, 1, 64, torch.float16)
    leaves[0].data[150, 0, 3] = float("nan")
    out = fastssl.packed_attention(*leaves, starts(100, 100), max_seqlen=100, backend="triton")
    assert out[150].isnan().all()
    assert out[:100].isfinite().all()
    dq, dk, dv = gradients(out, leaves, torch.ones_like(out))
    assert all(x.isnan().all() for x in (dq[150], dk[100:], dv[100:]))
    assert all(x[:100].isfinite().all() for x in (dq, dk, dv))
