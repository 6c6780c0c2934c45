"""self_relation_loss's gradient in Triton, one product with a matrix W that never leaves a program.

With S and T the logits of student and teacher in units of log2, l and m their log-sum-exps per row i, P_ij = 2^(S_ij −
l_i), Q_ij = 2^(T_ij − m_i), w_i the incoming gradient and dS_ij = w_i (P_ij − Q_ij) the logits' gradient:
    dX = s·W Xc,  W = dS           (columns given; dXc = s·Wᵀ X)
    dX = s·W X,   W = dS + dSᵀ     (symmetric: X is both)
S and T are made again tile by tile. Where P_ij > SATURATED, P_ij − Q_ij is taken from the forward pass, as −Σ of the
row's other elements: in rows that are nearly one-hot it is what cancels. No atomics: results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    LAYOUTS,
    LOG2E,
    LONGEST_STRIDE,
    THOROUGH,
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
    product_dtype,
    store_tile,
)
from fastssl.kernels.normalize_rows import backward_through_lengths, unit_vectors
from torch import Tensor

#: At most one element of a row is above it, the largest, whatever the rounding.
SATURATED = tl.constexpr(0.75)


@triton.jit
def loss_product(
    weights,  # (B, H, R) float32 by its strides; unused if WEIGHTS is 0
    stats,  # (3, B, H, R) float32, contiguous: l, m and P − Q of the row's largest P
    student_outer,  # (B, H, outer, K) by its strides
    student_inner,  # (B, H, inner, K) by its strides
    teacher_outer,  # (B, H, outer, L) by its strides
    teacher_inner,  # (B, H, inner, L) by its strides
    product,  # (B, H, outer, K) by its strides: output
    outer,  # R, or M if W is transposed
    inner,  # the other one
    K, L, num_heads,
    all_rows,  # B·H·R
    student_scale_log2, teacher_scale_log2, scale,
    weight_batch, weight_head, weight_row,
    student_outer_batch, student_outer_head, student_outer_row, student_outer_depth,
    student_inner_batch, student_inner_head, student_inner_row, student_inner_depth,
    teacher_outer_batch, teacher_outer_head, teacher_outer_row, teacher_outer_depth,
    teacher_inner_batch, teacher_inner_head, teacher_inner_row, teacher_inner_depth,
    product_batch, product_head, product_outer, product_depth,
    DIRECT: tl.constexpr,  # W has the term dS_oi
    TRANSPOSED: tl.constexpr,  # W has the term dS_io; symmetric relations have both
    WEIGHTS: tl.constexpr,  # 2: one per row; 1: one for all; 0: it is in scale
    WHOLE: tl.constexpr,  # neither K nor L is more than BLOCK_DEPTH
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_GRAM: tl.constexpr,
    MIXED: tl.constexpr,  # rows and columns differ in dtype
):  # fmt: skip
    """product = scale · W student_inner."""
    outer_blocks = tl.cdiv(outer, BLOCK_OUTER)
    depth_blocks = tl.cdiv(K, BLOCK_DEPTH)
    block = tl.program_id(0) // depth_blocks
    head = (block // outer_blocks).to(tl.int64)
    k = (tl.program_id(0) % depth_blocks) * BLOCK_DEPTH
    o = (block % outer_blocks) * BLOCK_OUTER
    image = head // num_heads
    head_in_image = head % num_heads
    weights += image * weight_batch + head_in_image * weight_head
    if WEIGHTS == 1:
        scale *= tl.load(weights)
    stats += head * (outer if DIRECT else inner)
    student_outer += image * student_outer_batch + head_in_image * student_outer_head
    student_inner += image * student_inner_batch + head_in_image * student_inner_head
    teacher_outer += image * teacher_outer_batch + head_in_image * teacher_outer_head
    teacher_inner += image * teacher_inner_batch + head_in_image * teacher_inner_head
    product += image * product_batch + head_in_image * product_head
    product_block(
        weights, stats, student_outer, student_inner, teacher_outer, teacher_inner, product, o, k, outer, inner, K, L,
        all_rows, student_scale_log2, teacher_scale_log2, scale, weight_row, student_outer_row, student_outer_depth,
        student_inner_row, student_inner_depth, teacher_outer_row, teacher_outer_depth, teacher_inner_row,
        teacher_inner_depth, product_outer, product_depth, DIRECT, TRANSPOSED, WEIGHTS == 2, WHOLE, BLOCK_OUTER,
        BLOCK_INNER, BLOCK_DEPTH, BLOCK_GRAM, MIXED,
    )  # fmt: skip


@triton.jit
def product_block(
    weights, stats, student_outer, student_inner, teacher_outer, teacher_inner, product,  # of one image and head
    o, k, outer, inner, K, L, all_rows, student_scale_log2, teacher_scale_log2, scale, weight_row,
    student_outer_row, student_outer_depth, student_inner_row, student_inner_depth,
    teacher_outer_row, teacher_outer_depth, teacher_inner_row, teacher_inner_depth,
    product_outer, product_depth,
    DIRECT: tl.constexpr, TRANSPOSED: tl.constexpr, WEIGHTED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_GRAM: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Block o, k of loss_product's product. Unless rows are WEIGHTED one by one, their weight is in scale."""
    if DIRECT:
        l_o, m_o, largest_o = _three(stats, all_rows, o, outer, BLOCK_OUTER)
        if WEIGHTED:
            w_o = load_vector(weights, o, outer, weight_row, BLOCK_OUTER)
    if WHOLE:
        x_o = load_tile(student_outer, o, 0, outer, K, student_outer_row, student_outer_depth, BLOCK_OUTER, BLOCK_DEPTH)
        y_o = load_tile(teacher_outer, o, 0, outer, L, teacher_outer_row, teacher_outer_depth, BLOCK_OUTER, BLOCK_DEPTH)
    accumulator = tl.zeros([BLOCK_OUTER, BLOCK_DEPTH], tl.float32)
    for i in range(0, inner, BLOCK_INNER):
        x = load_tile(student_inner, i, k, inner, K, student_inner_row, student_inner_depth, BLOCK_INNER, BLOCK_DEPTH)
        if WHOLE:
            y = load_tile(
                teacher_inner, 0, i, L, inner, teacher_inner_depth, teacher_inner_row, BLOCK_DEPTH, BLOCK_INNER
            )
            zeros = tl.zeros([BLOCK_OUTER, BLOCK_INNER], tl.float32)
            s = multiply(x_o, tl.trans(x), zeros, MIXED)
            t = multiply(y_o, y, zeros, MIXED)
        else:
            s = gram_tile(
                student_outer, student_inner, o, i, outer, inner, K, student_outer_row, student_outer_depth,
                student_inner_row, student_inner_depth, BLOCK_OUTER, BLOCK_INNER, BLOCK_GRAM, MIXED,
            )  # fmt: skip
            t = gram_tile(
                teacher_outer, teacher_inner, o, i, outer, inner, L, teacher_outer_row, teacher_outer_depth,
                teacher_inner_row, teacher_inner_depth, BLOCK_OUTER, BLOCK_INNER, BLOCK_GRAM, MIXED,
            )  # fmt: skip
        s *= student_scale_log2
        t *= teacher_scale_log2
        w = tl.zeros([BLOCK_OUTER, BLOCK_INNER], tl.float32)
        if DIRECT:
            p = tl.exp2(s - l_o[:, None])
            ds = tl.where(p > SATURATED, largest_o[:, None], p - tl.exp2(t - m_o[:, None]))
            w += ds * w_o[:, None] if WEIGHTED else ds
        if TRANSPOSED:
            l_i, m_i, largest_i = _three(stats, all_rows, i, inner, BLOCK_INNER)
            p = tl.exp2(s - l_i[None, :])
            ds = tl.where(p > SATURATED, largest_i[None, :], p - tl.exp2(t - m_i[None, :]))
            if WEIGHTED:
                ds *= load_vector(weights, i, inner, weight_row, BLOCK_INNER)[None, :]
            w += ds
        # Where there is no inner vector there was no logit: what stands there may be infinite.
        w = tl.where(tl.arange(0, BLOCK_INNER)[None, :] < inner - i, w, 0.0)
        # w becomes an operand of x's dtype, as the gradient of the logits does in plain PyTorch.
        accumulator = multiply(w if MIXED else w.to(x.dtype), x, accumulator, MIXED)
    store_tile(product, accumulator * scale, o, k, outer, K, product_outer, product_depth, BLOCK_OUTER, BLOCK_DEPTH)


