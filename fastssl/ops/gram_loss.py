"""gram_loss: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, HALF_AND_SINGLE, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._gradients import first_derivatives_only, save, saved, saved_gradients, wants_gradient
from fastssl.reference.gram_loss import gram_loss as _reference

_OP = "gram_loss"
_REMOVE = ("none", "teacher", "both")


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    remove_negatives: str = "none",
    per_image: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Gram anchoring: mean squared difference of the student's and the teacher's matrix of token similarities.

    Equivalent to::

        x = torch.nn.functional.normalize(student.float(), dim=-1)             # (B, N, C)
        y = torch.nn.functional.normalize(teacher.float(), dim=-1).detach()    # (B, N, C')
        x, y = x.flatten(0, 1), y.flatten(0, 1)                                # per_image=False
        s, t = x @ x.mT, y @ y.mT                                              # (B, N, N), or (B·N, B·N)
        t = t.where(t >= 0, 0)                                                 # remove_negatives="teacher" or "both"
        s = s.where(s >= 0, 0)                                                 # remove_negatives="both"
        loss = (s - t).square().mean()

    but no matrix of similarities is ever in memory: neither in forward nor kept for backward.

    Args:
        student: tokens (B, N, C) or a feature map (B, C, h, w), read as (B, h·w, C), a view where its strides
            allow; float32, float64, bfloat16 or float16, any strides. Arithmetic is float32 (float64 if any
            argument is float64).
        teacher: the same of the teacher, a constant. Its C may differ, its B and N may not. Its dtype may differ.
        normalize: divide every token by its length first (cosine similarity). A zero token stays zero and gets no
            gradient.
        remove_negatives: which negative similarities count as 0: "none", those of the "teacher", or those of
            "both"; a removed similarity of the student has no gradient.
        per_image: compare the N × N similarities within each image; False: those between all B·N tokens of the
            batch. Tokens that lie in memory one after the other are not copied for that, feature maps are.
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        A scalar, the mean over all B·N² or (B·N)² similarities, 0 if there are none. float32, or float64 if any
        argument is float64.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Bitwise repeatable, for any number of threads. First derivatives in reverse mode only. On the CPU, where the matrix
    of one image fits a core's cache, the gradient is computed with the loss, in one pass over student and teacher.

    Source: DINOv3 (arXiv 2508.10104), eq. 2: the loss that keeps dense features alive in long training.
    """
    args = _check(student, teacher, normalize, remove_negatives, per_image)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        return _reference(student, teacher, normalize=normalize, remove_negatives=remove_negatives, per_image=per_image)
    tensors = (args.student, args.teacher.detach())
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    if args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        result: Tensor = _GramLoss.apply(*tensors, *args.numbers, _in_one_pass(chosen, args), chosen)[0]
        return result
    return _forward(chosen, *tensors, *args.numbers, 0)[0]


class _Args(NamedTuple):
    """A checked call."""

    student: Tensor  # (B, N, C), any strides; (1, B·N, C) where tokens are compared across images
    teacher: Tensor  # (B, N, C'), any strides
    numbers: tuple[int, int]  # normalize, remove: as the raw operators take them
    needs_grad: bool


def _check(student: Any, teacher: Any, normalize: Any, remove_negatives: Any, per_image: Any) -> _Args:
    _checks.check_tensor(_OP, "student", student)
    _checks.check_tensor(_OP, "teacher", teacher)
    _checks.check_same_device(_OP, "teacher", teacher, "student", student)
    _checks.check_flag(_OP, "normalize", normalize)
    _checks.check_choice(_OP, "remove_negatives", remove_negatives, _REMOVE)
    _checks.check_flag(_OP, "per_image", per_image)
    x = _checks.tokens(_OP, "student", student)
    y = _checks.tokens(_OP, "teacher", teacher)
    for name, rows, given in (("student", x, student), ("teacher", y, teacher)):
        if rows.shape[2] < 1:
            raise ValueError(f"{_OP}: {name} must have at least one channel, got {_checks.shape(given)}")
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{_OP}: teacher must have student's batch and number of tokens (B = {x.shape[0]}, N = {x.shape[1]}), "
            f"got {_checks.shape(teacher)}"
        )
    if not per_image:
        x, y = (rows.reshape(1, rows.shape[0] * rows.shape[1], rows.shape[2]) for rows in (x, y))
    needs_grad = wants_gradient(student) and torch.is_grad_enabled()
    return _Args(x, y, (int(normalize), _REMOVE.index(remove_negatives)), needs_grad)


