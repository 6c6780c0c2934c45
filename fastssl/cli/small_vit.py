"""A small plain ViT with SimPool in place of a class token, trained in half a minute on a handful of photographs.

Its task needs no labels: which photograph is this crop from? Crops are small and their colours and light are changed
at random, so that sky, table and blur look alike wherever they are from. What tells photographs apart is what the
pooling learns to look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.nn import SimPool

#: Pixels of a patch's side and of a crop's, and how many patches a whole photograph has when it is looked at.
PATCH, CROP, TOKENS = 8, 64, 600
WIDTH, DEPTH, HEADS = 96, 4, 3
STEPS, BATCH, SEED = 180, 64, 0
#: The paper's exponent for ViTs.
GAMMA = 1.25
#: What attention to few patches costs: enough that it does not rest on the one patch that would do.
NARROW = 0.004


class SmallViT(nn.Module):
    """(B, 3, h, w) images of any size to logits; `pool` is the layer that this is about."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.pool = SimPool(WIDTH, gamma=GAMMA, return_attention=True)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes), and the attention of the pooling (B, 1, N)."""
        pooled, attention = self.pool(self.tokens(images))
        return self.head(pooled), attention

    def tokens(self, images: Tensor) -> Tensor:
        """Of each patch less its mean: what is smooth is no one's."""
        means = F.avg_pool2d(images, PATCH).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        maps = self.patches(images - means)
        tokens = maps.flatten(2).mT + _places(maps.shape[2], maps.shape[3])
        result: Tensor = self.norm(self.blocks(tokens))
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.before_mlp(x))
        return result


def _places(rows: int, columns: int) -> Tensor:
    """Sines and cosines of a patch's place (1, rows·columns, WIDTH), in shares of the image: of any size."""
    frequencies = 2.0 ** torch.arange(WIDTH // 4).div(WIDTH / 4 / 4) * math.pi / 2
    y, x = ((((torch.arange(n) + 0.5) / n)[:, None] * frequencies) for n in (rows, columns))
    down = torch.cat((y.sin(), y.cos()), 1)[:, None].expand(-1, columns, -1)
    along = torch.cat((x.sin(), x.cos()), 1)[None].expand(rows, -1, -1)
    return 0.3 * torch.cat((down, along), 2).flatten(0, 1)[None]


class Trained(NamedTuple):
    model: SmallViT
    accuracy: float  # of the last fifth of the steps


def train(photographs: Sequence[Any], progress: Callable[[float], None] = lambda share: None) -> Trained:
    """The same model every time. photographs: (height, width, 3) arrays in uint8; progress: told the share done."""
    generator = torch.Generator().manual_seed(SEED)
    canvases = torch.cat([_canvas(pixels, 192, 288) for pixels in photographs])
    ratios = torch.tensor([p.shape[1] / p.shape[0] for p in photographs])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SmallViT(len(photographs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.15)
    right = []
    for step in range(STEPS):
        labels = torch.randint(len(photographs), (BATCH,), generator=generator)
        logits, attention = model(augment(crops(canvases[labels], ratios[labels], generator), generator))
        narrow = attention.shape[2] * attention.square().sum(2).mean()  # 1 where it is uniform
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1) + NARROW * narrow
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step >= STEPS - max(1, STEPS // 5):
            right.append((logits.argmax(1) == labels).float().mean())
        progress((step + 1) / STEPS)
    return Trained(model.eval(), float(torch.stack(right).mean()))


def crops(canvases: Tensor, ratios: Tensor, generator: torch.Generator) -> Tensor:
    """Squares of the photographs, from a quarter of the shorter side to all of it, mirrored at random."""
    count = len(canvases)
    side, left, top, mirror = torch.rand(4, count, generator=generator)
    side = 0.25 + 0.75 * side
    along, down = side / ratios.clamp_min(1), side * ratios.clamp_max(1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = along * torch.where(mirror < 0.5, 1.0, -1.0)
    theta[:, 1, 1] = down
    theta[:, 0, 2] = (2 * left - 1) * (1 - along)
    theta[:, 1, 2] = (2 * top - 1) * (1 - down)
    grid = F.affine_grid(theta, [count, 3, CROP, CROP], align_corners=False)
    return F.grid_sample(canvases, grid, padding_mode="border", align_corners=False)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Other light, other colours, no colours."""
    count = len(images)
    gain, shift = torch.rand(2, count, 3, 1, 1, generator=generator)
    light, contrast, grey = torch.rand(3, count, 1, 1, 1, generator=generator)
    mean = images.mean((2, 3), keepdim=True)
    images = (images - mean) * (0.5 + contrast) + mean * (0.6 + 0.8 * gain) + 0.2 * (shift - 0.5) + 0.5 * (light - 0.5)
    images = torch.where(grey < 0.5, images.mean(1, keepdim=True), images)
    return images + 0.08 * torch.randn(images.shape, generator=generator)


def _canvas(pixels: Any, height: int, width: int) -> Tensor:
    """(1, 3, height, width), about from -1 to 1."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)


@torch.no_grad()
def look(model: SmallViT, pixels: Any) -> Tensor:
    """What the pooling attends to in a whole photograph, seen as it is and mirrored: (rows, columns), sum 1."""
    height, width = pixels.shape[:2]
    ratio = min(max(height / width, 1 / TOKENS), TOKENS)
    rows = max(1, round((TOKENS * ratio) ** 0.5))
    columns = max(1, round(TOKENS / rows))
    image = _canvas(pixels, rows * PATCH, columns * PATCH)
    _, attention = model(torch.cat((image, image.flip(3))))
    as_is, mirrored = attention.view(2, rows, columns)
    return (as_is + mirrored.flip(1)) / 2
