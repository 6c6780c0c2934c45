"""simpool's gradients in Triton: four launches, two of which read the tokens.

    grad_logits: dL of each token and head, and for each chunk G = Σ dL x̂; with a power also what of the gradient of y
        needs a sum over tokens: V = Σ dv, X = Σ dv x̂, and of the ties of the minimum their number T and TX = Σ x̂.
    grad_queries: adds up the chunks; dq = Wk (scale·w·G).
    grad_parameters: dmean = Wqᵀ dq and all gradients of parameters, sums over images.
    grad_tokens: through the LayerNorm to the tokens.
Σ dL = 0 and Σ a = 1 over the tokens: that is why most gradients of parameters need no sum over tokens. With
τ = −ΣV/ΣT, the gradient of the minimum, each of its ties gets an equal share. No atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import Configuration, configuration, launch, load_vector, on_device, store_tile
from fastssl.kernels.simpool_products import (
    IMAGES,
    OUTPUTS,
    few_chunks,
    folding_choice,
    grad_parameters,
    grad_queries,
    matrices,
    product_choice,
    tie_share,
)
from fastssl.kernels.simpool_tiles import (
    channels,
    direction,
    first_of,
    minimum_kind,
    normalized_tile,
    of_tokens,
    powers,
    sample,
    samples,
    tiled,
    work,
)
from torch import Tensor


@triton.jit
def grad_logits(
    x,  # (B, N, C) by its strides
    grad,  # (B, C) by its strides
    grad_attention,  # (B, H, N) by its strides; unused if attention_size is 0, else that is N
    rows,  # (B, 2 + 2H, N)
    vectors,  # (B, 3 + H, C): reads row 2
    minimum,  # (1,) or (B, C)
    norm_weight, norm_bias,  # (C,)
    logits,  # (2, B, H, N): output dL and, without MINIMUM, Σ_{c∈h} P_c x̂_nc
    sums,  # (B, chunks, H, C): output G
    moments,  # (B, chunks, 4, C): output V, X, T, TX; unused without MINIMUM
    N, C, num_heads, head_size, all_logits, chunks, chunk, attention_size, gamma, eps,
    x_image, x_token, x_channel, grad_image, grad_channel, attention_image, attention_head, attention_token,
    MINIMUM: tl.constexpr, MANY: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """With P the gradient of the values, da_hn = Σ_{c∈h} P_c value_nc, and dL = a (da − Σ a da)."""
    place = tl.program_id(0).to(tl.int64)
    image = place // chunks
    first = tl.program_id(0) % chunks * chunk
    x += image * x_image
    rows += image * (2 + 2 * num_heads) * N
    vectors += image * (3 + num_heads) * C
    grad_attention += image * attention_image
    logits += image * num_heads * N
    sums += place * num_heads * C
    channel = tl.arange(0, BLOCK_CHANNELS)
    weight = channels(norm_weight, C, 1, BLOCK_CHANNELS)
    bias = channels(norm_bias, C, 1, BLOCK_CHANNELS)
    upstream = channels(grad + image * grad_image, C, grad_channel, BLOCK_CHANNELS)
    mean = channels(vectors + 2 * C, C, 1, BLOCK_CHANNELS)
    share = upstream * weight
    rest = 1.0
    if MINIMUM:
        least = least_of(minimum, image, C, MINIMUM, BLOCK_CHANNELS)
        share = of_means(upstream, mean, C, gamma, BLOCK_CHANNELS)
        rest = 1.0 / gamma
    attention = rows + tl.cast(2 + num_heads, tl.int64) * N
    if not MANY:
        delta = _delta(share * mean, rest, attention, grad_attention, attention_token, attention_size)
    sum_g = tl.zeros([BLOCK_CHANNELS], tl.float32)
    sum_v = tl.zeros([BLOCK_CHANNELS], tl.float32)
    sum_x = tl.zeros([BLOCK_CHANNELS], tl.float32)
    ties = tl.zeros([BLOCK_CHANNELS], tl.float32)
    sum_ties = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for token in range(first, tl.minimum(first + chunk, N), BLOCK_TOKENS):
        unit, _ = normalized_tile(x, rows, token, N, C, x_token, x_channel, BLOCK_TOKENS, BLOCK_CHANNELS)
        if MINIMUM:
            y, v, slope = powers(unit, weight, bias, least, token, N, C, eps, gamma, BLOCK_TOKENS, BLOCK_CHANNELS)
            gained = share * (v * slope)
        else:
            gained = share * unit
        if MANY:
            mine = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
            for head in range(0, num_heads):
                of_head = (channel // head_size == head)[None, :]
                a = of_tokens(attention + tl.cast(head, tl.int64) * N, token, N, BLOCK_TOKENS)
                delta = _delta(
                    tl.where(of_head, share * mean, 0.0), rest, attention + tl.cast(head, tl.int64) * N,
                    grad_attention + tl.cast(head, tl.int64) * attention_head, attention_token, attention_size,
                )  # fmt: skip
                dl = _grad_logits(
                    tl.where(of_head, gained, 0.0), rest, a, delta, grad_attention, logits, head, token, N, all_logits,
                    attention_head, attention_token, attention_size, BLOCK_TOKENS,
                )  # fmt: skip
                at = sums + head * C + channel
                before = tl.load(at, mask=(channel < C) & (token > first), other=0.0)
                tl.store(at, before + tl.sum(dl * unit, 0), mask=channel < C)
                mine = tl.where(of_head, a, mine)
            tl.debug_barrier()  # other threads may read these sums in the next round
        else:
            mine = of_tokens(attention, token, N, BLOCK_TOKENS)
            dl = _grad_logits(
                gained, rest, mine, delta, grad_attention, logits, 0, token, N, all_logits,
                attention_head, attention_token, attention_size, BLOCK_TOKENS,
            )  # fmt: skip
            sum_g += tl.sum(dl * unit, 0)
        if MINIMUM:
            dv = mine * slope  # times E
            sum_v += tl.sum(dv, 0)
            sum_x += tl.sum(dv * unit, 0)
            tie = (y == least) & (tl.arange(0, BLOCK_TOKENS) < N - token)[:, None] & (channel < C)[None, :]
            ties += tl.sum(tl.where(tie, 1.0, 0.0), 0)
            sum_ties += tl.sum(tl.where(tie, unit, 0.0), 0)
    there = channel < C
    if not MANY:
        tl.store(sums + channel, sum_g, mask=there)
    if MINIMUM:
        moments += place * 4 * C
        store_tile(moments, share * sum_v[None, :], 0, 0, 1, C, 0, 1, 1, BLOCK_CHANNELS)
        store_tile(moments + C, share * sum_x[None, :], 0, 0, 1, C, 0, 1, 1, BLOCK_CHANNELS)
        tl.store(moments + 2 * C + channel, ties, mask=there)
        tl.store(moments + 3 * C + channel, sum_ties, mask=there)


@triton.jit
def least_of(minimum, image, C, MINIMUM: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    return tl.load(minimum) if MINIMUM == 1 else channels(minimum + image * C, C, 1, BLOCK_CHANNELS)


@triton.jit
def of_means(upstream, mean, C, gamma, BLOCK_CHANNELS: tl.constexpr):
    """E = g S^(1/γ − 1), zero beyond C."""
    here = tl.arange(0, BLOCK_CHANNELS)[None, :] < C
    return upstream * tl.exp2((1.0 / gamma - 1.0) * tl.log2(tl.where(here, mean, 1.0)))


@triton.jit
def _delta(terms, rest, attention, grad_attention, attention_token, size):
    """Σ a da over all tokens."""
    at = tl.arange(0, 256)
    total = tl.zeros([256], tl.float32)
    for first in range(0, size, 256):
        a = tl.load(attention + first + at, mask=at < size - first, other=0.0)
        to = grad_attention + (first + at).to(tl.int64) * attention_token
        total += a * tl.load(to, mask=at < size - first, other=0.0).to(tl.float32)
    return rest * tl.sum(tl.sum(terms, 1), 0) + tl.sum(total, 0)


@triton.jit
def _grad_logits(
    gained, rest, a, delta, grad_attention, logits, head, token, N, all_logits,
    attention_head, attention_token, attention_size, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """dL of the tokens from `token` on: (tokens, 1). Stores it, and what the head's channels have to say to it."""
    given = grad_attention + tl.cast(head, tl.int64) * attention_head
    logits += tl.cast(head, tl.int64) * N
    da = rest * tl.sum(gained, 1)[:, None]
    store_tile(logits + all_logits, da, token, 0, N, 1, 1, 0, BLOCK_TOKENS, 1)
    da += load_vector(given, token, attention_size, attention_token, BLOCK_TOKENS)[:, None].to(tl.float32)
    dl = a * (da - delta)
    store_tile(logits, dl, token, 0, N, 1, 1, 0, BLOCK_TOKENS, 1)
    return dl


