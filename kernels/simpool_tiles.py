"""What simpool's forward and backward share: tiles of normalised tokens, their powers, folded queries, small products.

A program has whole tokens in registers, a tile of some at a time, and takes a chunk of tokens of one image, several
tiles long. What is summed over an image is summed over chunks, and then by the kernel that needs it, always in the
same order. x̂ = (x − μ)·r and y = fma(x̂, w, b) have the same bits in every kernel: the minimum is found by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import Choice, load_tile, load_vector
from torch import Tensor


@triton.jit
def channels(base, C, stride, BLOCK_CHANNELS: tl.constexpr):
    """(1, C) numbers in float32, zero beyond C."""
    return load_tile(base, 0, 0, 1, C, 0, stride, 1, BLOCK_CHANNELS).to(tl.float32)


@triton.jit
def of_tokens(base, token, N, BLOCK_TOKENS: tl.constexpr):
    """(tokens, 1) numbers from `token` on, zero beyond N."""
    return load_vector(base, token, N, 1, BLOCK_TOKENS)[:, None]


@triton.jit
def normalized_tile(x, rows, token, N, C, x_token, x_channel, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """x̂ and 1/deviation of the tokens from `token` on."""
    value = load_tile(x, token, 0, N, C, x_token, x_channel, BLOCK_TOKENS, BLOCK_CHANNELS).to(tl.float32)
    inverse = of_tokens(rows + N, token, N, BLOCK_TOKENS)
    return (value - of_tokens(rows, token, N, BLOCK_TOKENS)) * inverse, inverse


@triton.jit
def powers(
    unit, weight, bias, least, token, N, C, eps, gamma, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """y, v = y − min + eps, and v^(γ − 1); v is 1 where there is no token."""
    y = tl.fma(unit, weight, bias)
    here = (tl.arange(0, BLOCK_TOKENS)[:, None] < N - token) & (tl.arange(0, BLOCK_CHANNELS)[None, :] < C)
    v = tl.where(here, y - least + eps, 1.0)
    exponent = gamma - 1.0
    return y, v, v if exponent == 1.0 else tl.exp2(exponent * tl.log2(v))


@triton.jit
def direction(query, weight, scale, C, BLOCK_CHANNELS: tl.constexpr):
    """t' = scale·u·w less its mean, (1, C), of a folded query u: the logits are x̂·t'."""
    t = scale * channels(query, C, 1, BLOCK_CHANNELS) * weight
    here = tl.arange(0, BLOCK_CHANNELS)[None, :] < C
    return tl.where(here, t - tl.sum(t, 1)[:, None] / C, 0.0)


#: BLOCK_CHANNELS → (BLOCK_TOKENS, warps): without a power, for contiguous tokens and one head, where small programs
#: overlap best, and for the rest; with a power, which needs most registers. 32, 16 and 8 elements a thread.
#: Each compiles without spills for sm_80, sm_90 and sm_100; none has been timed on a GPU yet.
TILES = {
    128: ((32, 4), (32, 8), (16, 8)),
    256: ((16, 4), (16, 8), (8, 8)),
    512: ((8, 4), (8, 8), (4, 8)),
    1024: ((8, 8), (4, 8), (2, 8)),
    2048: ((4, 8), (1, 8), (1, 8)),
}
#: Of more channels; those that no model has are left to spill.
LARGEST = (1, 32)
#: Tokens in a chunk, and up to how many chunks an image has.
CHUNK_TOKENS, MOST_CHUNKS = 40, 32
#: A feature map of which tiles have fewer tokens is copied, as is one whose tokens are not adjacent either: reading it
#: would waste most of each sector.
FEW_TOKENS = 8
#: Offsets inside a tile have 32 bits.
LONGEST_TILE = 2**31


class Tiling(NamedTuple):
    """How the tokens of an image are divided."""

    block_tokens: int
    block_channels: int
    num_warps: int

    @staticmethod
    def of(channels: int, plain: bool, power: bool) -> Tiling:
        """plain: tokens are contiguous, and there is one head."""
        block = next((block for block in TILES if channels <= block), triton.next_power_of_2(channels))
        tokens, warps = TILES[block][2 if power else 1 - plain] if block in TILES else LARGEST
        return Tiling(tokens, block, warps)

    def chunks(self, length: int, least: int = 0) -> tuple[int, int]:
        """Their number, and how many tokens each has; least: at least so many chunks, if there are as many tiles."""
        tiles = triton.cdiv(length, self.block_tokens)
        chunks = min(triton.cdiv(length, max(CHUNK_TOKENS, self.block_tokens)), MOST_CHUNKS)
        size = triton.cdiv(tiles, max(chunks, min(least, tiles)))
        return triton.cdiv(tiles, size), size * self.block_tokens

    def choice(self, kernel: object, **constexprs: int) -> Choice:
        blocks = {"BLOCK_TOKENS": self.block_tokens, "BLOCK_CHANNELS": self.block_channels}
        return Choice(kernel, {**constexprs, **blocks}, self.num_warps, 1)


def tiled(x: Tensor, many: bool, power: bool) -> tuple[Tensor, Tiling]:
    """x (B, N, C), or a copy of it, and its tiling."""
    C = x.shape[2]
    plain = not many and x.stride(2) == 1
    tiling = Tiling.of(C, plain, power)
    wasteful = x.stride(2) != 1 and (x.stride(1) != 1 or tiling.block_tokens < FEW_TOKENS)
    if wasteful or 32 * x.stride(1) + 2 * C * x.stride(2) >= LONGEST_TILE:
        return x.contiguous(), Tiling.of(C, not many, power)
    return x, tiling


def minimum_kind(gamma: float, channel_min: int) -> int:
    """MINIMUM: 0 without a power, 1 of the batch, 2 of each channel of each image."""
    return 0 if gamma == 0.0 else 1 + channel_min


def first_of(tensor: Tensor, otherwise: Tensor) -> Tensor:
    """`otherwise`, which is not read, for an absent tensor."""
    return tensor if tensor.numel() > 0 else otherwise


def work(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


class Types(NamedTuple):
    """Types of arguments as they come with one kind of tokens: what `configurations()` needs."""

    x: str  # strides of image, token and channel
    N: str
    C: str


LAYOUTS = {
    "tokens": Types("i32:16 i32:16 i32:1", "i32", "i32:16"),
    "map": Types("i32:16 i32:1 i32", "i32", "i32:16"),
    "odd map": Types("i32 i32:1 i32", "i32", "i32"),
    "odd width": Types("i32 i32 i32:1", "i32", "i32"),
    "single": Types("i32:1 i32:1 i32:1", "i32:1", "i32:1"),
}


def samples() -> Iterator[tuple[int, str, bool, int, str, str]]:
    """(channels, layout, many, MINIMUM, dtype of x, of parameters) of the kernels that read tokens.

    Every tile, with the minimum that costs most registers, and a sample of the rest.
    """
    for size in TILES:
        for many in (False, True):
            for kind in (0, 2):
                yield size, "tokens", many, kind, "bf16", "fp32"
    for size, (_, (others, _), (power, _)) in TILES.items():
        if others >= FEW_TOKENS:
            yield size, "map", False, 0, "bf16", "fp32"
        if power >= FEW_TOKENS:
            yield size, "map", True, 2, "bf16", "fp32"
    yield 4096, "tokens", False, 0, "bf16", "fp32"
    yield 512, "tokens", False, 1, "bf16", "fp32"
    for kind in (0, 2):
        yield 512, "tokens", False, kind, "fp32", "fp32"
    yield 512, "tokens", False, 2, "bf16", "bf16"
    yield 512, "tokens", False, 0, "fp16", "fp16"
    yield 256, "odd map", True, 2, "fp32", "fp32"
    yield 128, "odd width", False, 2, "fp32", "fp32"
    yield 512, "odd width", False, 2, "bf16", "fp32"
    yield 128, "single", False, 0, "bf16", "fp32"


def sample(
    size: int, layout: str, many: bool, kind: int, dtype: str, parameter: str
) -> tuple[Tiling, Types, str, str, str]:
    """Tiling, types, types of (C, H, d) and of the norm's parameters, and a description."""
    types = LAYOUTS[layout]
    heads = f"{types.C} {'i32' if many else 'i32:1'} {types.C}"
    norms = f"*{parameter}:16 *{parameter}:16"
    text = f"{dtype} {layout}" + f" {parameter} parameters" * (parameter != "fp32")
    return Tiling.of(size, "map" not in layout and not many, kind > 0), types, heads, norms, text
