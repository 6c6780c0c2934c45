"""packed_attention's gradient in Triton, which masked_attention launches too; see _attention.py for the rows.

With c = scale · log2(e), l the logarithm of a row's sum of exponentials and dO the incoming gradient:
    P_ij = 2^(c q_i·k_j − l_i log2(e)),  delta_i = dO_i · O_i,  dS_ij = P_ij (dO_i · v_j − delta_i)
    dQ = scale · dS K,  dK = scale · dSᵀ Q,  dV = Pᵀ dO
Two launches, each with a program per block of rows, so that every sum stays in one program, without atomics:
    attention_grad_queries: reads q, k, v, dO, O and l; writes dQ and, for the other kernel, delta, which it has anyway.
    attention_grad_keys: reads q, k, v, dO, l and delta; writes dK and dV.
Both make P and dS, 7 products instead of the 5 of one program per (sequence, head). But that one had a fourth of the
programs at 197 rows, and either registers for both sums of all keys or its own partial sums of dQ in memory. Where a
sequence is one block, one program is all there is: the first kernel then writes dQ, dK and dV, and the second one
ends at once. So it is each sequence's true length that decides, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels._attention import (
    LOG2E,
    Rows,
    Sequences,
    choose,
    dots,
    load_rows,
    locate,
    store_rows,
    tokens_of,
    width_of,
)
from fastssl.kernels.common import Choice, Configuration, configuration, launch, multiply, on_device
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
    SHORT: tl.constexpr,  # sequences of so many rows, BLOCK or 0, are done as a whole
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
                _whole_sequence(
                    q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
                    q_row, k_row, v_row, grad_row, out_row, BLOCK, DEPTH, INDEXED,
                )  # fmt: skip
        elif row + TAIL < count:
            _queries(
                q, k, v, grad, out, order, lse, delta, result, begin, row, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, out_row, BLOCK, INNER, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
        elif row < count:
            _queries(
                q, k, v, grad, out, order, lse, delta, result, begin, row, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, out_row, TAIL, INNER, INNER, DEPTH, SLICE, INDEXED,
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


@triton.jit
def _whole_sequence(
    q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
    q_row, k_row, v_row, grad_row, out_row, BLOCK: tl.constexpr, DEPTH: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """All gradients of a sequence of at most BLOCK rows, in 16 bits."""
    depth = depth_units * 8
    token, there = tokens_of(order, begin, 0, count, BLOCK, INDEXED)
    x = load_rows(q, token, there, depth, q_row, 0, DEPTH)
    y = load_rows(k, token, there, depth, k_row, 0, DEPTH)
    g = load_rows(grad, token, there, depth, grad_row, 0, DEPTH)
    l = tl.load(lse + token, mask=there, other=0.0) * LOG2E
    zeros = tl.zeros([BLOCK, DEPTH], tl.float32)
    square = tl.zeros([BLOCK, BLOCK], tl.float32)
    p = tl.exp2(multiply(x, tl.trans(y), square, False) * scale_log2 - l[:, None])
    p = tl.where(there[None, :], p, 0.0)
    one = heads * depth_units
    part = tl.cast(one, tl.int64) * 8
    dv = multiply(tl.trans(p.to(x.dtype)), g, zeros, False)
    store_rows(result + part * 2, dv, token, there, depth, 3 * one, DEPTH)
    z = load_rows(v, token, there, depth, v_row, 0, DEPTH)
    o = load_rows(out, token, there, depth, out_row, 0, DEPTH)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    ds = (p * (multiply(g, tl.trans(z), square, False) - d[:, None])).to(x.dtype)
    dq = multiply(ds, y, zeros, False)
    store_rows(result, dq * scale, token, there, depth, 3 * one, DEPTH)
    dk = multiply(tl.trans(ds), x, zeros, False)
    store_rows(result + part, dk * scale, token, there, depth, 3 * one, DEPTH)


@triton.jit
def _queries(
    q, k, v, grad, out, order, lse, delta, result, begin, row, count, heads, depth_units, scale, scale_log2,
    q_row, k_row, v_row, grad_row, out_row,
    BLOCK: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dQ and delta of one block."""
    depth = depth_units * 8
    token, there = tokens_of(order, begin, row, count, BLOCK, INDEXED)
    g = load_rows(grad, token, there, depth, grad_row, 0, DEPTH)
    o = load_rows(out, token, there, depth, out_row, 0, DEPTH)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + token, d, mask=there)
    l = tl.load(lse + token, mask=there, other=0.0) * LOG2E
    x = q
    if SLICE == 0:
        x = load_rows(q, token, there, depth, q_row, 0, DEPTH)
    else:
        g = grad
    dq = tl.zeros([BLOCK, DEPTH], tl.float32)
    whole = count // INNER * INNER
    for key in range(0, whole, INNER):
        dq = _add_keys(
            q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
            q_row, k_row, v_row, grad_row, False, BLOCK, INNER, DEPTH, SLICE, INDEXED,
        )  # fmt: skip
    large = whole
    if count - whole > (INNER // 2 if INNER_TAIL < INNER else 0):
        large = count
    for key in tl.range(whole, large, INNER, num_stages=1):
        dq = _add_keys(
            q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
            q_row, k_row, v_row, grad_row, True, BLOCK, INNER, DEPTH, SLICE, INDEXED,
        )  # fmt: skip
    if INNER_TAIL < INNER:
        for key in tl.range(large, count, INNER_TAIL, num_stages=1):
            dq = _add_keys(
                q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
                q_row, k_row, v_row, grad_row, True, BLOCK, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
    store_rows(result, dq * scale, token, there, depth, 3 * heads * depth_units, DEPTH)


@triton.jit
def _add_keys(
    q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
    q_row, k_row, v_row, grad_row,
    MASKED: tl.constexpr,  # there may be fewer than INNER keys
    BLOCK: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dq + dS K over keys key … key + INNER."""
    other, here = tokens_of(order, begin, key, count, INNER, INDEXED)
    y = load_rows(k, other, here, depth, k_row, 0, DEPTH)
    z = v
    if SLICE == 0:
        z = load_rows(v, other, here, depth, v_row, 0, DEPTH)
    s = dots(q, x, token, there, q_row, k, y, other, here, k_row, depth, BLOCK, INNER, SLICE)
    p = tl.exp2(s * scale_log2 - l[:, None])
    if MASKED:
        p = tl.where(here[None, :], p, 0.0)
    dp = dots(grad, g, token, there, grad_row, v, z, other, here, v_row, depth, BLOCK, INNER, SLICE)
    ds = p * (dp - d[:, None])
    return multiply(ds.to(y.dtype), y, dq, False)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES])
def attention_grad_keys(
    q, k, v, grad,  # by their strides
    lengths, order,  # as of Sequences
    lse, delta,  # (heads, rows) of each image, float32, contiguous
    result,  # (rows, 3, heads, depth) of each image, contiguous: output
    rows, heads, depth_units, blocks, per_image,
    scale, scale_log2,
    q_image, q_head, q_row,  # in UNITs, as all strides
    k_image, k_head, k_row,
    v_image, v_head, v_row,
    grad_image, grad_head, grad_row,
    SHORT: tl.constexpr,  # sequences of so many rows are done
    BLOCK: tl.constexpr, TAIL: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dK and dV of every `blocks`-th block of keys of a (sequence, head)."""
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
    for key in tl.range(first, count if count > SHORT else 0, blocks * BLOCK, disable_licm=True):
        if key + TAIL < count:
            _keys(
                q, k, v, grad, order, lse, delta, result, begin, key, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, BLOCK, INNER, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
        else:
            _keys(
                q, k, v, grad, order, lse, delta, result, begin, key, count, heads, depth_units, scale, scale_log2,
                q_row, k_row, v_row, grad_row, TAIL, INNER, INNER, DEPTH, SLICE, INDEXED,
            )  # fmt: skip


@triton.jit
def _keys(
    q, k, v, grad, order, lse, delta, result, begin, key, count, heads, depth_units, scale, scale_log2,
    q_row, k_row, v_row, grad_row,
    BLOCK: tl.constexpr, INNER: tl.constexpr, INNER_TAIL: tl.constexpr, DEPTH: tl.constexpr,
    SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block."""
    depth = depth_units * 8
    token, there = tokens_of(order, begin, key, count, BLOCK, INDEXED)
    y = k
    z = v
    if SLICE == 0:
        y = load_rows(k, token, there, depth, k_row, 0, DEPTH)
        z = load_rows(v, token, there, depth, v_row, 0, DEPTH)
    dk = tl.zeros([BLOCK, DEPTH], tl.float32)
    dv = tl.zeros([BLOCK, DEPTH], tl.float32)
    large = count
    if count % INNER <= (INNER // 2 if INNER_TAIL < INNER else 0):
        large = count // INNER * INNER
    for row in range(0, large, INNER):
        dk, dv = _add_queries(
            k, y, v, z, token, there, q, grad, lse, delta, order, begin, row, count, depth, dk, dv, scale_log2,
            q_row, k_row, v_row, grad_row, BLOCK, INNER, DEPTH, SLICE, INDEXED,
        )  # fmt: skip
    if INNER_TAIL < INNER:
        for row in tl.range(large, count, INNER_TAIL, num_stages=1):
            dk, dv = _add_queries(
                k, y, v, z, token, there, q, grad, lse, delta, order, begin, row, count, depth, dk, dv, scale_log2,
                q_row, k_row, v_row, grad_row, BLOCK, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
    one = heads * depth_units
    part = tl.cast(one, tl.int64) * 8
    store_rows(result + part, dk * scale, token, there, depth, 3 * one, DEPTH)
    store_rows(result + part * 2, dv, token, there, depth, 3 * one, DEPTH)


@triton.jit
def _add_queries(
    k, y, v, z, token, there, q, grad, lse, delta, order, begin, row, count, depth, dk, dv, scale_log2,
    q_row, k_row, v_row, grad_row,
    BLOCK: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dk + dSᵀ Q, dv + Pᵀ dO over queries row … row + INNER. Where there is none, dO, delta and hence dS are 0."""
    other, here = tokens_of(order, begin, row, count, INNER, INDEXED)
    x = load_rows(q, other, here, depth, q_row, 0, DEPTH)
    g = load_rows(grad, other, here, depth, grad_row, 0, DEPTH)
    l = tl.load(lse + other, mask=here, other=0.0) * LOG2E
    d = tl.load(delta + other, mask=here, other=0.0)
    s = dots(k, y, token, there, k_row, q, x, other, here, q_row, depth, BLOCK, INNER, SLICE)
    p = tl.exp2(s * scale_log2 - l[None, :])
    dv = multiply(p.to(g.dtype), g, dv, False)
    dp = dots(v, z, token, there, v_row, grad, g, other, here, grad_row, depth, BLOCK, INNER, SLICE)
    ds = p * (dp - d[None, :])
    return multiply(ds.to(x.dtype), x, dk, False), dv


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


def queries_choice(longest: int, depth: int, exact: bool, indexed: int) -> Choice:
    choice = choose(attention_grad_queries, QUERIES, longest, depth, exact, indexed)
    # All tiles of a sequence at once fit in the registers up to a depth of 64, in 16 bits.
    short = 0 if exact or width_of(depth) > 64 else choice.constexprs["BLOCK"]
    return choice._replace(constexprs={"SHORT": short, **choice.constexprs})


def keys_choice(longest: int, depth: int, exact: bool, indexed: int) -> Choice:
    choice = choose(attention_grad_keys, KEYS, longest, depth, exact, indexed)
    short = queries_choice(longest, depth, exact, indexed).constexprs["SHORT"]
    return choice._replace(constexprs={"SHORT": short, **choice.constexprs})


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
    """Launches attention_grad_queries and, unless no sequence can be that long, attention_grad_keys."""
    if result.numel() == 0:
        return
    heads, depth = q.shape[1], q.shape[-1]
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    views = [Rows.of(x) for x in (q, k, v, grad, out)]
    about = (sequences.longest, depth, q.dtype == torch.float32, sequences.indexed)
    for choice, used in ((queries_choice(*about), views), (keys_choice(*about), views[:4])):
        if choice.kernel is attention_grad_keys and sequences.rows <= choice.constexprs["SHORT"]:
            continue
        blocks = sequences.blocks(choice, heads)
        launch(
            choice, sequences.number * heads * blocks, *(view.tensor for view in used), *sequences.tensors(lse),
            lse, delta, result, sequences.rows, heads, depth // 8, blocks, int(sequences.lengths is None), scale,
            scale * math.log2(math.e), *(stride for view in used for stride in view.strides),
        )  # fmt: skip


def configurations() -> Iterator[Configuration]:
    for dtype in ("bf16", "fp32"):
        for kind, width in QUERIES:
            if (kind == "exact") == (dtype == "fp32"):
                yield from gradient_configurations(200, width, dtype, 0)
    yield from gradient_configurations(200, 64, "fp16", 0)


def gradient_configurations(longest: int, depth: int, dtype: str, indexed: int) -> Iterator[Configuration]:
    about = (longest, depth, dtype == "fp32", indexed)
    for choice, views in ((queries_choice(*about), 5), (keys_choice(*about), 4)):
        yield configuration(
            choice,
            dtype,
            f"*{dtype}:16 " * views + f"*i32:16 *i32:16 *fp32:16 *fp32:16 *{dtype}:16",
            "i32 i32 i32 i32 i32 fp32 fp32",
            "i32 i32 i32 " * views,
        )
