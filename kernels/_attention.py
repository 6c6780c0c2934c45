"""Ground shared by the kernels of packed_attention and masked_attention: one call as sequences of rows.

A sequence is a range of rows (packed_attention), all rows of an image, or the rows of an image that an index names
(masked_attention): kernels find its rows in q, k and v by themselves, and nothing is gathered. An index names the
dropped rows too, behind the kept ones, so that the kernels which write the results write their zeros as well.

Nothing on the host knows how long the sequences are. A program has one (sequence, head) and takes every `blocks`-th
block of its rows, however many those are; `blocks` is a guess, and a program without a row ends at once.

16-bit tiles are DEPTH channels wide. The ordinary cores, which multiply float32, keep whole rows of both operands in
registers, so that for them dot products are added up of SLICE channels at a time (SLICE = 0: no).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import Choice, multiply
from torch import Tensor

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

#: Head widths and strides are counted in so many elements: 16 bytes or more, which the compiler then knows.
UNIT = 8

#: A hint of max_seqlen may be far too large, and more programs than this per launch help nobody.
MOST_PROGRAMS = 2**24


@triton.jit
def locate(lengths, order, sequence, rows, per_image, INDEXED: tl.constexpr):
    """Image, first row, number of rows and index of a sequence, all within [0, rows), whatever `lengths` holds."""
    image = tl.cast(sequence, tl.int64)
    if INDEXED:
        begin = 0
        count = tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), rows)
        order += image * rows
    else:
        begin = tl.load(lengths + sequence, mask=per_image == 0, other=0)
        end = tl.load(lengths + sequence + 1, mask=per_image == 0, other=rows)
        begin = tl.minimum(tl.maximum(begin, 0), rows)
        count = tl.minimum(tl.maximum(end, begin), rows) - begin
        image *= per_image
    return image, begin, count, order


@triton.jit
def tokens_of(order, begin, first, count, ROWS: tl.constexpr, INDEXED: tl.constexpr):
    """Where rows first … first + ROWS of a sequence are, and which of them there are."""
    row = first + tl.arange(0, ROWS)
    there = row < count
    if INDEXED:
        return tl.load(order + row, mask=there, other=0), there
    else:
        return begin + row, there


@triton.jit
def load_rows(base, token, there, depth, stride, channel, WIDTH: tl.constexpr):
    """Channels channel … channel + WIDTH of the given tokens, zero outside; the stride is in UNITs."""
    at = channel + tl.arange(0, WIDTH)
    base += token.to(tl.int64)[:, None] * (stride * 8)
    return tl.load(base + at[None, :], mask=there[:, None] & (at < depth)[None, :], other=0.0)


@triton.jit
def store_rows(base, value, token, there, depth, stride, WIDTH: tl.constexpr):
    """The counterpart of load_rows; rounds to the dtype of base."""
    at = tl.arange(0, WIDTH)
    base += token.to(tl.int64)[:, None] * (stride * 8)
    tl.store(base + at[None, :], value.to(base.dtype.element_ty), mask=there[:, None] & (at < depth)[None, :])


@triton.jit
def dots(
    a, a_rows, a_token, a_there, a_stride, b, b_rows, b_token, b_there, b_stride, depth,
    A: tl.constexpr, B: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Products of A tokens of a with B of b, in float32: of their rows as loaded, or with SLICE read here in slices."""
    total = tl.zeros([A, B], tl.float32)
    if SLICE == 0:
        total = multiply(a_rows, tl.trans(b_rows), total, False)
    else:
        for channel in range(0, depth, SLICE):
            x = load_rows(a, a_token, a_there, depth, a_stride, channel, SLICE)
            y = load_rows(b, b_token, b_there, depth, b_stride, channel, SLICE)
            total = multiply(x, tl.trans(y), total, False)
    return total


class Rows(NamedTuple):
    """A tensor whose rows can be read as 16-byte vectors; strides in UNITs."""

    tensor: Tensor
    strides: tuple[int, int, int]  # of image, head and row

    @staticmethod
    def of(x: Tensor) -> Rows:
        """x: (B, H, N, d), or (T, H, d), which counts as one image; a copy of it where its strides are others.

        Views of a (B, N, 3, H, d) tensor need none. For others, one copy costs less than reading single elements of
        all keys once per block of queries.
        """
        x = x if x.dim() == 4 else x.transpose(0, 1)[None]
        strides = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
        if strides[3] != 1 or any(stride % UNIT for stride in strides[:3]) or x.data_ptr() % 16:
            x = x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
            strides = list(x.stride())
        image, head, row = (stride // UNIT for stride in strides[:3])
        return Rows(x, (image, head, row))


class Sequences(NamedTuple):
    """Which rows belong to which sequence."""

    number: int
    rows: int  # T, or N of each image
    longest: int  # a guess
    indexed: int
    lengths: Tensor | None  # int32: where sequences begin and the last one ends; kept rows per image; None: all rows
    order: Tensor | None  # (B, N) int32: the kept rows of each image, then the others

    @staticmethod
    def packed(cu_seqlens: Tensor, total: int, max_seqlen: int) -> Sequences:
        number = cu_seqlens.shape[0] - 1
        longest = min(total, max_seqlen or 2 * triton.cdiv(total, max(number, 1)))
        return Sequences(number, total, longest, 0, cu_seqlens.contiguous(), None)

    def tensors(self, unused: Tensor) -> tuple[Tensor, Tensor]:
        """`unused`: any 4-byte tensor, in place of those that there are not."""
        unused = unused.view(torch.int32)
        return unused if self.lengths is None else self.lengths, unused if self.order is None else self.order

    def blocks(self, choice: Choice, heads: int) -> int:
        """How many programs share the rows of a (sequence, head); no more than there may be in a launch."""
        wanted = triton.cdiv(self.longest, choice.constexprs["BLOCK"])
        return max(min(wanted, MOST_PROGRAMS // max(self.number * heads, 1)), 1)


#: Up to this length, blocks of 64 rows would be mostly padding.
FEW = 48


def width_of(depth: int) -> int:
    """DEPTH of the tables."""
    return 32 if depth <= 32 else 64 if depth <= 64 else 128


def choose(kernel: Any, table: dict[Any, Any], longest: int, depth: int, exact: bool, indexed: int) -> Choice:
    """Entries of tables: BLOCK, TAIL, INNER, INNER_TAIL, warps, stages.

    A block has BLOCK rows, or TAIL where no more are left; it goes over the other rows by INNER, what is left by
    INNER_TAIL unless that is more than half of INNER.
    """
    width = width_of(depth)
    few = longest <= FEW and ("few", width) in table
    block, tail, inner, inner_tail, warps, stages = table[("exact" if exact else "few" if few else "many", width)]
    blocks = {"BLOCK": block, "TAIL": tail, "INNER": inner, "INNER_TAIL": inner_tail}
    # An index is read one stage ahead of the rows that it names.
    stages += indexed and stages > 1
    return Choice(kernel, {**blocks, "DEPTH": width, "SLICE": 16 * exact, "INDEXED": indexed}, warps, stages)
