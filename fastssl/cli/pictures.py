"""Draws what the demo computes: a page per photograph, the overview, and the channel relations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fastssl.cli.features import GROUPS, Patches
from fastssl.cli.photos import Photo

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 1400  # pixels of a page
MARGIN = 25
GAP = 10
HEADER = 92
FOOTER = 62
BACKGROUND = "#0d1017"
BRIGHT, DIM = "#f2f4f8", "#8b94a7"
QUERY_COLOURS = ("#ff5d73", "#ffd23f", "#2ee6a8", "#4cc9f0", "#c38bff", "#ff9f45")
MAP = "inferno"
STEP = 3  # colours are rounded to this: at most one level off, and a quarter smaller as PNG

SUBTITLE = "Each map is one row of the relation matrix: how much every patch is like the numbered one."
MAP_NOTE = "Each map is scaled to its largest entry."
CHANNEL_SUBTITLE = "Each row of the channel relation: how much one feature varies over the photograph as the others do."
CHANNEL_NOTE = (
    "Lightness from dark to bright, edges by direction through half a turn, texture from fine to coarse. "
    "Each row is scaled to its largest entry; a feature that the photograph lacks stays blank."
)


class Study(NamedTuple):
    """One photograph and what self_relation says of it."""

    photo: Photo
    patches: Patches
    queries: list[int]
    rows: Array  # (queries, rows, columns): one row of the pixel relation per query
    channels: Array  # (C, C): the channel relation


class Box(NamedTuple):
    """Pixels on a page, from the top left."""

    x: int
    y: int
    width: int
    height: int


class Page:
    """A dark page: pictures are pasted pixel by pixel, then matplotlib draws marks and text over them."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.canvas = Image.new("RGB", self.size, BACKGROUND)
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float, colour: str = BRIGHT, **more: Any) -> None:
        """`size` in pixels; words are never read as mathematics."""
        more = {"va": "center", **more}
        self.axes.text(x, y, words, fontsize=size * 0.72, color=colour, parse_math=False, **more)

    def paste(self, pixels: Array, box: Box) -> None:
        self.canvas.paste(Image.fromarray(pixels), (box.x, box.y))

    def badge(self, x: float, y: float, number: int, size: float) -> None:
        colour = QUERY_COLOURS[(number - 1) % len(QUERY_COLOURS)]
        self.axes.plot([x], [y], "o", ms=size * 0.72, mfc=colour, mec=BACKGROUND, mew=1.2)
        self.text(x, y + 0.5, str(number), size * 0.62, BACKGROUND, ha="center", va="center", weight="bold")

    def ring(self, x: float, y: float, number: int, size: float) -> None:
        colour = QUERY_COLOURS[(number - 1) % len(QUERY_COLOURS)]
        self.axes.plot([x], [y], "o", ms=size * 0.72, mfc="none", mec=BACKGROUND, mew=3.0)
        self.axes.plot([x], [y], "o", ms=size * 0.72, mfc="none", mec=colour, mew=1.6)

    def header(self, title: str, subtitle: str) -> None:
        self.text(MARGIN, 36, title, 30, weight="bold")
        self.text(MARGIN, 69, subtitle, 15.5, DIM)

    def scale(self, low: str, high: str) -> None:
        """What the colours mean, at the top right."""
        box = Box(self.size[0] - MARGIN - 150, 29, 150, 12)
        ramp = np.linspace(0, 1, box.width)[None].repeat(box.height, 0)
        self.paste(blend(np.full((*ramp.shape, 3), 0.16), ramp), box)
        self.text(box.x, box.y + 25, low, 13, DIM)
        self.text(box.x + box.width, box.y + 25, high, 13, DIM, ha="right")

    def footer(self, command: str, call: str, credit: str) -> None:
        y = self.size[1] - FOOTER
        self.text(MARGIN, y + 22, f"$ {command}", 15, "#7ee0b8", family="monospace")
        self.text(self.size[0] - MARGIN, y + 22, call, 13, DIM, family="monospace", ha="right")
        self.text(MARGIN, y + 45, credit, 11.5, "#667085")

    def save(self, path: Path) -> None:
        self.figure.patch.set_alpha(0)
        surface: Any = FigureCanvasAgg(self.figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a file name in a script that the font lacks
            surface.draw()
        drawn = Image.fromarray(np.asarray(surface.buffer_rgba()).copy())
        page = Image.alpha_composite(self.canvas.convert("RGBA"), drawn).convert("RGB")
        coarse = np.round(np.asarray(page) / STEP) * STEP
        Image.fromarray(coarse.astype(np.uint8)).save(path, optimize=True)


def blend(under: Array, heat: Array) -> Array:
    """Heat in [0, 1] over a picture in [0, 1]: nothing where it is 0, the map's colour where it is high."""
    strength = (np.clip(1.7 * heat, 0, 1) * 0.9)[..., None]
    colour = colormaps[MAP](heat)[..., :3]
    return np.asarray(np.round((under * (1 - strength) + colour * strength) * 255), dtype=np.uint8)


def overlay(pixels: Array, row: Array) -> Array:
    """One row of the relation matrix, scaled to its largest entry, over the photograph in grey."""
    height, width = pixels.shape[:2]
    share = np.asarray(row / max(float(row.max()), 1e-30), dtype=np.float32)
    smooth = Image.fromarray(share).resize((width, height), Image.Resampling.BICUBIC)
    grey = (pixels / 255.0) @ np.array([0.299, 0.587, 0.114])
    under = (0.05 + 0.36 * grey)[..., None] * np.array([0.95, 1.0, 1.1])
    return blend(under, np.clip(np.asarray(smooth), 0, 1))


def fit(pixels: Array, box: Box) -> tuple[Array, Box]:
    """The picture scaled into the box, and where it lies; a hair's difference of proportions is ignored."""
    height, width = pixels.shape[:2]
    factor = min(box.width / width, box.height / height)
    w, h = max(1, round(width * factor)), max(1, round(height * factor))
    w, h = (box.width if box.width - w <= 3 else w), (box.height if box.height - h <= 3 else h)
    scaled = Image.fromarray(pixels).resize((w, h), Image.Resampling.LANCZOS)
    return np.asarray(scaled), Box(box.x + (box.width - w) // 2, box.y + (box.height - h) // 2, w, h)


def draw_study(page: Page, study: Study, photo_box: Box, map_boxes: Sequence[Box]) -> None:
    """The photograph with its numbered queries, and one map per box."""
    pixels, place = fit(study.photo.pixels, photo_box)
    page.paste(pixels, place)
    big = 24.0 if photo_box.height > 250 else 19.0
    spots = []
    for query in study.queries[: len(map_boxes)]:
        down, along = divmod(query, study.patches.columns)
        spots.append(((along + 0.5) / study.patches.columns, (down + 0.5) / study.patches.rows))
    for number, (x, y) in enumerate(spots, 1):
        page.badge(place.x + x * place.width, place.y + y * place.height, number, big)
    for number, (box, spot, row) in enumerate(zip(map_boxes, spots, study.rows, strict=False), 1):
        pixels, place = fit(study.photo.pixels, box)
        page.paste(overlay(pixels, row), place)
        page.ring(place.x + spot[0] * place.width, place.y + spot[1] * place.height, number, 12.0)
        page.badge(place.x + 15, place.y + 15, number, 19.0)


def draw_photograph(study: Study, path: Path, command: str, call: str) -> None:
    """The photograph on the left, two lines of maps on the right (one, if there is only one map)."""
    count = len(study.queries)
    lines = min(count, 2)
    columns = (count + lines - 1) // lines
    height, width = study.photo.pixels.shape[:2]
    ratio = min(max(width / height, 0.3), 4.0)
    room = WIDTH - 2 * MARGIN - columns * GAP
    across = min(round((room - ratio * GAP) / (lines + columns)), round(ratio * 660 / lines))
    down = round(across / ratio)
    tall = lines * down + (lines - 1) * GAP
    left = min(room - columns * across, round(tall * ratio) + 1)
    page = Page(WIDTH, HEADER + tall + FOOTER)
    start = (WIDTH - left - columns * (across + GAP)) // 2
    maps = start + left + GAP
    boxes = [
        Box(maps + i % columns * (across + GAP), HEADER + i // columns * (down + GAP), across, down)
        for i in range(count)
    ]
    draw_study(page, study, Box(start, HEADER, left, tall), boxes)
    page.header(f"What is like this patch?  {study.photo.title}", SUBTITLE)
    page.scale("unlike", "most alike")
    credit = f"  Photograph: {study.photo.credit}." if study.photo.credit else ""
    page.footer(command, call, MAP_NOTE + credit)
    page.save(path)


def draw_overview(studies: Sequence[Study], path: Path, command: str, call: str, maps: int = 4) -> None:
    """A row for each photograph: itself and its first maps."""
    width = (WIDTH - 2 * MARGIN - maps * GAP) // (maps + 1)
    height = round(width / 1.5)
    page = Page(WIDTH, HEADER + len(studies) * (height + GAP) - GAP + FOOTER)
    for i, study in enumerate(studies):
        y = HEADER + i * (height + GAP)
        boxes = [Box(MARGIN + j * (width + GAP), y, width, height) for j in range(maps + 1)]
        draw_study(page, study, boxes[0], boxes[1:])
    page.header("What is like this patch?", SUBTITLE)
    page.scale("unlike", "most alike")
    credits = "; ".join(f"{s.photo.name} {s.photo.credit}" for s in studies)
    page.footer(command, call, f"{MAP_NOTE}  Photographs: {credits}.")
    page.save(path)


def draw_channels(studies: Sequence[Study], path: Path, command: str, call: str) -> None:
    """The channel relation of up to three photographs, with the groups of channels labelled."""
    studies = studies[:3]
    labels, gap, thumbnail = 128, 50, 54
    cell = 11 if len(studies) > 1 else 17
    side = cell * sum(size for _, size, _ in GROUPS)
    left = (WIDTH + labels - len(studies) * (side + gap) + gap) // 2
    top = HEADER + thumbnail + 12
    page = Page(WIDTH, top + side + 20 + FOOTER)
    for i, study in enumerate(studies):
        box = Box(left + i * (side + gap), top, side, side)
        pixels, place = fit(study.photo.pixels, Box(box.x, HEADER, 2 * thumbnail, thumbnail))
        place = place._replace(x=box.x)
        page.paste(pixels, place)
        beside = place.x + place.width + 12
        page.text(beside, HEADER + thumbnail / 2, study.photo.title, 16, weight="bold")
        draw_matrix(page, study.channels, box, cell, named=i == 0)
    page.header("Which features say the same thing?", CHANNEL_SUBTITLE)
    page.scale("unlike", "most alike")
    page.footer(command, call, CHANNEL_NOTE)
    page.save(path)


def draw_matrix(page: Page, matrix: Array, box: Box, cell: int, named: bool) -> None:
    """The matrix, each row scaled to its largest entry, `cell` pixels a channel, a stripe for each group."""
    largest = matrix.max(axis=1, keepdims=True)
    # a zero channel is equally like every channel
    lacking = largest - matrix.min(axis=1, keepdims=True) < 1e-5 * largest
    heat = np.where(lacking, 0.0, matrix / largest)
    colours = blend(np.full((*heat.shape, 3), 0.09), heat)
    page.paste(colours.repeat(cell, 0).repeat(cell, 1), box)
    start = 0
    for (label, size, _), colour in zip(GROUPS, QUERY_COLOURS, strict=True):
        low, high = start * cell, (start + size) * cell
        stripe: dict[str, Any] = {"color": colour, "lw": 3, "solid_capstyle": "butt"}
        page.axes.plot([box.x - 6] * 2, [box.y + low + 2, box.y + high - 2], **stripe)
        page.axes.plot([box.x + low + 2, box.x + high - 2], [box.y + box.height + 6] * 2, **stripe)
        if named:
            page.text(box.x - 16, box.y + (low + high) / 2, label, 14.5, colour, ha="right")
        if start:
            page.axes.plot([box.x, box.x + box.width], [box.y + low - 0.5] * 2, color="#3a4252", lw=0.8)
            page.axes.plot([box.x + low - 0.5] * 2, [box.y, box.y + box.height], color="#3a4252", lw=0.8)
        start += size
