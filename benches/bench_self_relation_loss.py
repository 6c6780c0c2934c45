"""self_relation_loss against what SERE users write, at the shapes of a ViT-S/16 on 224² images."""

from __future__ import annotations

from collections.abc import Callable

import bench_sample_tokens
import sides
import torch
import torch.nn.functional as F
from harness import Case, Floor, Side
from torch import Tensor

import fastssl

OP = "self_relation_loss"
HEADS, LENGTH, DEPTH = 6, 196, 64
WIDTH = HEADS * DEPTH
SIDE, POINTS = 14, 13  # the map of one crop, and the grid on the rectangle that two global crops share
FEW = 6  # down and across, of the coarser grid of other columns
PIXEL_TEMP, CHANNEL_TEMP = 0.5, 0.1  # of the teacher, as published; the student's is 1


def eager_pixel(student: Tensor, teacher: Tensor) -> Tensor:
    return _cross_entropy(_pixel_logits(student), _pixel_logits(teacher.detach()) / PIXEL_TEMP)


def eager_channel(student: Tensor, teacher: Tensor) -> Tensor:
    return _cross_entropy(_channel_logits(student), _channel_logits(teacher.detach()) / CHANNEL_TEMP)


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def _pixel_logits(x: Tensor) -> Tensor:
    q = x.view(*x.shape[:2], HEADS, DEPTH).transpose(1, 2)
    return DEPTH**-0.5 * q @ q.transpose(-2, -1)


def _channel_logits(x: Tensor) -> Tensor:
    k = x.transpose(1, 2) / x.shape[1] ** 0.5  # SERE divides the features by √N first
    return k @ k.transpose(-2, -1)


def _sampled(logits: Tensor, rows_on: Tensor, columns_on: Tensor) -> Tensor:
    """The relation (B, H, N, N) sampled bilinearly on both of its axes, with a grid for each."""
    batch = logits.shape[0]
    columns = F.grid_sample(logits.reshape(batch, -1, SIDE, SIDE), columns_on.to(logits.dtype), align_corners=False)
    columns = columns.view(batch, HEADS, LENGTH, -1).transpose(-2, -1)
    rows = F.grid_sample(columns.reshape(batch, -1, SIDE, SIDE), rows_on.to(logits.dtype), align_corners=False)
    return rows.view(batch, HEADS, columns.shape[2], -1).transpose(-2, -1)


def cases(device: str, quick: bool) -> list[Case]:
    """The rows of this op. float32 on the CPU; on CUDA also the half precisions, at a GPU's batch."""
    batch = 64 if device == "cuda" else 16
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device == "cuda" else (torch.float32,)
    if quick:
        return [_pixel(batch, dtypes[0], device), _channel(batch, dtypes[0], device)]
    return [make(batch, dtype, device) for dtype in dtypes for make in (_pixel, _aligned, _columns, _channel)]


