"""simpool in Triton, forward: five launches, two of which read the tokens.

    token_statistics: μ and r of each token; sums of the tokens of each chunk, and with a power the least y.
    queries: the mean token, and q = Wq mean + bq.
    folded_queries: u = Wkᵀ q of each head.
    attend: logits x̂·t', and for each chunk their maximum, Σ exp and Σ exp · value, the values being x̂ or v^γ.
    finish: adds up the chunks; the attention and the result.
The minimum is completed by those who need it. No atomics: results are bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from fastssl.kernels.common import LOG2E as _LOG2E
from fastssl.kernels.common import Choice, Configuration, configuration, launch, load_tile, on_device, store_tile
from fastssl.kernels.simpool_backward import backward as backward
from fastssl.kernels.simpool_products import (
    IMAGES,
    OUTPUTS,
    few_chunks,
    folded_queries,
    folding_choice,
    matrices,
    product_choice,
    queries,
)
from fastssl.kernels.simpool_tiles import (
    channels,
    direction,
    first_of,
    minimum_kind,
    normalized_tile,
    powers,
    sample,
    samples,
    tiled,
    work,
)
from torch import Tensor

LOG2E = tl.constexpr(_LOG2E)


@triton.jit
def token_statistics(
    x,  # (B, N, C) by its strides
    norm_weight, norm_bias,  # (C,)
    rows,  # (B, 2 + 2H, N): output rows 0, μ, and 1, r
    sums,  # (B, chunks, C): output Σ x
    minima,  # (B, chunks) or, of each channel, (B, chunks, C): output; unused without MINIMUM
    N, C, num_heads, chunks, chunk, norm_eps,
    x_image, x_token, x_channel,
    MINIMUM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The variance is that around the mean. Everything that is kept is float32."""
    place = tl.program_id(0).to(tl.int64)
    image = place // chunks
    first = tl.program_id(0) % chunks * chunk
    x += image * x_image
    rows += image * (2 + 2 * num_heads) * N
    channel = tl.arange(0, BLOCK_CHANNELS)
    if MINIMUM:
        weight = channels(norm_weight, C, 1, BLOCK_CHANNELS)
        bias = channels(norm_bias, C, 1, BLOCK_CHANNELS)
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    least = tl.full([BLOCK_CHANNELS], float("inf"), tl.float32)
    for token in range(first, tl.minimum(first + chunk, N), BLOCK_TOKENS):
        value = load_tile(x, token, 0, N, C, x_token, x_channel, BLOCK_TOKENS, BLOCK_CHANNELS).to(tl.float32)
        total += tl.sum(value, 0)
        mean = tl.sum(value, 1)[:, None] / C
        centred = tl.where(channel[None, :] < C, value - mean, 0.0)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1)[:, None] / C + norm_eps)
        store_tile(rows, mean, token, 0, N, 1, 1, 0, BLOCK_TOKENS, 1)
        store_tile(rows + N, inverse, token, 0, N, 1, 1, 0, BLOCK_TOKENS, 1)
        if MINIMUM:
            y = tl.fma((value - mean) * inverse, weight, bias)
            here = (tl.arange(0, BLOCK_TOKENS) < N - token)[:, None] & (channel < C)[None, :]
            least = tl.minimum(least, tl.min(tl.where(here, y, float("inf")), 0))
    tl.store(sums + place * C + channel, total, mask=channel < C)
    if MINIMUM == 1:
        tl.store(minima + place, tl.min(least, 0))
    if MINIMUM == 2:
        tl.store(minima + place * C + channel, least, mask=channel < C)


