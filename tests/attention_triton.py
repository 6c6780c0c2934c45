"""Calls of the attention kernels under Triton's interpreter, compared with float64: what their test files share."""

import torch
from compare import assert_close, doubles, gradients
from launches import launched_from
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl.reference.masked_attention import masked_attention as masked_reference
from fastssl.reference.packed_attention import packed_attention as packed_reference


def starts(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(total, heads, depth, dtype=torch.float32):
    """q, k and v: views of one tensor, with gradients of their own."""
    return [x.requires_grad_() for x in torch.randn(total, 3, heads, depth).to(dtype).unbind(1)]


def masked(batch, length, heads, depth, dtype=torch.float32):
    qkv = torch.randn(batch, length, 3, heads, depth).to(dtype)
    return [x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]


def compare(out, truth, leaves, exact, upstream=None):
    """Value and gradients."""
    dtype = leaves[0].dtype
    assert out.dtype == dtype
    assert_close(out, truth, FORWARD[dtype], "value")
    upstream = torch.randn_like(out) if upstream is None else upstream
    got = gradients(out, leaves, upstream)
    expected = gradients(truth, exact, upstream.double())
    for name, g, e, leaf in zip("qkv", got, expected, leaves, strict=True):
        assert g.dtype == leaf.dtype
        assert_close(g, e, GRADIENT[dtype], f"gradient of {name}")
    return got


def check_packed(leaves, cu_seqlens, *, upstream=None, scale=None, **kwargs):
    out = fastssl.packed_attention(*leaves, cu_seqlens, scale=scale, backend="triton", **kwargs)
    assert out.is_contiguous()
    exact = doubles(leaves)
    compare(out, packed_reference(*exact, cu_seqlens, scale=scale), leaves, exact, upstream)
    return out


def check_masked(leaves, keep, *, upstream=None, scale=None):
    out = fastssl.masked_attention(*leaves, keep, scale=scale, backend="triton")
    assert out.transpose(1, 2).is_contiguous()
    exact = doubles(leaves)
    got = compare(out, masked_reference(*exact, keep, scale=scale), leaves, exact, upstream)
    if keep is not None:
        for x in (out, *got):
            assert not x.transpose(1, 2)[~keep].any()
    return out


def run(name, *arguments):
    return getattr(torch.ops.fastssl, f"{name}_triton")(*arguments)


def launched(monkeypatch):
    """The names of the kernels that will have been launched."""
    from fastssl.kernels import masked_attention, packed_attention, packed_attention_backward

    return launched_from(monkeypatch, masked_attention, packed_attention, packed_attention_backward)
