"""packed_attention's gradient in Triton, which masked_attention launches too; see _attention.py for the rows.

The formulas are in _attention_gradients.py. It is each sequence's true length that decides, on the device:
    up to SHORT rows: one program of attention_grad_queries writes dQ, dK and dV from one tile of logits;
    up to WHOLE rows: one program of attention_grad_keys does, which has all rows of Q and dO on chip;
    more: a program per block of rows, so that every sum stays in one program, without atomics:
        attention_grad_queries reads q, k, v, dO, O and l; writes dQ and, for the other kernel, delta;
        attention_grad_keys reads q, k, v, dO, l and delta; writes dK and dV.
The last way makes P and dS twice, 7 products instead of 5, and reads its inputs twice. It is the only one in float32,
whose products on the ordinary cores have both operands in registers: all rows of Q and dO are more than there are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels._attention import Rows, Sequences, choose, locate, store_rows, width_of
from fastssl.kernels._attention_blocks import keys, queries
from fastssl.kernels._attention_gradients import by_keys, in_one_tile
from fastssl.kernels.common import Choice, Configuration, architecture, configuration, launch, on_device
from torch import Tensor

_SIZES = ["rows", "heads", "depth_units", "blocks", "per_image"]
_STRIDES = [f"{x}_{axis}" for x in ("q", "k", "v", "grad", "out") for axis in ("image", "head", "row")]


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def attention_grad_queries(
    q, k, v, grad, out,  # by their strides
    lengths, order,  # as of Sequences
    lse,  # (heads, rows) of each image, float32, contiguous
    delta,  # the same: output
    result,  # (rows, 3, heads, depth) of each image, contiguous: output
    rows, heads, depth_units, blocks, per_image,
    scale, scale_log2,  # scale · log2(e)
    q_image, q_head, q_row,  # in UNITs, as all strides
    k_image, k_head, k_row,
    v_image, v_head, v_row,
    grad_image, grad_head, grad_row,
    out_image, out_head, out_row,
    SHORT: tl.constexpr,  # sequences of so many rows, BLOCK or 0, are done here as a whole
    WHOLE: tl.constexpr,  # those of so many by the other kernel
    BLOCK: tl.constexpr, TAIL: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dQ and delta of every `blocks`-th block of queries of a (sequence, head), or all gradients of a short one."""
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sequence = tl.program_id(0) // blocks // heads
    image, begin, count, order = locate(lengths, order, sequence, rows, per_image, INDEXED)
    q += (image * q_image + head * q_head) * 8
    k += (image * k_image + head * k_head) * 8
    v += (image * v_image + head * v_head) * 8
    grad += (image * grad_image + head * grad_head) * 8
    out += (image * out_image + head * out_head) * 8
    lse += (image * heads + head) * rows
    delta += (image * heads + head) * rows
    result += (image * rows * 3 * heads + head) * depth_units * 8
    first = tl.program_id(0) % blocks * BLOCK
    for row in tl.range(first, rows if INDEXED else count, blocks * BLOCK, disable_licm=True):
        if SHORT > 0 and count <= SHORT:
            if row < count:
                in_one_tile(
                    q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
                    q_row, k_row, v_row, grad_row, out_row, BLOCK, DEPTH, INDEXED,
                )  # fmt: skip
        elif count > WHOLE:
            if row + TAIL < count:
                queries(
                    q, k, v, grad, out, order, lse, delta, result, begin, row, count, heads, depth_units, scale,
                    scale_log2, q_row, k_row, v_row, grad_row, out_row, BLOCK, INNER, INNER_TAIL, DEPTH, SLICE, INDEXED,
                )  # fmt: skip
            elif row < count:
                queries(
                    q, k, v, grad, out, order, lse, delta, result, begin, row, count, heads, depth_units, scale,
                    scale_log2, q_row, k_row, v_row, grad_row, out_row, TAIL, INNER, INNER, DEPTH, SLICE, INDEXED,
                )  # fmt: skip
        if INDEXED:
            _drop(result, order, row, count, rows, heads * depth_units, depth_units, BLOCK, DEPTH)


