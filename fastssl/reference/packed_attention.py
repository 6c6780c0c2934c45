"""packed_attention in plain PyTorch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastssl._autocast import without_autocast
from fastssl.reference.masked_attention import masked_attention


@without_autocast
def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v within each sequence of a concatenation.

    Arguments as in `fastssl.packed_attention`. Computes in float32, or float64 if an input is float64. Waits for the
    device, to learn the lengths.
    """
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or starts[-1] != q.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"packed_attention: cu_seqlens must rise from 0 to T = {q.shape[0]}, got {starts}")
    outputs = []
    for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1)[None] for x in part]
        outputs.append(masked_attention(heads[0], heads[1], heads[2], None, scale=scale)[0].transpose(0, 1))
    # No sequence: nothing, but of all three, so that each has a gradient.
    return torch.cat(outputs) if outputs else (q + k + v).to(q.dtype)
