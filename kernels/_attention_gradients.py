"""All gradients of one (sequence, head) in one program: five products, every sum in its registers, no atomics.

With c = scale · log2(e), l the logarithm of a row's sum of exponentials and dO the incoming gradient:
    P_ij = 2^(c q_i·k_j − l_i log2(e)),  delta_i = dO_i · O_i,  dS_ij = P_ij (dO_i · v_j − delta_i)
    dQ = scale · dS K,  dK = scale · dSᵀ Q,  dV = Pᵀ dO
`in_one_tile` has P and dS of the whole sequence at once. `by_keys` has all rows of Q, dO and dQ on chip, and P and dS
of INNER keys at a time, whose dK and dV are then complete: device memory is read once and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastssl.kernels._attention import LOG2E, load_rows, store_rows, tokens_of
from fastssl.kernels.common import multiply


@triton.jit
def probabilities(logits, scale_log2, l):
    """P; where the rounding of huge logits makes an exponent positive, P is 1 instead of infinite."""
    return tl.exp2(tl.minimum(logits * scale_log2 - l, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def over_rows(weights, rows, KEYS: tl.constexpr, DEPTH: tl.constexpr):
    """weightsᵀ rows, (KEYS, DEPTH). For wgmma, which multiplies 64 rows, as the transpose of rowsᵀ weights.

    Rows are in shared memory, where they are transposed for nothing. Weights are in registers: as the transposed left
    operand of wgmma, they are what compilers before Triton 3.7.1 are said to get wrong on sm_90.
    """
    if KEYS >= 64 or DEPTH >= 64:
        return tl.trans(multiply(tl.trans(rows), weights, tl.zeros([DEPTH, KEYS], tl.float32), False))
    else:
        return multiply(tl.trans(weights), rows, tl.zeros([KEYS, DEPTH], tl.float32), False)


@triton.jit
def in_one_tile(
    q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
    q_row, k_row, v_row, grad_row, out_row, BLOCK: tl.constexpr, DEPTH: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Of a sequence of at most BLOCK rows, in 16 bits."""
    depth = depth_units * 8
    token, there = tokens_of(order, begin, 0, count, BLOCK, INDEXED)
    x = load_rows(q, token, there, depth, q_row, 0, DEPTH)
    y = load_rows(k, token, there, depth, k_row, 0, DEPTH)
    g = load_rows(grad, token, there, depth, grad_row, 0, DEPTH)
    l = tl.load(lse + token, mask=there, other=0.0) * LOG2E
    square = tl.zeros([BLOCK, BLOCK], tl.float32)
    p = probabilities(multiply(x, tl.trans(y), square, False), scale_log2, l[:, None])
    p = tl.where(there[None, :], p, 0.0)
    one = heads * depth_units
    part = tl.cast(one, tl.int64) * 8
    dv = over_rows(p.to(x.dtype), g, BLOCK, DEPTH)
    store_rows(result + part * 2, dv, token, there, depth, 3 * one, DEPTH)
    z = load_rows(v, token, there, depth, v_row, 0, DEPTH)
    o = load_rows(out, token, there, depth, out_row, 0, DEPTH)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    ds = (p * (multiply(g, tl.trans(z), square, False) - d[:, None])).to(x.dtype)
    dq = multiply(ds, y, tl.zeros([BLOCK, DEPTH], tl.float32), False)
    store_rows(result, dq * scale, token, there, depth, 3 * one, DEPTH)
    dk = over_rows(ds, x, BLOCK, DEPTH)
    store_rows(result + part, dk * scale, token, there, depth, 3 * one, DEPTH)


@triton.jit
def by_keys(
    q, k, v, grad, out, order, lse, result, begin, count, heads, depth_units, scale, scale_log2,
    q_row, k_row, v_row, grad_row, out_row,
    ROWS: tl.constexpr, INNER: tl.constexpr, DEPTH: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Of a sequence of at most ROWS rows, in 16 bits. Rows beyond it have no Q, dO and delta, and add nothing."""
    depth = depth_units * 8
    one = heads * depth_units
    part = tl.cast(one, tl.int64) * 8
    token, there = tokens_of(order, begin, 0, count, ROWS, INDEXED)
    g = load_rows(grad, token, there, depth, grad_row, 0, DEPTH)
    o = load_rows(out, token, there, depth, out_row, 0, DEPTH)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    x = load_rows(q, token, there, depth, q_row, 0, DEPTH)
    l = tl.load(lse + token, mask=there, other=0.0) * LOG2E
    square = tl.zeros([ROWS, INNER], tl.float32)
    dq = tl.zeros([ROWS, DEPTH], tl.float32)
    for key in range(0, count, INNER):
        other, here = tokens_of(order, begin, key, count, INNER, INDEXED)
        y = load_rows(k, other, here, depth, k_row, 0, DEPTH)
        z = load_rows(v, other, here, depth, v_row, 0, DEPTH)
        p = probabilities(multiply(x, tl.trans(y), square, False), scale_log2, l[:, None])
        p = tl.where(here[None, :], p, 0.0)
        ds = (p * (multiply(g, tl.trans(z), square, False) - d[:, None])).to(x.dtype)
        dv = over_rows(p.to(x.dtype), g, INNER, DEPTH)
        dk = over_rows(ds, x, INNER, DEPTH)
        store_rows(result + part * 2, dv, other, here, depth, 3 * one, DEPTH)
        store_rows(result + part, dk * scale, other, here, depth, 3 * one, DEPTH)
        dq = multiply(ds, y, dq, False)
    store_rows(result, dq * scale, token, there, depth, 3 * one, DEPTH)
