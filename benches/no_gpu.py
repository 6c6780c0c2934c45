"""Code for a GPU on a machine that has none: what it places there stays on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoGpu(TorchFunctionMode):
    """The word "cuda", as an argument of whatever torch does, means "cpu", as does "cuda:1"; `x.cuda()` is x."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_here, args), **{name: _here(value) for name, value in (kwargs or {}).items()})


def _here(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value