@triton.jit
def _three(stats, all_rows, i, I, WIDTH: tl.constexpr):
    l = load_vector(stats, i, I, 1, WIDTH)
    m = load_vector(stats + all_rows, i, I, 1, WIDTH)
    return l, m, load_vector(stats + all_rows * 2, i, I, 1, WIDTH)


class Side(NamedTuple):
    """Rows or columns: as given, and as they are multiplied."""

    given: Vectors
    used: Vectors
    inverse: Tensor | None  # 1/|x| of each where they were normalised


class Relation(NamedTuple):
    """The student's or the teacher's: two sides, which are one if it is symmetric."""

    rows: Side
    columns: Side
    scale: float

    @staticmethod
    def of_tokens(
        x: Tensor, columns: Tensor, channel: int, num_heads: int, scale: float, normalize: int, symmetric: int
    ) -> Relation:
        """Launches unit_rows where `normalize`."""
        dtype = product_dtype(x, columns)

        def side(tokens: Tensor) -> Side:
            given = Vectors.of_tokens(tokens, channel, num_heads)
            return Side(given, *unit_vectors(given, dtype)) if normalize else Side(given, given, None)

        rows = side(x)
        return Relation(rows, rows if symmetric else side(columns), scale)

    @property
    def mixed(self) -> bool:
        return self.rows.used.tensor.dtype != self.columns.used.tensor.dtype

    @property
    def exact(self) -> bool:
        """Whether products are of float32."""
        return self.mixed or self.rows.used.tensor.dtype == torch.float32