@triton.jit
def attend(
    x,  # (B, N, C) by its strides
    norm_weight, norm_bias,  # (C,)
    vectors,  # (B, 3 + H, C): rows 3 …, u
    minima,  # (minima_size,) of the batch, or (B, minima_size, C) of each channel; unused without MINIMUM
    minimum,  # (1,) or (B, C): output
    rows,  # (B, 2 + 2H, N): rows 0, 1; output rows 2 …, the logits
    statistics,  # (2, B, chunks, H): output, the largest logit and Σ exp
    pooled,  # (B, chunks, C): output, Σ exp · value
    N, C, num_heads, head_size, all_statistics, chunks, chunk, minima_size, scale, gamma, eps,
    x_image, x_token, x_channel,
    MINIMUM: tl.constexpr,
    MANY: tl.constexpr,  # there are several heads, and a chunk is one tile
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    image = place // chunks
    part = tl.program_id(0) % chunks
    first = part * chunk
    x += image * x_image
    rows += image * (2 + 2 * num_heads) * N
    vectors += image * (3 + num_heads) * C + 3 * C
    statistics += place * num_heads
    channel = tl.arange(0, BLOCK_CHANNELS)
    weight = channels(norm_weight, C, 1, BLOCK_CHANNELS)
    if MINIMUM:
        bias = channels(norm_bias, C, 1, BLOCK_CHANNELS)
    if MINIMUM == 1:
        least = _least(minima, minima_size)
        tl.store(minimum, least, mask=tl.program_id(0) == 0)
    if MINIMUM == 2:
        least = _least_of_channels(minima + image * minima_size * C, minima_size, C, BLOCK_CHANNELS)
        tl.store(minimum + image * C + channel[None, :], least, mask=(channel < C)[None, :] & (part == 0))
    if not MANY:
        towards = direction(vectors, weight, scale, C, BLOCK_CHANNELS)
    largest = float("-inf")
    share = 0.0
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for token in range(first, tl.minimum(first + chunk, N), BLOCK_TOKENS):
        unit, _ = normalized_tile(x, rows, token, N, C, x_token, x_channel, BLOCK_TOKENS, BLOCK_CHANNELS)
        value = unit
        if MINIMUM:
            _, v, slope = powers(unit, weight, bias, least, token, N, C, eps, gamma, BLOCK_TOKENS, BLOCK_CHANNELS)
            value = v * slope
        if MANY:
            mine = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
            for head in range(0, num_heads):
                towards = direction(vectors + head * C, weight, scale, C, BLOCK_CHANNELS)
                logits = _logits(rows, unit, towards, head, token, N, BLOCK_TOKENS)
                top = tl.max(logits, 0)
                e = tl.exp2((logits - top) * LOG2E)
                tl.store(statistics + head, top)
                tl.store(statistics + all_statistics + head, tl.sum(e, 0))
                mine = tl.where((channel // head_size == head)[None, :], e[:, None], mine)
            total += tl.sum(mine * value, 0)
        else:
            logits = _logits(rows, unit, towards, 0, token, N, BLOCK_TOKENS)
            higher = tl.maximum(largest, tl.max(logits, 0))
            shrink = tl.exp2((largest - higher) * LOG2E)
            e = tl.exp2((logits - higher) * LOG2E)
            share = share * shrink + tl.sum(e, 0)
            total = total * shrink + tl.sum(e[:, None] * value, 0)
            largest = higher
    tl.store(pooled + place * C + channel, total, mask=channel < C)
    if not MANY:
        tl.store(statistics, largest)
        tl.store(statistics + all_statistics, share)


@triton.jit
def _logits(rows, unit, towards, head, token, N, BLOCK_TOKENS: tl.constexpr):
    """Of the tokens from `token` on, which it stores; −∞ beyond N."""
    logits = tl.sum(unit * towards, 1)
    to = rows + tl.cast(2 + head, tl.int64) * N
    store_tile(to, logits[:, None], token, 0, N, 1, 1, 0, BLOCK_TOKENS, 1)
    return tl.where(tl.arange(0, BLOCK_TOKENS) < N - token, logits, float("-inf"))


@triton.jit
def _least(minima, size):
    at = tl.arange(0, 1024)
    least = tl.full([1024], float("inf"), tl.float32)
    for first in range(0, size, 1024):
        least = tl.minimum(least, tl.load(minima + first + at, mask=at < size - first, other=float("inf")))
    return tl.min(least, 0)


@triton.jit
def _least_of_channels(minima, size, C, BLOCK_CHANNELS: tl.constexpr):
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    least = tl.full([1, BLOCK_CHANNELS], float("inf"), tl.float32)
    for first in range(0, size, 8):
        for i in tl.static_range(8):
            here = (channel < C) & (first + i < size)
            value = tl.load(minima + ((first + i) * C + channel), mask=here, other=float("inf"))
            least = tl.minimum(least, value)
    return tl.where(channel < C, least, 0.0)


@triton.jit
def finish(
    statistics,  # (2, B, chunks, H)
    pooled,  # (B, chunks, C)
    norm_weight, norm_bias,  # (C,)
    beta,  # (1,); unused if beta_size is 0
    rows,  # (B, 2 + 2H, N): rows 2 …, the logits; output rows 2 + H …, the attention
    vectors,  # (B, 3 + H, C): output row 2, pooled
    out,  # (B, C), contiguous: output
    attention,  # (B, H, N), contiguous: output
    N, C, num_heads, head_size, all_statistics, chunks, beta_size, gamma,
    POWER: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program adds up the chunks of a block of channels, or writes the attention of a head."""
    blocks = tl.cdiv(C, BLOCK)
    image = (tl.program_id(0) // (blocks + num_heads)).to(tl.int64)
    part = tl.program_id(0) % (blocks + num_heads)
    channel = part * BLOCK + tl.arange(0, BLOCK)
    is_head = part >= blocks
    head = tl.where(is_head, part - blocks, channel // head_size)
    there = (channel < C) & (part < blocks)
    statistics += image * chunks * num_heads
    pooled += image * chunks * C
    largest = tl.full([BLOCK_CHUNKS, BLOCK], float("-inf"), tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        at, here = _chunks(first, chunks, head, num_heads, BLOCK_CHUNKS)
        largest = tl.maximum(largest, tl.load(statistics + at, mask=here, other=float("-inf")))
    top = tl.max(largest, 0)
    # Heads beyond the last, of channels beyond C, have no logits.
    top = tl.where(head < num_heads, top, 0.0)
    share = tl.zeros([BLOCK_CHUNKS, BLOCK], tl.float32)
    total = tl.zeros([BLOCK_CHUNKS, BLOCK], tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        at, here = _chunks(first, chunks, head, num_heads, BLOCK_CHUNKS)
        logit = tl.load(statistics + at, mask=here, other=float("-inf"))
        factor = tl.exp2((logit - top[None, :]) * LOG2E)
        share += factor * tl.load(statistics + all_statistics + at, mask=here, other=0.0)
        chunk = (first + tl.arange(0, BLOCK_CHUNKS))[:, None]
        at = chunk.to(tl.int64) * C + channel[None, :]
        total += factor * tl.load(pooled + at, mask=(chunk < chunks) & there[None, :], other=0.0)
    z = tl.sum(share, 0)
    if is_head:
        rows += image * (2 + 2 * num_heads) * N + (part - blocks + 2).to(tl.int64) * N
        attention += (image * num_heads + (part - blocks)) * N
        shift = tl.max(top, 0)  # all are alike
        factor = 1.0 / tl.max(z, 0)
        for first in range(0, N, BLOCK):
            token = first + tl.arange(0, BLOCK)
            a = tl.exp2((tl.load(rows + token, mask=token < N, other=0.0) - shift) * LOG2E) * factor
            tl.store(rows + tl.cast(num_heads, tl.int64) * N + token, a, mask=token < N)
            tl.store(attention + token, a.to(attention.dtype.element_ty), mask=token < N)
    else:
        mean = tl.where(there, tl.sum(total, 0) / tl.where(there, z, 1.0), 1.0)
        tl.store(vectors + (image * (3 + num_heads) + 2) * C + channel, mean, mask=there)
        if POWER:
            result = tl.exp2(tl.log2(mean) / gamma) + tl.load(beta, mask=beta_size > 0, other=0.0).to(tl.float32)
        else:
            weight = tl.load(norm_weight + channel, mask=there, other=0.0).to(tl.float32)
            result = weight * mean + tl.load(norm_bias + channel, mask=there, other=0.0).to(tl.float32)
        tl.store(out + image * C + channel, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def _chunks(first, chunks, head, num_heads, BLOCK_CHUNKS: tl.constexpr):
    """Where statistics lie, (chunks, channels), and which of them there are."""
    chunk = (first + tl.arange(0, BLOCK_CHUNKS))[:, None]
    return chunk * num_heads + head[None, :], (chunk < chunks) & (head < num_heads)[None, :]


#: More minima than this are reduced by torch first, instead of by every program of attend.
MOST_MINIMA = 4096


def finish_choice(power: bool) -> Choice:
    return Choice(finish, {"POWER": int(power), "BLOCK_CHUNKS": 16, "BLOCK": 128}, 4, 1)


def forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor,
    wk: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    beta: Tensor,
    num_heads: int,
    scale: float,
    gamma: float,
    channel_min: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw operator simpool_forward of fastssl/ops/simpool.py."""
    B, N, C = x.shape
    kind, many = minimum_kind(gamma, channel_min), num_heads > 1
    out, attention = x.new_empty((B, C)), x.new_empty((B, num_heads, N))
    rows, vectors = work(x, B, 2 + 2 * num_heads, N), work(x, B, 3 + num_heads, C)
    minimum = work(x, B, C) if kind == 2 else work(x, kind)
    if B == 0:
        return out, attention, rows, vectors, minimum.zero_()
    with on_device(x):
        x, tiling = tiled(x, many, kind > 0)
        wq, wk = matrices(wq, wk)
        norms = norm_weight.contiguous(), norm_bias.contiguous()

        chunks, chunk = tiling.chunks(N)
        sums = work(x, B, chunks, C)
        minima = work(x, B, chunks, C) if kind == 2 else work(x, B * chunks * (kind > 0))
        choice = tiling.choice(token_statistics, MINIMUM=kind)
        sizes = (N, C, num_heads, chunks, chunk, norm_eps)
        launch(choice, B * chunks, x, *norms, rows, sums, minima, *sizes, *x.stride())
        if kind == 1 and minima.numel() > MOST_MINIMA:
            minima = minima.amin(0, keepdim=True)
        minima_size = minima.shape[kind - 1] if kind else 0

        blocks = triton.cdiv(B, IMAGES) * triton.cdiv(C, OUTPUTS)
        sums = few_chunks(sums)
        choice = folding_choice(queries, sums.shape[1])
        bias = first_of(bq, sums).contiguous()
        sizes = (B, N, C, num_heads, sums.shape[1], bq.numel())
        launch(choice, blocks, sums, wq, bias, vectors, *sizes, *wq.stride())
        choice = product_choice(folded_queries)
        head_size = C // num_heads
        launch(choice, blocks * num_heads, vectors, wk, B, C, num_heads, head_size, *wk.stride())

        chunks, chunk = tiling.chunks(N, N if many else 0)
        statistics, pooled = work(x, 2, B, chunks, num_heads), work(x, B, chunks, C)
        choice = tiling.choice(attend, MINIMUM=kind, MANY=int(many))
        tensors = (x, *norms, vectors, minima, minimum, rows, statistics, pooled)
        heads = (N, C, num_heads, head_size, B * chunks * num_heads)
        sizes = (*heads, chunks, chunk, minima_size, scale, gamma, eps)
        launch(choice, B * chunks, *tensors, *sizes, *x.stride())

        choice = finish_choice(kind > 0)
        programs = B * (triton.cdiv(C, choice.constexprs["BLOCK"]) + num_heads)
        tensors = (statistics, pooled, *norms, first_of(beta, pooled), rows, vectors, out, attention)
        launch(choice, programs, *tensors, *heads, chunks, beta.numel(), gamma)
    return out, attention, rows, vectors, minimum


def configurations() -> Iterator[Configuration]:
    """Each one once."""
    yield from {one.description: one for one in _configurations()}.values()


def _configurations() -> Iterator[Configuration]:
    kept = "*fp32:16"
    for one in samples():
        _, _, many, kind, dtype, _ = one
        tiling, types, heads, norms, text = sample(*one)
        yield configuration(
            tiling.choice(token_statistics, MINIMUM=kind),
            text,
            f"*{dtype}:16 {norms} {kept} {kept} {kept}",
            f"{types.N} {types.C} i32 i32 i32 fp32 {types.x}",
        )
        yield configuration(
            tiling.choice(attend, MINIMUM=kind, MANY=int(many)),
            text,
            f"*{dtype}:16 {norms} {kept} {kept} {kept} {kept} {kept} {kept}",
            f"{types.N} {heads} i32 i32 i32 i32 fp32 fp32 fp32 {types.x}",
        )
    for dtype, C in (("bf16", "i32:16"), ("fp32", "i32")):
        for power in (False, True):
            yield configuration(
                finish_choice(power),
                dtype + " odd width" * (C == "i32"),
                f"{kept} {kept} {kept} {kept} {kept} {kept} {kept} *{dtype}:16 *{dtype}:16",
                f"i32 {C} i32 {C} i32 i32 i32 fp32",
            )
