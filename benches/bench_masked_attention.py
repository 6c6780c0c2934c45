"""masked_attention against the ways users attend among what a mask keeps, at the shape of a ViT-S/16 on 224² images."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sides
import torch
import torch.nn.functional as F
from harness import MODES, Case, Floor, Side
from torch import Tensor

OP = "masked_attention"
HEADS, LENGTH, DEPTH = 6, 197, 64
_MODES = ("forward", "forward+backward")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def formula(keep: Tensor | None) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = DEPTH**-0.5 * q @ k.transpose(-1, -2)
        if keep is None:
            return logits.softmax(-1) @ v
        logits = logits.masked_fill(~keep[:, None, None, :], -torch.inf)
        return (logits.softmax(-1) @ v) * keep[:, None, :, None]

    return attend


def eager(keep: Tensor | None) -> Attention:
    """All tokens, with a mask over the keys; as in the others, rows of dropped tokens become zero."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if keep is None:
            return F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :]) * keep[:, None, :, None]

    return attend


def gathered(keep: Tensor) -> Attention:
    """MAE's way: what is kept as a smaller batch, and back."""
    count = int(keep[0].sum())
    index = keep.nonzero()[:, 1].view(-1, 1, count, 1).expand(-1, HEADS, -1, DEPTH)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.gather(2, index) for x in (q, k, v)))
        return q.new_zeros(q.shape).scatter(2, index, out)

    return attend


def flexible(keep: Tensor | None) -> Attention:
    """FlexAttention with the mask as blocks, made once."""
    from torch.nn.attention import flex_attention as flex

    run = torch.compile(flex.flex_attention, dynamic=False)

    @functools.cache
    def blocks() -> flex.BlockMask | None:
        if keep is None:
            return None

        def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return keep[b, i] & keep[b, j]

        return flex.create_block_mask(kept, keep.shape[0], None, LENGTH, LENGTH, device=keep.device.type)

    return lambda q, k, v: run(q, k, v, block_mask=blocks())


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions, at a GPU's batch."""
    batch = 64 if device == "cuda" else 32
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    if quick:
        return [_case(25, batch, dtypes[0], device, _MODES[1:])]
    return [_case(percent, batch, dtype, device, _MODES) for dtype in dtypes for percent in (25, 50, 100)]


def _case(percent: int, batch: int, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    kept = round(LENGTH * percent / 100)
    keep = None if percent == 100 else _keep(batch, kept).to(device)
    shape = (batch, HEADS, LENGTH, DEPTH)

    def to_call(*tensors: Tensor) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
        return (*tensors, keep), {}

    gather = (Side("gather", gathered(keep)),) if keep is not None else ()
    flex_modes = MODES if device == "cuda" else ("forward",)  # it has no backward on a CPU
    compiled = sides.compiled(formula(keep), device)
    return Case(
        op=OP,
        shape=f"keep {percent}% B{batch} H{HEADS} N{LENGTH} d{DEPTH}",
        dtype=dtype,
        device=device,
        make_inputs=_inputs(batch),
        sides=(
            Side("eager", eager(keep)),
            compiled,
            *gather,
            Side("flex", flexible(keep), modes=flex_modes, absent=compiled.absent),
            *sides.ours(OP, to_call, (shape, shape, shape), dtype, device),
        ),
        floors=_floors(batch, kept, dtype, modes),
        differentiable=(0, 1, 2),
        truth=formula(keep),
    )


def _keep(batch: int, kept: int) -> Tensor:
    """As many in every image, at random, always the same ones."""
    order = torch.rand(batch, LENGTH, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    return order < kept


def _inputs(batch: int):
    """Views of one qkv projection's output."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        qkv = torch.randn(batch, LENGTH, 3, HEADS, DEPTH, generator=generator)
        return tuple(x.transpose(1, 2) for x in qkv.unbind(2))

    return make


def _floors(batch: int, kept: int, dtype: torch.dtype, modes: tuple[str, ...]) -> dict[str, Floor]:
    """Kept tokens are read, all of the output and of the gradients is written; of k² pairs, two products in forward,
    five more in backward, and an exponential in each."""
    row = batch * HEADS * DEPTH * dtype.itemsize
    pairs = batch * HEADS * kept * kept
    forward = Floor(3 * kept * row, LENGTH * row, 4 * pairs * DEPTH, pairs)
    both = Floor(4 * kept * row, 4 * LENGTH * row, 14 * pairs * DEPTH, 2 * pairs)
    floors = {"forward": forward, "forward+backward": both}
    return {mode: floors[mode] for mode in modes}


def test_masked_attention(bench) -> None:
    bench()
