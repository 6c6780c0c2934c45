"""self_relation in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._autocast import without_autocast

#: A row whose norm is not above this is left zero by `normalize=True`, with zero gradient.
NORM_EPS = 1e-12


@without_autocast
def self_relation(
    x: Tensor,
    *,
    kind: str = "pixel",
    num_heads: int = 1,
    scale: float | None = None,
    temp: float = 1.0,
    columns: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """softmax over the last axis of scale/temp · X_h Y_hᵀ (pixel) or scale/temp · X_hᵀ Y_h (channel), Y = columns or x.

    Arguments as in `fastssl.self_relation`. Computes in float32, or float64 if an input is float64.
    """
    work = (
        torch.float64 if torch.float64 in (x.dtype, columns.dtype if columns is not None else None) else torch.float32
    )
    rows = heads(tokens(x).to(work), num_heads, kind)
    cols = rows if columns is None else heads(tokens(columns).to(work), num_heads, kind)
    if normalize:
        cols = normalize_rows(cols)
        rows = cols if columns is None else normalize_rows(rows)
    if scale is None:
        depth = rows.shape[-1]
        scale = depth**-0.5 if kind == "pixel" else 1.0 / max(depth, 1)
    logits = (scale / temp) * (rows @ cols.transpose(-1, -2))
    return logits.softmax(-1).to(x.dtype)


def tokens(x: Tensor) -> Tensor:
    """(B,N,C) as it is, or a feature map (B,C,h,w) as a (B,h·w,C) view."""
    return x.flatten(2).transpose(1, 2) if x.dim() == 4 else x


def heads(x: Tensor, num_heads: int, kind: str) -> Tensor:
    """(B,N,C) → the vectors that are related, (B,H,N,d) for pixels and (B,H,d,N) for channels."""
    split = x.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    return split.permute(0, 2, 1, 3) if kind == "pixel" else split.permute(0, 2, 3, 1)


def normalize_rows(x: Tensor) -> Tensor:
    """Each vector of the last axis over its length; a zero vector stays zero and gets no gradient, NaN stays NaN.

    Divided by its largest element first, or squares of large vectors would overflow; the result does not depend on
    that divisor, so that it counts as a constant.
    """
    if x.numel() == 0:
        return x
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    squared = x.square().sum(-1, keepdim=True)
    nothing = squared.detach().sqrt() * largest <= NORM_EPS
    return torch.where(nothing, 0.0, x * torch.where(nothing, 1.0, squared).rsqrt())
