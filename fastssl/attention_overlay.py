"""attention_overlay: an attention map drawn over its image, as papers print it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import _checks

_OP = "attention_overlay"
_MODES = {"bilinear": "bilinear", "nearest": "nearest-exact"}
#: 33 colours each, from 0 to 1 in equal steps; between them is at most 2 of 255 from matplotlib's map of the name.
_COLORS = {
    "inferno": (
        "000004 040312 0b0724 150b37 210c4a 2e0a5a 3c0965 4a0c6b 57106d 63146e 70196e "
        "7d1e6d 89226a 962766 a32b61 af315c bb3755 c63e4d d14644 db4f3b e35932 eb6528 "
        "f1711e f67f14 f98d0a fb9c06 fcab0f fbba1f f9ca32 f5d949 f2e865 f3f586 fcffa4"
    ),
    "viridis": (
        "440154 470d60 48186a 482374 472d7b 453681 424086 3f4989 3b528b 375a8d 33638d "
        "2f6a8e 2c728e 297a8e 26818e 23898e 21908c 1f988b 1f9f88 21a685 28ae80 31b57b "
        "3ebc74 4cc26c 5dc963 6ece58 82d34c 96d83f abdc32 c0df24 d5e21a eae51a fde725"
    ),
}


def attention_overlay(
    image: Tensor,
    attention: Tensor,
    *,
    grid_size: tuple[int, int] | None = None,
    head: int | None = None,
    alpha: float = 0.6,
    colors: str = "inferno",
    mode: str = "bilinear",
) -> Tensor:
    """Blends the attention to an image's patches over the image, in colours.

    Equivalent to::

        a = attention.mean(heads), or attention[head]                      # (h, w), for each image
        a = (a - a.min()) / (a.max() - a.min())                            # 0 everywhere if all are equal
        a = interpolate(a, (H, W), mode)                                   # each patch over its pixels
        (1 - alpha) * image + alpha * colour(a)

    Args:
        image: (3, H, W) or (B, 3, H, W), floating in [0, 1] or uint8. Undo a normalisation first.
        attention: of the N = h·w patches, row by row, without prefix tokens. For one image (N,) or (heads, N), for a
            batch (B, N) or (B, heads, N), as `fastssl.simpool` and `fastssl.nn.SimPool` return it. In place of N also
            h, w: (heads, h, w) and (B, heads, h, w) always, (h, w) and (B, h, w) with `grid_size`. For one image also
            (1, heads, N) with `grid_size`. Any floating dtype, finite; gets no gradient.
        grid_size: (h, w); None: of a square map, h = w.
        head: the number of one head, from 0; None: the mean of all.
        alpha: the share of the colours, from 0, the image alone, to 1, the map alone.
        colors: "inferno" or "viridis".
        mode: "bilinear", or "nearest", which shows the patches.

    Returns:
        What `image` is: its shape, dtype and device. Rounded for uint8.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device.

    Each map is drawn on its own scale, so the colours of two images are not comparable.
    """
    maps = _check(image, attention, grid_size, head, alpha, colors, mode)  # (B, heads, h, w)
    work = image.dtype if image.dtype in (torch.float32, torch.float64) else torch.float32
    heat = maps.detach().to(work)
    heat = heat.mean(1) if head is None else heat[:, head]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    spread = high - low
    heat = (heat - low) / torch.where(spread > 0, spread, 1)
    height, width = image.shape[-2:]
    interpolate: dict[str, Any] = {"mode": _MODES[mode], "align_corners": False if mode == "bilinear" else None}
    if heat.shape[0] > 0:
        heat = F.interpolate(heat[:, None], (height, width), **interpolate)[:, 0]
    else:
        heat = heat.new_empty((0, height, width))
    colour = _colour(heat, colors)
    full = 255.0 if image.dtype == torch.uint8 else 1.0
    pixels = image.detach().to(work).reshape(-1, 3, height, width)
    blended = (1 - alpha) * pixels + (alpha * full) * colour
    if image.dtype == torch.uint8:
        blended = blended.round()
    return blended.clamp(0, full).to(image.dtype).view(image.shape)


def _colour(heat: Tensor, colors: str) -> Tensor:
    """(B, H, W) in [0, 1] as (B, 3, H, W), interpolated between the colours of the table."""
    rows = [[int(word[i : i + 2], 16) / 255 for i in (0, 2, 4)] for word in _COLORS[colors].split()]
    table = torch.tensor(rows, dtype=heat.dtype, device=heat.device)
    place = heat.clamp(0, 1) * (len(rows) - 1)
    below = place.floor().clamp(max=len(rows) - 2)
    index = below.long()
    colour = torch.lerp(table[index], table[index + 1], (place - below)[..., None])
    return colour.permute(0, 3, 1, 2)


def _check(image: Any, attention: Any, grid_size: Any, head: Any, alpha: Any, colors: Any, mode: Any) -> Tensor:
    """The attention as (B, heads, h, w)."""
    if not isinstance(image, Tensor):
        raise TypeError(f"{_OP}: image must be a Tensor, got {type(image).__name__}")
    if image.dtype != torch.uint8 and not image.dtype.is_floating_point:
        raise TypeError(f"{_OP}: image must have a floating dtype or uint8, got dtype {str(image.dtype)[6:]}")
    if image.dim() not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        raise ValueError(f"{_OP}: image must be (3, H, W) or (B, 3, H, W), got {_checks.shape(image)}")
    if image.dtype != torch.uint8 and image.numel() > 0:
        low, high = (float(bound) for bound in image.detach().aminmax())
        if low < -1e-3 or high > 1 + 1e-3:
            raise ValueError(f"{_OP}: image must lie in [0, 1] where it is floating, got {low:.4g} to {high:.4g}")
    _checks.check_tensor(_OP, "attention", attention)
    _checks.check_same_device(_OP, "attention", attention, "image", image)
    if not bool(attention.isfinite().all()):
        raise ValueError(f"{_OP}: attention must be finite, got infinities or NaN")
    _checks.check_number(_OP, "alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{_OP}: alpha must be from 0 to 1, got {alpha}")
    _checks.check_choice(_OP, "colors", colors, tuple(_COLORS))
    _checks.check_choice(_OP, "mode", mode, tuple(_MODES))
    maps = _maps(image, attention, grid_size)
    heads = maps.shape[1]
    if head is not None:
        if isinstance(head, bool) or not isinstance(head, int):
            raise TypeError(f"{_OP}: head must be None or an int, got {type(head).__name__}")
        if not 0 <= head < heads:
            raise ValueError(f"{_OP}: head must be from 0 to {heads - 1} for {heads} heads, got {head}")
    return maps


def _is_batch_of_one(attention: Tensor, grid_size: Any) -> bool:
    """Whether one image's attention is (1, heads, N), as a layer gives it, and not the (heads, h, w) of one head."""
    if attention.dim() != 3 or attention.shape[0] != 1 or attention.shape[1] == attention.shape[2]:
        return False
    length = attention.shape[2]
    if isinstance(grid_size, tuple | list):
        return tuple(attention.shape[1:]) != tuple(grid_size) and math.prod(grid_size) == length
    if math.isqrt(length) ** 2 == length:
        raise ValueError(
            f"{_OP}: attention must be (heads, N) for image (3, H, W) or come with grid_size, got "
            f"{_checks.shape(attention)}, which could be (1, heads, N) or (heads, h, w)"
        )
    return False


