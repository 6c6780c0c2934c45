"""self_relation against what SERE users write, at the shapes of a ViT-S/16 on 224² images."""

from __future__ import annotations

import math
from collections.abc import Callable

import sides
import torch
from harness import Case, Floor, Side
from torch import Tensor

OP = "self_relation"
HEADS, LENGTH, DEPTH = 6, 196, 64
WIDTH = HEADS * DEPTH
ALIGNED = 13 * 13  # SERE samples a 13 × 13 grid of the rectangle that two global crops share
_TRAINING = ("forward", "backward", "forward+backward")
_QUICK = ("forward", "forward+backward")


def eager_pixel(x: Tensor) -> Tensor:
    q = _heads(x)
    return (DEPTH**-0.5 * q @ q.transpose(-2, -1)).softmax(-1)


def eager_columns(x: Tensor, y: Tensor) -> Tensor:
    return (DEPTH**-0.5 * _heads(x) @ _heads(y).transpose(-2, -1)).softmax(-1)


def eager_channel(x: Tensor) -> Tensor:
    k = x.transpose(1, 2) / math.sqrt(x.shape[1])  # SERE divides the features by √N first
    return (k @ k.transpose(-2, -1)).softmax(-1).unsqueeze(1)


def _heads(x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    return x.view(batch, length, HEADS, DEPTH).transpose(1, 2)


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions, at a GPU's batch."""
    batch = 64 if device == "cuda" else 16
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    if quick:
        return [
            c for t in dtypes[:1] for c in (_pixel(batch, t, device, _QUICK), _channel(batch, t, device, _QUICK[:1]))
        ]
    return [
        case
        for dtype in dtypes
        for case in (
            _pixel(batch, dtype, device, _TRAINING),
            _columns(batch, dtype, device, _TRAINING[::2]),
            _channel(batch, dtype, device, _TRAINING[::2]),
        )
    ]


def _pixel(batch: int, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    shape = (batch, LENGTH, WIDTH)
    mine = sides.ours(OP, lambda x: ((x,), {"num_heads": HEADS}), (shape,), dtype, device)
    return Case(
        op=OP,
        shape=f"pixel B{batch} H{HEADS} N{LENGTH} d{DEPTH}",
        dtype=dtype,
        device=device,
        make_inputs=lambda g: (torch.randn(shape, generator=g),),
        sides=(_eager(eager_pixel), sides.compiled(eager_pixel, device), *mine),
        floors=_floors(batch * HEADS, LENGTH, LENGTH, DEPTH, dtype, modes, symmetric=True),
    )


def _columns(batch: int, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    shape = (batch, ALIGNED, WIDTH)

    def to_call(x: Tensor, y: Tensor) -> tuple[tuple[Tensor], dict[str, object]]:
        return (x,), {"num_heads": HEADS, "columns": y}

    mine = sides.ours(OP, to_call, (shape, shape), dtype, device)
    return Case(
        op=OP,
        shape=f"pixel columns B{batch} H{HEADS} N169 M169 d{DEPTH}",
        dtype=dtype,
        device=device,
        make_inputs=lambda g: (torch.randn(shape, generator=g), torch.randn(shape, generator=g)),
        sides=(_eager(eager_columns), sides.compiled(eager_columns, device), *mine),
        floors=_floors(batch * HEADS, ALIGNED, ALIGNED, DEPTH, dtype, modes, symmetric=False),
        differentiable=(0, 1),
    )


def _channel(batch: int, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    shape = (batch, LENGTH, WIDTH)
    mine = sides.ours(OP, lambda x: ((x,), {"kind": "channel"}), (shape,), dtype, device)
    return Case(
        op=OP,
        shape=f"channel B{batch} C{WIDTH} N{LENGTH}",
        dtype=dtype,
        device=device,
        make_inputs=lambda g: (torch.randn(shape, generator=g),),
        sides=(_eager(eager_channel), sides.compiled(eager_channel, device), *mine),
        floors=_floors(batch, WIDTH, WIDTH, LENGTH, dtype, modes, symmetric=True),
    )


def _eager(formula: Callable[..., Tensor]) -> Side:
    return Side("eager", formula)


def _floors(
    matrices: int,
    rows: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    modes: tuple[str, ...],
    *,
    symmetric: bool,
) -> dict[str, Floor]:
    """Of `matrices` relations of rows × columns vectors of `depth`.

    Forward: vectors read, matrix written. A symmetric Gram matrix needs half of its products, and half of its
    exponentials, since with one shift per matrix exp(S − c) is symmetric too. Backward: matrix and its
    gradient read, vectors read, their gradients written; dS + dSᵀ times X is one product, two with columns.
    """
    size = dtype.itemsize
    entries = matrices * rows * columns
    vectors = matrices * (rows if symmetric else rows + columns) * depth
    computed = matrices * rows * (rows + 1) / 2 if symmetric else entries
    forward = Floor(vectors * size, entries * size, 2 * computed * depth, computed)
    backward = Floor((2 * entries + vectors) * size, vectors * size, (2 if symmetric else 4) * entries * depth)
    floors = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return {mode: floors[mode] for mode in modes}


def test_self_relation(bench) -> None:
    bench()
