"""self_relation_loss in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl._autocast import without_autocast
from fastssl.reference.self_relation import heads, normalize_rows, tokens


@without_autocast
def self_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "pixel",
    num_heads: int = 1,
    scale: float | None = None,
    student_temp: float = 1.0,
    teacher_temp: float = 1.0,
    student_columns: Tensor | None = None,
    teacher_columns: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """−Σ_j Q_ij log P_ij, P and Q the softmax of the student's and the teacher's relations; Q is a constant.

    Arguments as in `fastssl.self_relation_loss`. Computes in float32, or float64 if an input is float64.
    """
    given = [t for t in (student, teacher, student_columns, teacher_columns) if t is not None]
    work = torch.float64 if torch.float64 in {t.dtype for t in given} else torch.float32

    def logits(x: Tensor, columns: Tensor | None, temp: float) -> Tensor:
        rows = heads(tokens(x).to(work), num_heads, kind)
        cols = rows if columns is None else heads(tokens(columns).to(work), num_heads, kind)
        if normalize:
            cols = normalize_rows(cols)
            rows = cols if columns is None else normalize_rows(rows)
        depth = rows.shape[-1]
        factor = scale if scale is not None else depth**-0.5 if kind == "pixel" else 1.0 / max(depth, 1)
        return (factor / temp) * (rows @ cols.transpose(-1, -2))

    with torch.no_grad():
        target = logits(teacher, teacher_columns, teacher_temp).softmax(-1)
    rows = -(target * logits(student, student_columns, student_temp).log_softmax(-1)).sum(-1)
    if reduction == "none":
        return rows
    return rows.mean() if rows.numel() > 0 else rows.sum()
