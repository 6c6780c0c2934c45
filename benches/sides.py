"""The sides that every bench has: torch.compile of a formula, and fastssl's own op as users call it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from harness import MODES, Side
from torch import Tensor

import fastssl
from fastssl import _backends


def compiled(formula: Callable[..., Tensor], device: str, **options: Any) -> Side:
    """`formula` under torch.compile for exactly this shape, which is the best it can do."""
    absent = ""
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        absent = "torch.compile needs a C++ compiler for the CPU"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        absent = "torch.compile needs triton for CUDA"
    return Side("compile", torch.compile(formula, dynamic=False, **options), absent=absent)


def ours(
    op: str,
    to_call: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]],
    inputs: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: str,
    *,
    output: Callable[[Any], Tensor] | None = None,
) -> tuple[Side, ...]:
    """`ours`, the backend left to the library, and on CUDA one side for each backend that can be forced.

    Args:
        op: name of the op.
        to_call: from the case's input tensors to the op's (args, kwargs).
        inputs: shapes of the case's input tensors.
        output: picks the tensor that is compared, where the op returns more.
    """
    accepted = {mode: _accepted(op, to_call, inputs, dtype, device, mode) for mode in MODES}

    def run(*tensors: Tensor, backend: str | None) -> Tensor:
        args, kwargs = to_call(*tensors)
        result = function(*args, **kwargs, backend=backend)
        return result if output is None else output(result)

    function = getattr(fastssl, op)
    chosen = {mode: explanation.chosen or "" for mode, explanation in accepted.items()}
    sides = [Side("ours", functools.partial(run, backend=None), ours=True, backends=chosen)]
    for backend in _backends.OPS[op].backends if device == "cuda" else ():
        name = backend.name
        modes = tuple(mode for mode in MODES if not accepted[mode].reasons[name])
        if name == "reference" or not modes:
            continue
        forced = functools.partial(run, backend=name)
        sides.append(Side(f"ours[{name}]", forced, ours=True, backends=dict.fromkeys(modes, name), modes=modes))
    return tuple(sides)


def _accepted(
    op: str, to_call: Callable[..., Any], inputs: Any, dtype: torch.dtype, device: str, mode: str
) -> fastssl.Explanation:
    grad = mode != "forward"
    examples = [torch.empty(s, dtype=dtype, device=device, requires_grad=grad) for s in inputs]
    args, kwargs = to_call(*examples)
    return fastssl.explain(op, *args, **kwargs)
