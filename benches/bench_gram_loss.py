"""gram_loss against DINOv3's formula as its users write it, at the shape of a ViT-S/16 on 224² images."""

from __future__ import annotations

import sides
import torch
import torch.nn.functional as F
from harness import Case, Floor, Side
from torch import Tensor

OP = "gram_loss"
LENGTH, WIDTH = 196, 384
_MODES = ("forward", "forward+backward")


def eager_per_image(student: Tensor, teacher: Tensor) -> Tensor:
    return _compare(*_unit(student, teacher))


def eager_batch(student: Tensor, teacher: Tensor) -> Tensor:
    return _compare(*(x.flatten(0, 1) for x in _unit(student, teacher)))


def _unit(*both: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least, as DINOv3 does it."""
    return tuple(F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in both)


def _compare(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student @ student.transpose(-1, -2), teacher @ teacher.transpose(-1, -2))


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions, at a GPU's batch."""
    batch = 64 if device == "cuda" else 16
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    if quick:
        return [_case(per_image, batch, dtypes[0], device, _MODES[1:]) for per_image in (True, False)]
    return [_case(per_image, batch, dtype, device, _MODES) for dtype in dtypes for per_image in (True, False)]


def _case(per_image: bool, batch: int, dtype: torch.dtype, device: str, modes: tuple[str, ...]) -> Case:
    shape = (batch, LENGTH, WIDTH)
    eager = eager_per_image if per_image else eager_batch

    def to_call(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        return (student, teacher), {"per_image": per_image}

    mine = sides.ours(OP, to_call, (shape, shape), dtype, device)
    return Case(
        op=OP,
        shape=f"{'per image' if per_image else 'batch'} B{batch} N{LENGTH} C{WIDTH}",
        dtype=dtype,
        device=device,
        make_inputs=_inputs(shape),
        sides=(Side("eager", eager), sides.compiled(eager, device), *mine),
        floors=_floors(batch if per_image else 1, LENGTH if per_image else batch * LENGTH, dtype, modes),
    )


def _inputs(shape: tuple[int, ...]):
    """A teacher that is partly the student, as in training."""

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        student = torch.randn(shape, generator=generator)
        return student, 0.7 * student + 0.7 * torch.randn(shape, generator=generator)

    return make


def _floors(matrices: int, rows: int, dtype: torch.dtype, modes: tuple[str, ...]) -> dict[str, Floor]:
    """Of `matrices` pairs of Gram matrices of `rows` tokens.

    Forward: both read, half of each matrix computed. Backward: both read, the gradient written; one product of the
    whole matrix of differences with the tokens, which were just computed where one pass does both.
    """
    tokens = matrices * rows * WIDTH * dtype.itemsize
    halves = matrices * rows * (rows + 1) / 2
    forward = Floor(2 * tokens, 0, 2 * 2 * halves * WIDTH)
    both = Floor(2 * tokens, tokens, forward.flops + 2 * matrices * rows * rows * WIDTH)
    floors = {"forward": forward, "forward+backward": both}
    return {mode: floors[mode] for mode in modes}


def test_gram_loss(bench) -> None:
    bench()
