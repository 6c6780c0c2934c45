"""gram_loss in Triton: two kernels that make the Gram matrices of student and teacher tile by tile, and keep neither.

N tokens, of depth K in the student and L in the teacher; S = X Xᵀ, T = Y Yᵀ of one image. Where tokens are normalised,
products are of the tokens as they are and are divided by both lengths afterwards: unit tokens rounded to 16 bits would
drown the difference of matrices that are nearly equal.
    gram_squares: Σ (S − T)², one number per block of rows, which torch adds up. S and T are symmetric: only blocks on
        and below the diagonal are made, and what is below it counts twice.
    gram_product: dX = 4 w·D X with D = S − T, or 0 where the student's similarity was removed.
No atomics: results are bitwise repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    LAYOUTS,
    Choice,
    Configuration,
    Vectors,
    configuration,
    gram_tile,
    launch,
    load_tile,
    load_vector,
    multiply,
    on_device,
    store_tile,
)
from fastssl.kernels.normalize_rows import backward_through_lengths, inverse_lengths
from torch import Tensor


@triton.jit
def gram_squares(
    student,  # (B, N, K) by its strides
    teacher,  # (B, N, L) by its strides
    student_inverse,  # (B, N) float32, contiguous: 1/length, or 0; unused unless NORMALIZE
    teacher_inverse,
    sums,  # (B, blocks of rows) float32, contiguous: output
    N, K, L,
    student_least, teacher_least,  # similarities below it count as 0: 0 or −∞
    student_batch, student_row, student_depth,
    teacher_batch, teacher_row, teacher_depth,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_GRAM: tl.constexpr,
):  # fmt: skip
    """Share of a block of rows in Σ (S − T)²."""
    row_blocks = tl.cdiv(N, BLOCK_ROWS)
    image = (tl.program_id(0) // row_blocks).to(tl.int64)
    block = row_blocks - 1 - tl.program_id(0) % row_blocks  # those that have most to do begin first
    row = block * BLOCK_ROWS
    student += image * student_batch
    teacher += image * teacher_batch
    student_inverse += image * N
    teacher_inverse += image * N
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for column in range(0, tl.minimum(row + BLOCK_ROWS, N), BLOCK_COLUMNS):
        d = _differences(
            student, teacher, student_inverse, teacher_inverse, row, column, N, K, L, student_least, teacher_least,
            student_row, student_depth, teacher_row, teacher_depth, NORMALIZE, False,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_GRAM,
        )  # fmt: skip
        below = (row - column) + (tl.arange(0, BLOCK_ROWS)[:, None] - tl.arange(0, BLOCK_COLUMNS)[None, :])
        total += tl.where(below > 0, 2.0, tl.where(below == 0, 1.0, 0.0)) * (d * d)
    tl.store(sums + image * row_blocks + block, tl.sum(total))


@triton.jit
def gram_product(
    upstream,  # one float32
    student,  # (B, N, K) by its strides
    teacher,  # (B, N, L) by its strides
    student_inverse,  # as of gram_squares
    teacher_inverse,
    product,  # (B, N, K) by its strides: output
    N, K, L,
    student_least, teacher_least,  # as of gram_squares
    scale,  # 4 w
    student_batch, student_row, student_depth,
    teacher_batch, teacher_row, teacher_depth,
    product_batch, product_row, product_depth,
    NORMALIZE: tl.constexpr,  # product is the gradient of the unit tokens
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_GRAM: tl.constexpr,
):  # fmt: skip
    """product = upstream · scale · D student; of the unit tokens if NORMALIZE."""
    row_blocks = tl.cdiv(N, BLOCK_ROWS)
    depth_blocks = tl.cdiv(K, BLOCK_DEPTH)
    block = tl.program_id(0) // depth_blocks
    image = (block // row_blocks).to(tl.int64)
    k = (tl.program_id(0) % depth_blocks) * BLOCK_DEPTH
    row = (block % row_blocks) * BLOCK_ROWS
    student += image * student_batch
    teacher += image * teacher_batch
    student_inverse += image * N
    teacher_inverse += image * N
    product += image * product_batch
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], tl.float32)
    for column in range(0, N, BLOCK_COLUMNS):
        d = _differences(
            student, teacher, student_inverse, teacher_inverse, row, column, N, K, L, student_least, teacher_least,
            student_row, student_depth, teacher_row, teacher_depth, NORMALIZE, True,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_GRAM,
        )  # fmt: skip
        x = load_tile(student, column, k, N, K, student_row, student_depth, BLOCK_COLUMNS, BLOCK_DEPTH)
        if NORMALIZE and x.dtype == tl.float16:  # whose range D over a length may leave
            x = (x * load_vector(student_inverse, column, N, 1, BLOCK_COLUMNS)[:, None]).to(tl.float16)
        elif NORMALIZE:
            d *= load_vector(student_inverse, column, N, 1, BLOCK_COLUMNS)[None, :]
        accumulator = multiply(d.to(x.dtype), x, accumulator, False)
    accumulator *= scale * tl.load(upstream)
    store_tile(product, accumulator, row, k, N, K, product_row, product_depth, BLOCK_ROWS, BLOCK_DEPTH)


@triton.jit
def _differences(
    student, teacher, student_inverse, teacher_inverse,  # of one image
    row, column, N, K, L, student_least, teacher_least, student_row, student_depth, teacher_row, teacher_depth,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,  # 0 where the student's similarity was removed: half the gradient of the square
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_GRAM: tl.constexpr,
):  # fmt: skip
    """S − T of a block of rows and columns, zero outside."""
    s = gram_tile(
        student, student, row, column, N, N, K, student_row, student_depth, student_row, student_depth,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_GRAM, False,
    )  # fmt: skip
    t = gram_tile(
        teacher, teacher, row, column, N, N, L, teacher_row, teacher_depth, teacher_row, teacher_depth,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_GRAM, False,
    )  # fmt: skip
    if NORMALIZE:
        s *= _inverses(student_inverse, row, column, N, BLOCK_ROWS, BLOCK_COLUMNS)
        t *= _inverses(teacher_inverse, row, column, N, BLOCK_ROWS, BLOCK_COLUMNS)
    t = tl.where(t < teacher_least, 0.0, t)
    removed = s < student_least
    if MASKED:
        t = tl.where(removed, s, t)
    else:
        s = tl.where(removed, 0.0, s)
    return s - t


@triton.jit
def _inverses(inverse, row, column, N, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """1 / (length of i · length of j) of a block of rows and columns."""
    of_rows = load_vector(inverse, row, N, 1, BLOCK_ROWS)[:, None]
    return of_rows * load_vector(inverse, column, N, 1, BLOCK_COLUMNS)[None, :]


class Side(NamedTuple):
    """Student or teacher."""

    tokens: Vectors
    inverse: Tensor | None  # 1/|x| of each, where they are normalised

    @staticmethod
    def of_tokens(x: Tensor, normalize: int) -> Side:
        """Launches row_lengths where `normalize`."""
        tokens = Vectors.of_tokens(x, 0, 1)
        return Side(tokens, inverse_lengths(tokens) if normalize else None)


def _strides_of(vectors: Vectors) -> tuple[int, int, int]:
    """Of image, row and depth."""
    image, _, row, depth = vectors.strides
    return image, row, depth


#: (BLOCK_ROWS, BLOCK_COLUMNS, warps, stages) of gram_squares for 16-bit smooth, 16-bit, float32 smooth and float32,
#: as in self_relation.ROWS, for few rows and for many.
SQUARES = {
    "few": ((16, 16, 1, 2), (16, 16, 1, 1), (16, 16, 1, 1), (16, 16, 2, 1)),
    "many": ((64, 64, 8, 3), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
}
#: The same of gram_product, for few rows, then for each BLOCK_DEPTH.
PRODUCT = {
    "few": ((16, 16, 1, 2), (16, 16, 1, 1), (16, 16, 1, 1), (16, 16, 1, 1)),
    64: ((64, 32, 4, 2), (64, 16, 4, 1), (32, 32, 8, 1), (32, 16, 4, 1)),
    128: ((64, 32, 4, 1), None, (32, 32, 8, 1), (16, 16, 4, 1)),
    256: ((64, 32, 8, 2), None, None, None),
}
#: Up to this many rows, blocks of 64 would be mostly padding.
FEW = 48


class Traits(NamedTuple):
    """What of a call the tables depend on."""

    exact: bool  # a product is of float32
    smooth: bool  # all tokens are read as 16-byte vectors

    @staticmethod
    def of(student: Side, teacher: Side) -> Traits:
        sides = (student.tokens, teacher.tokens)
        return Traits(any(v.tensor.dtype == torch.float32 for v in sides), all(v.smooth() for v in sides))

    def pick(self, entries: tuple[Any, ...]) -> Any:
        return entries[2 * self.exact + (not self.smooth)]

    @property
    def gram_depth(self) -> int:
        """The depth of blocks from which Gram tiles are made."""
        return 16 if self.exact else 32


def squares_choice(rows: int, traits: Traits, normalize: int) -> Choice:
    block, width, warps, stages = traits.pick(SQUARES["few" if rows <= FEW else "many"])
    blocks = {"BLOCK_ROWS": block, "BLOCK_COLUMNS": width, "BLOCK_GRAM": traits.gram_depth}
    return Choice(gram_squares, {"NORMALIZE": normalize, **blocks}, warps, stages)


def product_choice(rows: int, depth: int, teacher_depth: int, traits: Traits, normalize: int) -> Choice:
    # Every depth block makes both Gram matrices again, which costs more than padding, up to a point.
    widths = [width for width in (64, 128, 256) if traits.pick(PRODUCT[width]) is not None]
    width = min(widths, key=lambda width: triton.cdiv(depth, width) * (depth + teacher_depth + width))
    few = rows <= FEW and width == 64
    block, columns, warps, stages = traits.pick(PRODUCT["few" if few else width])
    blocks = {"BLOCK_ROWS": block, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": width, "BLOCK_GRAM": traits.gram_depth}
    return Choice(gram_product, {"NORMALIZE": normalize, **blocks}, warps, stages)


def forward(student: Tensor, teacher: Tensor, normalize: int, remove: int, wanted: int) -> tuple[Tensor, Tensor]:
    """The raw operator gram_loss_forward of fastssl/ops/gram_loss.py."""
    with on_device(student):
        own, target = Side.of_tokens(student, normalize), Side.of_tokens(teacher, normalize)
        rows = own.tokens
        choice = squares_choice(rows.rows, Traits.of(own, target), normalize)
        blocks = triton.cdiv(rows.rows, choice.constexprs["BLOCK_ROWS"])
        sums = student.new_empty((rows.batch, blocks), dtype=torch.float32)
        launch(choice, rows.batch * blocks, *_tensors(own, target, sums), sums, *_sizes(own, target, *_LEAST[remove]))
        loss = (sums.sum(dtype=torch.float64) * _weight(rows)).float()
        if not wanted:
            return loss, student.new_empty(0)
        one = torch.ones((), dtype=torch.float32, device=student.device)
        return loss, _gradient(one, own, target, student, remove)


def backward(grad: Tensor, student: Tensor, teacher: Tensor, normalize: int, remove: int) -> Tensor:
    """The raw operator gram_loss_backward."""
    with on_device(student):
        own, target = Side.of_tokens(student, normalize), Side.of_tokens(teacher, normalize)
        return _gradient(grad, own, target, student, remove)


def _tensors(own: Side, target: Side, unused: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inverses = (unused if side.inverse is None else side.inverse for side in (own, target))
    return own.tokens.tensor, target.tokens.tensor, *inverses


def _sizes(own: Side, target: Side, *between: float) -> tuple[float, ...]:
    """Numbers and strides; `between` them whatever the kernel has there."""
    x, y = own.tokens, target.tokens
    return x.rows, x.depth, y.depth, *between, *_strides_of(x), *_strides_of(y)


#: student_least and teacher_least for `remove`: nobody's negative similarities, the teacher's, both.
_LEAST = ((-math.inf, -math.inf), (-math.inf, 0.0), (0.0, 0.0))


def _weight(rows: Vectors) -> float:
    """Of each (S − T)²."""
    return 1.0 / max(rows.batch * rows.rows * rows.rows, 1)


def _gradient(upstream: Tensor, own: Side, target: Side, student: Tensor, remove: int) -> Tensor:
    grad = torch.empty_like(student)
    rows = own.tokens
    result = Vectors.of_tokens(grad, 0, 1)
    normalize = own.inverse is not None
    product = rows.like(torch.empty_like(rows.tensor, dtype=torch.float32)) if normalize else result
    depths = (rows.depth, target.tokens.depth)
    choice = product_choice(rows.rows, *depths, Traits.of(own, target), int(normalize))
    programs = rows.batch * triton.cdiv(rows.rows, choice.constexprs["BLOCK_ROWS"])
    programs *= triton.cdiv(rows.depth, choice.constexprs["BLOCK_DEPTH"])
    sizes = (*_sizes(own, target, *_LEAST[remove], 4.0 * _weight(rows)), *_strides_of(product))
    launch(choice, programs, upstream, *_tensors(own, target, upstream), product.tensor, *sizes)
    if own.inverse is not None:
        backward_through_lengths(product.tensor, rows, own.inverse, result)
    if result.tensor is not grad:
        grad.copy_(result.tensor)
    return grad


def configurations() -> Iterator[Configuration]:
    """Every block size in the layouts it is for, and a sample of the rest: float16, mixed dtypes, no lengths."""
    for dtype in ("bf16", "fp32"):
        for layout in ("tokens", "odd width"):
            for rows in (16, 200):
                yield _squares(rows, layout, dtype)
            for rows, depth in ((16, 64), (200, 64), (200, 128), (200, 256)):
                if depth == 64 or _traits(layout, dtype).pick(PRODUCT[depth]) is not None:
                    yield _product(rows, depth, layout, dtype, result="fp32")
        yield _squares(200, "odd map", dtype)
        yield _product(200, 64, "odd map", dtype, result="fp32")
    yield _squares(200, "tokens", "bf16", normalize=0)
    yield _squares(200, "tokens", "bf16", teacher="fp32")
    yield _squares(16, "single", "bf16")
    yield _product(200, 256, "tokens", "bf16", normalize=0)
    yield _product(200, 64, "tokens", "bf16", teacher="fp32", result="fp32")
    yield _product(200, 256, "tokens", "fp16", result="fp32")


def _squares(rows: int, layout: str, dtype: str, *, normalize: int = 1, teacher: str = "") -> Configuration:
    """teacher: its dtype, if not the student's."""
    _, _, count, depth, _ = LAYOUTS[layout]
    strides = _strides(layout)
    return configuration(
        squares_choice(rows, _traits(layout, dtype + teacher), normalize),
        f"{dtype} {layout}" + (f" {teacher} teacher" if teacher else ""),
        f"*{dtype}:16 *{teacher or dtype}:16 *fp32:16 *fp32:16 *fp32:16",
        f"{count} {depth} {depth} fp32 fp32 {strides} {strides}",
    )


def _product(
    rows: int,
    width: int,
    layout: str,
    dtype: str,
    *,
    normalize: int = 1,
    teacher: str = "",
    result: str = "",
) -> Configuration:
    """teacher, result: dtypes of the teacher and the product, if not that of the student."""
    _, _, count, depth, _ = LAYOUTS[layout]
    return configuration(
        product_choice(rows, width, width, _traits(layout, dtype + teacher), normalize),
        f"{dtype} {layout}" + (f" {teacher} teacher" if teacher else ""),
        f"*fp32:16 *{dtype}:16 *{teacher or dtype}:16 *fp32:16 *fp32:16 *{result or dtype}:16",
        f"{count} {depth} {depth} fp32 fp32 fp32",
        *[_strides(layout)] * 3,
    )


def _strides(layout: str) -> str:
    image, _, row, depth = LAYOUTS[layout].strides.split()
    return f"{image} {row} {depth}"


def _traits(layout: str, dtypes: str) -> Traits:
    return Traits("fp32" in dtypes, LAYOUTS[layout].smooth)
