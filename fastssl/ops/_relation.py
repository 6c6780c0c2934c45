"""The check that ops on relations share: rows, columns and scale of one relation matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastssl import _checks


def relation_of(
    op: str,
    names: tuple[str, str, str],
    rows: Tensor,
    columns: Any,
    channel: bool,
    num_heads: int,
    scale: Any,
    temp: float,
) -> tuple[Tensor, Tensor | None, float]:
    """Rows and columns as (B, N, C), None for columns that are the rows, and scale / temp.

    names: of rows, columns and temp, as the op's signature has them. What is not Any is checked already.
    """
    name, columns_name, temp_name = names
    x = _checks.tokens(op, name, rows)
    batch, length, width = x.shape
    if width < 1 or width % num_heads != 0:
        raise ValueError(f"{op}: num_heads must divide the C channels of {name}, got {num_heads} for C = {width}")
    cols = None
    if columns is not None and columns is not rows:
        _checks.check_tensor(op, columns_name, columns)
        _checks.check_same_device(op, columns_name, columns, name, rows)
        cols = _checks.tokens(op, columns_name, columns)
        if cols.shape[0] != batch or cols.shape[2] != width:
            raise ValueError(
                f"{op}: {columns_name} must have {name}'s batch and channels (B = {batch}, C = {width}), "
                f"got {_checks.shape(columns)}"
            )
        if channel and cols.shape[1] != length:
            raise ValueError(
                f"{op}: {columns_name} must have {name}'s number of tokens (N = {length}) for kind='channel', "
                f"got {cols.shape[1]}"
            )
        if not channel and cols.shape[1] < 1:
            raise ValueError(f"{op}: {columns_name} must have at least one token, got {_checks.shape(columns)}")
    if scale is None:
        scale = 1.0 / max(length, 1) if channel else (width // num_heads) ** -0.5
    else:
        _checks.check_number(op, "scale", scale)
    factor = scale / temp
    if not _checks.is_finite(factor):
        raise ValueError(f"{op}: scale / {temp_name} must be a finite number, got {scale} / {temp}")
    return x, cols, factor
