"""What the tests of masked_attention and packed_attention share: inputs, both ops called alike, and float64's word."""

import pytest
import torch
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import _library
from fastssl.reference.masked_attention import masked_attention as masked_reference
from fastssl.reference.packed_attention import packed_attention as packed_reference

OPS = ("masked_attention", "packed_attention")
BOTH = pytest.mark.parametrize("op", OPS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["reference", *(["cpp"] if _library.loaded() else [])]
needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")
#: Lengths of one packed call.
LENGTHS = (37, 0, 197, 1, 300, 1100, 0)
SHORT = (5, 0, 9, 1, 70)


def starts_of(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def keep_of(batch, length, ratio):
    """As many in every image, as MAE keeps them; None: no mask at all."""
    if ratio is None:
        return None
    order = torch.rand(batch, length).argsort(1).argsort(1)
    return order < round(ratio * length)


def projection(op, tokens, heads=2, depth=16, dtype=torch.float32, grad=True):
    """(B, N, 3, H, d) or (T, 3, H, d), as a qkv projection gives it; `tokens` are (B, N) or the lengths."""
    shape = tokens if op == "masked_attention" else (sum(tokens),)
    return torch.randn(*shape, 3, heads, depth).to(dtype).requires_grad_(grad)


def heads_of(op, qkv):
    """q, k and v as views of it."""
    views = qkv.unbind(qkv.dim() - 3)
    return [x.transpose(1, 2) for x in views] if op == "masked_attention" else list(views)


def small(op, heads=2, depth=16, dtype=torch.float32, grad=True):
    """q, k, v as leaves, and keep or cu_seqlens: what most contracts are shown on."""
    tokens = (3, 70) if op == "masked_attention" else SHORT
    views = heads_of(op, projection(op, tokens, heads, depth, dtype, grad=False))
    keep = torch.rand(3, 70) < 0.6
    keep[1] = False
    where = keep if op == "masked_attention" else starts_of(SHORT)
    return [x.clone().requires_grad_(grad) for x in views], where


def run(op, q, k, v, where, **kwargs):
    return getattr(fastssl, op)(q, k, v, where, **kwargs)


def reference(op, q, k, v, where, max_seqlen=None, **kwargs):
    return (masked_reference if op == "masked_attention" else packed_reference)(q, k, v, where, **kwargs)


def check(op, tensors, where, backend="cpp", upstream=None, wanted=None, tolerances=None, **kwargs):
    """Value and gradients of one call against float64; `wanted` is the projection that q, k and v are views of."""
    out = run(op, *tensors, where, backend=backend, **kwargs)
    leaves = tensors if wanted is None else [wanted]
    exact = doubles(leaves)
    truth = reference(op, *(exact if wanted is None else heads_of(op, exact[0])), where, **kwargs)
    assert out.dtype == tensors[0].dtype
    assert out.device == tensors[0].device
    forward, gradient = tolerances or (FORWARD[out.dtype], GRADIENT[out.dtype])
    assert_close(out, truth, forward, "out")
    if not any(x.requires_grad for x in leaves):
        return out
    upstream = torch.randn(out.shape).to(out.dtype) if upstream is None else upstream
    got = torch.autograd.grad(out, [x for x in leaves if x.requires_grad], upstream, retain_graph=True)
    for i, (g, e) in enumerate(zip(got, gradients(truth, exact, upstream.double()), strict=True)):
        assert g.dtype == out.dtype
        assert_close(g, e, gradient, f"gradient {i}")
    return out
