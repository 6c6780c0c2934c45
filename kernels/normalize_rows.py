"""Unit rows in Triton: x̂ = x / |x| and its gradient dx = (dx̂ − x̂ (x̂·dx̂)) / |x|, for kernels that relate cosines.

A row whose squared length is not above NORM_EPS² is zero and gets no gradient: its 1/|x| is taken as 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    DTYPES,
    LAYOUTS,
    Choice,
    Configuration,
    Vectors,
    configuration,
    launch,
    load_tile,
    load_vector,
    store_tile,
)
from torch import Tensor

from fastssl.reference.self_relation import NORM_EPS


@triton.jit
def unit_rows(
    x,  # (B, H, R, K) by its strides
    unit,  # (B, H, R, K), contiguous: output x̂
    inverse,  # (B, H, R) float32, contiguous: output 1/|x|, or 0
    R, K, num_heads,
    smallest,  # NORM_EPS²
    x_batch, x_head, x_row, x_depth,
    BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    x += head // num_heads * x_batch + head % num_heads * x_head
    unit += head * R * K
    shrink = _inverse_lengths(x, first, R, K, smallest, x_row, x_depth, BLOCK_ROWS, BLOCK_DEPTH)
    store_tile(inverse + head * R, shrink, first, 0, R, 1, 1, 0, BLOCK_ROWS, 1)
    for start in range(0, K, BLOCK_DEPTH):
        value = load_tile(x, first, start, R, K, x_row, x_depth, BLOCK_ROWS, BLOCK_DEPTH).to(tl.float32)
        store_tile(unit, value * shrink, first, start, R, K, K, 1, BLOCK_ROWS, BLOCK_DEPTH)


@triton.jit
def row_lengths(
    x,  # (B, H, R, K) by its strides
    inverse,  # (B, H, R) float32, contiguous: output 1/|x|, or 0
    R, K, num_heads,
    smallest,  # NORM_EPS²
    x_batch, x_head, x_row, x_depth,
    BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    x += head // num_heads * x_batch + head % num_heads * x_head
    shrink = _inverse_lengths(x, first, R, K, smallest, x_row, x_depth, BLOCK_ROWS, BLOCK_DEPTH)
    store_tile(inverse + head * R, shrink, first, 0, R, 1, 1, 0, BLOCK_ROWS, 1)


@triton.jit
def _inverse_lengths(x, first, R, K, smallest, x_row, x_depth, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], tl.float32)
    for start in range(0, K, BLOCK_DEPTH):
        value = load_tile(x, first, start, R, K, x_row, x_depth, BLOCK_ROWS, BLOCK_DEPTH).to(tl.float32)
        sums += value * value
    squared = tl.sum(sums, 1)[:, None]
    alive = squared > smallest
    return tl.where(alive, 1.0 / tl.sqrt_rn(tl.where(alive, squared, 1.0)), 0.0)


@triton.jit
def project_rows(
    x,  # (B, H, R, K) by its strides
    grad_unit,  # (B, H, R, K) float32, contiguous: dx̂
    inverse,  # (B, H, R) float32, contiguous: 1/|x|, or 0
    grad,  # (B, H, R, K) by its strides: output dx
    R, K, num_heads,
    x_batch, x_head, x_row, x_depth,
    grad_batch, grad_head, grad_row, grad_depth,
    BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """x̂ is made again from x: rounded to x's dtype it would leave a part of dx̂ along x."""
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    x += head // num_heads * x_batch + head % num_heads * x_head
    grad += head // num_heads * grad_batch + head % num_heads * grad_head
    grad_unit += head * R * K
    shrink = load_vector(inverse + head * R, first, R, 1, BLOCK_ROWS)[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], tl.float32)
    for start in range(0, K, BLOCK_DEPTH):
        unit = load_tile(x, first, start, R, K, x_row, x_depth, BLOCK_ROWS, BLOCK_DEPTH).to(tl.float32) * shrink
        sums += unit * load_tile(grad_unit, first, start, R, K, K, 1, BLOCK_ROWS, BLOCK_DEPTH)
    along = tl.sum(sums, 1)[:, None]
    for start in range(0, K, BLOCK_DEPTH):
        unit = load_tile(x, first, start, R, K, x_row, x_depth, BLOCK_ROWS, BLOCK_DEPTH).to(tl.float32) * shrink
        dx = (load_tile(grad_unit, first, start, R, K, K, 1, BLOCK_ROWS, BLOCK_DEPTH) - unit * along) * shrink
        store_tile(grad, dx, first, start, R, K, grad_row, grad_depth, BLOCK_ROWS, BLOCK_DEPTH)


# All are bound by memory: one tile serves every shape and dtype.
_BLOCK = {"BLOCK_ROWS": 32, "BLOCK_DEPTH": 64}
_UNIT = Choice(unit_rows, _BLOCK, 4, 2)
_LENGTHS = Choice(row_lengths, _BLOCK, 4, 2)
_PROJECT = Choice(project_rows, _BLOCK, 4, 2)


def _programs(x: Vectors) -> int:
    return x.batch * x.num_heads * triton.cdiv(x.rows, _BLOCK["BLOCK_ROWS"])


def unit_vectors(x: Vectors, dtype: torch.dtype) -> tuple[Vectors, Tensor]:
    """x̂ in this dtype and (B, H, rows) inverse lengths in float32."""
    shape = (x.batch, x.num_heads, x.rows)
    unit = x.like(x.tensor.new_empty((*shape, x.depth), dtype=dtype))
    inverse = x.tensor.new_empty(shape, dtype=torch.float32)
    sizes = (x.rows, x.depth, x.num_heads, NORM_EPS**2)
    launch(_UNIT, _programs(x), x.tensor, unit.tensor, inverse, *sizes, *x.strides)
    return unit, inverse


def inverse_lengths(x: Vectors) -> Tensor:
    """(B, H, rows) in float32."""
    inverse = x.tensor.new_empty((x.batch, x.num_heads, x.rows), dtype=torch.float32)
    sizes = (x.rows, x.depth, x.num_heads, NORM_EPS**2)
    launch(_LENGTHS, _programs(x), x.tensor, inverse, *sizes, *x.strides)
    return inverse


def backward_through_lengths(grad_unit: Tensor, x: Vectors, inverse: Tensor, grad: Vectors) -> None:
    """Writes dx into `grad`, given dx̂, (B, H, rows, depth) float32 contiguous."""
    sizes = (x.rows, x.depth, x.num_heads)
    tensors = (x.tensor, grad_unit, inverse, grad.tensor)
    launch(_PROJECT, _programs(x), *tensors, *sizes, *x.strides, *grad.strides)


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for name in ("tokens", "odd map"):
            _, strides, count, depth, num_heads = LAYOUTS[name]
            vectors = f"{count} {depth} {num_heads}"
            x, single = f"*{dtype}:16", "*fp32:16"
            for unit in sorted({dtype, "fp32"}):
                yield configuration(
                    _UNIT, f"{dtype} {name} to {unit}", x, f"*{unit}:16", single, vectors, "fp32", strides
                )
            yield configuration(_LENGTHS, f"{dtype} {name}", x, single, vectors, "fp32", strides)
            yield configuration(_PROJECT, f"{dtype} {name}", x, single, single, x, vectors, strides, strides)
