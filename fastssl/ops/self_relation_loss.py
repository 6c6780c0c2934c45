"""self_relation_loss: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, HALF_AND_SINGLE, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._gradients import first_derivatives_only, mean, save, saved, saved_gradients, wants_gradient
from fastssl.ops._relation import relation_of
from fastssl.reference.self_relation_loss import self_relation_loss as _reference

_OP = "self_relation_loss"
_KINDS = ("pixel", "channel")
_REDUCTIONS = ("mean", "none")


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
    backend: str | None = None,
) -> Tensor:
    """Relation distillation: cross-entropy of the teacher's self-relation against the student's.

    Equivalent to::

        p = fastssl.self_relation(student, temp=student_temp, columns=student_columns, ...)    # (B, H, R, M)
        q = fastssl.self_relation(teacher, temp=teacher_temp, columns=teacher_columns, ...)    # (B, H, R, M)
        loss = -(q.detach() * p.log()).sum(-1)                                                 # (B, H, R)
        loss.mean()                                                                            # reduction="mean"

    but no matrix of relations is ever in memory, and a loss that is nearly zero, of rows that are nearly one-hot,
    keeps its digits. To compare two views on the rectangle that they share, sample the tokens first
    (`fastssl.sample_tokens`) and relate after: sampling is linear, so the relations are the same.

    Args:
        student: tokens (B, N, C) or a feature map (B, C, h, w), read as (B, h·w, C), a view where its strides
            allow; float32, float64, bfloat16 or float16, any strides. Arithmetic is float32 (float64 if any
            argument is float64).
        teacher: the same of the teacher, a constant. Its C may differ from the student's for "pixel", its N for
            "channel"; the number of related vectors may not. Its dtype may differ.
        kind: "pixel" relates tokens, "channel" relates the channels of each head.
        num_heads: H, a divisor of both C.
        scale: factor of the dot products of both; None means d**-0.5 for pixels and 1/N for channels, each with
            its own d or N.
        student_temp, teacher_temp: temperatures, finite numbers above 0; they divide `scale`.
        student_columns, teacher_columns: the tokens that become the columns, (B, M, C) or (B, C, h', w'), each with
            the channels of its rows; None for the rows themselves. Both must give as many columns.
        normalize: divide every related vector by its length first (cosine similarity). A zero vector stays zero
            and gets no gradient.
        reduction: "mean" over every row of every head and image, or "none".
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        A scalar, the mean over B·H·R rows (0 if there are none), or (B, H, R) with "none"; R is N for "pixel" and
        C/H for "channel". float32, or float64 if any argument is float64.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Bitwise repeatable, for any number of threads. First derivatives in reverse mode only. Where one head fits on chip,
    the gradient of the mean is computed with the loss, in one pass over student and teacher.

    Source: SERE (arXiv 2206.05184), the losses of eq. 3 (pixel) and eq. 5 (channel); MiniLM (arXiv 2002.10957).
    """
    options: dict[str, Any] = dict(
        kind=kind,
        num_heads=num_heads,
        scale=scale,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        student_columns=student_columns,
        teacher_columns=teacher_columns,
        normalize=normalize,
        reduction=reduction,
    )
    args = _check(student, teacher, **options)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        return _reference(student, teacher, **options)
    tensors = (args.student, args.teacher.detach(), args.student_columns, _detached(args.teacher_columns))
    of_mean = reduction == "mean"
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    if args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        eager = of_mean and _in_one_pass(chosen, args)
        result: Tensor = _SelfRelationLoss.apply(*tensors, *args.numbers, args.wanted(), of_mean, eager, chosen)[0]
        return result
    loss = _forward(chosen, *_pairs(*tensors), *args.numbers, 0)[0]
    return mean(loss) if of_mean else loss


class _Args(NamedTuple):
    """A checked call."""

    student: Tensor  # (B, N, C), any strides
    teacher: Tensor  # (B, N', C'), any strides
    student_columns: Tensor | None  # (B, M, C), any strides; None: student itself
    teacher_columns: Tensor | None
    #: channel, num_heads, student's and teacher's scale / temp, normalize, symmetric: as the raw operators take them
    numbers: tuple[int, int, float, float, int, int]
    needs_grad: bool

    def wanted(self) -> int:
        """Which gradients: of the student's rows 1, of its columns 2, which may be the same tensor."""
        columns = self.student if self.student_columns is None else self.student_columns
        return int(wants_gradient(self.student)) + 2 * int(wants_gradient(columns) and not self.numbers[5])

    def rows_columns_depth(self) -> tuple[int, int, int]:
        """R, M and K of the student's relation."""
        channel, num_heads = self.numbers[:2]
        length, width = self.student.shape[1:]
        if channel:
            return width // num_heads, width // num_heads, length
        columns = self.student if self.student_columns is None else self.student_columns
        return length, columns.shape[1], width // num_heads