class Traits(NamedTuple):
    """What of a call the tables depend on."""

    depth: int  # the larger one of student's and teacher's
    exact: bool  # a product is of float32
    smooth: bool  # all tokens are read as 16-byte vectors
    along: bool  # all vectors lie in memory without gaps
    mixed: bool = False  # rows and columns differ in dtype

    @staticmethod
    def of(student: Relation, teacher: Relation) -> Traits:
        used = [side.used for relation in (student, teacher) for side in relation[:2]]
        return Traits(
            max(vectors.depth for vectors in used),
            student.exact or teacher.exact,
            all(vectors.smooth() for vectors in used),
            all(vectors.strides[3] == 1 for vectors in used),
            student.mixed or teacher.mixed,
        )

    @property
    def whole(self) -> bool:
        """Whether a block of 16-bit vectors is kept as it is, instead of being read again for each Gram tile."""
        return self.depth <= SHORT and self.along and not self.exact

    @property
    def gram_depth(self) -> int:
        """The depth of the blocks that Gram tiles are made from."""
        return SHORT if self.whole else 16 if self.exact else 32

    def pick(self, entries: tuple[Any, ...]) -> Any:
        """Of what a table holds for 16-bit smooth, 16-bit, exact smooth and exact, as in self_relation.ROWS."""
        return entries[2 * self.exact + (not self.smooth)]


#: The depth of one block, and the number of vectors up to which 64 rows at a time would be mostly padding.
SHORT, FEW = 64, 48

#: (BLOCK_OUTER, BLOCK_INNER, warps, stages) of loss_product, found like those of self_relation.ROWS, for few rows, for
#: whole vectors, then for each BLOCK_DEPTH. A warp multiplies 16 rows: more than BLOCK_OUTER / 16 would do so twice.
PRODUCT = {
    "few": ((16, 16, 1, 2), (32, 16, 2, 2), (32, 16, 2, 1), (32, 16, 2, 1)),
    "whole": ((64, 32, 4, 3), (64, 32, 4, 1), None, None),
    64: ((64, 32, 4, 2), (128, 32, 8, 1), (64, 16, 8, 1), (32, 16, 4, 1)),
    128: ((64, 32, 4, 1), None, (32, 32, 8, 1), (16, 32, 8, 1)),
    256: ((128, 32, 8, 1), None, None, None),
}


