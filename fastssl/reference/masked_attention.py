"""masked_attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._autocast import without_autocast


@without_autocast
def masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, *, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v among the kept tokens of each image; zero for the others.

    Arguments as in `fastssl.masked_attention`. Computes in float32, or float64 if an input is float64.
    """
    work = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    if scale is None:
        scale = q.shape[-1] ** -0.5
    queries, keys, values = q.to(work), k.to(work), v.to(work)
    if keep is None:
        return ((scale * queries @ keys.transpose(-1, -2)).softmax(-1) @ values).to(q.dtype)
    rows = keep[:, None, :, None]
    # What a dropped token holds counts for nothing, NaN included.
    queries, keys, values = (torch.where(rows, x, 0.0) for x in (queries, keys, values))
    logits = scale * queries @ keys.transpose(-1, -2)
    # The smallest number in place of −inf: an image that keeps nothing is then 0, not NaN.
    logits = torch.where(rows.transpose(-1, -2), logits, torch.finfo(work).min)
    return torch.where(rows, logits.softmax(-1) @ values, 0.0).to(q.dtype)