def _check(
    student: Any,
    teacher: Any,
    *,
    kind: Any = "pixel",
    num_heads: Any = 1,
    scale: Any = None,
    student_temp: Any = 1.0,
    teacher_temp: Any = 1.0,
    student_columns: Any = None,
    teacher_columns: Any = None,
    normalize: Any = False,
    reduction: Any = "mean",
) -> _Args:
    _checks.check_tensor(_OP, "student", student)
    _checks.check_tensor(_OP, "teacher", teacher)
    _checks.check_same_device(_OP, "teacher", teacher, "student", student)
    _checks.check_choice(_OP, "kind", kind, _KINDS)
    _checks.check_choice(_OP, "reduction", reduction, _REDUCTIONS)
    _checks.check_count(_OP, "num_heads", num_heads)
    _checks.check_number(_OP, "student_temp", student_temp, positive=True)
    _checks.check_number(_OP, "teacher_temp", teacher_temp, positive=True)
    _checks.check_flag(_OP, "normalize", normalize)
    channel = kind == "channel"
    student_names = ("student", "student_columns", "student_temp")
    student_rows, student_cols, student_scale = relation_of(
        _OP, student_names, student, student_columns, channel, num_heads, scale, student_temp
    )
    teacher_names = ("teacher", "teacher_columns", "teacher_temp")
    teacher_rows, teacher_cols, teacher_scale = relation_of(
        _OP, teacher_names, teacher, teacher_columns, channel, num_heads, scale, teacher_temp
    )
    if teacher_rows.shape[0] != student_rows.shape[0]:
        raise ValueError(
            f"{_OP}: teacher must have student's batch (B = {student_rows.shape[0]}), got {_checks.shape(teacher)}"
        )
    if channel and teacher_rows.shape[2] != student_rows.shape[2]:
        raise ValueError(
            f"{_OP}: teacher must have student's channels (C = {student_rows.shape[2]}) for kind='channel', "
            f"got {_checks.shape(teacher)}"
        )
    if not channel and teacher_rows.shape[1] != student_rows.shape[1]:
        raise ValueError(
            f"{_OP}: teacher must have student's number of tokens (N = {student_rows.shape[1]}) for kind='pixel', "
            f"got {_checks.shape(teacher)}"
        )
    if not channel:
        wanted = (student_rows if student_cols is None else student_cols).shape[1]
        got = (teacher_rows if teacher_cols is None else teacher_cols).shape[1]
        if got != wanted:
            raise ValueError(
                f"{_OP}: teacher_columns must give as many columns as student_columns (M = {wanted}), got {got}"
            )
    symmetric = int(student_cols is None and teacher_cols is None)
    needs_grad = wants_gradient(student) or (student_cols is not None and wants_gradient(student_cols))
    return _Args(
        student_rows,
        teacher_rows,
        student_cols,
        teacher_cols,
        (int(channel), num_heads, student_scale, teacher_scale, int(normalize), symmetric),
        needs_grad and torch.is_grad_enabled(),
    )


def _describe(student: Any, teacher: Any, **options: Any) -> Call:
    return _call(_check(student, teacher, **options))


def _call(args: _Args) -> Call:
    """What the backends are asked about: R rows and M columns, of depth K in the student."""
    names = ("student", "teacher", "student_columns", "teacher_columns")
    dtypes = tuple((name, t.dtype) for name, t in zip(names, args[:4], strict=True) if isinstance(t, Tensor))
    rows, columns, depth = args.rows_columns_depth()
    sizes = {"rows": rows, "columns": columns, "depth": depth}
    return Call(_OP, args.student.device.type, dtypes, args.needs_grad, sizes)


#: Up to this many elements the CPU kernel keeps the logits' gradient of one head in a core's second-level cache, and
#: computes loss and gradient in one pass, if there are this many heads; as in csrc/cpu/self_relation_loss.cpp.
ONE_PASS_CPP, ONE_PASS_CPP_HEADS = 160 * 1024, 8
#: Up to this many rows and columns, and this depth, the Triton kernel does so in one program; longer rows of a program
#: that holds all statistics and gradients would leave too few registers. As kernels/self_relation_loss.py has it.
ONE_PASS_TRITON, ONE_PASS_TRITON_DEPTH = 64, 64


def _in_one_pass(backend: str, args: _Args) -> bool:
    """Whether the gradient of the mean is best computed with the loss.

    Never in float16: the gradient of one row of many, not yet multiplied by the loss scaling that comes in with
    backward, is often below float16's smallest number.
    """
    rows, columns, depth = args.rows_columns_depth()
    if args.student.dtype == torch.float16 or (
        args.student_columns is not None and args.student_columns.dtype == torch.float16
    ):
        return False
    if backend == "cpp":
        heads = args.student.shape[0] * args.numbers[1]
        return rows * columns <= ONE_PASS_CPP and heads >= ONE_PASS_CPP_HEADS
    channel, num_heads = args.numbers[:2]
    teacher_depth = args.teacher.shape[1] if channel else args.teacher.shape[2] // num_heads
    return max(rows, columns) <= ONE_PASS_TRITON and max(depth, teacher_depth) <= ONE_PASS_TRITON_DEPTH


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ops = torch.ops.fastssl
    run = ops.self_relation_loss_forward if backend == "cpp" else ops.self_relation_loss_forward_triton
    results: tuple[Tensor, Tensor, Tensor, Tensor] = run(*arguments)
    return results


