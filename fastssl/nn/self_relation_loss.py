"""SelfRelationLoss: SERE's relation distillation as a module, with its alignment of two views."""

from __future__ import annotations

from torch import Tensor, nn

from fastssl import _checks
from fastssl.ops.sample_tokens import sample_tokens
from fastssl.ops.self_relation_loss import self_relation_loss

_OP = "SelfRelationLoss"
Grids = tuple[Tensor, Tensor]


class SelfRelationLoss(nn.Module):
    """Cross-entropy of the teacher's self-relation against the student's.

    Equivalent to::

        self_relation_loss(student, teacher, kind=kind, num_heads=num_heads, student_temp=…, teacher_temp=…)

    and with grids to the same of `sample_tokens(x, rows)` and, as columns, `sample_tokens(x, columns)`: two views
    are compared on the rectangle that they share. That is SERE's relation sampled bilinearly on both axes, for
    sampling is linear; the relation itself is never made. No parameters.

    Args:
        kind: "pixel" relates tokens (SERE: the backbone's num_heads), "channel" channels (SERE: one head).
        num_heads: H, a divisor of the channels.
        student_temp: temperature, a finite number above 0.
        teacher_temp: the same; None means SERE's, 0.5 for "pixel" and 0.1 for "channel".
        normalize: cosine similarities instead of dot products.

    Source: SERE (arXiv 2206.05184), eq. 3 and 5.
    """

    def __init__(
        self,
        kind: str = "pixel",
        num_heads: int = 1,
        student_temp: float = 1.0,
        teacher_temp: float | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        _checks.check_choice(_OP, "kind", kind, ("pixel", "channel"))
        _checks.check_count(_OP, "num_heads", num_heads)
        _checks.check_number(_OP, "student_temp", student_temp, positive=True)
        if teacher_temp is None:
            teacher_temp = 0.5 if kind == "pixel" else 0.1
        _checks.check_number(_OP, "teacher_temp", teacher_temp, positive=True)
        _checks.check_flag(_OP, "normalize", normalize)
        self.kind = kind
        self.num_heads = num_heads
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.normalize = normalize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_grids: Grids | None = None,
        teacher_grids: Grids | None = None,
    ) -> Tensor:
        """The mean loss, a scalar.

        Args:
            student, teacher: tokens (B, N, C) or feature maps (B, C, h, w); square maps where grids are given.
                The teacher is a constant.
            student_grids, teacher_grids: for "pixel", the points of rows and of columns in each view, (B, k, k, 2)
                and (B, m, m, 2), as `overlap_grids` makes them for the student's and the teacher's crop.

        Raises:
            TypeError: an argument of a wrong type or dtype.
            ValueError: a wrong shape or value, or grids of one of the two alone.
        """
        student_columns = teacher_columns = None
        if (student_grids is None) != (teacher_grids is None):
            raise ValueError(f"{_OP}: student_grids and teacher_grids must be given together, got one of them")
        if student_grids is not None and teacher_grids is not None:
            if self.kind != "pixel":
                raise ValueError(f"{_OP}: grids are for kind='pixel', got {self.kind!r}")
            for name, grids in (("student_grids", student_grids), ("teacher_grids", teacher_grids)):
                if not isinstance(grids, tuple | list) or len(grids) != 2:
                    raise TypeError(f"{_OP}: {name} must be a pair of grids, of rows and of columns, got {type(grids)}")
            student, student_columns = (sample_tokens(student, grid) for grid in student_grids)
            teacher, teacher_columns = (sample_tokens(teacher.detach(), grid) for grid in teacher_grids)
        return self_relation_loss(
            student,
            teacher,
            kind=self.kind,
            num_heads=self.num_heads,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp,
            student_columns=student_columns,
            teacher_columns=teacher_columns,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.kind!r}, num_heads={self.num_heads}, student_temp={self.student_temp}, "
            f"teacher_temp={self.teacher_temp}, normalize={self.normalize}"
        )
