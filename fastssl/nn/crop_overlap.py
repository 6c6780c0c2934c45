"""overlap_grids: the points that two crops of one image share, each in its own crop's coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl import _checks

_OP = "overlap_grids"

#: The coordinates of points that there are not: outside every map, so that sampling gives zero tokens.
OUTSIDE = -2.0


def overlap_grids(
    rect_a: Tensor, rect_b: Tensor, size: int | tuple[int, int], flips: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """SERE's alignment of two views: one grid of points in the rectangle that two crops share, seen from each crop.

    Equivalent, for one image with rectangles ``(top, left, height, width)``, to::

        top, bottom = max(tops), min(bottoms)                            # of the shared rectangle; across likewise
        y = torch.linspace(top, bottom, k)                               # its borders included
        2 * (y - crop_top) / crop_height - 1                             # for each crop; x also negated if flipped

    Args:
        rect_a, rect_b: (B, 4) tensors of any number dtype: top, left, height and width of a crop, in the coordinates
            of the image it was cut from. Crops of the same image stand in the same row.
        size: k, the number of points down and across, or both, (down, across). One point alone lies in the middle.
            SERE may relate the points of one grid with those of another size: call once for each.
        flips: two (B,) bool tensors that say which crops were mirrored horizontally after they were cut; None: none.

    Returns:
        Two grids (B, k, k, 2) for `fastssl.sample_tokens`, (x, y) in [-1, 1], in float32 (float64 where a rectangle
        has it). Point (i, j) of both is the same place of the image. Crops that share no area, those that only touch
        included, get points at (-2, -2), outside their maps. Points on the border of a crop, at -1 or 1, are half a
        token beyond the last centres, so that `sample_tokens` blends them with zeros.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device.

    Runs on the rectangles' device without waiting for it. Rectangles get no gradient.

    Source: SERE (arXiv 2206.05184), the alignment of two views.
    """
    _check(rect_a, rect_b, size, flips)
    down, across = (size, size) if isinstance(size, int) else size
    work = torch.float64 if torch.float64 in (rect_a.dtype, rect_b.dtype) else torch.float32
    a, b = rect_a.detach().to(work), rect_b.detach().to(work)
    first, last = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    shared = (last > first).all(1)  # false for NaN
    flip_a, flip_b = (None, None) if flips is None else flips
    grids = (_grid(a, first, last, shared, down, across, flip_a), _grid(b, first, last, shared, down, across, flip_b))
    return grids


def _grid(
    rect: Tensor, first: Tensor, last: Tensor, shared: Tensor, down: int, across: int, flip: Tensor | None
) -> Tensor:
    """The points between the corners `first` and `last`, both (B, 2) as (y, x), in the coordinates of `rect`."""
    # Borders of a crop become -1 and 1 exactly, whatever the rounding of the points between them.
    start, stop = ((2 * (corner - rect[:, :2]) / rect[:, 2:] - 1)[:, :, None] for corner in (first, last))
    y, x = (
        start[:, axis] * (1 - ticks) + stop[:, axis] * ticks
        for axis, ticks in enumerate(_ticks(count, rect) for count in (down, across))
    )
    if flip is not None:
        x = torch.where(flip[:, None], -x, x)
    grid = torch.stack((x[:, None, :].expand(-1, down, -1), y[:, :, None].expand(-1, -1, across)), -1)
    return torch.where(shared[:, None, None, None], grid, OUTSIDE)


def _ticks(count: int, like: Tensor) -> Tensor:
    """From 0 to 1."""
    if count == 1:
        return torch.full((1,), 0.5, dtype=like.dtype, device=like.device)
    return torch.arange(count, dtype=like.dtype, device=like.device) / (count - 1)


def _check(rect_a: Any, rect_b: Any, size: Any, flips: Any) -> None:
    for name, rect in (("rect_a", rect_a), ("rect_b", rect_b)):
        if not isinstance(rect, Tensor):
            raise TypeError(f"{_OP}: {name} must be a Tensor, got {type(rect).__name__}")
        if rect.dtype == torch.bool or rect.dtype.is_complex:
            raise TypeError(f"{_OP}: {name} must have a real number dtype, got dtype {str(rect.dtype)[6:]}")
        if rect.dim() != 2 or rect.shape[1] != 4:
            raise ValueError(f"{_OP}: {name} must be (B, 4), got {_checks.shape(rect)}")
    batch = rect_a.shape[0]
    if rect_b.shape[0] != batch:
        raise ValueError(f"{_OP}: rect_b must have rect_a's batch (B = {batch}), got {_checks.shape(rect_b)}")
    _checks.check_same_device(_OP, "rect_b", rect_b, "rect_a", rect_a)
    counts = size if isinstance(size, tuple | list) else (size, size)
    if len(counts) != 2:
        raise ValueError(f"{_OP}: size must be an int or two of them, got {size!r}")
    for count in counts:
        _checks.check_count(_OP, "size", count)
    if flips is None:
        return
    if not isinstance(flips, tuple | list) or len(flips) != 2:
        raise TypeError(f"{_OP}: flips must be None or two Tensors, got {type(flips).__name__}")
    for flip in flips:
        if not isinstance(flip, Tensor) or flip.dtype != torch.bool:
            got = f"dtype {str(flip.dtype)[6:]}" if isinstance(flip, Tensor) else type(flip).__name__
            raise TypeError(f"{_OP}: flips must be two Tensors of dtype bool, got {got}")
        if flip.dim() != 1 or flip.shape[0] != batch:
            raise ValueError(f"{_OP}: flips must be two (B,) tensors with B = {batch}, got {_checks.shape(flip)}")
        _checks.check_same_device(_OP, "flips", flip, "rect_a", rect_a)