def _pairs(
    student: Tensor, teacher: Tensor, student_columns: Tensor | None, teacher_columns: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the raw operators take them: rows that are their own columns twice."""
    return (
        student,
        teacher,
        student if student_columns is None else student_columns,
        teacher if teacher_columns is None else teacher_columns,
    )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


class _SelfRelationLoss(torch.autograd.Function):
    """Saves the tokens and some statistics per row; or, in one pass, the gradient instead of the statistics.

    Its outputs beside the loss carry what is saved from forward to setup_context.
    """

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        student_columns: Tensor | None,
        teacher_columns: Tensor | None,
        channel: int,
        num_heads: int,
        student_scale: float,
        teacher_scale: float,
        normalize: int,
        symmetric: int,
        wanted: int,
        of_mean: bool,
        eager: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = _pairs(student, teacher, student_columns, teacher_columns)
        numbers = (channel, num_heads, student_scale, teacher_scale, normalize, symmetric)
        loss, stats, grad_student, grad_columns = _forward(backend, *tensors, *numbers, wanted if eager else 0)
        return mean(loss) if of_mean else loss, stats, grad_student, grad_columns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = inputs[:4]
        *ctx.numbers, ctx.wanted, ctx.of_mean, ctx.eager, ctx.backend = inputs[4:]
        _, stats, *gradients = output
        ctx.mark_non_differentiable(stats, *gradients)
        ctx.set_materialize_grads(False)
        save(ctx, (*tensors, None if ctx.eager else stats), gradients if ctx.eager else ())

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        *given, stats = saved(ctx)
        if grad is None:
            return (None,) * 14
        own_columns = given[2] is None
        tensors = _pairs(*given)
        if ctx.eager:
            results = saved_gradients(ctx, grad, lambda: _forward(ctx.backend, *tensors, *ctx.numbers, ctx.wanted)[2:])
        else:
            rows = stats.shape[1:]
            weights = (grad / max(rows.numel(), 1)).expand(rows) if ctx.of_mean else grad
            ops = torch.ops.fastssl
            run = ops.self_relation_loss_backward if ctx.backend == "cpp" else ops.self_relation_loss_backward_triton
            results = run(weights, stats, *tensors, *ctx.numbers, ctx.wanted)
        grad_student, grad_columns = (g if ctx.wanted & bit else None for g, bit in zip(results, (1, 2), strict=True))
        if own_columns and grad_student is not None and grad_columns is not None:
            grad_student, grad_columns = grad_student + grad_columns, None
        return (grad_student, None, grad_columns) + (None,) * 11


_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor student_columns, Tensor teacher_columns, int channel, int num_heads, "
    "float student_scale, float teacher_scale, int normalize, int symmetric, int wanted"
)
_FORWARD = f"self_relation_loss_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = f"self_relation_loss_backward(Tensor weights, Tensor stats, {_ARGUMENTS}) -> (Tensor, Tensor)"


def _fake_forward(kept: int, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kept: how many numbers per row a backend saves for its backward."""
    teacher, student_columns, teacher_columns, channel, num_heads, *_, wanted = arguments
    batch, length, width = student.shape
    rows = width // num_heads if channel else length
    double = torch.float64 in (student.dtype, teacher.dtype, student_columns.dtype, teacher_columns.dtype)
    dtype = torch.float64 if double else torch.float32
    loss = student.new_empty((batch, num_heads, rows), dtype=dtype)
    stats = student.new_empty((kept, batch, num_heads, rows), dtype=dtype)
    return loss, stats, *_fake_gradients(student, student_columns, wanted)


def _fake_backward(weights: Tensor, stats: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    student, _, student_columns, *_, wanted = arguments
    return _fake_gradients(student, student_columns, wanted)


def _fake_gradients(student: Tensor, student_columns: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    grad_student = torch.empty_like(student) if wanted & 1 else student.new_empty(0)
    grad_columns = torch.empty_like(student_columns) if wanted & 2 else student_columns.new_empty(0)
    return grad_student, grad_columns


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastssl.kernels.self_relation_loss import forward

    return forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastssl.kernels.self_relation_loss_backward import backward

    return backward(*args)


_library.register_fake("self_relation_loss_forward", partial(_fake_forward, 6))
_library.register_fake("self_relation_loss_backward", _fake_backward)
_library.define(_FORWARD.replace("(", "_triton(", 1), _triton_forward, partial(_fake_forward, 3))
_library.define(_BACKWARD.replace("(", "_triton(", 1), _triton_backward, _fake_backward)

register(
    Op(
        name=_OP,
        describe=_describe,
        backends=(
            Backend("cpp", ("cpu",), FLOATING, _library.why_not_on),
            Backend("triton", ("cuda", "cpu"), HALF_AND_SINGLE, _triton_missing),
            Backend("reference", (), FLOATING, always),
        ),
    )
)
