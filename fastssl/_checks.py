"""The checks that every op shares. Each raises one sentence: the op, the argument, what was wanted, what came.

They are plain `if: raise`, because they are traced by torch.compile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastssl._backends import FLOATING


def check_tensor(op: str, name: str, value: Any) -> None:
    """A dense tensor of a floating dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must have dtype float32, float64, bfloat16 or float16, got dtype "
            f"{str(value.dtype).removeprefix('torch.')}"
        )
    check_strided(op, name, value)


def check_strided(op: str, name: str, value: torch.Tensor) -> None:
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense (strided) tensor, got layout {value.layout}")


def check_same_device(op: str, name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {value.device}")


def is_finite(value: float) -> bool:
    """By comparison: torch.compile traces that for a symbolic number, math.isfinite it does not."""
    return -sys.float_info.max <= value <= sys.float_info.max


def check_number(op: str, name: str, value: Any, *, positive: bool = False) -> None:
    """A finite real number; greater than zero where `positive`."""
    wanted = "a finite number greater than 0" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}")
    if not is_finite(value) or (positive and value <= 0):
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


def check_count(op: str, name: str, value: Any) -> None:
    """An int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int of at least 1, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be an int of at least 1, got {value}")


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")


def check_choice(op: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def shape(value: torch.Tensor) -> tuple[int, ...]:
    """The shape as a tuple, for messages: `(3, 4)` instead of `torch.Size([3, 4])`."""
    return tuple(value.shape)


def tokens(op: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """(B,N,C) as it is, or a feature map (B,C,h,w) as a (B,h·w,C) view of the same memory."""
    if value.dim() == 4:
        return value.flatten(2).transpose(1, 2)
    if value.dim() != 3:
        raise ValueError(f"{op}: {name} must be (B, N, C) or (B, C, h, w), got {shape(value)}")
    return value


def map_of_tokens(op: str, name: str, value: torch.Tensor, grid_size: Any) -> torch.Tensor:
    """(B,N,C) or (B,C,h,w) as a (B,h,w,C) view; tokens without a `grid_size` (h, w) are those of a square map."""
    if value.dim() not in (3, 4):
        raise ValueError(f"{op}: {name} must be (B, N, C) or (B, C, h, w), got {shape(value)}")
    if grid_size is not None:
        if not isinstance(grid_size, tuple | list) or not all(type(n) is int for n in grid_size):
            raise TypeError(f"{op}: grid_size must be None or two ints (h, w), got {grid_size!r}")
        if len(grid_size) != 2 or min(grid_size) < 1:
            raise ValueError(f"{op}: grid_size must be None or two ints (h, w) of at least 1, got {tuple(grid_size)}")
    if value.dim() == 4:
        size = (value.shape[2], value.shape[3])
        if grid_size is not None and tuple(grid_size) != size:
            raise ValueError(f"{op}: grid_size must be None or (h, w) = {size} of {name}, got {tuple(grid_size)}")
        if size[0] < 1 or size[1] < 1:
            raise ValueError(f"{op}: {name} must have at least one token, got {shape(value)}")
        return value.permute(0, 2, 3, 1)
    length = value.shape[1]
    if length < 1:
        raise ValueError(f"{op}: {name} must have at least one token, got {shape(value)}")
    if grid_size is None:
        side = int(length**0.5 + 0.5)  # not math.isqrt: torch.compile traces this for a symbolic length
        if side * side != length:
            raise ValueError(f"{op}: {name} must have N = h² tokens where grid_size is None, got N = {length}")
        return value.unflatten(1, (side, side))
    if grid_size[0] * grid_size[1] != length:
        raise ValueError(f"{op}: grid_size must be (h, w) with h·w = N = {length} of {name}, got {tuple(grid_size)}")
    return value.unflatten(1, (grid_size[0], grid_size[1]))
