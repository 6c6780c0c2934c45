"""One call of each op, alike for all: what must hold of every op on a GPU, whatever it computes, is tested on these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastssl


class Arguments(NamedTuple):
    """Tensors of one call; `leaves` are those with a gradient."""

    images: list[Tensor]  # the first dimension grows with the number of images
    shared: list[Tensor]  # of all images
    places: list[Tensor]  # integers and masks

    def all(self) -> list[Tensor]:
        return [*self.images, *self.shared, *self.places]

    def leaves(self) -> list[Tensor]:
        return [x for x in self.all() if x.requires_grad]

    def to(self, device: str | None = None, dtype: torch.dtype | None = None) -> Arguments:
        """New leaves."""

        def move(x: Tensor) -> Tensor:
            kind = dtype if x.is_floating_point() else None
            return x.detach().to(device or x.device, kind or x.dtype, copy=True).requires_grad_(x.requires_grad)

        return Arguments(*([move(x) for x in part] for part in self))


class Small(NamedTuple):
    op: str
    images: Callable[[int, int, int], list[Tensor]]  # (images, tokens, channels)
    arrange: Callable[..., tuple[tuple[Tensor, ...], dict[str, Any]]]  # arguments of the op from the tensors
    wanted: int = 1  # how many of `images` get a gradient
    shared: Callable[[int], list[Tensor]] = lambda width: []
    places: Callable[[int, int], list[Tensor]] = lambda images, length: []
    independent: bool = True  # images: each has its own result, or its share of a mean

    def arguments(
        self, size: tuple[int, int, int], device: str, dtype: torch.dtype, repeat: int = 1, grad: bool = True
    ) -> Arguments:
        """size: (images, tokens, channels); every image is there `repeat` times."""
        images = [x.to(device, dtype).repeat(repeat, *[1] * (x.dim() - 1)) for x in self.images(*size)]
        images = [x.requires_grad_(grad and i < self.wanted) for i, x in enumerate(images)]
        shared = [x.to(device, dtype).requires_grad_(grad) for x in self.shared(size[2])]
        return Arguments(images, shared, [x.to(device) for x in self.places(size[0] * repeat, size[1])])

    def __call__(self, arguments: Arguments, backend: str) -> Tensor:
        args, kwargs = self.arrange(*arguments.all())
        result: Tensor = getattr(fastssl, self.op)(*args, **kwargs, backend=backend)
        return result

    def step(self, arguments: Arguments, backend: str, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        """Output and gradients, these where there are leaves."""
        out = self(arguments, backend)
        if not out.requires_grad:
            return (out,)
        upstream = torch.ones_like(out) if upstream is None else upstream
        return (out.detach(), *torch.autograd.grad(out, arguments.leaves(), upstream))

    def why_not(self, arguments: Arguments, backend: str) -> list[str]:
        args, kwargs = self.arrange(*arguments.all())
        return fastssl.explain(self.op, *args, **kwargs).reasons[backend]


def _tokens(number: int, scale: float = 1.0) -> Callable[[int, int, int], list[Tensor]]:
    return lambda *size: [torch.randn(size) * scale for _ in range(number)]


def _maps(images: int, length: int, width: int) -> list[Tensor]:
    return [torch.randn(images, length, width), torch.rand(images, 5, 7, 2) * 2.4 - 1.2]


def _weights(width: int) -> list[Tensor]:
    matrices = [torch.randn(width, width) / width**0.5 for _ in range(2)]
    return [*matrices, torch.rand(width) + 0.5, torch.randn(width)]


def _pooled(*size: int) -> list[Tensor]:
    return [torch.randn(size) + 0.5]


def _heads(images: int, length: int, width: int) -> list[Tensor]:
    return [torch.randn(images, length, 3, 2, width // 2)]


def _rows(images: int, length: int, width: int) -> list[Tensor]:
    return [torch.randn(images * length, 3, 2, width // 2)]


def _every_third_dropped(images: int, length: int) -> list[Tensor]:
    return [(torch.arange(length) % 3 < 2).repeat(images, 1)]


def _two_to_an_image(images: int, length: int) -> list[Tensor]:
    """Sequences of 5 tokens and of the others."""
    starts = (torch.arange(images)[:, None] * length + torch.tensor([0, min(5, length)])).flatten()
    return [torch.cat([starts, torch.tensor([images * length])]).int()]


def _of_heads(qkv: Tensor, keep: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (*qkv.permute(2, 0, 3, 1, 4).unbind(0), keep), {}


def _of_rows(qkv: Tensor, starts: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (*qkv.unbind(1), starts), {"max_seqlen": 2 * qkv.shape[0] // (starts.shape[0] - 1)}


TWO = {"num_heads": 2}
CHANNELS = {"num_heads": 2, "kind": "channel"}
SMALL_CALLS = {
    "self_relation": Small("self_relation", _tokens(1, 0.5), lambda x: ((x,), TWO)),
    "self_relation of channels": Small("self_relation", _tokens(1, 0.5), lambda x: ((x,), CHANNELS)),
    "self_relation_loss": Small("self_relation_loss", _tokens(2, 0.5), lambda *x: (x, TWO)),
    "self_relation_loss of channels": Small("self_relation_loss", _tokens(2, 0.5), lambda *x: (x, CHANNELS)),
    "gram_loss": Small("gram_loss", _tokens(2), lambda *x: (x, {})),
    "gram_loss of a batch": Small("gram_loss", _tokens(2), lambda *x: (x, {"per_image": False}), independent=False),
    "sample_tokens": Small("sample_tokens", _maps, lambda *x: (x, {"grid_size": (1, x[0].shape[1])}), wanted=2),
    "simpool": Small("simpool", _pooled, lambda *x: (x, TWO), shared=_weights),
    "simpool with gamma": Small(
        "simpool", _pooled, lambda *x: (x, {"gamma": 1.25, "value_min": "channel", "eps": 1e-3}), shared=_weights
    ),
    "masked_attention": Small("masked_attention", _heads, _of_heads, places=_every_third_dropped),
    "packed_attention": Small("packed_attention", _rows, _of_rows, places=_two_to_an_image),
}

#: Images, tokens and channels. Attention's gradient has a kernel for up to 64 tokens, 128, 256 and any number.
SIZES = [(1, 1, 48), (2, 37, 48), (2, 100, 128), (2, 197, 128), (3, 300, 144)]


def arguments_for(
    call: Small, backend: str, size: tuple[int, int, int], device: str, dtype: torch.dtype
) -> tuple[Arguments, list[str]]:
    """Arguments, without gradients where the backend has none there, and why it cannot take them."""
    arguments = call.arguments(size, device, dtype)
    reasons = call.why_not(arguments, backend)
    if any("backward" in reason for reason in reasons):
        arguments = call.arguments(size, device, dtype, grad=False)
        reasons = call.why_not(arguments, backend)
    return arguments, reasons
