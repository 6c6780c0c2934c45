"""simpool against the plain formula, and the same with the library's fused attention, on a ViT's patch tokens."""

from __future__ import annotations

import sides
import torch
import torch.nn.functional as F
from harness import Case, Floor, Side
from torch import Tensor

OP = "simpool"
LENGTH = 196
EPS, NORM_EPS = 1e-6, 1e-6
_MODES = ("forward", "forward+backward")


def plain(gamma: float | None):
    """The formula as the paper's users write it: the keys of all tokens, one head, the batch's minimum."""

    def pool(x: Tensor, wq: Tensor, wk: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)
        query, keys = F.linear(x.mean(1, keepdim=True), wq), F.linear(y, wk)
        attention = (query @ keys.transpose(1, 2) * x.shape[-1] ** -0.5).softmax(-1)
        if gamma is None:
            return (attention @ y).squeeze(1)
        return ((attention @ (y - y.min() + EPS) ** gamma) ** (1 / gamma)).squeeze(1)

    return pool


def fused_attention(gamma: float | None):
    """The same with scaled_dot_product_attention, as timm's SimPool1d has it."""

    def pool(x: Tensor, wq: Tensor, wk: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], weight, bias, NORM_EPS)
        query, keys = F.linear(x.mean(1, keepdim=True), wq), F.linear(y, wk)
        values = y if gamma is None else (y - y.min() + EPS) ** gamma
        out = F.scaled_dot_product_attention(query.unsqueeze(1), keys.unsqueeze(1), values.unsqueeze(1))
        return out.flatten(1) if gamma is None else (out ** (1 / gamma)).flatten(1)

    return pool


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions, at a GPU's batch."""
    batch = 128 if device == "cuda" else 32
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    if quick:
        return [_case(gamma, batch, 384, dtypes[0], device, _MODES[1:]) for gamma in (None, 1.25)]
    kinds = ((None, 384), (1.25, 384), (2.0, 384), (None, 768))
    return [_case(gamma, batch, width, dtype, device, _MODES) for dtype in dtypes for gamma, width in kinds]


def _case(gamma: float | None, batch: int, width: int, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    shapes = ((batch, LENGTH, width), (width, width), (width, width), (width,), (width,))

    def to_call(*tensors: Tensor) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        return tensors, {"gamma": gamma, "eps": EPS, "norm_eps": NORM_EPS}

    return Case(
        op=OP,
        shape=f"gamma {gamma or 'none'} B{batch} N{LENGTH} C{width}",
        dtype=dtype,
        device=device,
        make_inputs=_inputs(shapes),
        sides=(
            Side("eager", plain(gamma)),
            sides.compiled(plain(gamma), device),
            Side("sdpa", fused_attention(gamma)),
            *sides.ours(OP, to_call, shapes, dtype, device),
        ),
        floors=_floors(batch, width, gamma, dtype, modes),
        differentiable=(0, 1, 2, 3, 4),
    )


def _inputs(shapes: tuple[tuple[int, ...], ...]):
    """Tokens of different lengths around a common mean, weights as torch.nn.Linear begins with."""

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        batch, length, width = shapes[0]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        x = normal(batch, length, width) * (0.5 + torch.rand(batch, length, 1, generator=generator)) + normal(
            1, 1, width
        )
        wq, wk = (normal(width, width) * width**-0.5 for _ in range(2))
        return x, wq, wk, 1 + 0.1 * normal(width), 0.1 * normal(width)

    return make


def _floors(
    batch: int, width: int, gamma: float | None, dtype: torch.dtype, modes: tuple[str, ...]
) -> dict[str, Floor]:
    """Forward reads x once, what it needs a second time is in a cache. With the backward, x is read twice more, for
    the sums over the tokens and for the gradient that needs them, and the gradient is written.

    Each look at a token costs two multiply-adds per element in forward and four in backward; a power is an exponential
    and a logarithm, counted as two exponentials, in each of three looks. Products with the weights: 4 and 8 per image.
    """
    tokens = batch * LENGTH * width
    weights = 2 * batch * width * width
    powers = 0 if gamma in (None, 2.0) else 2 * tokens
    size = dtype.itemsize
    forward = Floor(tokens * size, 0, 2 * 2 * tokens + 2 * weights, powers)
    both = Floor(3 * tokens * size, tokens * size, 2 * 6 * tokens + 6 * weights, 3 * powers)
    floors = {"forward": forward, "forward+backward": both}
    return {mode: floors[mode] for mode in modes}


def test_simpool(bench) -> None:
    bench()
