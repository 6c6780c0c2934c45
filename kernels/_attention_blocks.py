"""Gradients of a block of queries, or of keys, of a (sequence, head) that is too long for one program.

The formulas are in _attention_gradients.py. A block goes over the other rows tile by tile, so that each sum stays in
one program, without atomics; what is left over after whole tiles is done by smaller ones.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastssl.kernels._attention import LOG2E, dots, load_rows, store_rows, tokens_of
from fastssl.kernels._attention_gradients import probabilities
from fastssl.kernels.common import multiply


@triton.jit
def queries(
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
    large = count
    if count % INNER <= (INNER // 2 if INNER_TAIL < INNER else 0):
        large = count // INNER * INNER
    for key in range(0, large, INNER):
        dq = _add_keys(
            q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
            q_row, k_row, v_row, grad_row, BLOCK, INNER, DEPTH, SLICE, INDEXED,
        )  # fmt: skip
    if INNER_TAIL < INNER:
        for key in tl.range(large, count, INNER_TAIL, num_stages=1):
            dq = _add_keys(
                q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
                q_row, k_row, v_row, grad_row, BLOCK, INNER_TAIL, DEPTH, SLICE, INDEXED,
            )  # fmt: skip
    store_rows(result, dq * scale, token, there, depth, 3 * heads * depth_units, DEPTH)


@triton.jit
def _add_keys(
    q, x, grad, g, token, there, l, d, k, v, order, begin, key, count, depth, dq, scale_log2,
    q_row, k_row, v_row, grad_row,
    BLOCK: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, SLICE: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dq + dS K over keys key … key + INNER."""
    other, here = tokens_of(order, begin, key, count, INNER, INDEXED)
    y = load_rows(k, other, here, depth, k_row, 0, DEPTH)
    z = v
    if SLICE == 0:
        z = load_rows(v, other, here, depth, v_row, 0, DEPTH)
    s = dots(q, x, token, there, q_row, k, y, other, here, k_row, depth, BLOCK, INNER, SLICE)
    p = tl.where(here[None, :], probabilities(s, scale_log2, l[:, None]), 0.0)
    dp = dots(grad, g, token, there, grad_row, v, z, other, here, v_row, depth, BLOCK, INNER, SLICE)
    ds = p * (dp - d[:, None])
    return multiply(ds.to(y.dtype), y, dq, False)


@triton.jit
def keys(
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
    p = probabilities(s, scale_log2, l[None, :])
    dv = multiply(p.to(g.dtype), g, dv, False)
    dp = dots(v, z, token, there, v_row, grad, g, other, here, grad_row, depth, BLOCK, INNER, SLICE)
    ds = p * (dp - d[None, :])
    return multiply(ds.to(x.dtype), x, dk, False), dv
