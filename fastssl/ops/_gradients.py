"""What the autograd Functions of the ops share: gradients that came with their loss, constants, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient · factor (a scalar tensor), in place; nothing is done where the factor is 1. Waits for no GPU."""
    if torch.compiler.is_compiling() or type(factor) is not Tensor or _is_wrapped(factor):
        return (gradient * factor).to(gradient.dtype)
    if gradient.is_cuda:
        from fastssl.kernels.multiply_in_place import multiply_in_place

        multiply_in_place(gradient, factor)
        return gradient
    try:
        number = float(factor)
    except RuntimeError:  # one of several that torch.autograd.grad(is_grads_batched=True) brings at once
        return (gradient * factor).to(gradient.dtype)
    return gradient if number == 1.0 else gradient.mul_(number)


def mean(rows: Tensor) -> Tensor:
    """The mean of all elements, 0 of none. The same bits for any number of threads.

    torch splits a sum of more than 32768 elements into one over threads; here each of its parts is a sum of its own.
    """
    count = rows.numel()
    if count == 0:
        return rows.sum()
    if rows.is_cuda or count <= 32768:
        return rows.mean()
    parts = torch.nn.functional.pad(rows.flatten(), (0, -count % 1024)).view(-1, 1024)
    return parts.sum(1).sum() / count


def wants_gradient(x: Tensor) -> bool:
    """Whether x requires one, also where torch.vmap hides it: the Function then says that it cannot."""
    if torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(x):
        return x.requires_grad
    return x.requires_grad or wants_gradient(torch._C._functorch.get_unwrapped(x))


def save(ctx: Any, tensors: tuple[Tensor | None, ...], gradients: Sequence[Tensor] = ()) -> None:
    """Keeps for backward what a forward was given and, where it computed them with the loss, the gradients.

    Tensors made under torch.inference_mode(), a teacher's, are none that ctx.save_for_backward takes. The counterparts
    are `saved` and `saved_gradients`.
    """
    ctx.constants = {}
    ctx.saved_inputs = len(tensors)
    if torch.compiler.is_compiling():
        ctx.save_for_backward(*tensors, *gradients)
        return
    ctx.constants = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.constants else t for i, t in enumerate(tensors)))
    ctx.gradients = gradients


def saved(ctx: Any) -> list[Any]:
    """What was given: ctx.saved_tensors with the inference tensors among them."""
    return [ctx.constants.get(i, t) for i, t in enumerate(ctx.saved_tensors[: ctx.saved_inputs])]


def saved_gradients(ctx: Any, grad: Tensor, again: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The gradients that were computed with the loss, times that of the loss.

    Handed out once, so that whoever gets them may write to them. A graph that is kept computes them `again`.
    """
    if torch.compiler.is_compiling():
        gradients = ctx.saved_tensors[ctx.saved_inputs :]
    else:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = again()
    return [times(gradient, grad) for gradient in gradients]


def first_derivatives_only(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates `backward` of an autograd Function: differentiating its results once more raises.

    once_differentiable alone lets a second derivative through as zero where the gradient that comes in is a constant.
    """
    sentence = f"{op}: second derivatives are not implemented by its fast backends, backend='reference' has them"

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)

        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return once(ctx, *grads)
            if _grad_levels() > 1:
                raise RuntimeError(sentence)
            with torch.no_grad():
                results = backward(ctx, *grads)
            if _grad_levels() == 1:  # torch.func.grad asks for a graph in any case, and drops it
                return results
            return tuple(None if r is None else _Refused.apply(r.detach().requires_grad_(), sentence) for r in results)

        return guarded

    return decorate


class _Refused(torch.autograd.Function):
    """The identity, whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sentence: str) -> Tensor:
        ctx.sentence = sentence
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(ctx.sentence)


def _is_wrapped(x: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def _grad_levels() -> int:
    """How many torch.func.grad (or vjp, jacrev) are at work around this call."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in stack)
