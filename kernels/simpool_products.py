"""The small products of simpool in Triton: of vectors per image with Wq and Wk, and the gradients of both.

All are of float32 in float32. What comes as one sum per chunk of tokens is added up by the product that needs it.
    queries: the mean token, and q = Wq mean + bq.
    folded_queries: u = Wkᵀ q of each head.
    grad_queries: G, and dq = Wk (scale·w·G).
    grad_parameters: dmean = Wqᵀ dq, and all gradients of parameters, sums over images.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from fastssl.kernels.common import Choice, Configuration, configuration, load_tile, multiply, store_tile
from fastssl.kernels.simpool_tiles import LONGEST_TILE
from torch import Tensor


@triton.jit
def fold_tile(
    partial, i, j, I, J, chunks, stride_i, stride_chunk,
    WIDTH_I: tl.constexpr, WIDTH_J: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Elements (i …, j …) of an (I, J) matrix that lies in up to CHUNKS summands."""
    total = load_tile(partial, i, j, I, J, stride_i, 1, WIDTH_I, WIDTH_J)
    for chunk in tl.static_range(1, CHUNKS):
        there = tl.where(chunk < chunks, I, 0)
        total += load_tile(partial + chunk * stride_chunk, i, j, there, J, stride_i, 1, WIDTH_I, WIDTH_J)
    return total