def product_choice(rows: int, depth: int, traits: Traits, direct: bool, transposed: bool, weights: int) -> Choice:
    """rows and depth: of the product."""
    # Every depth block makes both Gram matrices again, which costs more than padding, up to a point.
    widths = [width for width in (64, 128, 256) if traits.pick(PRODUCT[width]) is not None]
    width = min(widths, key=lambda width: triton.cdiv(depth, width) * (2 * traits.depth + width))
    kind = "whole" if traits.whole else width
    if rows <= FEW and width == SHORT and (traits.whole or traits.exact):
        kind = "few"
    outer, inner, warps, stages = traits.pick(PRODUCT[kind])
    flags = {"DIRECT": int(direct), "TRANSPOSED": int(transposed), "WEIGHTS": weights, "WHOLE": int(traits.whole)}
    blocks = {"BLOCK_OUTER": outer, "BLOCK_INNER": inner, "BLOCK_DEPTH": width, "BLOCK_GRAM": traits.gram_depth}
    return Choice(loss_product, {**flags, **blocks, "MIXED": int(traits.mixed)}, warps, stages)


class Call(NamedTuple):
    """Arguments of the raw operators, their vectors as they are multiplied, and where the gradients go."""

    student: Relation
    teacher: Relation
    channel: int
    symmetric: int
    wanted: int
    grads: tuple[Tensor, Tensor]  # of student and student_columns; empty where they are not wanted

    @staticmethod
    def of(
        student: Tensor, teacher: Tensor, student_columns: Tensor, teacher_columns: Tensor, channel: int,
        num_heads: int, student_scale: float, teacher_scale: float, normalize: int, symmetric: int, wanted: int,
    ) -> Call:  # fmt: skip
        grad = torch.empty_like(student) if wanted & 1 else student.new_empty(0)
        grad_columns = torch.empty_like(student_columns) if wanted & 2 else student_columns.new_empty(0)
        if symmetric and wanted & 2:
            grad_columns.zero_()
        how = (normalize, symmetric)
        own = Relation.of_tokens(student, student_columns, channel, num_heads, student_scale, *how)
        target = Relation.of_tokens(teacher, teacher_columns, channel, num_heads, teacher_scale, *how)
        return Call(own, target, channel, symmetric, wanted & 1 if symmetric else wanted, (grad, grad_columns))


