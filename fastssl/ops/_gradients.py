"""Gradients that were computed with their loss: what backward has left to do with them."""

from __future__ import annotations

import torch
from torch import Tensor


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor (a scalar tensor), in place; nothing is done where the factor is 1. Waits for no GPU."""
    if torch.compiler.is_compiling():
        return (gradient * factor).to(gradient.dtype)
    if gradient.is_cuda:
        from fastssl.kernels.multiply_in_place import multiply_in_place

        multiply_in_place(gradient, factor)
        return gradient
    number = float(factor)
    return gradient if number == 1.0 else gradient.mul_(number)