@triton.jit
def grad_tokens(
    x,  # (B, N, C) by its strides
    grad,  # (B, C) by its strides
    rows,  # (B, 2 + 2H, N)
    vectors,  # (B, 3 + H, C): reads rows 2 …
    minimum,  # (1,) or (B, C)
    norm_weight, norm_bias,  # (C,)
    logits,  # (2, B, H, N): dL and Σ_{c∈h} P_c x̂_nc
    moments,  # (B, 4, C): reads V and T, of MINIMUM 2
    totals,  # (3, total_size), of MINIMUM 1
    grad_mean,  # (B, C)
    grad_x,  # (B, N, C) by its strides: output
    N, C, num_heads, head_size, all_logits, chunks, chunk, total_size, scale, gamma, eps,
    x_image, x_token, x_channel, grad_image, grad_channel, grad_x_image, grad_x_token, grad_x_channel,
    MINIMUM: tl.constexpr, MANY: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = r (dx̂ − mean(dx̂) − x̂ mean(dx̂ x̂)) + dmean/N over the channels, with dx̂ = dy·w + Σ_h dL t'."""
    image = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk
    x += image * x_image
    grad_x += image * grad_x_image
    rows += image * (2 + 2 * num_heads) * N
    vectors += image * (3 + num_heads) * C
    logits += image * num_heads * N
    channel = tl.arange(0, BLOCK_CHANNELS)
    weight = channels(norm_weight, C, 1, BLOCK_CHANNELS)
    bias = channels(norm_bias, C, 1, BLOCK_CHANNELS)
    slopes = channels(grad + image * grad_image, C, grad_channel, BLOCK_CHANNELS)
    of_mean = channels(grad_mean + image * C, C, 1, BLOCK_CHANNELS) / N
    if MINIMUM:
        least = least_of(minimum, image, C, MINIMUM, BLOCK_CHANNELS)
        slopes = of_means(slopes, channels(vectors + 2 * C, C, 1, BLOCK_CHANNELS), C, gamma, BLOCK_CHANNELS)
    if MINIMUM == 1:
        tau = tie_share(totals, total_size)
    if MINIMUM == 2:
        moments += image * 4 * C
        ties = channels(moments + 2 * C, C, 1, BLOCK_CHANNELS)
        tau = -channels(moments, C, 1, BLOCK_CHANNELS) / tl.maximum(ties, 1.0)
    if MINIMUM == 0:
        slopes *= weight
    if not MANY:
        towards = direction(vectors + 3 * C, weight, scale, C, BLOCK_CHANNELS)
        total = tl.sum(tl.sum(slopes, 1), 0)
    for token in range(first, tl.minimum(first + chunk, N), BLOCK_TOKENS):
        unit, inverse = normalized_tile(x, rows, token, N, C, x_token, x_channel, BLOCK_TOKENS, BLOCK_CHANNELS)
        if MANY:
            mine = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
            along = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], tl.float32)
            level = tl.zeros([BLOCK_TOKENS, 1], tl.float32)
            tilt = tl.zeros([BLOCK_TOKENS, 1], tl.float32)
            for head in range(0, num_heads):
                towards = direction(vectors + (3 + head) * C, weight, scale, C, BLOCK_CHANNELS)
                of_head = (channel // head_size == head)[None, :]
                a, dl, turn = _of_head(rows, logits, head, num_heads, token, N, all_logits, BLOCK_TOKENS)
                along += dl * towards
                mine = tl.where(of_head, a, mine)
                level += a * tl.sum(tl.sum(tl.where(of_head, slopes, 0.0), 1), 0)
                tilt += turn
        else:
            mine, dl, tilt = _of_head(rows, logits, 0, 1, token, N, all_logits, BLOCK_TOKENS)
            along = dl * towards
            level = mine * total
        if MINIMUM:
            y, _, slope = powers(unit, weight, bias, least, token, N, C, eps, gamma, BLOCK_TOKENS, BLOCK_CHANNELS)
            along += (mine * slopes * slope + tl.where(y == least, tau, 0.0)) * weight
            level = tl.sum(along, 1)[:, None]
            tilt = tl.sum(along * unit, 1)[:, None]
        else:  # the sums over the channels are known
            along += mine * slopes
        dx = inverse * (along - level / C - unit * (tilt / C)) + of_mean
        store_tile(grad_x, dx, token, 0, N, C, grad_x_token, grad_x_channel, BLOCK_TOKENS, BLOCK_CHANNELS)


@triton.jit
def _of_head(rows, logits, head, num_heads, token, N, all_logits, BLOCK_TOKENS: tl.constexpr):
    """a, dL, and Σ_c x̂ dx̂ without a power."""
    logits += tl.cast(head, tl.int64) * N
    a = of_tokens(rows + tl.cast(2 + num_heads + head, tl.int64) * N, token, N, BLOCK_TOKENS)
    dl = of_tokens(logits, token, N, BLOCK_TOKENS)
    turn = a * of_tokens(logits + all_logits, token, N, BLOCK_TOKENS)
    return a, dl, turn + dl * of_tokens(rows + tl.cast(2 + head, tl.int64) * N, token, N, BLOCK_TOKENS)


def backward(
    grad: Tensor,
    grad_attention: Tensor,
    rows: Tensor,
    vectors: Tensor,
    minimum: Tensor,
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
    wanted: int,
) -> tuple[Tensor, ...]:
    """The raw operator simpool_backward of fastssl/ops/simpool.py."""
    B, N, C = x.shape
    grad_x = torch.empty_like(x) if wanted & 1 else x.new_empty(0)
    parameters = (wq, bq, wk, norm_weight, norm_bias, beta)
    grads = [torch.empty_like(p) if wanted & 2 else p.new_empty(0) for p in parameters]
    if wanted == 0:
        return grad_x, *grads
    kind, many, head_size = minimum_kind(gamma, channel_min), num_heads > 1, C // num_heads
    with on_device(x):
        given, (x, tiling) = x, tiled(x, many, kind > 0)
        wq, wk = matrices(wq, wk)
        norms = norm_weight.contiguous(), norm_bias.contiguous()
        flags = {"MINIMUM": kind, "MANY": int(many)}
        heads = (C, num_heads, head_size)
        all_logits = B * num_heads * N

        chunks, chunk = tiling.chunks(N)
        logits, sums = work(x, 2, B, num_heads, N), work(x, B, chunks, num_heads, C)
        moments = work(x, B, chunks, 4 * (kind > 0), C)
        tensors = (x, grad, first_of(grad_attention, logits), rows, vectors, minimum, *norms, logits, sums, moments)
        strides = (0, 0, 0) if grad_attention.numel() == 0 else grad_attention.stride()
        sizes = (N, *heads, all_logits, chunks, chunk, N * (grad_attention.numel() > 0), gamma, eps)
        launch(tiling.choice(grad_logits, **flags), B * chunks, *tensors, *sizes, *x.stride(), *grad.stride(), *strides)

        sums, moments = few_chunks(sums), few_chunks(moments)
        queries, folded = work(x, B, C), work(x, B, num_heads, C)
        folded_moments = work(x, B, 4 * (kind > 0), C)
        programs = triton.cdiv(B, IMAGES) * num_heads * triton.cdiv(head_size, OUTPUTS)
        totals = work(x, 3, programs)
        tensors = (sums, moments, grad, wk, norms[0], queries, folded, folded_moments, totals)
        sizes = (B, *heads, sums.shape[1], scale, *grad.stride(), *wk.stride())
        launch(folding_choice(grad_queries, sums.shape[1], MINIMUM=kind), programs, *tensors, *sizes)

        grad_mean = work(x, B, C)
        mean_programs = triton.cdiv(B, IMAGES) * (wanted & 1)
        of_weights = 1 + triton.cdiv(C, OUTPUTS) + num_heads * triton.cdiv(head_size, OUTPUTS)
        grad_wq, grad_bq, grad_wk, *rest = grads
        strides = (*grad_wq.stride(), *grad_wk.stride()) if wanted & 2 else (0, 0, 0, 0)
        tensors = (grad, vectors, queries, folded, folded_moments, totals, norms[0], wq)
        results = (grad_mean, grad_wq, grad_wk, grad_bq, *rest)
        sizes = (B, *heads, programs, grad_bq.numel(), grads[5].numel(), mean_programs, scale)
        blocks = (mean_programs + of_weights * (wanted >> 1)) * triton.cdiv(C, OUTPUTS)
        choice = product_choice(grad_parameters, MINIMUM=kind)
        launch(choice, blocks, *tensors, *results, *sizes, *grad.stride(), *wq.stride(), *strides)

        if wanted & 1:
            result = grad_x if x is given else torch.empty_like(x)
            tensors = (x, grad, rows, vectors, minimum, *norms, logits, folded_moments, totals, grad_mean, result)
            sizes = (N, *heads, all_logits, chunks, chunk, programs, scale, gamma, eps)
            strides = (*x.stride(), *grad.stride(), *result.stride())
            launch(tiling.choice(grad_tokens, **flags), B * chunks, *tensors, *sizes, *strides)
            if result is not grad_x:
                grad_x.copy_(result)
    return grad_x, *grads


def configurations() -> Iterator[Configuration]:
    kept = "*fp32:16"
    for one in samples():
        _, layout, many, kind, dtype, _ = one
        tiling, types, heads, norms, text = sample(*one)
        x, grad = f"*{dtype}:16", f"{types.C} i32:1"
        flags = {"MINIMUM": kind, "MANY": int(many)}
        given = "i32 i32 i32:1" if layout == "odd width" else "i32:16 i32:16 i32:16"
        yield configuration(
            tiling.choice(grad_logits, **flags),
            text,
            f"{x} {x} {x} {kept} {kept} {kept} {norms} {kept} {kept} {kept}",
            f"{types.N} {heads} i32 i32 i32 i32 fp32 fp32 {types.x} {grad} {given}",
        )
        yield configuration(
            tiling.choice(grad_tokens, **flags),
            text,
            f"{x} {x} {kept} {kept} {kept} {norms} {kept} {kept} {kept} {kept} {x}",
            f"{types.N} {heads} i32 i32 i32 i32 fp32 fp32 fp32 {types.x} {grad} {types.x}",
        )
