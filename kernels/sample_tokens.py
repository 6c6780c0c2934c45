"""sample_tokens in Triton: bilinear samples of a map of tokens, and their gradients, without atomics.

Forward and the grid's gradient gather the four tokens around each point. The gradient of the map goes the other way:
many points add to one token, in an order that must not change. So a program owns a tile of tokens and multiplies the
matrix of weights (tokens × points), which it makes in registers, with the upstream gradients. It skips the points
whose cells touch none of its rows; as grids run in raster order, few tiles are left. A product needs neither sorting
nor a chain of loads from memory that a loop over points would wait for, one point after the other, and on 196 tokens
and 169 points its zeros cost less than the bytes that are moved.

The cell of a point is found in float64, as on every backend: in float32, rounding alone would move points of a map of
100 tokens by 4e-6 of a token. Tokens are addressed with 64 bits: a tile holds few addresses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    DTYPES,
    Choice,
    Configuration,
    configuration,
    launch,
    multiply,
    on_device,
)
from torch import Tensor


@triton.jit
def _locate(grid, first, P, height, width, grid_point, grid_xy, BLOCK_POINTS: tl.constexpr):
    """Cells (y, x) of the points from `first` on, and their positions (fy, fx) in them.

    A cell is named by its north-western token; it is -2, with nothing in the map, where there is none, and where a
    coordinate is not finite: there the position is NaN.
    """
    point = first + tl.arange(0, BLOCK_POINTS)
    at = grid + point.to(tl.int64) * grid_point
    across = tl.load(at, mask=point < P, other=-3.0).to(tl.float64)
    down = tl.load(at + grid_xy, mask=point < P, other=-3.0).to(tl.float64)
    x, fx = _cell(across, width)
    y, fy = _cell(down, height)
    return y, x, fy, fx


@triton.jit
def _cell(coordinate, size):
    at = ((coordinate + 1.0) * size - 1.0) * 0.5
    floor = tl.floor(at)
    inside = (floor >= -1.0) & (floor < size)
    return tl.where(inside, floor, -2.0).to(tl.int32), (at - floor).to(tl.float32)


@triton.jit
def _corner(x, row, column, channel, height, width, C, x_y, x_x, x_channel):
    """The token at (row, column) for each point, zero outside the map: (points, channels) in float32."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = row.to(tl.int64) * x_y + column.to(tl.int64) * x_x
    at = x + (at[:, None] + channel.to(tl.int64)[None, :] * x_channel)
    return tl.load(at, mask=inside[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rows(rows, first, channel, P, C, stride_point, stride_channel, BLOCK_POINTS: tl.constexpr):
    """Rows of points from `first` on: addresses, and which of them there are."""
    point = first + tl.arange(0, BLOCK_POINTS)
    at = point.to(tl.int64)[:, None] * stride_point + channel.to(tl.int64)[None, :] * stride_channel
    return rows + at, (point < P)[:, None] & (channel < C)[None, :]


@triton.jit
def sample_points(
    x,  # (B, h, w, C) by its strides
    grid,  # (B, P, 2) by its strides
    out,  # (B, P, C), contiguous: output
    P, C, height, width,
    x_batch, x_y, x_x, x_channel,
    grid_batch, grid_point, grid_xy,
    BLOCK_POINTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A token outside the map is multiplied too, as a zero: a coordinate that is not finite gives NaN."""
    channel_blocks = tl.cdiv(C, BLOCK_CHANNELS)
    point_blocks = tl.cdiv(P, BLOCK_POINTS)
    image = (tl.program_id(0) // channel_blocks // point_blocks).to(tl.int64)
    first = tl.program_id(0) // channel_blocks % point_blocks * BLOCK_POINTS
    channel = tl.program_id(0) % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    x += image * x_batch
    grid += image * grid_batch
    y, column, fy, fx = _locate(grid, first, P, height, width, grid_point, grid_xy, BLOCK_POINTS)
    token = _corner(x, y, column, channel, height, width, C, x_y, x_x, x_channel)
    value = ((1 - fy) * (1 - fx))[:, None] * token
    token = _corner(x, y, column + 1, channel, height, width, C, x_y, x_x, x_channel)
    value += ((1 - fy) * fx)[:, None] * token
    token = _corner(x, y + 1, column, channel, height, width, C, x_y, x_x, x_channel)
    value += (fy * (1 - fx))[:, None] * token
    token = _corner(x, y + 1, column + 1, channel, height, width, C, x_y, x_x, x_channel)
    value += (fy * fx)[:, None] * token
    at, there = _rows(out + image * P * C, first, channel, P, C, C, 1, BLOCK_POINTS)
    tl.store(at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def sample_grad_tokens(
    grad,  # (B, P, C) by its strides
    grid,  # (B, P, 2) by its strides
    grad_x,  # (B, h, w, C) by its strides: output
    P, C, height, width,
    grad_batch, grad_point, grad_channel,
    grid_batch, grid_point, grid_xy,
    x_batch, x_y, x_x, x_channel,  # of grad_x
    BLOCK_TOKENS: tl.constexpr, BLOCK_POINTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x = W grad, W_tp = (weight of token t at point p)."""
    channel_blocks = tl.cdiv(C, BLOCK_CHANNELS)
    token_blocks = tl.cdiv(height * width, BLOCK_TOKENS)
    image = (tl.program_id(0) // channel_blocks // token_blocks).to(tl.int64)
    first = tl.program_id(0) // channel_blocks % token_blocks * BLOCK_TOKENS
    channel = tl.program_id(0) % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    token = first + tl.arange(0, BLOCK_TOKENS)
    row = (token // width)[:, None]
    column = (token % width)[:, None]
    grad += image * grad_batch
    grid += image * grid_batch

    total = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, P, BLOCK_POINTS):
        y, x, fy, fx = _locate(grid, start, P, height, width, grid_point, grid_xy, BLOCK_POINTS)
        touches = (y >= first // width - 1) & (y <= (first + BLOCK_TOKENS - 1) // width)
        if tl.max(touches.to(tl.int32), 0) > 0:
            weight = _hat(row, y, fy) * _hat(column, x, fx)
            at, there = _rows(grad, start, channel, P, C, grad_point, grad_channel, BLOCK_POINTS)
            g = tl.load(at, mask=there, other=0.0)
            # In 16 bits, a weight is two of them: the four of a point still add up to one.
            high = weight.to(g.dtype)
            total = multiply(high, g, total, 0)
            if g.dtype != tl.float32:
                low = (weight - high.to(tl.float32)).to(g.dtype)
                total = multiply(low, g, total, 0)
    row = token // width
    at = row.to(tl.int64) * x_y + (token - row * width).to(tl.int64) * x_x
    at = at[:, None] + channel.to(tl.int64)[None, :] * x_channel
    there = (token < height * width)[:, None] & (channel < C)[None, :]
    tl.store(grad_x + image * x_batch + at, total.to(grad_x.dtype.element_ty), mask=there)


@triton.jit
def _hat(index, cell, position):
    """The weight of row (or column) `index` for points at `position` in `cell`; exactly 0 where it is no corner."""
    near = tl.where(index == cell[None, :], (1 - position)[None, :], 0.0)
    return tl.where(index == cell[None, :] + 1, position[None, :], near)


@triton.jit
def sample_grad_points(
    grad,  # (B, P, C) by its strides
    x,  # (B, h, w, C) by its strides
    grid,  # (B, P, 2) by its strides
    grad_grid,  # (B, P, 2), contiguous: output
    P, C, height, width,
    grad_batch, grad_point, grad_channel,
    x_batch, x_y, x_x, x_channel,
    grid_batch, grid_point, grid_xy,
    BLOCK_POINTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """size/2 · Σ_c grad_c · slope_c, with the differences of neighbouring tokens first: they are small."""
    point_blocks = tl.cdiv(P, BLOCK_POINTS)
    image = (tl.program_id(0) // point_blocks).to(tl.int64)
    first = tl.program_id(0) % point_blocks * BLOCK_POINTS
    grad += image * grad_batch
    x += image * x_batch
    grid += image * grid_batch
    y, column, fy, fx = _locate(grid, first, P, height, width, grid_point, grid_xy, BLOCK_POINTS)
    sum_x = tl.zeros([BLOCK_POINTS, BLOCK_CHANNELS], tl.float32)
    sum_y = tl.zeros([BLOCK_POINTS, BLOCK_CHANNELS], tl.float32)
    for start in range(0, C, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        at, there = _rows(grad, first, channel, P, C, grad_point, grad_channel, BLOCK_POINTS)
        g = tl.load(at, mask=there, other=0.0).to(tl.float32)
        nw = _corner(x, y, column, channel, height, width, C, x_y, x_x, x_channel)
        ne = _corner(x, y, column + 1, channel, height, width, C, x_y, x_x, x_channel)
        sw = _corner(x, y + 1, column, channel, height, width, C, x_y, x_x, x_channel)
        se = _corner(x, y + 1, column + 1, channel, height, width, C, x_y, x_x, x_channel)
        sum_x += g * ((ne - nw) * (1 - fy)[:, None] + (se - sw) * fy[:, None])
        sum_y += g * ((sw - nw) * (1 - fx)[:, None] + (se - ne) * fx[:, None])
    point = first + tl.arange(0, BLOCK_POINTS)
    to = grad_grid + (image * P + point) * 2
    slope_x = width * 0.5 * tl.sum(sum_x, 1)
    slope_y = height * 0.5 * tl.sum(sum_y, 1)
    tl.store(to, slope_x.to(grad_grid.dtype.element_ty), mask=point < P)
    tl.store(to + 1, slope_y.to(grad_grid.dtype.element_ty), mask=point < P)


# The tables: narrow channels and wide ones. Each row compiles without spills for sm_80, sm_90 and sm_100
# (tests/test_triton_compile.py); none has been timed on a GPU yet.

#: BLOCK_CHANNELS → (BLOCK_POINTS, warps) of sample_points.
POINTS = {32: (16, 4), 128: (16, 8)}
#: The same of sample_grad_points, where every element takes four addresses.
GRAD_POINTS = {32: (16, 4), 128: (8, 8)}
#: BLOCK_CHANNELS → (BLOCK_TOKENS, BLOCK_POINTS, warps) of sample_grad_tokens for 16-bit and float32 products.
TOKENS = {32: ((64, 32, 4), (32, 32, 4)), 128: ((64, 32, 8), (32, 32, 8))}


def _wide(channels: int) -> int:
    """BLOCK_CHANNELS."""
    return 32 if channels <= 32 else 128


def points_choice(channels: int) -> Choice:
    width = _wide(channels)
    points, warps = POINTS[width]
    return Choice(sample_points, {"BLOCK_POINTS": points, "BLOCK_CHANNELS": width}, warps, 1)


def grad_points_choice(channels: int) -> Choice:
    width = _wide(channels)
    points, warps = GRAD_POINTS[width]
    return Choice(sample_grad_points, {"BLOCK_POINTS": points, "BLOCK_CHANNELS": width}, warps, 1)


def grad_tokens_choice(channels: int, exact: bool) -> Choice:
    """exact: products of float32 operands."""
    width = _wide(channels)
    tokens, points, warps = TOKENS[width][exact]
    blocks = {"BLOCK_TOKENS": tokens, "BLOCK_POINTS": points, "BLOCK_CHANNELS": width}
    return Choice(sample_grad_tokens, blocks, warps, 1)


def forward(x: Tensor, grid: Tensor) -> Tensor:
    """The raw operator sample_tokens_forward of fastssl/ops/sample_tokens.py."""
    batch, height, width, channels = x.shape
    points = grid.shape[1]
    out = x.new_empty((batch, points, channels))
    choice = points_choice(channels)
    programs = batch * triton.cdiv(points, choice.constexprs["BLOCK_POINTS"])
    programs *= triton.cdiv(channels, choice.constexprs["BLOCK_CHANNELS"])
    with on_device(x):
        launch(choice, programs, x, grid, out, points, channels, height, width, *x.stride(), *grid.stride())
    return out


def backward(grad: Tensor, x: Tensor, grid: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The raw operator sample_tokens_backward."""
    grad_x = torch.empty_like(x) if wanted & 1 else x.new_empty(0)
    grad_grid = grid.new_empty(grid.shape) if wanted & 2 else grid.new_empty(0)
    batch, height, width, channels = x.shape
    points = grid.shape[1]
    sizes = (points, channels, height, width)
    with on_device(x):
        if wanted & 1:
            choice = grad_tokens_choice(channels, x.dtype == torch.float32)
            programs = batch * triton.cdiv(height * width, choice.constexprs["BLOCK_TOKENS"])
            programs *= triton.cdiv(channels, choice.constexprs["BLOCK_CHANNELS"])
            strides = (*grad.stride(), *grid.stride(), *grad_x.stride())
            launch(choice, programs, grad, grid, grad_x, *sizes, *strides)
        if wanted & 2:
            choice = grad_points_choice(channels)
            programs = batch * triton.cdiv(points, choice.constexprs["BLOCK_POINTS"])
            strides = (*grad.stride(), *x.stride(), *grid.stride())
            launch(choice, programs, grad, x, grid, grad_grid, *sizes, *strides)
    return grad_x, grad_grid


#: Types of a map's strides (image, row, column, channel), of C, and of the strides of upstream gradients.
_LAYOUTS = {
    "tokens": ("i32:16 i32:16 i32:16 i32:1", "i32:16", "i32:16 i32:16 i32:1"),
    "map": ("i32:16 i32 i32:1 i32", "i32:16", "i32:16 i32:16 i32:1"),
    "odd width": ("i32 i32 i32 i32:1", "i32", "i32 i32 i32:1"),
    "strided": ("i32 i32 i32 i32", "i32", "i32 i32 i32"),
    "expanded grad": ("i32:16 i32:16 i32:16 i32:1", "i32:16", "i32:16 i32:16 i32:16"),
    "single": ("i32:1 i32:1 i32:1 i32:1", "i32:1", "i32:1 i32:1 i32:1"),
}


def configurations() -> Iterator[Configuration]:
    """Every block size in every layout and dtype, with a float32 grid; grids of 16 bits are sampled."""
    for dtype in DTYPES:
        for layout in _LAYOUTS:
            for channels in POINTS:
                yield from _configurations(channels, dtype, layout)
        for grid in ("bf16", "fp16"):
            yield from _configurations(128, dtype, "tokens", grid)


def _configurations(channels: int, dtype: str, layout: str, grid: str = "fp32") -> Iterator[Configuration]:
    x, C, grad = _LAYOUTS[layout]
    size = "i32:1" if layout == "single" else "i32"
    sizes = f"i32 {C} {size} {size}"
    strides = "i32 i32 i32:1"  # of the grid
    text = f"{dtype} {layout}" + f" {grid} grid" * (grid != "fp32")
    yield configuration(points_choice(channels), text, f"*{dtype}:16 *{grid}:16 *{dtype}:16", sizes, x, strides)
    yield configuration(
        grad_tokens_choice(channels, dtype == "fp32"),
        text,
        f"*{dtype}:16 *{grid}:16 *{dtype}:16",
        sizes,
        grad,
        strides,
        x,
    )
    yield configuration(
        grad_points_choice(channels),
        text,
        f"*{dtype}:16 *{dtype}:16 *{grid}:16 *{grid}:16",
        sizes,
        grad,
        x,
        strides,
    )
