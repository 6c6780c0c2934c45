"""self_relation in Triton: the relation matrix A = softmax(scale · X Yᵀ) of each image and head.

One view serves pixels and channels: R row vectors X and M column vectors Y of depth K, given by element strides. Pixel
rows are tokens (K = d), channel rows are the head's channels (K = N). Up to 512 columns, a program holds whole rows of
logits in registers, so that no online softmax is needed and the matrix is written once; beyond, two passes stream over
the columns. The gradients are in self_relation_backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    LAYOUTS,
    THOROUGH,
    Choice,
    Configuration,
    Vectors,
    alignment,
    configuration,
    launch,
    load_tile,
    multiply,
    on_device,
    product_dtype,
    store_tile,
)
from fastssl.kernels.normalize_rows import unit_vectors
from fastssl.kernels.self_relation_backward import backward
from torch import Tensor

__all__ = ["backward", "configurations", "forward"]

LOG2E = math.log2(math.e)


@triton.jit
def relation_rows(
    rows,  # (B, H, R, K) by its strides
    columns,  # (B, H, M, K) by its strides
    relation,  # (B, H, R, M), contiguous: output
    R, M, K, num_heads,
    scale_log2,  # scale · log2(e): exp(scale · s) = exp2(scale_log2 · s)
    rows_batch, rows_head, rows_row, rows_depth,
    columns_batch, columns_head, columns_column, columns_depth,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,  # a row of logits is T0 + T1 + T2 columns wide; 0: absent
    BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    MIXED: tl.constexpr,  # rows and columns differ in dtype
    ALIGNMENT: tl.constexpr,  # divides M
):  # fmt: skip
    M = (M // ALIGNMENT) * ALIGNMENT  # changes nothing but what the compiler knows: vector stores
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    rows += head // num_heads * rows_batch + head % num_heads * rows_head + first_row.to(tl.int64) * rows_row
    columns += head // num_heads * columns_batch + head % num_heads * columns_head
    relation += (head * R + first_row) * M
    R -= first_row

    logits0 = tl.zeros([BLOCK_ROWS, T0], tl.float32)
    if T1 > 0:
        logits1 = tl.zeros([BLOCK_ROWS, T1], tl.float32)
    if T2 > 0:
        logits2 = tl.zeros([BLOCK_ROWS, T2], tl.float32)
    for start in range(0, K, BLOCK_DEPTH):
        x = load_tile(rows, 0, start, R, K, rows_row, rows_depth, BLOCK_ROWS, BLOCK_DEPTH)
        # On sm_80 the compiler gives all products the layout of the last one; with a narrow last one, the 8 warps that
        # a wide T0 needs would hold the same rows several times. Up to 4 warps that layout is the better one.
        if T0 < 256:
            y = load_tile(columns, start, 0, K, M, columns_depth, columns_column, BLOCK_DEPTH, T0)
            logits0 = multiply(x, y, logits0, MIXED)
        if T1 > 0:
            y = load_tile(columns, start, T0, K, M, columns_depth, columns_column, BLOCK_DEPTH, T1)
            logits1 = multiply(x, y, logits1, MIXED)
        if T2 > 0:
            y = load_tile(columns, start, T0 + T1, K, M, columns_depth, columns_column, BLOCK_DEPTH, T2)
            logits2 = multiply(x, y, logits2, MIXED)
        if T0 >= 256:
            y = load_tile(columns, start, 0, K, M, columns_depth, columns_column, BLOCK_DEPTH, T0)
            logits0 = multiply(x, y, logits0, MIXED)

    # A_ij = exp2(l_ij − max_j l_ij) / Σ_j …, with l = scale_log2 · logits: the true maximum keeps any logits finite.
    logits0 = _scaled(logits0, scale_log2, 0, M, T0)
    top = tl.max(logits0, 1)
    if T1 > 0:
        logits1 = _scaled(logits1, scale_log2, T0, M, T1)
        top = tl.maximum(top, tl.max(logits1, 1))
    if T2 > 0:
        logits2 = _scaled(logits2, scale_log2, T0 + T1, M, T2)
        top = tl.maximum(top, tl.max(logits2, 1))
    logits0 = tl.exp2(logits0 - top[:, None])
    total = tl.sum(logits0, 1)
    if T1 > 0:
        logits1 = tl.exp2(logits1 - top[:, None])
        total += tl.sum(logits1, 1)
    if T2 > 0:
        logits2 = tl.exp2(logits2 - top[:, None])
        total += tl.sum(logits2, 1)
    share = (1.0 / total)[:, None]
    store_tile(relation, logits0 * share, 0, 0, R, M, M, 1, BLOCK_ROWS, T0)
    if T1 > 0:
        store_tile(relation, logits1 * share, 0, T0, R, M, M, 1, BLOCK_ROWS, T1)
    if T2 > 0:
        store_tile(relation, logits2 * share, 0, T0 + T1, R, M, M, 1, BLOCK_ROWS, T2)


@triton.jit
def relation_stream(
    rows,  # (B, H, R, K) by its strides
    columns,  # (B, H, M, K) by its strides
    relation,  # (B, H, R, M), contiguous: output
    R, M, K, num_heads, scale_log2,
    rows_batch, rows_head, rows_row, rows_depth,
    columns_batch, columns_head, columns_column, columns_depth,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    MIXED: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The same for rows that do not fit into registers: the first pass finds maximum and sum, the second writes."""
    M = (M // ALIGNMENT) * ALIGNMENT
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    rows += head // num_heads * rows_batch + head % num_heads * rows_head + first_row.to(tl.int64) * rows_row
    columns += head // num_heads * columns_batch + head % num_heads * columns_head
    relation += (head * R + first_row) * M
    R -= first_row

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for writes in tl.static_range(2):
        for first in range(0, M, BLOCK_COLUMNS):
            logits = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for start in range(0, K, BLOCK_DEPTH):
                x = load_tile(rows, 0, start, R, K, rows_row, rows_depth, BLOCK_ROWS, BLOCK_DEPTH)
                y = load_tile(columns, start, first, K, M, columns_depth, columns_column, BLOCK_DEPTH, BLOCK_COLUMNS)
                logits = multiply(x, y, logits, MIXED)
            logits = _scaled(logits, scale_log2, first, M, BLOCK_COLUMNS)
            if writes == 0:
                higher = tl.maximum(top, tl.max(logits, 1))
                total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
                top = higher
            else:
                value = tl.exp2(logits - top[:, None]) * (1.0 / total)[:, None]
                store_tile(relation, value, 0, first, R, M, M, 1, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _scaled(logits, scale_log2, first, M, WIDTH: tl.constexpr):
    column = first + tl.arange(0, WIDTH)
    return tl.where(column[None, :] < M, logits * scale_log2, float("-inf"))


# The tables. Blocks depend on the dtype of the products ("exact": float32) and on whether tokens are "smooth", that is
# read as 16-byte vectors; otherwise every element costs registers for its own address. Each row compiles without
# spills for sm_80, sm_90 and sm_100 (tests/test_triton_compile.py); none has been timed on a GPU yet.

#: (T0, T1, T2) → (BLOCK_ROWS, warps) for 16-bit smooth, 16-bit, exact smooth and exact; None: relation_stream.
#: Tails of 16 keep 197 tokens from paying for 256, and 37 from paying for 64: from 37 columns on, at most 1.32 times
#: as many are computed. More tiles would waste less and compile longer.
ROWS = {
    (16, 0, 0): ((16, 1), (16, 1), (16, 1), (16, 1)),
    (32, 0, 0): ((16, 1), (16, 1), (16, 1), (16, 1)),
    (32, 16, 0): ((16, 1), (16, 1), (16, 1), (16, 1)),
    (64, 0, 0): ((64, 4), (64, 4), (64, 4), (64, 4)),
    (64, 16, 0): ((32, 2), (32, 2), (32, 2), (32, 4)),
    (64, 32, 0): ((16, 1), (32, 2), (32, 4), (32, 4)),
    (128, 0, 0): ((64, 4), (64, 4), (64, 4), (16, 4)),
    (128, 32, 0): ((64, 4), (64, 4), (16, 4), (16, 4)),
    (128, 64, 16): ((64, 4), (64, 4), (16, 4), (16, 4)),
    (256, 0, 0): ((64, 8), (64, 8), (32, 8), (32, 8)),
    (256, 16, 0): ((64, 8), (64, 8), (16, 4), (32, 8)),
    (256, 64, 0): ((64, 8), (64, 8), (16, 8), (32, 8)),
    (256, 128, 0): ((64, 8), (64, 8), (16, 4), (16, 8)),
    (256, 128, 64): ((64, 8), (64, 8), (32, 8), (16, 8)),
    (512, 0, 0): ((64, 8), (32, 8), (32, 8), None),
}


def column_tiles(columns: int) -> tuple[int, int, int] | None:
    """The narrowest tiles that hold this many columns; None: too many for registers."""
    return next((tiles for tiles in ROWS if sum(tiles) >= columns), None)


def forward_choice(columns: int, exact: bool, smooth: bool, alignment: int, mixed: bool = False) -> Choice:
    common = {"BLOCK_DEPTH": 32 if smooth and not exact else 16, "MIXED": int(mixed), "ALIGNMENT": alignment}
    tiles = column_tiles(columns)
    entry = None if tiles is None else ROWS[tiles][2 * exact + (not smooth)]
    if tiles is None or entry is None:
        return Choice(relation_stream, {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64 if exact else 128, **common}, 8, 2)
    wide = {"T0": tiles[0], "T1": tiles[1], "T2": tiles[2], "BLOCK_ROWS": entry[0]}
    return Choice(relation_rows, {**wide, **common}, entry[1], 2 if exact else 3)


def forward(
    x: Tensor, columns: Tensor, channel: int, num_heads: int, scale: float, normalize: int, symmetric: int
) -> Tensor:
    """The raw operator self_relation_forward of fastssl/ops/self_relation.py."""
    rows = Vectors.of_tokens(x, channel, num_heads)
    others = rows if symmetric else Vectors.of_tokens(columns, channel, num_heads)
    relation = x.new_empty((rows.batch, num_heads, rows.rows, others.rows))
    with on_device(x):
        if normalize:
            dtype = product_dtype(x, columns)
            rows, _ = unit_vectors(rows, dtype)
            others = rows if symmetric else unit_vectors(others, dtype)[0]
        mixed = rows.tensor.dtype != others.tensor.dtype
        exact = mixed or rows.tensor.dtype == torch.float32
        choice = forward_choice(others.rows, exact, rows.smooth() and others.smooth(), alignment(others.rows), mixed)
        programs = rows.batch * num_heads * triton.cdiv(rows.rows, choice.constexprs["BLOCK_ROWS"])
        launch(
            choice, programs, rows.tensor, others.tensor, relation, rows.rows, others.rows, rows.depth, num_heads,
            scale * LOG2E, *rows.strides, *others.strides,
        )  # fmt: skip
    return relation


def configurations() -> Iterator[Configuration]:
    """Every block size in every layout it is for, and a sample of the rest: float16, ALIGNMENT 4, mixed dtypes."""
    for dtype, layout in THOROUGH:
        column = 2 * (dtype == "fp32") + (not LAYOUTS[layout].smooth)
        for tiles, entries in ROWS.items():
            if entries[column] is not None:
                yield _configuration(sum(tiles), layout, dtype)
        yield _configuration(1000, layout, dtype)
    for columns in (48, 64, 208, 272, 1000):
        yield _configuration(columns, "tokens", "fp16")
        yield _configuration(columns, "odd map", "fp16")
        yield _configuration(columns, "tokens", "bf16", known=4)
        yield _configuration(columns, "tokens", "fp32", known=4)
    for other in ("fp16", "fp32"):
        yield _configuration(208, "tokens", "bf16", other=other)
    yield _configuration(1, "single", "fp32")


def _configuration(columns: int, layout: str, dtype: str, known: int = 1, other: str = "") -> Configuration:
    """known: ALIGNMENT; other: the dtype of the columns, if not that of the rows."""
    smooth, strides, count, depth, num_heads = LAYOUTS[layout]
    choice = forward_choice(columns, dtype == "fp32" or other != "", smooth, known, other != "")
    return configuration(
        choice,
        f"{dtype} {layout}" + f" {other} columns" * (other != ""),
        f"*{dtype}:16 *{other or dtype}:16 *{dtype}:16 {count} {count} {depth} {num_heads} fp32 {strides} {strides}",
    )
