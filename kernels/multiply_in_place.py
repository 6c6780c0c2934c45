"""x ← factor · x in Triton, for a factor that lies on the device: nothing is read or written where it is 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastssl.kernels.common import DTYPES, Choice, Configuration, configuration, launch, on_device
from torch import Tensor


@triton.jit
def multiply_unless_one(
    x,  # (count,), contiguous: input and output
    factor,  # one float32
    count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    value = tl.load(factor)
    if value != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        at = tl.arange(0, BLOCK)
        inside = at < count - start
        old = tl.load(x + start + at, mask=inside).to(tl.float32)
        tl.store(x + start + at, (old * value).to(x.dtype.element_ty), mask=inside)


_CHOICE = Choice(multiply_unless_one, {"BLOCK": 4096}, 8, 1)


def multiply_in_place(x: Tensor, factor: Tensor) -> None:
    """x: any dense tensor; factor: a scalar tensor on the same device, which is not waited for."""
    with on_device(x):
        programs = triton.cdiv(x.numel(), _CHOICE.constexprs["BLOCK"])
        launch(_CHOICE, programs, x, factor.to(torch.float32), x.numel())


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        yield configuration(_CHOICE, dtype, f"*{dtype}:16", "*fp32:16", "i32:16")
    yield configuration(_CHOICE, "bf16 long", "*bf16:16", "*fp32:16", "i64")
