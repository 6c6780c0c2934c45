"""What masked_attention and packed_attention check alike, and what their kernels cannot take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl import _checks
from fastssl._backends import Call

#: Head widths of the Triton kernels: from 16 to 128, multiples of 8.
DEPTHS = (16, 128)


def check_heads(op: str, q: Any, k: Any, v: Any, letters: tuple[str, ...], scale: Any) -> float:
    """q, k and v of one shape, as many dimensions as `letters`; returns the scale."""
    shape = ", ".join(letters)
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor(op, name, value)
        _checks.check_same_device(op, name, value, "q", q)
        if value.dim() != len(letters):
            raise ValueError(f"{op}: {name} must be ({shape}), got {_checks.shape(value)}")
        if value.shape != q.shape:
            raise ValueError(f"{op}: {name} must have q's shape {_checks.shape(q)}, got {_checks.shape(value)}")
    if q.shape[-1] < 1:
        raise ValueError(f"{op}: q must have at least one channel, got {_checks.shape(q)}")
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    _checks.check_number(op, "scale", scale)
    largest = 1e308 if torch.float64 in (q.dtype, k.dtype, v.dtype) else 1e38
    if abs(scale) > largest:
        raise ValueError(f"{op}: scale must be at most {largest} in size, got {scale}")
    return float(scale)


def kept_for_backward(backend: str, output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """One number per row, the logarithm of its sum of exponentials; on a GPU also the output, from which its backward
    takes Σ P dP: the projection after attention keeps that tensor anyway. On a CPU the sum is at hand."""
    return output[1:] if backend == "cpp" else output


def cpp_limits(call: Call) -> list[str]:
    return _one_dtype(call)


def triton_limits(call: Call) -> list[str]:
    depth = call.sizes["depth"]
    reasons = _one_dtype(call)
    if depth % 8 != 0 or not DEPTHS[0] <= depth <= DEPTHS[1]:
        reasons.append(f"takes head widths from {DEPTHS[0]} to {DEPTHS[1]} that are multiples of 8, got {depth}")
    return reasons


def _one_dtype(call: Call) -> list[str]:
    kinds: list[torch.dtype] = [dtype for _, dtype in call.dtypes]
    if all(kind == kinds[0] for kind in kinds):
        return []
    names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
    return [f"takes q, k and v of one dtype, got {names}"]
