"""masked_attention in Triton: the kernels of packed_attention, on the rows that an index names.

One more launch before them, kept_rows, makes that index: one program per image reads its N bytes of `keep` and writes
where the kept rows are, then where the others are, and how many are kept. Backward makes it again, which costs less
than to keep it. With nothing dropped there is no index.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels._attention import Sequences
from fastssl.kernels.common import Choice, Configuration, configuration, launch, on_device
from fastssl.kernels.packed_attention import ROWS, rows_configuration, write_rows
from fastssl.kernels.packed_attention_backward import QUERIES, gradient_configurations, write_gradients
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "keep_image", "keep_row"])
def kept_rows(
    keep,  # (B, N) bytes by its strides
    counts,  # (B,) int32: output
    order,  # (B, N) int32, contiguous: output
    rows, keep_image, keep_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The kept rows of one image in their order, then the others in theirs, and the number of the former."""
    image = tl.program_id(0).to(tl.int64)
    keep += image * keep_image
    order += image * rows
    total = 0
    for first in range(0, rows, BLOCK):
        total += tl.sum(_kept(keep, first, rows, keep_row, BLOCK), 0)
    tl.store(counts + image, total)
    before = 0
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        kept = _kept(keep, first, rows, keep_row, BLOCK)
        through = before + tl.cumsum(kept, 0)  # kept rows, this one among them
        at = tl.where(kept != 0, through - 1, total + row - through)
        tl.store(order + at, row, mask=row < rows)
        before += tl.sum(kept, 0)


@triton.jit
def _kept(keep, first, rows, keep_row, BLOCK: tl.constexpr):
    """1 where a row is kept, else 0."""
    row = first + tl.arange(0, BLOCK)
    return (tl.load(keep + row.to(tl.int64) * keep_row, mask=row < rows, other=0) != 0).to(tl.int32)


def order_choice(rows: int) -> Choice:
    return Choice(kept_rows, {"BLOCK": 256 if rows <= 256 else 1024}, 4, 1)


def sequences_of(keep: Tensor, batch: int, rows: int) -> Sequences:
    """Launches kept_rows, unless `keep` has no elements, which means that all are kept."""
    if keep.dim() == 1 or keep.numel() == 0:
        return Sequences(batch, rows, rows, 0, None, None)
    counts = keep.new_empty((batch,), dtype=torch.int32)
    order = keep.new_empty((batch, rows), dtype=torch.int32)
    launch(order_choice(rows), batch, keep.view(torch.uint8), counts, order, rows, *keep.stride())
    return Sequences(batch, rows, rows, 1, counts, order)


def forward(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The raw operator masked_attention_forward_triton of fastssl/ops/masked_attention.py: out is (B, N, H, d)."""
    batch, heads, rows, depth = q.shape
    out = q.new_empty((batch, rows, heads, depth))
    lse = q.new_empty((batch, heads, rows), dtype=torch.float32)
    with on_device(q):
        write_rows(q, k, v, out.transpose(1, 2), lse, sequences_of(keep, batch, rows), scale)
    return out, lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float
) -> Tensor:
    """The raw operator masked_attention_backward_triton: grad is (B, H, N, d), out as forward gave it."""
    batch, heads, rows, depth = q.shape
    result = q.new_empty((batch, rows, 3, heads, depth))
    with on_device(q):
        write_gradients(grad, out.transpose(1, 2), lse, q, k, v, result, sequences_of(keep, batch, rows), scale)
    return result


def configurations() -> Iterator[Configuration]:
    """Those with an index; the others are packed_attention's."""
    for rows in (200, 300):
        yield configuration(order_choice(rows), "", "*u8:16 *i32:16 *i32:16 i32 i32 i32")
    for dtype in ("bf16", "fp32"):
        for kind, width in ROWS:
            if (kind == "exact") == (dtype == "fp32"):
                yield rows_configuration(16 if kind == "few" else 200, width, dtype, 1)
        for kind, width in QUERIES:
            if (kind == "exact") == (dtype == "fp32"):
                yield from gradient_configurations(width, dtype, 1)
