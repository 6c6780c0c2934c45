"""packed_attention against the ways users attend within crops of two sizes, as DINOv2 packs them: ViT-S/16's heads."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sides
import torch
import torch.nn.functional as F
from harness import MODES, Case, Floor, Side
from torch import Tensor

OP = "packed_attention"
HEADS, DEPTH = 6, 64
#: (sequences, tokens of each): global and local crops.
CROPS = ((8, 197), (32, 37))
LENGTHS = tuple(length for count, length in CROPS for _ in range(count))
TOTAL, LONGEST = sum(LENGTHS), max(LENGTHS)
_MODES = ("forward", "forward+backward")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _crops(x: Tensor) -> list[Tensor]:
    """(T, H, d) as one (B, H, N, d) view for each size."""
    parts = x.split([count * length for count, length in CROPS])
    return [p.view(*crop, HEADS, DEPTH).transpose(1, 2) for p, crop in zip(parts, CROPS, strict=True)]


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, HEADS, DEPTH)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = zip(*(_crops(x) for x in (q, k, v)), strict=True)
    return torch.cat([_flat((DEPTH**-0.5 * q @ k.transpose(-1, -2)).softmax(-1) @ v) for q, k, v in parts])


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call for each size of crops."""
    parts = zip(*(_crops(x) for x in (q, k, v)), strict=True)
    return torch.cat([_flat(F.scaled_dot_product_attention(*part)) for part in parts])


def padded(mask: Tensor) -> Attention:
    """All sequences as long as the longest, with a mask over the keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = [torch.cat([F.pad(p, (0, 0, 0, LONGEST - p.shape[2])) for p in _crops(x)]) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*wide, attn_mask=mask).split([count for count, _ in CROPS])
        return torch.cat([_flat(o[:, :, :length]) for o, (_, length) in zip(out, CROPS, strict=True)])

    return attend


def nested(starts: Tensor) -> Attention:
    """torch.nested's jagged tensors, whose kernels want them contiguous."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        jagged = [
            torch.nested.nested_tensor_from_jagged(x.contiguous(), starts, min_seqlen=min(LENGTHS), max_seqlen=LONGEST)
            for x in (q, k, v)
        ]
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in jagged)).transpose(1, 2).values()

    return attend


def varlen(starts: Tensor) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, starts, starts, LONGEST, LONGEST)

    return attend


def flexible(device: str) -> Attention:
    """FlexAttention over all tokens, with a mask of blocks that was made once."""
    from torch.nn.attention import flex_attention as flex

    run = torch.compile(flex.flex_attention, dynamic=False)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(device)

    @functools.cache
    def blocks() -> flex.BlockMask:
        def together(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return sequence[i] == sequence[j]

        return flex.create_block_mask(together, None, None, TOTAL, TOTAL, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=blocks())[0].transpose(0, 1)

    return attend


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    if quick:
        return [_case(dtypes[0], device, _MODES[1:])]
    return [_case(dtype, device, _MODES) for dtype in dtypes]


def _case(dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    shape = (TOTAL, HEADS, DEPTH)
    starts = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(device, torch.int32)
    mask = (torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None])[:, None, None, :].to(device)

    def to_call(*tensors: Tensor) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        return (*tensors, starts), {"max_seqlen": LONGEST}

    compiled = sides.compiled(eager, device)
    half = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flex_modes = MODES if device == "cuda" else ("forward",)  # it has no backward on a CPU
    return Case(
        op=OP,
        shape=f"{' + '.join(f'{count} of {length}' for count, length in CROPS)} H{HEADS} d{DEPTH}",
        dtype=dtype,
        device=device,
        make_inputs=_inputs,
        sides=(
            Side("eager", eager),
            compiled,
            Side("padded", padded(mask)),
            Side("nested", nested(starts.long())),
            Side("varlen", varlen(starts), absent="" if half else "varlen_attn takes half precision on CUDA alone"),
            Side("flex", flexible(device), modes=flex_modes, absent=compiled.absent),
            *sides.ours(OP, to_call, (shape, shape, shape), dtype, device),
        ),
        floors=_floors(dtype, modes),
        differentiable=(0, 1, 2),
        truth=formula,
    )


def _inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Views of one qkv projection's output."""
    return torch.randn(TOTAL, 3, HEADS, DEPTH, generator=generator).unbind(1)


def _floors(dtype: torch.dtype, modes: tuple[str, ...]) -> dict[str, Floor]:
    """q, k and v are read, the output and the gradients are written; of the pairs within each sequence, two products
    in forward, five more in backward, and an exponential in each."""
    tensor = TOTAL * HEADS * DEPTH * dtype.itemsize
    pairs = HEADS * sum(length * length for length in LENGTHS)
    forward = Floor(3 * tensor, tensor, 4 * pairs * DEPTH, pairs)
    both = Floor(4 * tensor, 4 * tensor, 14 * pairs * DEPTH, 2 * pairs)
    floors = {"forward": forward, "forward+backward": both}
    return {mode: floors[mode] for mode in modes}


def test_packed_attention(bench) -> None:
    bench()