@triton.jit
def folded_product(
    partial,  # (I, K) matrix in summands, as of fold_tile
    factor,  # (K,): of each column of it; unused unless FACTOR
    matrix,  # (K, J) by its strides
    i, j, I, J, K, chunks, stride_i, stride_chunk, matrix_k, matrix_j,
    WIDTH_I: tl.constexpr, WIDTH_J: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Elements (i …, j …) of the product in float32."""
    products = tl.zeros([WIDTH_I, WIDTH_J], tl.float32)
    for k in range(0, K, BLOCK_DEPTH):
        a = fold_tile(partial, i, k, I, K, chunks, stride_i, stride_chunk, WIDTH_I, BLOCK_DEPTH, CHUNKS)
        if FACTOR:
            a *= load_tile(factor, 0, k, 1, K, 0, 1, 1, BLOCK_DEPTH).to(tl.float32)
        b = load_tile(matrix, k, j, K, J, matrix_k, matrix_j, BLOCK_DEPTH, WIDTH_J)
        products = multiply(a, b, products, True)
    return products


@triton.jit
def product(
    a,  # (I, K) by its strides
    b,  # (K, J) by its strides
    i, j, I, J, K, a_i, a_k, b_k, b_j,
    WIDTH_I: tl.constexpr, WIDTH_J: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Elements (i …, j …) of a b in float32."""
    products = tl.zeros([WIDTH_I, WIDTH_J], tl.float32)
    for k in range(0, K, BLOCK_DEPTH):
        left = load_tile(a, i, k, I, K, a_i, a_k, WIDTH_I, BLOCK_DEPTH)
        right = load_tile(b, k, j, K, J, b_k, b_j, BLOCK_DEPTH, WIDTH_J)
        products = multiply(left, right, products, True)
    return products


@triton.jit
def queries(
    sums,  # (B, chunks, C)
    weight,  # Wq, (C, C) by its strides
    bias,  # (C,); unused if bias_size is 0
    vectors,  # (B, 3 + H, C): output rows 0, the mean token, and 1, q
    B, N, C, num_heads, chunks, bias_size,
    weight_row, weight_column,
    IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, OUTPUTS)
    i = tl.program_id(0) // blocks * IMAGES
    j = tl.program_id(0) % blocks * OUTPUTS
    stride = (3 + num_heads) * C
    q = folded_product(
        sums, sums, weight, i, j, B, C, C, chunks, chunks * C, C, weight_column, weight_row,
        IMAGES, OUTPUTS, BLOCK_DEPTH, CHUNKS, False,
    )  # fmt: skip
    q = q / N + load_tile(bias, 0, j, 1, bias_size, 0, 1, 1, OUTPUTS).to(tl.float32)
    store_tile(vectors + C, q, i, j, B, C, stride, 1, IMAGES, OUTPUTS)
    mean = fold_tile(sums, i, j, B, C, chunks, chunks * C, C, IMAGES, OUTPUTS, CHUNKS) / N
    store_tile(vectors, mean, i, j, B, C, stride, 1, IMAGES, OUTPUTS)


@triton.jit
def folded_queries(
    vectors,  # (B, 3 + H, C): reads row 1, q; output rows 3 …, u
    weight,  # Wk, (C, C) by its strides
    B, C, num_heads, head_size,
    weight_row, weight_column,
    IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, OUTPUTS)
    head = tl.program_id(0) // blocks % num_heads
    i = tl.program_id(0) // blocks // num_heads * IMAGES
    j = tl.program_id(0) % blocks * OUTPUTS
    stride = (3 + num_heads) * C
    first = head * head_size
    u = product(
        vectors + (C + first), weight + first.to(tl.int64) * weight_row, i, j, B, C, head_size,
        stride, 1, weight_row, weight_column, IMAGES, OUTPUTS, BLOCK_DEPTH,
    )  # fmt: skip
    store_tile(vectors + (3 + head) * C, u, i, j, B, C, stride, 1, IMAGES, OUTPUTS)


@triton.jit
def grad_queries(
    sums,  # (B, chunks, H, C)
    moments,  # (B, chunks, 4, C); unused without MINIMUM
    grad,  # (B, C) by its strides
    weight,  # Wk, (C, C) by its strides
    norm_weight,  # (C,)
    queries,  # (B, C): output dq
    folded,  # (B, H, C): output G of all chunks
    folded_moments,  # (B, 4, C): output
    totals,  # (3, programs): output, shares of ΣV, ΣT and Σg over everything; unused without MINIMUM
    B, C, num_heads, head_size, chunks, scale,
    grad_image, grad_channel, weight_row, weight_column,
    MINIMUM: tl.constexpr, IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(head_size, OUTPUTS)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % num_heads
    i = tl.program_id(0) // blocks // num_heads * IMAGES
    stride = chunks * num_heads * C
    j = block * OUTPUTS
    dq = folded_product(
        sums + head * C, norm_weight, weight + (head * head_size).to(tl.int64) * weight_row, i, j, B, head_size, C,
        chunks, stride, num_heads * C, weight_column, weight_row, IMAGES, OUTPUTS, BLOCK_DEPTH, CHUNKS, True,
    )  # fmt: skip
    store_tile(queries + head * head_size, scale * dq, i, j, B, head_size, C, 1, IMAGES, OUTPUTS)
    for k in range(j, C, blocks * OUTPUTS):
        g = fold_tile(sums + head * C, i, k, B, C, chunks, stride, num_heads * C, IMAGES, OUTPUTS, CHUNKS)
        store_tile(folded + head * C, g, i, k, B, C, num_heads * C, 1, IMAGES, OUTPUTS)
    if MINIMUM:
        slices = blocks * num_heads
        total_v = tl.zeros([IMAGES, OUTPUTS], tl.float32)
        total_t = tl.zeros([IMAGES, OUTPUTS], tl.float32)
        total_g = tl.zeros([IMAGES, OUTPUTS], tl.float32)
        for k in range((head * blocks + block) * OUTPUTS, C, slices * OUTPUTS):
            for moment in tl.static_range(4):
                m = fold_tile(moments + moment * C, i, k, B, C, chunks, chunks * 4 * C, 4 * C, IMAGES, OUTPUTS, CHUNKS)
                store_tile(folded_moments + moment * C, m, i, k, B, C, 4 * C, 1, IMAGES, OUTPUTS)
                if moment == 0:
                    total_v += m
                if moment == 2:
                    total_t += m
            total_g += load_tile(grad, i, k, B, C, grad_image, grad_channel, IMAGES, OUTPUTS).to(tl.float32)
        programs = tl.num_programs(0)
        totals += tl.program_id(0)
        tl.store(totals, tl.sum(tl.sum(total_v, 1), 0))
        tl.store(totals + programs, tl.sum(tl.sum(total_t, 1), 0))
        tl.store(totals + 2 * programs, tl.sum(tl.sum(total_g, 1), 0))


@triton.jit
def grad_parameters(
    grad,  # (B, C) by its strides
    vectors,  # (B, 3 + H, C)
    queries,  # (B, C): dq
    folded,  # (B, H, C): G
    moments,  # (B, 4, C): V, X, T, TX
    totals,  # (3, total_size)
    norm_weight,  # (C,)
    query_weight,  # Wq, (C, C) by its strides
    grad_mean,  # (B, C): output
    grad_query, grad_key,  # (C, C) by their strides: outputs
    grad_bias, grad_norm_weight, grad_norm_bias, grad_beta,  # (C,) and (1,), contiguous: outputs
    B, C, num_heads, head_size, total_size, bias_size, beta_size, mean_programs, scale,
    grad_image, grad_channel, query_row, query_column,
    grad_query_row, grad_query_column, grad_key_row, grad_key_column,
    MINIMUM: tl.constexpr, IMAGES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A program has a block of dmean, of dWq, of dWk, or of the gradients of the vectors."""
    blocks = tl.cdiv(C, OUTPUTS)
    head_blocks = tl.cdiv(head_size, OUTPUTS)
    stride = (3 + num_heads) * C
    j = tl.program_id(0) % blocks * OUTPUTS
    part = tl.program_id(0) // blocks - mean_programs
    if part < 0:
        i = (part + mean_programs) * IMAGES
        dmean = product(
            queries, query_weight, i, j, B, C, C, C, 1, query_row, query_column, IMAGES, OUTPUTS, BLOCK_DEPTH
        )
        store_tile(grad_mean, dmean, i, j, B, C, C, 1, IMAGES, OUTPUTS)
    elif part < blocks:
        i = part * OUTPUTS
        dwq = product(queries, vectors, i, j, C, C, B, 1, C, stride, 1, OUTPUTS, OUTPUTS, BLOCK_DEPTH)
        store_tile(grad_query, dwq, i, j, C, C, grad_query_row, grad_query_column, OUTPUTS, OUTPUTS)
    elif part < blocks + num_heads * head_blocks:
        head = (part - blocks) // head_blocks
        i = (part - blocks) % head_blocks * OUTPUTS
        dwk = product(
            vectors + (C + head * head_size), folded + head * C, i, j, head_size, C, B,
            1, stride, num_heads * C, 1, OUTPUTS, OUTPUTS, BLOCK_DEPTH,
        )  # fmt: skip
        dwk *= scale * load_tile(norm_weight, 0, j, 1, C, 0, 1, 1, OUTPUTS).to(tl.float32)
        to = grad_key + (head * head_size).to(tl.int64) * grad_key_row
        store_tile(to, dwk, i, j, head_size, C, grad_key_row, grad_key_column, OUTPUTS, OUTPUTS)
    else:
        _grad_vectors(
            grad, vectors, queries, folded, moments, totals, grad_bias, grad_norm_weight, grad_norm_bias, grad_beta,
            j, B, C, num_heads, total_size, bias_size, beta_size, scale, grad_image, grad_channel,
            MINIMUM, OUTPUTS, IMAGES,
        )  # fmt: skip


@triton.jit
def _grad_vectors(
    grad, vectors, queries, folded, moments, totals, grad_bias, grad_norm_weight, grad_norm_bias, grad_beta,
    j, B, C, num_heads, total_size, bias_size, beta_size, scale, grad_image, grad_channel,
    MINIMUM: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr,  # images at a time
):  # fmt: skip
    """Channels j … of what is learned of them: sums over images, some at a time."""
    stride = (3 + num_heads) * C
    dq = tl.zeros([ROWS, OUTPUTS], tl.float32)
    dw = tl.zeros([ROWS, OUTPUTS], tl.float32)
    db = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if MINIMUM == 1:
        tau = tie_share(totals, total_size)
    for i in range(0, B, ROWS):
        dq += load_tile(queries, i, j, B, C, C, 1, ROWS, OUTPUTS)
        if MINIMUM:
            v = load_tile(moments, i, j, B, C, 4 * C, 1, ROWS, OUTPUTS)
            ties = load_tile(moments + 2 * C, i, j, B, C, 4 * C, 1, ROWS, OUTPUTS)
            if MINIMUM == 2:
                tau = -v / tl.maximum(ties, 1.0)
            dw += load_tile(moments + C, i, j, B, C, 4 * C, 1, ROWS, OUTPUTS)
            dw += tau * load_tile(moments + 3 * C, i, j, B, C, 4 * C, 1, ROWS, OUTPUTS)
            db += v + tau * ties
        else:
            g = load_tile(grad, i, j, B, C, grad_image, grad_channel, ROWS, OUTPUTS).to(tl.float32)
            dw += g * load_tile(vectors + 2 * C, i, j, B, C, stride, 1, ROWS, OUTPUTS)
            db += g
        for head in range(0, num_heads):
            u = load_tile(vectors + (3 + head) * C, i, j, B, C, stride, 1, ROWS, OUTPUTS)
            g = load_tile(folded + head * C, i, j, B, C, num_heads * C, 1, ROWS, OUTPUTS)
            dw += scale * u * g
    _store_sum(grad_bias, dq, j, bias_size, OUTPUTS)
    _store_sum(grad_norm_weight, dw, j, C, OUTPUTS)
    _store_sum(grad_norm_bias, db, j, C, OUTPUTS)
    if MINIMUM:
        dbeta = total_of(totals + 2 * total_size, total_size)
        tl.store(grad_beta, dbeta.to(grad_beta.dtype.element_ty), mask=(beta_size > 0) & (j == 0))


@triton.jit
def _store_sum(base, value, j, J, WIDTH: tl.constexpr):
    store_tile(base, tl.sum(value, 0)[None, :], 0, j, 1, J, 0, 1, 1, WIDTH)


@triton.jit
def total_of(values, size):
    at = tl.arange(0, 256)
    total = tl.zeros([256], tl.float32)
    for first in range(0, size, 256):
        total += tl.load(values + first + at, mask=at < size - first, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def tie_share(totals, size):
    """τ of the minimum of the batch."""
    return -total_of(totals, size) / tl.maximum(total_of(totals + size, size), 1.0)


#: Images, outputs and depth of a block of a product.
IMAGES, OUTPUTS, DEPTH = 16, 32, 32
#: Up to so many summands are added by the product that needs their sum.
FEW_CHUNKS = 8


def few_chunks(partial: Tensor) -> Tensor:
    """(B, chunks, …) partial sums, added up where there are more than a product adds."""
    return partial if partial.shape[1] <= FEW_CHUNKS else partial.sum(1, keepdim=True)


def product_choice(kernel: object, **constexprs: int) -> Choice:
    """The product of vectors per image and a matrix."""
    blocks = {"IMAGES": IMAGES, "OUTPUTS": OUTPUTS, "BLOCK_DEPTH": DEPTH}
    return Choice(kernel, {**constexprs, **blocks}, 4, 3)


def folding_choice(kernel: object, chunks: int, **constexprs: int) -> Choice:
    return product_choice(kernel, **constexprs, CHUNKS=1 if chunks == 1 else FEW_CHUNKS)


def matrices(*weights: Tensor) -> list[Tensor]:
    """As they are, or copied, where strides are too long for offsets of 32 bits in a tile."""
    return [w if DEPTH * max(w.stride()) < LONGEST_TILE else w.contiguous() for w in weights]


def configurations() -> Iterator[Configuration]:
    kept = "*fp32:16"
    for dtype, C in (("fp32", "i32:16"), ("bf16", "i32:16"), ("fp32", "i32")):
        text, weight = dtype + " odd width" * (C == "i32"), f"*{dtype}:16"
        matrix, heads = f"{C} i32:1", f"{C} i32:1 {C}"
        for chunks in ("i32:1", "i32"):
            choice = folding_choice(queries, int(chunks == "i32") + 1)
            yield configuration(
                choice, text, f"{kept} {weight} {weight} {kept}", f"i32 i32 {C} i32 {chunks} {C} {matrix}"
            )
        yield configuration(product_choice(folded_queries), text, f"{kept} {weight} i32 {heads} {matrix}")
        for kind in (0, 1, 2):
            for chunks in ("i32:1", "i32"):
                yield configuration(
                    folding_choice(grad_queries, int(chunks == "i32") + 1, MINIMUM=kind),
                    text,
                    f"{kept} {kept} *bf16:16 {weight} {weight} {kept} {kept} {kept} {kept}",
                    f"i32 {heads} {chunks} fp32 {matrix} {matrix}",
                )
            yield configuration(
                product_choice(grad_parameters, MINIMUM=kind),
                text,
                f"*bf16:16 {kept} {kept} {kept} {kept} {kept} {weight} {weight}",
                f"{kept} {weight} {weight} {weight} {weight} {weight} {weight}",
                f"i32 {heads} i32 {C} i32 i32 fp32 {matrix} {matrix} {matrix} {matrix}",
            )
