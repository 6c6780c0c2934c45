"""gram_loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._autocast import without_autocast
from fastssl.reference.self_relation import normalize_rows, tokens


@without_autocast
def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    remove_negatives: str = "none",
    per_image: bool = True,
) -> Tensor:
    """mean (S − T)² with S = X Xᵀ of the student's and T = Y Yᵀ of the teacher's tokens; T is a constant.

    Arguments as in `fastssl.gram_loss`. Computes in float32, or float64 if an input is float64.
    """
    work = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32

    def gram(x: Tensor, remove: bool) -> Tensor:
        rows = tokens(x).to(work)
        if not per_image:
            rows = rows.flatten(0, 1)
        if normalize:
            rows = normalize_rows(rows)
        products = rows @ rows.transpose(-1, -2)
        return torch.where(products < 0, 0.0, products) if remove else products

    with torch.no_grad():
        target = gram(teacher, remove_negatives != "none")
    squares = (gram(student, remove_negatives == "both") - target).square()
    return squares.mean() if squares.numel() > 0 else squares.sum()
