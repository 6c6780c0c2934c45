"""sample_tokens against grid_sample of the tokens laid out as a map, at SERE's shapes for a ViT-S/16 on 224² images."""

from __future__ import annotations

from collections.abc import Callable

import sides
import torch
import torch.nn.functional as F
from harness import Case, Floor, Side
from torch import Tensor

OP = "sample_tokens"
SIDE, WIDTH = 14, 384
POINTS = 13  # down and across, of the rectangle that two global crops share


def eager_tokens(x: Tensor, grid: Tensor) -> Tensor:
    feature_map = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], SIDE, SIDE)
    return eager_map(feature_map, grid)


def eager_map(x: Tensor, grid: Tensor) -> Tensor:
    """grid_sample wants both in one dtype, and autocast gives it the wider one."""
    work = torch.promote_types(x.dtype, grid.dtype)
    sampled = F.grid_sample(x.to(work), grid.to(work), align_corners=False)
    return sampled.flatten(2).transpose(1, 2).to(x.dtype)


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions, at a GPU's batch."""
    batch = 64 if device == "cuda" else 16
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    tokens, feature_map = (batch, SIDE * SIDE, WIDTH), (batch, WIDTH, SIDE, SIDE)
    if quick:
        return [_case("tokens", tokens, eager_tokens, dtypes[0], device)]
    return [
        case
        for dtype in dtypes
        for case in (
            _case("tokens", tokens, eager_tokens, dtype, device),
            _case("map", feature_map, eager_map, dtype, device),
        )
    ]


def _case(kind: str, shape: tuple[int, ...], formula: Callable[..., Tensor], dtype: torch.dtype, device: str) -> Case:
    batch = shape[0]
    grid = grid_of(batch).to(device)  # not an input of the case: it is float32 in every row

    def eager(x: Tensor) -> Tensor:
        return formula(x, grid)

    mine = sides.ours(OP, lambda x: ((x, grid), {}), (shape,), dtype, device)
    return Case(
        op=OP,
        shape=f"{kind} B{batch} {SIDE}×{SIDE} C{WIDTH} {POINTS}×{POINTS}",
        dtype=dtype,
        device=device,
        make_inputs=lambda g: (torch.randn(shape, generator=g),),
        sides=(Side("eager", eager), sides.compiled(eager, device), *mine),
        floors=_floors(batch, dtype),
    )


def grid_of(batch: int, seed: int = 0, points: int = POINTS) -> Tensor:
    """Rectangles of half to all of the map, another in every image; `points` down and across."""
    start, stop = torch.rand(2, batch, 2, 1, generator=torch.Generator().manual_seed(seed)).mul(0.5).unbind()
    ticks = torch.linspace(0, 1, points)
    y, x = ((start - 1) * (1 - ticks) + (1 - stop) * ticks).unbind(1)
    return torch.stack((x[:, None, :].expand(-1, points, -1), y[:, :, None].expand(-1, -1, points)), -1).contiguous()


def _floors(batch: int, dtype: torch.dtype) -> dict[str, Floor]:
    """Forward: tokens and grid read, samples written. Backward: their gradients read, those of the tokens written."""
    tokens = batch * SIDE * SIDE * WIDTH * dtype.itemsize
    samples = batch * POINTS * POINTS * WIDTH * dtype.itemsize
    grid = batch * POINTS * POINTS * 2 * 4
    flops = 2 * 4 * batch * POINTS * POINTS * WIDTH
    forward = Floor(tokens + grid, samples, flops)
    backward = Floor(samples + grid, tokens, flops)
    return {"forward": forward, "forward+backward": forward + backward}


def test_sample_tokens(bench) -> None:
    bench()