def backward(weights: Tensor, stats: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The raw operator self_relation_loss_backward. With `symmetric`, the whole gradient is grad_student."""
    with on_device(stats):
        call = Call.of(*arguments)
        if max(weights.stride()) > LONGEST_STRIDE:
            weights = weights.contiguous()
        write_gradients(call, weights, 1.0, stats)
    return call.grads


def write_gradients(call: Call, weights: Tensor | None, factor: float, stats: Tensor) -> None:
    """Those of Σ factor · weights · loss; no weights: all are 1."""
    if call.wanted & 2:
        flipped = (side._replace(rows=side.columns, columns=side.rows) for side in (call.student, call.teacher))
        _write_gradient(weights, factor, stats, *flipped, False, True, call.grads[1], call.channel)
    if call.wanted & 1:
        both = bool(call.symmetric)
        _write_gradient(weights, factor, stats, *call[:2], True, both, call.grads[0], call.channel)


def _write_gradient(
    weights: Tensor | None, factor: float, stats: Tensor, student: Relation, teacher: Relation, direct: bool,
    transposed: bool, grad: Tensor, channel: int,
) -> None:  # fmt: skip
    """That of the student's rows, s·W·columns. `grad` is like the tokens that they are from."""
    rows, columns = student.rows.used, student.columns.used
    target, product = gradient_vectors(student.rows, grad, channel)
    per_row = 0 if weights is None else 2 if any(weights.stride()) else 1
    choice = product_choice(rows.rows, rows.depth, Traits.of(student, teacher), direct, transposed, per_row)
    blocks = triton.cdiv(rows.rows, choice.constexprs["BLOCK_OUTER"])
    blocks *= triton.cdiv(rows.depth, choice.constexprs["BLOCK_DEPTH"])
    vectors = (rows, columns, teacher.rows.used, teacher.columns.used, product)
    launch(
        choice, rows.batch * rows.num_heads * blocks, stats if weights is None else weights, stats,
        *(v.tensor for v in vectors), rows.rows, columns.rows, rows.depth, teacher.rows.used.depth, rows.num_heads,
        stats[0].numel(), student.scale * LOG2E, teacher.scale * LOG2E, student.scale * factor,
        *((0, 0, 0) if weights is None else weights.stride()), *(stride for v in vectors for stride in v.strides),
    )  # fmt: skip
    finish(student.rows, product, target, grad)


def gradient_vectors(side: Side, grad: Tensor, channel: int) -> tuple[Vectors, Vectors]:
    """Where the gradient of this side is to be written, and before that, the one of what was multiplied."""
    target = Vectors.of_tokens(grad, channel, side.given.num_heads)
    if side.inverse is None:
        return target, target
    return target, side.given.like(torch.empty_like(side.used.tensor, dtype=torch.float32))


def finish(side: Side, product: Vectors, target: Vectors, grad: Tensor) -> None:
    """Takes a gradient from where it was written by gradient_vectors to `grad`."""
    if side.inverse is not None:
        backward_through_lengths(product.tensor, side.given, side.inverse, target)
    if target.tensor is not grad:
        grad.copy_(target.tensor)


def layout_traits(dtypes: str, layout: str, depth: int, mixed: bool = False) -> Traits:
    """Of a configuration."""
    along = LAYOUTS[layout].strides.endswith("i32:1")
    return Traits(depth, "fp32" in dtypes or mixed, LAYOUTS[layout].smooth, along, mixed)


def configurations() -> Iterator[Configuration]:
    """Each one once, whatever number of sizes leads to it."""
    yield from {one.description: one for one in _configurations()}.values()


def _configurations() -> Iterator[Configuration]:
    """Every block size in every layout it is for, and a sample of the rest: float16, mixed dtypes."""
    for dtype, layout in THOROUGH:
        for rows, depth, deeper in ((16, 64, 0), (16, 64, 1), (200, 64, 0), (200, 64, 1), (200, 128, 0), (200, 256, 0)):
            for direct, transposed in ((True, True), (True, False), (False, True)):
                if layout != "channels" or (direct and transposed):
                    yield _configuration(rows, depth, layout, dtype, direct, transposed, deeper=deeper)
    for dtype in ("bf16", "fp32"):
        for weights in (0, 2):
            yield _configuration(16, 64, "tokens", dtype, weights=weights)
            yield _configuration(200, 64, "tokens", dtype, weights=weights)
        yield _configuration(200, 256, "channels", dtype, weights=2)
        yield _configuration(200, 64, "odd map", dtype)
        yield _configuration(16, 64, "single", dtype)
    for depth in (64, 256):
        yield _configuration(200, depth, "tokens", "fp16")
    yield _configuration(200, 64, "tokens", "bf16", result="fp32")
    yield _configuration(200, 64, "tokens", "bf16", teacher="fp32")
    for direct in (True, False):
        yield _configuration(200, 64, "tokens", "bf16", direct, not direct, inner="fp32")


def _configuration(
    rows: int, depth: int, layout: str, dtype: str, direct: bool = True, transposed: bool = True, *,
    deeper: int = 0, weights: int = 1, teacher: str = "", inner: str = "", result: str = "",
) -> Configuration:  # fmt: skip
    """deeper: whether the teacher's vectors are longer than the block that holds the student's; teacher, inner, result:
    dtypes of the teacher, the inner vectors and the product, if not that of the rows."""
    _, strides, count, K, num_heads = LAYOUTS[layout]
    traits = layout_traits(dtype + teacher, layout, depth + deeper * SHORT, inner != "")
    choice = product_choice(rows, depth, traits, direct, transposed, weights)
    named = ((teacher, "teacher"), (inner, "inner"), (result, "result"))
    y = teacher or dtype
    return configuration(
        choice,
        f"{dtype} {layout}" + "".join(f" {name} {what}" for name, what in named if name != ""),
        f"*fp32:16 *fp32:16 *{dtype}:16 *{inner or dtype}:16 *{y}:16 *{y}:16 *{result or dtype}:16",
        f"{count} {count} {K} {K} {num_heads} i32 fp32 fp32 fp32",
        "i32 i32 i32:1" if weights == 2 else "i32:16 i32:16 i32:16",
        *[strides] * 5,
    )
