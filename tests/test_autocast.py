"""Under autocast every op takes what it gets and computes in float32, the references too."""

import pytest
import torch

import fastssl
from fastssl import _library

W = torch.eye(24) + 0.1
KEEP = torch.arange(32).view(2, 16) % 3 > 0
STARTS = torch.tensor([0, 12, 12, 32])
ONE, NOTHING = torch.ones(24), torch.zeros(24)
CALLS = {
    "self_relation": lambda x, b: fastssl.self_relation(x, num_heads=3, backend=b),
    "self_relation_loss": lambda x, b: fastssl.self_relation_loss(x, x.flip(1), num_heads=3, backend=b),
    "gram_loss": lambda x, b: fastssl.gram_loss(x, x.flip(1), backend=b),
    "sample_tokens": lambda x, b: fastssl.sample_tokens(x, torch.full((2, 3, 3, 2), 0.3), backend=b),
    "simpool": lambda x, b: fastssl.simpool(x, W, W, ONE, NOTHING, gamma=1.5, backend=b),
    "masked_attention": lambda x, b: fastssl.masked_attention(*[x[:, None]] * 3, KEEP, backend=b),
    "packed_attention": lambda x, b: fastssl.packed_attention(*[x.view(32, 1, 24)] * 3, STARTS, backend=b),
}


@pytest.mark.parametrize("backend", ["reference", *(["cpp"] if _library.loaded() else [])])
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(backend, op, dtype):
    x = (torch.randn(2, 16, 24) * 3).requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            out = CALLS[op](x, backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert results[0][0].dtype == torch.float32
    for alone, under in zip(*results, strict=True):
        assert torch.equal(alone, under)


def test_every_op_is_here():
    from fastssl._backends import OPS

    assert set(CALLS) == set(OPS)
