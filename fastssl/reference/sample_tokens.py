"""sample_tokens in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl._autocast import without_autocast


@without_autocast
def sample_tokens(x: Tensor, grid: Tensor, *, grid_size: tuple[int, int] | None = None) -> Tensor:
    """grid_sample of the map that the tokens lie in, as tokens again: bilinear, zeros outside, align_corners=False.

    Arguments as in `fastssl.sample_tokens`. Computes in float32, or float64 if an input is float64.
    """
    work = torch.float64 if torch.float64 in (x.dtype, grid.dtype) else torch.float32
    sampled = F.grid_sample(feature_map(x, grid_size).to(work), grid.to(work), align_corners=False)
    return sampled.flatten(2).transpose(1, 2).to(x.dtype).contiguous()


def feature_map(x: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
    """A feature map (B,C,h,w) as it is, or tokens (B,N,C) as a (B,C,h,w) view; square if `grid_size` is None."""
    if x.dim() == 4:
        return x
    side = square_side(x.shape[1])
    return x.unflatten(1, grid_size or (side, side)).permute(0, 3, 1, 2)


def square_side(length: int) -> int:
    """√length, rounded; not math.isqrt, because torch.compile traces this for a symbolic length."""
    return int(length**0.5 + 0.5)