@triton.jit
def _drop(result, order, row, count, rows, one, depth_units, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Zeros for those of a block's rows that are dropped."""
    if row + BLOCK > count:
        at = row + tl.arange(0, BLOCK)
        dropped = (at >= count) & (at < rows)
        token = tl.load(order + at, mask=dropped, other=0)
        zeros = tl.zeros([BLOCK, DEPTH], tl.float32)
        for which in tl.static_range(3):
            part = result + tl.cast(one, tl.int64) * (which * 8)
            store_rows(part, zeros, token, dropped, depth_units * 8, 3 * one, DEPTH)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def attention_grad_keys(
    q, k, v, grad, out,  # by their strides
    lengths, order,  # as of Sequences
    lse, delta,  # (heads, rows) of each image, float32, contiguous
    result,  # (rows, 3, heads, depth) of each image, contiguous: output
    rows, heads, depth_units, blocks, per_image,
    scale, scale_log2,
    q_image, q_head, q_row,  # in UNITs, as all strides
    k_image, k_head, k_row,
    v_image, v_head, v_row,
    grad_image, grad_head, grad_row,
    out_image, out_head, out_row,
    SHORT: tl.constexpr,  # sequences of so many rows are done
    WHOLE: tl.constexpr,  # longer ones of so many are done here as a whole
    BLOCK: tl.constexpr, TAIL: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dK and dV of every `blocks`-th block of keys of a (sequence, head), or all gradients of one that fits."""
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sequence = tl.program_id(0) // blocks // heads
    image, begin, count, order = locate(lengths, order, sequence, rows, per_image, INDEXED)
    q += (image * q_image + head * q_head) * 8
    k += (image * k_image + head * k_head) * 8
    v += (image * v_image + head * v_head) * 8
    grad += (image * grad_image + head * grad_head) * 8
    lse += (image * heads + head) * rows
    delta += (image * heads + head) * rows
    result += (image * rows * 3 * heads + head) * depth_units * 8
    first = tl.program_id(0) % blocks * BLOCK
    if WHOLE > SHORT and (first == 0) & (count > SHORT) & (count <= WHOLE):
        out += (image * out_image + head * out_head) * 8
        if WHOLE // 2 > SHORT and count <= WHOLE // 2:
            by_keys(
                q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, out_row, WHOLE // 2, INNER, DEPTH, INDEXED,
            )  # fmt: skip
        else:
            by_keys(
                q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, out_row, WHOLE, INNER, DEPTH, INDEXED,
            )  # fmt: skip
    for key in tl.range(first, count if count > WHOLE else 0, blocks * BLOCK, disable_licm=True):
        if key + TAIL < count:
            keys(
                q, k, v, grad, order, lse, delta, result, begin, key, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, BLOCK, INNER, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
        else:
            keys(
                q, k, v, grad, order, lse, delta, result, begin, key, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, TAIL, INNER, INNER, DEPTH, SLICE, INDEXED,
            )  # fmt: skip


#: See `choose` in _attention.py.
QUERIES = {
    ("many", 32): (64, 16, 32, 16, 4, 2),
    ("many", 64): (64, 16, 32, 16, 4, 2),
    ("many", 128): (64, 16, 32, 16, 4, 2),
    ("exact", 32): (16, 16, 16, 16, 4, 1),
    ("exact", 64): (32, 16, 16, 16, 2, 1),
    ("exact", 128): (16, 16, 16, 16, 8, 1),
}
KEYS = {
    ("many", 32): (64, 16, 64, 16, 4, 2),
    ("many", 64): (64, 16, 32, 16, 4, 2),
    ("many", 128): (64, 16, 32, 16, 8, 2),
    ("exact", 32): (32, 16, 16, 16, 2, 1),
    ("exact", 64): (32, 16, 16, 16, 4, 1),
    ("exact", 128): (16, 16, 16, 16, 4, 1),
}


#: Architecture and DEPTH → WHOLE → INNER and stages, in 16 bits. 256 rows of 128 channels of Q, dO and dQ fit nowhere;
#: other architectures have 99 KiB of shared memory in a block, too few for any.
WHOLE = {
    (80, 32): {128: (32, 2), 256: (32, 2)},
    (80, 64): {128: (32, 2), 256: (16, 2)},
    (80, 128): {128: (16, 2)},
    (90, 32): {128: (32, 2), 256: (32, 2)},
    (90, 64): {128: (32, 2), 256: (32, 2)},
    (90, 128): {128: (32, 2)},
    (100, 32): {128: (32, 2), 256: (32, 2)},
    (100, 64): {128: (32, 2), 256: (16, 1)},
    (100, 128): {128: (16, 2)},
}
WHOLE_WARPS = 8


class Kind(NamedTuple):
    """What decides how the gradients of a call are made."""

    longest: int
    depth: int
    exact: bool
    indexed: int
    arch: int  # 0: none of those in WHOLE

    def short(self) -> int:
        """All tiles of a sequence at once fit in the registers up to a depth of 64."""
        return 0 if self.exact or width_of(self.depth) > 64 else 64

    def whole(self) -> int:
        """WHOLE; SHORT where sequences are expected to be longer than any, or all short.

        An index is there because rows are dropped: of twice as many, half may be kept.
        """
        table = WHOLE.get((self.arch, width_of(self.depth)), {})
        if not self.exact and self.longest > self.short():
            for rows in table:
                if self.longest <= rows:
                    return rows
            if self.indexed and self.longest <= 2 * max(table, default=0):
                return max(table)
        return self.short()


def queries_choice(kind: Kind) -> Choice:
    choice = choose(attention_grad_queries, QUERIES, *kind[:4])
    choice = choice._replace(constexprs={"SHORT": kind.short(), "WHOLE": kind.whole(), **choice.constexprs})
    # Then longer sequences than expected are all that would be loaded in stages.
    return choice._replace(num_stages=1) if kind.whole() > kind.short() else choice


def keys_choice(kind: Kind) -> Choice:
    choice = choose(attention_grad_keys, KEYS, *kind[:4])
    whole = kind.whole()
    constexprs = {"SHORT": kind.short(), "WHOLE": whole, **choice.constexprs}
    if whole == kind.short():
        return choice._replace(constexprs=constexprs)
    inner, stages = WHOLE[kind.arch, width_of(kind.depth)][whole]
    stages += kind.indexed and stages > 1
    return Choice(attention_grad_keys, constexprs | {"INNER": inner, "INNER_TAIL": 16}, WHOLE_WARPS, stages)


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """The raw operator packed_attention_backward_triton."""
    total, heads, depth = q.shape
    result = q.new_empty((total, 3, heads, depth))
    with on_device(q):
        sequences = Sequences.packed(cu_seqlens, total, max_seqlen)
        write_gradients(grad, out, lse, q, k, v, result, sequences, scale)
    return result


def write_gradients(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, sequences: Sequences,
    scale: float,
) -> None:  # fmt: skip
    """Launches attention_grad_queries and attention_grad_keys, unless no sequence can have a length for it."""
    if result.numel() == 0:
        return
    heads, depth = q.shape[1], q.shape[-1]
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    views = [Rows.of(x) for x in (q, k, v, grad, out)]
    kind = Kind(sequences.longest, depth, q.dtype == torch.float32, sequences.indexed, architecture(q))
    for choice in (queries_choice(kind), keys_choice(kind)):
        short, whole = choice.constexprs["SHORT"], choice.constexprs["WHOLE"]
        if choice.kernel is attention_grad_keys and sequences.rows <= short:
            continue
        if choice.kernel is attention_grad_queries and sequences.lengths is None and short < sequences.rows <= whole:
            continue
        blocks = 1 if short < sequences.longest <= whole else sequences.blocks(choice, heads)
        launch(
            choice, sequences.number * heads * blocks, *(view.tensor for view in views), *sequences.tensors(lse),
            lse, delta, result, sequences.rows, heads, depth // 8, blocks, int(sequences.lengths is None), scale,
            scale * math.log2(math.e), *(stride for view in views for stride in view.strides),
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    for dtype in ("bf16", "fp32"):
        for kind, width in QUERIES:
            if (kind == "exact") == (dtype == "fp32"):
                yield from gradient_configurations(width, dtype, 0)
    yield from gradient_configurations(64, "fp16", 0)


def gradient_configurations(depth: int, dtype: str, indexed: int) -> Iterator[Configuration]:
    exact = dtype == "fp32"
    lengths = (600,) if exact else (100, 200, 300, 600)
    found: dict[Any, set[int]] = defaultdict(set)
    for arch in sorted({arch for arch, _ in WHOLE}):
        for longest in lengths:
            kind = Kind(longest, depth, exact, indexed, arch)
            for choice in (queries_choice(kind), keys_choice(kind)):
                found[(choice.kernel, tuple(choice.constexprs.items()), *choice[2:])].add(arch)
    for (kernel, constexprs, warps, stages), archs in found.items():
        made = configuration(
            Choice(kernel, dict(constexprs), warps, stages),
            dtype,
            f"*{dtype}:16 " * 5 + f"*i32:16 *i32:16 *fp32:16 *fp32:16 *{dtype}:16",
            "i32 i32 i32 i32 i32 fp32 fp32",
            "i32 i32 i32 " * 5,
        )
        yield made._replace(archs=tuple(sorted(archs)))
