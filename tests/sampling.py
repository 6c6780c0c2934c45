"""What the tests of sample_tokens share: grid_sample on tokens, inputs, and the comparison with float64."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, doubles, gradients
from tolerances import FORWARD, GRADIENT

import fastssl
from fastssl import _library
from fastssl.reference.sample_tokens import feature_map

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or "")


def grid_sample(x, grid, grid_size=None):
    """What it all must equal, in the dtype of its arguments."""
    sampled = F.grid_sample(feature_map(x, grid_size), grid, align_corners=False)
    return sampled.flatten(2).transpose(1, 2)


def make(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def points(batch, rows, columns=None, *, reach=1.3, dtype=torch.float32):
    """Anywhere in the map and somewhat outside."""
    return ((2 * torch.rand(batch, rows, columns or rows, 2) - 1) * reach).to(dtype).requires_grad_()


def check(x, grid, *, grid_size=None, backend="cpp", upstream=None):
    """Value and gradients of one call against float64."""
    out = fastssl.sample_tokens(x, grid, grid_size=grid_size, backend=backend)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    x64, grid64 = doubles([x, grid])
    truth = grid_sample(x64, grid64, grid_size)
    assert_close(out, truth, FORWARD[x.dtype], "value")
    upstream = torch.randn_like(out) if upstream is None else upstream
    got = gradients(out, [x, grid], upstream)
    expected = gradients(truth, [x64, grid64], upstream.cpu().double())
    for leaf, g, e in zip([t for t in (x, grid) if t.requires_grad], got, expected, strict=True):
        assert g.dtype == leaf.dtype
        # The grid's gradient is computed as x's is, and rounded to the grid's dtype.
        assert_close(g, e, max(GRADIENT[leaf.dtype], GRADIENT[torch.promote_types(x.dtype, torch.float32)]), "gradient")
    return out
