"""self_relation_loss in Triton: the cross-entropy of the teacher's relation matrix against the student's.

R rows and M columns, of depth K in the student and L in the teacher, seen as in self_relation.py. Logits are made tile
by tile, the columns stream by, and what is kept of a row are its loss and three statistics. For small relations the
gradient is made in the same launch; the kernel for the others is in self_relation_loss_backward.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import (
    LAYOUTS,
    LOG2E,
    THOROUGH,
    Choice,
    Configuration,
    configuration,
    gram_tile,
    launch,
    load_tile,
    multiply,
    on_device,
    store_tile,
)
from fastssl.kernels.self_relation_loss_backward import (
    FEW,
    SHORT,
    Call,
    Traits,
    backward,
    finish,
    gradient_vectors,
    layout_traits,
    product_block,
    write_gradients,
)
from torch import Tensor

__all__ = ["backward", "configurations", "forward"]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def loss_rows(
    student,  # (B, H, R, K) by its strides
    student_columns,  # (B, H, M, K) by its strides
    teacher,  # (B, H, R, L) by its strides
    teacher_columns,  # (B, H, M, L) by its strides
    loss,  # (B, H, R) float32, contiguous: output
    stats,  # (3, B, H, R) float32, contiguous: output l, m and P − Q of the row's largest P
    R, M, K, L, num_heads,
    all_rows,  # B·H·R
    student_scale_log2, teacher_scale_log2,  # scale · log2(e): exp(scale · s) = exp2(scale_log2 · s)
    student_batch, student_head, student_row, student_depth,
    student_columns_batch, student_columns_head, student_columns_row, student_columns_depth,
    teacher_batch, teacher_head, teacher_row, teacher_depth,
    teacher_columns_batch, teacher_columns_head, teacher_columns_row, teacher_columns_depth,
    WHOLE: tl.constexpr,  # neither K nor L is more than BLOCK_DEPTH
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    MIXED: tl.constexpr,  # rows and columns differ in dtype
):  # fmt: skip
    """Loss and statistics of a block of rows."""
    row_blocks = tl.cdiv(R, BLOCK_ROWS)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    image = head // num_heads
    head_in_image = head % num_heads
    student += image * student_batch + head_in_image * student_head
    student_columns += image * student_columns_batch + head_in_image * student_columns_head
    teacher += image * teacher_batch + head_in_image * teacher_head
    teacher_columns += image * teacher_columns_batch + head_in_image * teacher_columns_head
    _rows(
        student, student_columns, teacher, teacher_columns, loss + head * R, stats + head * R, row, R, M, K, L,
        all_rows, student_scale_log2, teacher_scale_log2, student_row, student_depth, student_columns_row,
        student_columns_depth, teacher_row, teacher_depth, teacher_columns_row, teacher_columns_depth,
        WHOLE, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, MIXED,
    )  # fmt: skip


@triton.jit
def loss_and_gradient(
    student, student_columns, teacher, teacher_columns, loss, stats,  # as of loss_rows
    grad,  # (B, H, R, K) by its strides: output
    grad_columns,  # (B, H, M, K) by its strides: output
    R, M, K, L, num_heads, all_rows, student_scale_log2, teacher_scale_log2,
    scale,  # student_scale · the weight of each row
    student_batch, student_head, student_row, student_depth,
    student_columns_batch, student_columns_head, student_columns_row, student_columns_depth,
    teacher_batch, teacher_head, teacher_row, teacher_depth,
    teacher_columns_batch, teacher_columns_head, teacher_columns_row, teacher_columns_depth,
    grad_batch, grad_head, grad_row, grad_depth,
    grad_columns_batch, grad_columns_head, grad_columns_row, grad_columns_depth,
    ROWS: tl.constexpr,  # the gradient of the rows is wanted
    COLUMNS: tl.constexpr,  # that of the columns is
    SYMMETRIC: tl.constexpr,  # rows and columns are the same: grad has the whole gradient
    WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_GRAM: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """loss_rows and loss_product of one image and head in one program, which reads its tokens from memory once."""
    head = tl.program_id(0).to(tl.int64)
    image = head // num_heads
    head_in_image = head % num_heads
    student += image * student_batch + head_in_image * student_head
    student_columns += image * student_columns_batch + head_in_image * student_columns_head
    teacher += image * teacher_batch + head_in_image * teacher_head
    teacher_columns += image * teacher_columns_batch + head_in_image * teacher_columns_head
    grad += image * grad_batch + head_in_image * grad_head
    grad_columns += image * grad_columns_batch + head_in_image * grad_columns_head
    loss += head * R
    stats += head * R
    for row in tl.range(0, R, BLOCK_ROWS, disable_licm=True):
        _rows(
            student, student_columns, teacher, teacher_columns, loss, stats, row, R, M, K, L,
            all_rows, student_scale_log2, teacher_scale_log2, student_row, student_depth, student_columns_row,
            student_columns_depth, teacher_row, teacher_depth, teacher_columns_row, teacher_columns_depth,
            WHOLE, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH if WHOLE else BLOCK_GRAM, MIXED,
        )  # fmt: skip
    tl.debug_barrier()  # statistics that other threads have written are read from here on
    if ROWS:
        for row in tl.range(0, R, BLOCK_ROWS, disable_licm=True):
            product_block(
                loss, stats, student, student_columns, teacher, teacher_columns, grad, row, 0, R, M, K, L,
                all_rows, student_scale_log2, teacher_scale_log2, scale, 0, student_row, student_depth,
                student_columns_row, student_columns_depth, teacher_row, teacher_depth, teacher_columns_row,
                teacher_columns_depth, grad_row, grad_depth, True, SYMMETRIC, False, WHOLE, BLOCK_ROWS,
                BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_GRAM, MIXED,
            )  # fmt: skip
    if COLUMNS:
        for column in tl.range(0, M, BLOCK_ROWS, disable_licm=True):
            product_block(
                loss, stats, student_columns, student, teacher_columns, teacher, grad_columns, column, 0, M, R, K, L,
                all_rows, student_scale_log2, teacher_scale_log2, scale, 0, student_columns_row,
                student_columns_depth, student_row, student_depth, teacher_columns_row, teacher_columns_depth,
                teacher_row, teacher_depth, grad_columns_row, grad_columns_depth, False, True, False, WHOLE,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, BLOCK_GRAM, MIXED,
            )  # fmt: skip


@triton.jit
def _rows(
    student, student_columns, teacher, teacher_columns, loss, stats,  # of one image and head
    row, R, M, K, L, all_rows, student_scale_log2, teacher_scale_log2,
    student_row, student_depth, student_columns_row, student_columns_depth,
    teacher_row, teacher_depth, teacher_columns_row, teacher_columns_depth,
    WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Writes the loss and the statistics of a block of rows.

    Streams over the columns. When a larger logit turns up, what was summed before is made relative to it. The loss is
    log(1 + Σ' 2^(S − top)) + Σ_j Q_j (top − S_j), Σ' without the largest logit, top: no term is negative, so that
    nothing cancels in rows that are nearly one-hot.
    """
    if WHOLE:
        x = load_tile(student, row, 0, R, K, student_row, student_depth, BLOCK_ROWS, BLOCK_DEPTH)
        y = load_tile(teacher, row, 0, R, L, teacher_row, teacher_depth, BLOCK_ROWS, BLOCK_DEPTH)
    top_s = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    top_t = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total_s = tl.zeros([BLOCK_ROWS], tl.float32)  # Σ 2^(S − top_s)
    total_t = tl.zeros([BLOCK_ROWS], tl.float32)  # Σ 2^(T − top_t)
    rest_s = tl.zeros([BLOCK_ROWS], tl.float32)  # the same without the columns where S = top_s
    rest_t = tl.zeros([BLOCK_ROWS], tl.float32)
    cost = tl.zeros([BLOCK_ROWS], tl.float32)  # Σ 2^(T − top_t) (top_s − S)
    for first in range(0, M, BLOCK_COLUMNS):
        if WHOLE:
            x_j = load_tile(
                student_columns, 0, first, K, M, student_columns_depth, student_columns_row, BLOCK_DEPTH, BLOCK_COLUMNS
            )
            y_j = load_tile(
                teacher_columns, 0, first, L, M, teacher_columns_depth, teacher_columns_row, BLOCK_DEPTH, BLOCK_COLUMNS
            )
            zeros = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            s = multiply(x, x_j, zeros, MIXED)
            t = multiply(y, y_j, zeros, MIXED)
        else:
            s = gram_tile(
                student, student_columns, row, first, R, M, K, student_row, student_depth,
                student_columns_row, student_columns_depth, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, MIXED,
            )  # fmt: skip
            t = gram_tile(
                teacher, teacher_columns, row, first, R, M, L, teacher_row, teacher_depth,
                teacher_columns_row, teacher_columns_depth, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, MIXED,
            )  # fmt: skip
        here = tl.where(tl.arange(0, BLOCK_COLUMNS) < M - first, 0.0, float("-inf"))[None, :]
        s *= student_scale_log2
        t = t * teacher_scale_log2 + here
        masked = s + here
        higher_s = tl.maximum(top_s, tl.max(masked, 1))
        higher_t = tl.maximum(top_t, tl.max(t, 1))
        rises = higher_s > top_s
        climb = tl.where(total_s > 0.0, higher_s - top_s, 0.0)
        shrink_s = tl.exp2(top_s - higher_s)
        shrink_t = tl.exp2(top_t - higher_t)
        is_top = masked == higher_s[:, None]
        e = tl.exp2(masked - higher_s[:, None])
        f = tl.exp2(t - higher_t[:, None])
        cost = (cost + climb * total_t) * shrink_t + tl.sum(f * (higher_s[:, None] - s), 1)
        rest_s = tl.where(rises, total_s * shrink_s, rest_s) + tl.sum(tl.where(is_top, 0.0, e), 1)
        rest_t = tl.where(rises, total_t, rest_t) * shrink_t + tl.sum(tl.where(is_top, 0.0, f), 1)
        total_s = total_s * shrink_s + tl.sum(e, 1)
        total_t = total_t * shrink_t + tl.sum(f, 1)
        top_s = higher_s
        top_t = higher_t

    ties = tl.floor(total_s - rest_s + 0.5)  # how many columns share the top: of these, P is not near 1
    others = rest_s + (ties - 1.0)
    up = 1.0 + others
    log1p = tl.where(up == 1.0, others, tl.log(up) * (others / tl.where(up == 1.0, 1.0, up - 1.0)))
    l = top_s + tl.log2(up)
    m = top_t + tl.log2(total_t)
    largest = rest_t / total_t - rest_s / up  # where P is largest and alone, P − Q = −Σ' (P − Q)
    _store_row(loss, log1p + LN2 * (cost / total_t), row, R, BLOCK_ROWS)
    _store_row(stats, l, row, R, BLOCK_ROWS)
    _store_row(stats + all_rows, m, row, R, BLOCK_ROWS)
    _store_row(stats + all_rows * 2, largest, row, R, BLOCK_ROWS)