def _maps(image: Tensor, attention: Tensor, grid_size: Any) -> Tensor:
    batched = image.dim() == 4
    lead = "B, " if batched else ""
    maps = attention if batched or _is_batch_of_one(attention, grid_size) else attention[None]
    is_map = maps.dim() == 4 or (
        maps.dim() == 3 and isinstance(grid_size, tuple | list) and tuple(maps.shape[1:]) == tuple(grid_size)
    )
    tokens = maps.flatten(-2) if is_map else maps
    if tokens.dim() == 2:
        tokens = tokens[:, None]
    if tokens.dim() != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"{_OP}: attention must be ({lead}N), ({lead}heads, N) or ({lead}heads, h, w) for image "
            f"{_checks.shape(image)}, got {_checks.shape(attention)}"
        )
    if batched and tokens.shape[0] != image.shape[0]:
        raise ValueError(
            f"{_OP}: attention must have image's batch (B = {image.shape[0]}), got {_checks.shape(attention)}"
        )
    if is_map and grid_size is None:
        grid_size = (maps.shape[-2], maps.shape[-1])
    if is_map and isinstance(grid_size, tuple | list) and tuple(grid_size) != tuple(maps.shape[-2:]):
        raise ValueError(
            f"{_OP}: grid_size must be None or (h, w) = {tuple(maps.shape[-2:])} of attention, got {grid_size}"
        )
    by_patch = _checks.map_of_tokens(_OP, "attention", tokens.mT, grid_size)  # (B, h, w, heads)
    return by_patch.permute(0, 3, 1, 2)