def _describe(
    student: Any, teacher: Any, *, normalize: Any = True, remove_negatives: Any = "none", per_image: Any = True
) -> Call:
    return _call(_check(student, teacher, normalize, remove_negatives, per_image))


def _call(args: _Args) -> Call:
    """What the backends are asked about: matrices of N rows, of depth C in the student."""
    dtypes = (("student", args.student.dtype), ("teacher", args.teacher.dtype))
    _, rows, depth = args.student.shape
    return Call(_OP, args.student.device.type, dtypes, args.needs_grad, {"rows": rows, "depth": depth})


#: Up to this many similarities the CPU kernel keeps those of one image in a core's second-level cache, and computes
#: loss and gradient in one pass, if there are this many images; as in csrc/cpu/gram_loss.cpp.
ONE_PASS_CPP, ONE_PASS_CPP_IMAGES = 160 * 1024, 8


def _in_one_pass(backend: str, args: _Args) -> bool:
    """Whether the gradient is best computed with the loss.

    Never in float16: the gradient of a mean over so many, not yet multiplied by the loss scaling that comes in with
    backward, is often below float16's smallest number.
    """
    batch, rows, _ = args.student.shape
    if backend != "cpp" or args.student.dtype == torch.float16:
        return False
    return rows * rows <= ONE_PASS_CPP and batch >= ONE_PASS_CPP_IMAGES


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    ops = torch.ops.fastssl
    results: tuple[Tensor, Tensor] = (ops.gram_loss_forward if backend == "cpp" else ops.gram_loss_forward_triton)(
        *arguments
    )
    return results


class _GramLoss(torch.autograd.Function):
    """Saves the tokens; or, in one pass, also the gradient, which is an output to get from forward to setup_context."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, normalize: int, remove: int, eager: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _forward(backend, student, teacher, normalize, remove, int(eager))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.normalize, ctx.remove, ctx.eager, ctx.backend = inputs
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        save(ctx, tuple(tensors), (gradient,) if ctx.eager else ())

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        student, teacher = saved(ctx)
        if grad is None:
            return (None,) * 6
        numbers = (ctx.normalize, ctx.remove)
        if ctx.eager:
            (result,) = saved_gradients(ctx, grad, lambda: _forward(ctx.backend, student, teacher, *numbers, 1)[1:])
        else:
            ops = torch.ops.fastssl
            run = ops.gram_loss_backward if ctx.backend == "cpp" else ops.gram_loss_backward_triton
            result = run(grad, student, teacher, *numbers)
        return (result,) + (None,) * 5


_ARGUMENTS = "Tensor student, Tensor teacher, int normalize, int remove"
_FORWARD = f"gram_loss_forward({_ARGUMENTS}, int wanted) -> (Tensor, Tensor)"
_BACKWARD = f"gram_loss_backward(Tensor grad, {_ARGUMENTS}) -> Tensor"


def _fake_forward(student: Tensor, teacher: Tensor, normalize: int, remove: int, wanted: int) -> tuple[Tensor, Tensor]:
    double = torch.float64 in (student.dtype, teacher.dtype)
    loss = student.new_empty((), dtype=torch.float64 if double else torch.float32)
    return loss, torch.empty_like(student) if wanted else student.new_empty(0)


def _fake_backward(grad: Tensor, student: Tensor, teacher: Tensor, normalize: int, remove: int) -> Tensor:
    return torch.empty_like(student)


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastssl.kernels.gram_loss import forward

    return forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from fastssl.kernels.gram_loss import backward

    return backward(*args)


_library.register_fake("gram_loss_forward", _fake_forward)
_library.register_fake("gram_loss_backward", _fake_backward)
_library.define(_FORWARD.replace("(", "_triton(", 1), _triton_forward, _fake_forward)
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