@triton.jit
def _store_row(base, value, row, R, BLOCK_ROWS: tl.constexpr):
    store_tile(base, value[:, None], row, 0, R, 1, 1, 0, BLOCK_ROWS, 1)


#: (BLOCK_ROWS, BLOCK_COLUMNS, warps, stages) of loss_rows: the columns of PRODUCT, and found like it.
ROWS = {
    "few": ((16, 16, 1, 2), (16, 16, 1, 2), (16, 16, 1, 1), (16, 16, 1, 1)),
    "whole": ((64, 32, 4, 3), (64, 32, 4, 3), None, None),
    "many": ((64, 32, 4, 3), (128, 32, 8, 3), (64, 32, 8, 1), (64, 32, 4, 1)),
}
#: The same of loss_and_gradient.
TOGETHER = {
    "few": ((16, 16, 1, 2), (16, 16, 2, 1), (16, 16, 2, 2), (16, 16, 2, 1)),
    "many": ((64, 32, 4, 3), None, None, None),
}
#: Up to so many rows and columns, loss and gradient are computed together. With more, one program per image and head
#: would leave much of the GPU idle: twice the registers, hence half as many warps, and a fourth of the programs.
ONE_PROGRAM = 64


def rows_choice(columns: int, traits: Traits) -> Choice:
    kind = "few" if columns <= FEW else "whole" if traits.whole else "many"
    rows, width, warps, stages = traits.pick(ROWS[kind])
    blocks = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": width, "BLOCK_DEPTH": traits.gram_depth}
    return Choice(loss_rows, {"WHOLE": int(traits.whole), **blocks, "MIXED": int(traits.mixed)}, warps, stages)


