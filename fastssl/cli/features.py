"""Patch features without a network (colour, edges, texture), and the choice of patches worth asking about."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Pixels of a patch's side, after the photograph is scaled so that it has about TOKENS patches.
PATCH = 8
TOKENS = 1200

#: A group of channels that varies less than FLAT over a photograph says nothing, nor does a channel with less
#: than the share FAINT of its group's variation: both are left zero.
FLAT, FAINT = 1e-3, 0.01

#: The groups of channels: label, number of channels, and what the group weighs in a dot product.
GROUPS = (
    ("lightness", 4, 0.7),
    ("green to red", 5, 1.0),
    ("blue to yellow", 5, 1.0),
    ("fine edges", 8, 0.35),
    ("coarse edges", 8, 0.35),
    ("texture", 4, 0.6),
)


class Patches(NamedTuple):
    """Features (1, N, C) of the N = rows·columns patches of one photograph."""

    features: Tensor
    rows: int
    columns: int


def patch_features(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Patches:
    """What a patch looks like, not where it lies. Every channel has mean 0, every group its variance."""
    from PIL import Image
    from skimage.color import rgb2lab

    height, width = pixels.shape[:2]
    rows, columns = grid(height, width)
    small = Image.fromarray(pixels).resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    lab = torch.from_numpy(rgb2lab(np.asarray(small)).astype(np.float32)).permute(2, 0, 1)[:, None]
    light = lab[0:1] / 100
    # a and b are mostly near 0; this spreads the greys and keeps vivid colours in range
    red, yellow = (lab[i : i + 1] / (lab[i : i + 1].abs() + 25) for i in (1, 2))
    maps = (
        _histogram(light, 0.0, 1.0, 4),
        _histogram(red, -0.7, 0.7, 5),
        _histogram(yellow, -0.7, 0.7, 5),
        _directions(blur(light, 0.8)),
        _directions(blur(light, 2.5)),
        _bands(light),
    )
    parts = []
    for (_, _, weight), group in zip(GROUPS, maps, strict=True):
        pooled = F.avg_pool2d(group, PATCH).clamp_min(0).sqrt()
        smooth = blur(pooled.transpose(0, 1), 1.0).transpose(0, 1).flatten(2).squeeze(0)
        centred = smooth - smooth.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
        spread = variance.sum().sqrt()
        says = (variance.sqrt() > FAINT * spread) & (spread > FLAT)
        parts.append(torch.where(says, centred * (weight / spread.clamp_min(FLAT)), 0.0))
    return Patches(torch.cat(parts).T[None].contiguous(), rows, columns)


def grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of about TOKENS patches in the picture's proportions, at least 1 each."""
    ratio = min(max(height / width, 1 / TOKENS), TOKENS)
    rows = max(1, round((TOKENS * ratio) ** 0.5))
    return rows, max(1, round(TOKENS / rows))


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (M, 1, h, w) that repeats the border."""
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    maps = F.conv2d(F.pad(maps, (radius, radius, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(maps, (0, 0, radius, radius), mode="replicate"), kernel.view(1, 1, -1, 1))


def _histogram(values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Each pixel shared between the two nearest of `bins` centres from low to high: (1, bins, h, w)."""
    place = ((values - low) / (high - low)).clamp(0, 1) * (bins - 1)
    return (1 - (place - torch.arange(bins).view(1, -1, 1, 1)).abs()).clamp_min(0)


def _directions(light: Tensor, bins: int = 8) -> Tensor:
    """Edge strength by direction, half a turn in `bins` steps: (1, bins, h, w)."""
    padded = F.pad(light, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    angle = torch.atan2(dy, dx) / torch.pi * bins
    offset = (angle - torch.arange(bins).view(1, -1, 1, 1) + bins / 2).remainder(bins) - bins / 2
    strength = (dx.square() + dy.square()).sqrt()
    return strength * (1 - offset.abs()).clamp_min(0)


def _bands(light: Tensor) -> Tensor:
    """How much of each size of detail there is, from fine to coarse: (1, 4, h, w)."""
    levels = [light] + [blur(light, sigma) for sigma in (0.7, 1.4, 2.8, 5.6)]
    return torch.cat([(a - b).abs() for a, b in pairwise(levels)], 1)


def choose_queries(patches: Patches, count: int) -> list[int]:
    """`count` patches that differ from each other and each stand for a region; the same ones every time.

    Farthest-point selection by cosine distance, weighted: a patch counts more the less it is like the average
    patch, the more it is like its neighbours (a region, not an edge), the more patches are like it that no
    earlier choice is like, and the nearer it lies to the middle.
    """
    features = patches.features[0].double()
    unit = F.normalize(features, dim=-1, eps=1e-9)
    plane = unit.T.reshape(1, -1, patches.rows, patches.columns)
    around = F.avg_pool2d(F.pad(plane, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    calm = (around * plane).sum(1).flatten().clamp(0, 1)
    weight = features.square().sum(-1) * calm.square() * _central(patches.rows, patches.columns)
    likeness = unit @ unit.T
    alike = (likeness > 0.5).double()
    uncovered = torch.ones(len(unit), dtype=torch.float64)
    away = torch.ones(len(unit), dtype=torch.float64)
    chosen: list[int] = []
    while len(chosen) < min(count, len(unit)):
        region = (alike @ uncovered / len(unit)).clamp(max=0.1).sqrt()
        score = weight * region * away
        best = int(score.argmax())
        if score[best] <= 0:  # nothing differs from what is chosen already
            break
        chosen.append(best)
        uncovered = uncovered * (1 - alike[best])
        away = torch.minimum(away, (1 - likeness[best]).clamp_min(0))
    return chosen or [int(_central(patches.rows, patches.columns).argmax())]


def _central(rows: int, columns: int) -> Tensor:
    """1 in the middle of the picture, 1/3 in its corners, and less where a marker would not fit inside."""
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) / columns * 2 - 1
    weight = 1 / (1 + y.square()[:, None] + x.square()[None])
    margin = torch.minimum((1 - y.abs())[:, None] * rows, (1 - x.abs())[None] * columns) / 2
    return (weight * (margin / 2.5).clamp(max=1)).flatten()
