"""self_relation's gradients in Triton, one product with a matrix W that never leaves a program.

With A the relation matrix, X the rows, Y the columns and dS_ij = A_ij (dA_ij − Σ_k A_ik dA_ik) the logits' gradient:
    dX = s·W Y,  W = dS           (columns given; dY = s·Wᵀ X)
    dX = s·W X,  W = dS + dSᵀ     (symmetric: X is both)
dS is computed as A_ij ((dA_ij − g_i) − δ_i), with g_i the dA of the row's largest element and
δ_i = Σ_k A_ik (dA_ik − g_i) / Σ_k A_ik. It is the same, but nothing cancels in rows that are nearly one-hot, or saved
in 16 bits and so no longer of sum 1. No atomics: results are bitwise repeatable. No N×N temporary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    DTYPES,
    LAYOUTS,
    LONGEST_STRIDE,
    THOROUGH,
    Choice,
    Configuration,
    Vectors,
    alignment,
    configuration,
    launch,
    load_tile,
    load_vector,
    multiply,
    on_device,
    product_dtype,
    store_tile,
)
from fastssl.kernels.normalize_rows import backward_through_lengths, unit_vectors
from torch import Tensor


@triton.jit
def relation_delta(
    relation,  # (B, H, R, M), contiguous
    grad,  # (B, H, R, M) by its strides
    level,  # (B, H, R) float32, contiguous: output g
    delta,  # (B, H, R) float32, contiguous: output δ
    R, M, num_heads,
    grad_batch, grad_head, grad_row, grad_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # divides M and every stride of grad but the last
):  # fmt: skip
    """The second pass finds its rows in the cache."""
    M = (M // ALIGNMENT) * ALIGNMENT
    grad_row = (grad_row // ALIGNMENT) * ALIGNMENT
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    relation += head * R * M
    grad += (head // num_heads * grad_batch + head % num_heads * grad_head) // ALIGNMENT * ALIGNMENT

    most = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], -1.0, tl.float32)
    there = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, M, BLOCK_COLUMNS):
        a = load_tile(relation, row, first, R, M, M, 1, BLOCK_ROWS, BLOCK_COLUMNS).to(tl.float32)
        da = load_tile(grad, row, first, R, M, grad_row, grad_column, BLOCK_ROWS, BLOCK_COLUMNS).to(tl.float32)
        there = tl.where(a > most, da, there)
        most = tl.maximum(a, most)
    is_largest = tl.arange(0, BLOCK_COLUMNS)[None, :] == tl.argmax(most, 1)[:, None]
    g = tl.sum(tl.where(is_largest, there, 0.0), 1)[:, None]

    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    shares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, M, BLOCK_COLUMNS):
        a = load_tile(relation, row, first, R, M, M, 1, BLOCK_ROWS, BLOCK_COLUMNS).to(tl.float32)
        da = load_tile(grad, row, first, R, M, grad_row, grad_column, BLOCK_ROWS, BLOCK_COLUMNS).to(tl.float32)
        sums += a * (da - g)
        shares += a
    store_tile(level + head * R, g, row, 0, R, 1, 1, 0, BLOCK_ROWS, 1)
    total = tl.where(row + tl.arange(0, BLOCK_ROWS) < R, tl.sum(shares, 1), 1.0)
    store_tile(delta + head * R, (tl.sum(sums, 1) / total)[:, None], row, 0, R, 1, 1, 0, BLOCK_ROWS, 1)


@triton.jit
def relation_product(
    relation,  # (B, H, R, M), contiguous
    grad,  # (B, H, R, M) by its strides
    level,  # (B, H, R) float32, contiguous: g
    delta,  # (B, H, R) float32, contiguous: δ
    operand,  # (B, H, inner, K) by its strides
    product,  # (B, H, outer, K) by its strides: output
    outer,  # R, or M if W is transposed
    inner,  # the other one
    K, num_heads, scale,
    grad_batch, grad_head, grad_row, grad_column,
    operand_batch, operand_head, operand_inner, operand_depth,
    product_batch, product_head, product_outer, product_depth,
    DIRECT: tl.constexpr,  # W has the term dS_oi
    TRANSPOSED: tl.constexpr,  # W has the term dS_io; symmetric relations have both
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    MIXED: tl.constexpr,  # x and columns differ in dtype
    ALIGNMENT: tl.constexpr,  # divides M and every stride of grad but the last
):  # fmt: skip
    """product = scale · W operand; W is formed tile by tile from A, dA, g and δ."""
    grad_row = (grad_row // ALIGNMENT) * ALIGNMENT
    if DIRECT:
        inner = (inner // ALIGNMENT) * ALIGNMENT
    if TRANSPOSED:
        outer = (outer // ALIGNMENT) * ALIGNMENT
    outer_blocks = tl.cdiv(outer, BLOCK_OUTER)
    depth_blocks = tl.cdiv(K, BLOCK_DEPTH)
    block = tl.program_id(0) // depth_blocks
    head = (block // outer_blocks).to(tl.int64)
    k = (tl.program_id(0) % depth_blocks) * BLOCK_DEPTH
    o = (block % outer_blocks) * BLOCK_OUTER
    relation += head * outer * inner
    grad += (head // num_heads * grad_batch + head % num_heads * grad_head) // ALIGNMENT * ALIGNMENT
    operand += head // num_heads * operand_batch + head % num_heads * operand_head
    product += head // num_heads * product_batch + head % num_heads * product_head
    if DIRECT:  # once; as vectors, a configuration for sm_80 would spill
        g_o = load_tile(level + head * outer, o, 0, outer, 1, 1, 0, BLOCK_OUTER, 1)
        delta_o = load_tile(delta + head * outer, o, 0, outer, 1, 1, 0, BLOCK_OUTER, 1)

    accumulator = tl.zeros([BLOCK_OUTER, BLOCK_DEPTH], tl.float32)
    for i in range(0, inner, BLOCK_INNER):
        w = tl.zeros([BLOCK_OUTER, BLOCK_INNER], tl.float32)
        if DIRECT:
            a = load_tile(relation, o, i, outer, inner, inner, 1, BLOCK_OUTER, BLOCK_INNER)
            da = load_tile(grad, o, i, outer, inner, grad_row, grad_column, BLOCK_OUTER, BLOCK_INNER)
            w += a.to(tl.float32) * ((da.to(tl.float32) - g_o) - delta_o)
        if TRANSPOSED:
            a = load_tile(relation, o, i, outer, inner, 1, outer, BLOCK_OUTER, BLOCK_INNER)
            da = load_tile(grad, o, i, outer, inner, grad_column, grad_row, BLOCK_OUTER, BLOCK_INNER)
            g_i = load_vector(level + head * inner, i, inner, 1, BLOCK_INNER)[None, :]
            delta_i = load_vector(delta + head * inner, i, inner, 1, BLOCK_INNER)[None, :]
            w += a.to(tl.float32) * ((da.to(tl.float32) - g_i) - delta_i)
        x = load_tile(operand, i, k, inner, K, operand_inner, operand_depth, BLOCK_INNER, BLOCK_DEPTH)
        # w becomes an operand of x's dtype, as the gradient of the logits does in plain PyTorch.
        accumulator = multiply(w if MIXED else w.to(x.dtype), x, accumulator, MIXED)
    value = accumulator * scale
    store_tile(product, value, o, k, outer, K, product_outer, product_depth, BLOCK_OUTER, BLOCK_DEPTH)


#: BLOCK_DEPTH → (BLOCK_OUTER, BLOCK_INNER, warps, stages) of relation_product for 16-bit smooth, 16-bit, exact smooth
#: and exact: the columns of self_relation.ROWS, and found like it.
PRODUCT = {
    64: ((64, 32, 4, 2), (64, 16, 8, 2), (32, 16, 8, 1), (32, 16, 8, 1)),
    128: ((64, 32, 8, 2), (64, 16, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)),
    256: ((64, 32, 8, 2), (64, 16, 8, 2), None, None),
}


def delta_choice(alignment: int) -> Choice:
    return Choice(relation_delta, {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "ALIGNMENT": alignment}, 4, 2)


def product_choice(
    depth: int, direct: bool, transposed: bool, exact: bool, smooth: bool, alignment: int, mixed: bool = False
) -> Choice:
    """exact: products of float32 operands; smooth: tokens, and rows of A and dA, are read as vectors."""
    column = 2 * exact + (not smooth)
    # Every depth block forms W again: as wide as can be without padding more than narrower ones would.
    widths = [width for width, entries in PRODUCT.items() if entries[column] is not None]
    width = min(widths, key=lambda width: (triton.cdiv(depth, width) * width, -width))
    outer, inner, warps, stages = PRODUCT[width][column]
    blocks = {"BLOCK_OUTER": outer, "BLOCK_INNER": inner, "BLOCK_DEPTH": width}
    flags = {"DIRECT": int(direct), "TRANSPOSED": int(transposed), "MIXED": int(mixed), "ALIGNMENT": alignment}
    return Choice(relation_product, {**flags, **blocks}, warps, stages)


class _Matrix(NamedTuple):
    """What W is made of."""

    relation: Tensor
    grad: Tensor
    level: Tensor
    delta: Tensor
    scale: float
    alignment: int
    smooth: bool  # rows of relation and grad can be read as vectors


class _Side(NamedTuple):
    """The rows or the columns: as given, and as they were multiplied."""

    given: Vectors
    used: Vectors
    inverse: Tensor | None  # 1/|x| of each where they were normalised


def backward(
    grad: Tensor,
    relation: Tensor,
    x: Tensor,
    columns: Tensor,
    channel: int,
    num_heads: int,
    scale: float,
    normalize: int,
    symmetric: int,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    """The raw operator self_relation_backward. With `symmetric`, the whole gradient is grad_x."""
    grad_x = torch.empty_like(x) if wanted & 1 else x.new_empty(0)
    grad_columns = torch.empty_like(columns) if wanted & 2 else columns.new_empty(0)
    with on_device(x):
        dtype = product_dtype(x, columns)
        rows = _side(x, channel, num_heads, normalize, dtype)
        others = rows if symmetric else _side(columns, channel, num_heads, normalize, dtype)
        matrix = _matrix(grad, relation, scale)
        if symmetric and wanted & 2:
            grad_columns.zero_()
        elif wanted & 2:
            _gradient(matrix, others, rows, False, True, grad_columns, channel)
        if wanted & 1:
            _gradient(matrix, rows, others, True, bool(symmetric), grad_x, channel)
    return grad_x, grad_columns


def _side(tokens: Tensor, channel: int, num_heads: int, normalize: int, dtype: torch.dtype) -> _Side:
    given = Vectors.of_tokens(tokens, channel, num_heads)
    return _Side(given, *unit_vectors(given, dtype)) if normalize else _Side(given, given, None)


def _matrix(grad: Tensor, relation: Tensor, scale: float) -> _Matrix:
    """Launches relation_delta."""
    if not grad.is_contiguous() and max(grad.stride()[2:]) > LONGEST_STRIDE:
        grad = grad.contiguous()
    batch, num_heads, rows, columns = relation.shape
    level, delta = relation.new_empty((2, batch, num_heads, rows), dtype=torch.float32).unbind()
    counts = (columns, *grad.stride()[:3])
    known = alignment(*counts)
    smooth = grad.stride(3) == 1 and (known > 1 or math.gcd(*counts) % 16 == 0)
    choice = delta_choice(known)
    programs = batch * num_heads * triton.cdiv(rows, choice.constexprs["BLOCK_ROWS"])
    launch(choice, programs, relation, grad, level, delta, rows, columns, num_heads, *grad.stride())
    return _Matrix(relation, grad, level, delta, scale, known, smooth)


def _gradient(
    matrix: _Matrix, side: _Side, other: _Side, direct: bool, transposed: bool, result: Tensor, channel: int
) -> None:
    """Writes the gradient of one side, s·W·other, into `result`, a tensor like the tokens it came from."""
    operand = other.used
    target = product = Vectors.of_tokens(result, channel, operand.num_heads)
    if side.inverse is not None:
        product = side.given.like(torch.empty_like(side.used.tensor, dtype=torch.float32))
    mixed = side.used.tensor.dtype != operand.tensor.dtype
    exact = mixed or operand.tensor.dtype == torch.float32
    smooth = matrix.smooth and operand.smooth()
    choice = product_choice(operand.depth, direct, transposed, exact, smooth, matrix.alignment, mixed)
    blocks = triton.cdiv(product.rows, choice.constexprs["BLOCK_OUTER"])
    blocks *= triton.cdiv(operand.depth, choice.constexprs["BLOCK_DEPTH"])
    launch(
        choice, operand.batch * operand.num_heads * blocks, *matrix[:4], operand.tensor, product.tensor, product.rows,
        operand.rows, operand.depth, operand.num_heads, matrix.scale, *matrix.grad.stride(), *operand.strides,
        *product.strides,
    )  # fmt: skip
    if side.inverse is not None:
        backward_through_lengths(product.tensor, side.given, side.inverse, target)
    if target.tensor is not result:
        result.copy_(target.tensor)


#: Types of the gradient's strides; {0} is that of the row length of the relation.
_GRADS = {"": "{0} {0} {0} i32:1", " expanded": "i32:16 i32:16 i32:16 i32:16", " strided": "i32 i32 i32 i32"}


def configurations() -> Iterator[Configuration]:
    """Every block size in every layout it is for, and a sample of the rest: float16, other gradients, mixed dtypes."""
    for dtype, layout in THOROUGH:
        for depth in PRODUCT:
            if depth < 256 or dtype == "bf16":
                for direct, transposed in ((True, True), (True, False), (False, True)):
                    yield _product(depth, layout, dtype, direct, transposed)
    for dtype in ("bf16", "fp32"):
        for depth in (64, 128):
            yield _product(depth, "tokens", dtype, known=4)
        yield _product(64, "odd map", dtype)
        yield _product(64, "tokens", dtype, grad=" expanded")
        yield _product(64, "tokens", dtype, grad=" strided")
        yield _product(64, "single", dtype)
    for depth in PRODUCT:
        yield _product(depth, "tokens", "fp16")
    yield _product(64, "tokens", "bf16", result="fp32")
    yield _product(64, "tokens", "bf16", True, False, operand="fp32")
    yield _product(64, "tokens", "bf16", False, True, operand="fp32")
    for dtype in DTYPES:
        for grad in _GRADS:
            yield _delta("tokens", dtype, grad)
        yield _delta("tokens", dtype, known=4)
        yield _delta("channels", dtype)


def _delta(layout: str, dtype: str, grad: str = "", known: int = 1) -> Configuration:
    count, num_heads = LAYOUTS[layout].count, LAYOUTS[layout].num_heads
    types = f"*{dtype}:16 *{dtype}:16 *fp32:16 *fp32 {count} {count} {num_heads}"
    return configuration(delta_choice(known), f"{dtype} {layout}{grad}", types, _GRADS[grad].format(count))


def _product(
    depth: int,
    layout: str,
    dtype: str,
    direct: bool = True,
    transposed: bool = True,
    *,
    grad: str = "",
    operand: str = "",
    result: str = "",
    known: int = 1,
) -> Configuration:
    """operand: its dtype, if not that of the rows; result: that of the product; known: ALIGNMENT."""
    smooth, strides, count, K, num_heads = LAYOUTS[layout]
    smooth = smooth and grad == "" and (known > 1 or count == "i32:16")
    mixed = operand != ""
    choice = product_choice(depth, direct, transposed, dtype == "fp32" or mixed, smooth, known, mixed)
    description = f"{dtype} {layout}{grad}" + f" {operand} operand" * mixed + f" {result} result" * (result != "")
    return configuration(
        choice,
        description,
        f"*{dtype}:16 *{dtype}:16 *fp32:16 *fp32 *{operand or dtype}:16 *{result or dtype}:16",
        f"{count} {count} {K} {num_heads} fp32",
        _GRADS[grad].format(count),
        strides,
        strides,
    )
