"""Draws what a small ViT's SimPool layer attends to: each photograph, and its attention over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl.attention_overlay import attention_overlay
from fastssl.cli.photos import Photo
from fastssl.cli.pictures import FOOTER, GAP, HEADER, MARGIN, WIDTH, Array, Box, Page, fit

TITLE = "Where does SimPool look?"
CALL = "fastssl.attention_overlay(image, attention, grid_size={size}, alpha={alpha})"
ALPHA = 0.65


def draw_attention(photos: Sequence[Photo], maps: Sequence[Tensor], path: Path, command: str, subtitle: str) -> None:
    """Pairs of photograph and map; two pairs a line, or one where there is one photograph."""
    pairs = min(len(photos), 2)
    lines = (len(photos) + pairs - 1) // pairs
    across = (WIDTH - 2 * MARGIN - (2 * pairs - 1) * GAP) // (2 * pairs)
    down = round(across / 1.5)
    page = Page(WIDTH, HEADER + lines * (down + GAP) - GAP + FOOTER)
    for i, (photo, attention) in enumerate(zip(photos, maps, strict=True)):
        line, pair = divmod(i, pairs)
        x, y = MARGIN + pair * 2 * (across + GAP), HEADER + line * (down + GAP)
        pixels, place = fit(photo.pixels, Box(x, y, across, down))
        page.paste(pixels, place)
        page.paste(overlaid(pixels, attention), place._replace(x=place.x + across + GAP))
    page.header(TITLE, subtitle)
    size = f"({maps[0].shape[0]}, {maps[0].shape[1]})"
    credits = "; ".join(f"{photo.name} {photo.credit}" for photo in photos if photo.credit)
    page.scale("least", "most")
    page.footer(command, CALL.format(size=size, alpha=ALPHA), "")
    if credits:  # of all of them, so smaller than on the other pages
        page.text(MARGIN, page.size[1] - FOOTER + 45, f"Photographs: {credits}.", 9.4, "#667085")
    page.save(path)


def overlaid(pixels: Array, attention: Tensor) -> Array:
    """The photograph in grey under the colours of its attention (rows, columns)."""
    grey = (pixels @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    image = torch.from_numpy(grey).expand(3, -1, -1)
    size = (attention.shape[0], attention.shape[1])
    shown = attention_overlay(image, attention.flatten(), grid_size=size, alpha=ALPHA)
    return np.asarray(shown.permute(1, 2, 0).numpy())
