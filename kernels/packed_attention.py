"""packed_attention's forward kernel in Triton, which masked_attention launches too; see _attention.py for the rows.

A program has a block of queries of one (sequence, head). Keys and values stream by, tile after tile; when a larger
logit turns up, what was summed before is made relative to it. Whole tiles need no mask; what is left over is done by
smaller tiles: 197 rows are 3·64 + 16 of them, for queries as for keys. One launch; reads q, k and v where they are,
writes out and the natural logarithm of each row's sum of exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels._attention import (
    LN2,
    Rows,
    Sequences,
    choose,
    dots,
    load_rows,
    locate,
    store_rows,
    tokens_of,
)
from fastssl.kernels.common import Choice, Configuration, configuration, launch, multiply, on_device
from fastssl.kernels.packed_attention_backward import backward
from torch import Tensor

__all__ = ["backward", "configurations", "forward"]

_SIZES = ["rows", "heads", "depth_units", "blocks", "per_image"]
_STRIDES = [f"{x}_{axis}" for x in "qkv" for axis in ("image", "head", "row")]


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def attention_rows(
    q, k, v,  # by their strides
    lengths, order,  # as of Sequences
    out,  # (rows, heads, depth) of each image, contiguous: output
    lse,  # (heads, rows) of each image, float32, contiguous: output
    rows, heads, depth_units, blocks, per_image,
    sign, scale_log2,  # scale · log2(e) is their product, and scale_log2 is not negative
    q_image, q_head, q_row,  # in UNITs, as all strides
    k_image, k_head, k_row,
    v_image, v_head, v_row,
    BLOCK: tl.constexpr, TAIL: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Attention of every `blocks`-th block of queries of a (sequence, head)."""
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sequence = tl.program_id(0) // blocks // heads
    image, begin, count, order = locate(lengths, order, sequence, rows, per_image, INDEXED)
    q += (image * q_image + head * q_head) * 8
    k += (image * k_image + head * k_head) * 8
    v += (image * v_image + head * v_head) * 8
    out += (image * rows * heads + head) * depth_units * 8
    lse += (image * heads + head) * rows
    first = tl.program_id(0) % blocks * BLOCK
    for row in tl.range(first, rows if INDEXED else count, blocks * BLOCK, disable_licm=True):
        if row + TAIL < count:
            _attend(
                q, k, v, order, out, lse, begin, row, count, heads, depth_units, sign, scale_log2, q_row, k_row, v_row,
                BLOCK, INNER, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
        elif row < count:
            _attend(
                q, k, v, order, out, lse, begin, row, count, heads, depth_units, sign, scale_log2, q_row, k_row, v_row,
                TAIL, INNER, INNER, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
        if INDEXED:
            _drop(out, lse, order, row, count, rows, heads, depth_units, BLOCK, DEPTH)


@triton.jit
def _drop(out, lse, order, row, count, rows, heads, depth_units, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Zeros for those of a block's rows that are dropped."""
    if row + BLOCK > count:
        at = row + tl.arange(0, BLOCK)
        dropped = (at >= count) & (at < rows)
        token = tl.load(order + at, mask=dropped, other=0)
        zeros = tl.zeros([BLOCK, DEPTH], tl.float32)
        store_rows(out, zeros, token, dropped, depth_units * 8, heads * depth_units, DEPTH)
        tl.store(lse + token, tl.zeros([BLOCK], tl.float32), mask=dropped)


@triton.jit
def _attend(
    q, k, v, order, out, lse, begin, row, count, heads, depth_units, sign, scale_log2, q_row, k_row, v_row,
    BLOCK: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Of one block of queries."""
    depth = depth_units * 8
    token, there = tokens_of(order, begin, row, count, BLOCK, INDEXED)
    x = q
    if SLICE == 0:
        x = load_rows(q, token, there, depth, q_row, 0, DEPTH)
        x = (x * sign).to(x.dtype)
    top = tl.full([BLOCK], float("-inf"), tl.float32)  # the largest logit · log2(e)
    total = tl.zeros([BLOCK], tl.float32)  # Σ 2^(logit · log2(e) − top)
    sums = tl.zeros([BLOCK, DEPTH], tl.float32)  # the same of values
    whole = count // INNER * INNER
    for key in range(0, whole, INNER):
        sums, total, top = _step(
            q, x, token, there, k, v, order, begin, key, count, depth, sums, total, top, sign, scale_log2,
            q_row, k_row, v_row, False, BLOCK, INNER, DEPTH, SLICE, INDEXED,
        )  # fmt: skip
    large = whole
    if count - whole > (INNER // 2 if INNER_TAIL < INNER else 0):
        large = count
    for key in tl.range(whole, large, INNER, num_stages=1):
        sums, total, top = _step(
            q, x, token, there, k, v, order, begin, key, count, depth, sums, total, top, sign, scale_log2,
            q_row, k_row, v_row, True, BLOCK, INNER, DEPTH, SLICE, INDEXED,
        )  # fmt: skip
    if INNER_TAIL < INNER:
        for key in tl.range(large, count, INNER_TAIL, num_stages=1):
            sums, total, top = _step(
                q, x, token, there, k, v, order, begin, key, count, depth, sums, total, top, sign, scale_log2,
                q_row, k_row, v_row, True, BLOCK, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
    store_rows(out, sums / total[:, None], token, there, depth, heads * depth_units, DEPTH)
    tl.store(lse + token, (top + tl.log2(total)) * LN2, mask=there)


@triton.jit
def _step(
    q, x, token, there, k, v, order, begin, key, count, depth, sums, total, top, sign, scale_log2,
    q_row, k_row, v_row,
    MASKED: tl.constexpr,  # there may be fewer than INNER keys
    BLOCK: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Keys key … key + INNER."""
    other, here = tokens_of(order, begin, key, count, INNER, INDEXED)
    y = k
    if SLICE == 0:
        y = load_rows(k, other, here, depth, k_row, 0, DEPTH)
    s = dots(q, x, token, there, q_row, k, y, other, here, k_row, depth, BLOCK, INNER, SLICE)
    if SLICE != 0:
        s *= sign
    # The scale is applied with the shift, in one multiply-add. Masked are maximum and exponentials, not the logits,
    # because −∞ · 0 is not a number.
    peak = tl.max(tl.where(here[None, :], s, float("-inf")) if MASKED else s, 1)
    higher = tl.maximum(top, peak * scale_log2)
    p = tl.exp2(s * scale_log2 - higher[:, None])
    if MASKED:
        p = tl.where(here[None, :], p, 0.0)
    shrink = tl.exp2(top - higher)
    z = load_rows(v, other, here, depth, v_row, 0, DEPTH)
    sums = multiply(p.to(z.dtype), z, sums * shrink[:, None], False)
    return sums, total * shrink + tl.sum(p, 1), higher


#: See `choose`.
ROWS = {
    ("few", 32): (32, 16, 32, 16, 2, 2),
    ("few", 64): (32, 16, 32, 16, 2, 2),
    ("many", 32): (64, 16, 64, 16, 4, 2),
    ("many", 64): (64, 16, 64, 16, 4, 3),
    ("many", 128): (64, 16, 64, 16, 4, 2),
    ("exact", 32): (32, 16, 16, 16, 2, 1),
    ("exact", 64): (32, 16, 16, 16, 4, 1),
    ("exact", 128): (32, 16, 16, 16, 8, 1),
}


def rows_choice(longest: int, depth: int, exact: bool, indexed: int) -> Choice:
    return choose(attention_rows, ROWS, longest, depth, exact, indexed)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The raw operator packed_attention_forward_triton of fastssl/ops/packed_attention.py."""
    total, heads, depth = q.shape
    out = q.new_empty((total, heads, depth))
    lse = q.new_empty((heads, total), dtype=torch.float32)
    with on_device(q):
        write_rows(q, k, v, out, lse, Sequences.packed(cu_seqlens, total, max_seqlen), scale)
    return out, lse


def write_rows(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences, scale: float) -> None:
    """Launches attention_rows."""
    if out.numel() == 0:
        return
    heads, depth = q.shape[1], q.shape[-1]
    views = [Rows.of(x) for x in (q, k, v)]
    choice = rows_choice(sequences.longest, depth, q.dtype == torch.float32, sequences.indexed)
    blocks = sequences.blocks(choice, heads)
    launch(
        choice, sequences.number * heads * blocks, *(view.tensor for view in views), *sequences.tensors(lse), out, lse,
        sequences.rows, heads, depth // 8, blocks, int(sequences.lengths is None), math.copysign(1.0, scale),
        abs(scale) * math.log2(math.e), *(stride for view in views for stride in view.strides),
    )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    for dtype in ("bf16", "fp32"):
        for kind, width in ROWS:
            if (kind == "exact") == (dtype == "fp32"):
                yield rows_configuration(16 if kind == "few" else 200, width, dtype, 0)
    yield rows_configuration(200, 64, "fp16", 0)


def rows_configuration(longest: int, depth: int, dtype: str, indexed: int) -> Configuration:
    return configuration(
        rows_choice(longest, depth, dtype == "fp32", indexed),
        dtype,
        f"*{dtype}:16 *{dtype}:16 *{dtype}:16 *i32:16 *i32:16 *{dtype}:16 *fp32:16",
        "i32 i32 i32 i32 i32 fp32 fp32",
        "i32 i32 i32 " * 3,
    )