def _pixel(batch: int, dtype: torch.dtype, device: str) -> Case:
    def to_call(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        return (student, teacher), {"num_heads": HEADS, "teacher_temp": PIXEL_TEMP}

    floors = _floors(batch * HEADS, LENGTH, DEPTH, batch * LENGTH * WIDTH, dtype)
    return _case(f"pixel B{batch} H{HEADS} N{LENGTH} d{DEPTH}", eager_pixel, to_call, batch, dtype, device, floors)


def _channel(batch: int, dtype: torch.dtype, device: str) -> Case:
    def to_call(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        return (student, teacher), {"kind": "channel", "teacher_temp": CHANNEL_TEMP}

    floors = _floors(batch, WIDTH, LENGTH, batch * LENGTH * WIDTH, dtype)
    return _case(f"channel B{batch} C{WIDTH} N{LENGTH}", eager_channel, to_call, batch, dtype, device, floors)


def _aligned(batch: int, dtype: torch.dtype, device: str) -> Case:
    """Two views on their common rectangle: sampled and then related, against related and then sampled."""
    student_grid, teacher_grid = (bench_sample_tokens.grid_of(batch, seed).to(device) for seed in (0, 1))

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        ours = _sampled(_pixel_logits(student), student_grid, student_grid)
        theirs = _sampled(_pixel_logits(teacher.detach()), teacher_grid, teacher_grid)
        return _cross_entropy(ours, theirs / PIXEL_TEMP)

    def to_call(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        sampled = fastssl.sample_tokens(student, student_grid), fastssl.sample_tokens(teacher, teacher_grid)
        return sampled, {"num_heads": HEADS, "teacher_temp": PIXEL_TEMP}

    # Rows and columns are sampled on one grid here, so that the relation of the samples is symmetric.
    floors = _floors(batch * HEADS, POINTS**2, DEPTH, batch * LENGTH * WIDTH, dtype)
    shape = f"aligned {POINTS}×{POINTS} B{batch} H{HEADS} N{LENGTH} d{DEPTH}"
    return _case(shape, eager, to_call, batch, dtype, device, floors)


def _columns(batch: int, dtype: torch.dtype, device: str) -> Case:
    """The same with columns on a coarser grid of their own: M of them, another number than the rows."""
    sizes = ((0, POINTS), (1, POINTS), (2, FEW), (3, FEW))
    grids = [bench_sample_tokens.grid_of(batch, seed, points).to(device) for seed, points in sizes]
    student_grid, teacher_grid, student_columns, teacher_columns = grids

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        ours = _sampled(_pixel_logits(student), student_grid, student_columns)
        theirs = _sampled(_pixel_logits(teacher.detach()), teacher_grid, teacher_columns)
        return _cross_entropy(ours, theirs / PIXEL_TEMP)

    def to_call(student: Tensor, teacher: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, object]]:
        rows = fastssl.sample_tokens(student, student_grid), fastssl.sample_tokens(teacher, teacher_grid)
        columns = {
            "student_columns": fastssl.sample_tokens(student, student_columns),
            "teacher_columns": fastssl.sample_tokens(teacher, teacher_columns),
        }
        return rows, {"num_heads": HEADS, "teacher_temp": PIXEL_TEMP, **columns}

    floors = _floors(batch * HEADS, POINTS**2, DEPTH, batch * LENGTH * WIDTH, dtype, columns=FEW**2)
    shape = f"columns {POINTS}×{POINTS} M{FEW**2} B{batch} H{HEADS} N{LENGTH} d{DEPTH}"
    return _case(shape, eager, to_call, batch, dtype, device, floors)


def _case(
    shape: str,
    eager: Callable[..., Tensor],
    to_call: Callable[..., tuple[tuple[Tensor, Tensor], dict[str, object]]],
    batch: int,
    dtype: torch.dtype,
    device: str,
    floors: dict[str, Floor],
) -> Case:
    size = (batch, LENGTH, WIDTH)

    def make_inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        student, other = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
        return student, 0.5 * (student + other)  # a teacher resembles its student

    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        make_inputs=make_inputs,
        sides=(
            Side("eager", eager),
            sides.compiled(eager, device),
            *sides.ours(OP, to_call, (size, size), dtype, device),
        ),
        floors=floors,
    )


def _floors(
    matrices: int, rows: int, depth: int, tokens: int, dtype: torch.dtype, *, columns: int | None = None
) -> dict[str, Floor]:
    """Of `matrices` pairs of relations of `rows` vectors of `depth`, made of `tokens` elements each.

    Both relations need their products and exponentials, half of them where no columns are given and they are symmetric.
    The gradient is one product; with columns it is one for these and one for the rows. Student and teacher are read
    once, the gradient is written once.
    """
    computed = matrices * rows * ((rows + 1) / 2 if columns is None else columns)
    of_gradient = matrices * rows * (rows if columns is None else 2 * columns)
    forward = Floor(2 * tokens * dtype.itemsize, 0, 2 * 2 * computed * depth, 2 * computed)
    gradient = Floor(0, tokens * dtype.itemsize, 2 * of_gradient * depth)
    return {"forward": forward, "forward+backward": forward + gradient}


def test_self_relation_loss(bench) -> None:
    bench()
