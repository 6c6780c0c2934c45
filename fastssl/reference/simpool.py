"""simpool in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._autocast import without_autocast
from fastssl.reference.self_relation import tokens


@without_autocast
def simpool(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    bq: Tensor | None = None,
    bk: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    gamma: float | None = None,
    beta: Tensor | None = None,
    value_min: str = "batch",
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Attention of one query, the projected mean token, to the projected normalised tokens; the values are the latter.

    Arguments as in `fastssl.simpool`; returns the pooled vectors (B, C) and the attention (B, H, N) in x's dtype.
    Computes in float32, or float64 if an input is float64.
    """
    parameters = (wq, wk, norm_weight, norm_bias, bq, bk, beta)
    double = torch.float64 in (x.dtype, *(p.dtype for p in parameters if p is not None))
    work = torch.float64 if double else torch.float32

    def cast(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.to(work)

    rows = tokens(x).to(work)
    channels = rows.shape[2]
    y = torch.nn.functional.layer_norm(rows, (channels,), cast(norm_weight), cast(norm_bias), norm_eps)
    linear = torch.nn.functional.linear
    query = linear(rows.mean(1), wq.to(work), cast(bq)).unflatten(-1, (num_heads, -1))  # (B, H, d)
    keys = linear(y, wk.to(work), cast(bk)).unflatten(-1, (num_heads, -1))  # (B, N, H, d)
    values = y.unflatten(-1, (num_heads, -1))
    if scale is None:
        scale = (channels // num_heads) ** -0.5
    attention = (scale * torch.einsum("bhd,bnhd->bhn", query, keys)).softmax(-1)
    if gamma is None:
        pooled = torch.einsum("bhn,bnhd->bhd", attention, values)
    else:
        if value_min == "batch":
            smallest = values.amin() if values.numel() > 0 else values.sum()
        else:
            smallest = values.amin(1, keepdim=True)
        powers = (values - smallest + eps) ** gamma
        pooled = torch.einsum("bhn,bnhd->bhd", attention, powers) ** (1.0 / gamma)
        if beta is not None:
            pooled = pooled + beta.to(work)
    return pooled.flatten(1).to(x.dtype), attention.to(x.dtype)