def together_choice(rows: int, columns: int, traits: Traits, symmetric: bool, wanted: int) -> Choice | None:
    """None if loss and gradient are not computed together."""
    most = max(rows, columns)
    if wanted == 0 or most > ONE_PROGRAM or traits.depth > SHORT or not (traits.whole or traits.exact):
        return None
    entry = traits.pick(TOGETHER["few" if most <= FEW else "many"])
    if entry is None:
        return None
    block, width, warps, stages = entry
    flags = {"ROWS": wanted & 1, "COLUMNS": wanted >> 1, "SYMMETRIC": int(symmetric), "WHOLE": int(traits.whole)}
    blocks = {"BLOCK_ROWS": block, "BLOCK_COLUMNS": width, "BLOCK_DEPTH": SHORT, "BLOCK_GRAM": traits.gram_depth}
    return Choice(loss_and_gradient, {**flags, **blocks, "MIXED": int(traits.mixed)}, warps, stages)


def forward(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator self_relation_loss_forward of fastssl/ops/self_relation_loss.py."""
    with on_device(student):
        call = Call.of(student, *arguments)
        own, target = call.student, call.teacher
        vectors = (own.rows.used, own.columns.used, target.rows.used, target.columns.used)
        rows, columns, teacher_rows, _ = vectors
        loss = student.new_empty((rows.batch, rows.num_heads, rows.rows), dtype=torch.float32)
        stats = student.new_empty((3, *loss.shape), dtype=torch.float32)
        tensors = (*(v.tensor for v in vectors), loss, stats)
        sizes = (rows.rows, columns.rows, rows.depth, teacher_rows.depth, rows.num_heads, loss.numel())
        scales = (own.scale * LOG2E, target.scale * LOG2E)
        strides = [stride for v in vectors for stride in v.strides]
        share = 1.0 / max(loss.numel(), 1)
        traits = Traits.of(own, target)
        together = together_choice(rows.rows, columns.rows, traits, bool(call.symmetric), call.wanted)
        if together is None:
            choice = rows_choice(columns.rows, traits)
            programs = rows.batch * rows.num_heads * triton.cdiv(rows.rows, choice.constexprs["BLOCK_ROWS"])
            launch(choice, programs, *tensors, *sizes, *scales, *strides)
            write_gradients(call, None, share, stats)
        else:
            sides = ((1, own.rows, call.grads[0]), (2, own.columns, call.grads[1]))
            results = [
                (side, grad, *gradient_vectors(side, grad, call.channel))
                for bit, side, grad in sides
                if call.wanted & bit
            ]
            first, last = results[0][3], results[-1][3]  # where one is not wanted, nothing is written to it
            launch(
                together, rows.batch * rows.num_heads, *tensors, first.tensor, last.tensor, *sizes, *scales,
                own.scale * share, *strides, *first.strides, *last.strides,
            )  # fmt: skip
            for side, grad, result, product in results:
                finish(side, product, result, grad)
    return loss, stats, *call.grads


def configurations() -> Iterator[Configuration]:
    """Each one once, whatever number of sizes leads to it."""
    yield from {one.description: one for one in _configurations()}.values()


def _configurations() -> Iterator[Configuration]:
    """Every block size in every layout it is for, and a sample of the rest: float16, mixed dtypes."""
    for dtype, layout in THOROUGH:
        for rows, depth in ((16, 64), (16, 65), (200, 64), (200, 65)):
            yield _configuration(rows, depth, layout, dtype)
        for rows in (16, 64):
            if together_choice(rows, rows, layout_traits(dtype, layout, 64), True, 1) is not None:
                yield _configuration(rows, 64, layout, dtype, wanted=1)
                yield _configuration(rows, 64, layout, dtype, wanted=3, symmetric=False)
    for wanted in (0, 1):
        yield _configuration(64, 64, "tokens", "fp16", wanted=wanted)
        for dtype in ("bf16", "fp32"):
            yield _configuration(16, 64, "single", dtype, wanted=wanted)
        yield _configuration(16, 64, "tokens", "bf16", wanted=wanted, teacher="fp32")
        yield _configuration(16, 64, "tokens", "bf16", wanted=wanted, symmetric=False, columns="fp32")
    yield _configuration(200, 64, "tokens", "bf16", teacher="fp32")
    yield _configuration(200, 64, "tokens", "bf16", columns="fp32")
    for wanted in (1, 2):
        yield _configuration(64, 64, "tokens", "bf16", wanted=wanted, symmetric=False)
    yield _configuration(64, 64, "tokens", "bf16", wanted=1, result="fp32")
    for dtype in ("bf16", "fp32"):
        yield _configuration(200, 64, "odd map", dtype)
        yield _configuration(200, 200, "odd map", dtype)


def _configuration(
    rows: int,
    depth: int,
    layout: str,
    dtype: str,
    *,
    wanted: int = 0,
    symmetric: bool = True,
    teacher: str = "",
    columns: str = "",
    result: str = "",
) -> Configuration:
    """teacher, columns, result: dtypes of the teacher, the columns and the gradient, if not that of the rows."""
    _, strides, count, K, num_heads = LAYOUTS[layout]
    traits = layout_traits(dtype + teacher, layout, depth, columns != "")
    choice = together_choice(rows, rows, traits, symmetric, wanted) or rows_choice(rows, traits)
    named = ((teacher, "teacher"), (columns, "columns"), (result, "result"))
    grads = f"*{result or dtype}:16 *{result or columns or dtype}:16" if wanted else ""
    y = teacher or dtype
    return configuration(
        choice,
        f"{dtype} {layout}" + "".join(f" {name} {what}" for name, what in named if name != ""),
        f"*{dtype}:16 *{columns or dtype}:16 *{y}:16 *{y}:16 *fp32:16 *fp32:16 {grads}",
        f"{count} {count} {K} {K} {num_heads} i32 fp32 fp32" + " fp32" * (wanted > 0),
        *[strides] * (6 if wanted else 4),
    )
