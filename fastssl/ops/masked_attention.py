"""masked_attention: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, HALF_AND_SINGLE, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._attention import check_heads, cpp_limits, kept_for_backward, triton_limits
from fastssl.ops._gradients import first_derivatives_only, save, saved, wants_gradient
from fastssl.reference.masked_attention import masked_attention as _reference

_OP = "masked_attention"


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention among the kept tokens of each image.

    Equivalent to::

        logits = scale * q @ k.mT                                       # (B, H, N, N)
        logits = logits.masked_fill(~keep[:, None, None, :], -inf)
        out = (logits.softmax(-1) @ v) * keep[:, None, :, None]         # and 0 where an image keeps nothing

    but work and memory go with the kept tokens, k² and k per image: what is dropped is not read, kept tokens are not
    gathered into copies, and no matrix of logits is in memory, neither in forward nor kept for backward.

    Args:
        q, k, v: (B, H, N, d); float32, float64, bfloat16 or float16, any strides: views of one (B, N, 3, H, d) tensor
            are read where they are. Arithmetic is float32 (float64 if any of them is float64).
        keep: (B, N) bool, True: the token is kept; None keeps all.
        scale: factor of the dot products; None means d**-0.5.
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        (B, H, N, d) in q's dtype, in memory as (B, N, H, d), so that ``out.transpose(1, 2).flatten(2)`` is no copy.
        Rows of dropped tokens are zero and their q, k, v get zero gradient.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Bitwise repeatable, for any number of threads. First derivatives in reverse mode only.

    Source: the sparse students of DILEMMA (arXiv 2204.04788), token dropping of MAE (arXiv 2111.06377).
    """
    args = _check(q, k, v, keep, scale)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        return _reference(q, k, v, keep, scale=args.scale)
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    if args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        result: Tensor = _MaskedAttention.apply(*args.tensors, args.scale, chosen)[0]
    else:
        result = _forward(chosen, *args.tensors, args.scale)[0]
    return result.transpose(1, 2)


class _Args(NamedTuple):
    """A checked call."""

    tensors: tuple[Tensor, ...]  # q, k, v, keep (without elements where all are kept)
    scale: float
    needs_grad: bool


def _check(q: Any, k: Any, v: Any, keep: Any, scale: Any) -> _Args:
    scale = check_heads(_OP, q, k, v, ("B", "H", "N", "d"), scale)
    batch, _, length, _ = q.shape
    if keep is None:
        keep = q.new_empty(0, dtype=torch.bool)
    else:
        if not isinstance(keep, Tensor):
            raise TypeError(f"{_OP}: keep must be None or a Tensor, got {type(keep).__name__}")
        if keep.dtype != torch.bool:
            raise TypeError(f"{_OP}: keep must have dtype bool, got dtype {str(keep.dtype).removeprefix('torch.')}")
        _checks.check_strided(_OP, "keep", keep)
        _checks.check_same_device(_OP, "keep", keep, "q", q)
        if tuple(keep.shape) != (batch, length):
            raise ValueError(f"{_OP}: keep must be (B, N) = {(batch, length)} of q, got {_checks.shape(keep)}")
    needs_grad = torch.is_grad_enabled() and any(wants_gradient(x) for x in (q, k, v))
    return _Args((q, k, v, keep), scale, needs_grad)


def _describe(q: Any, k: Any, v: Any, keep: Any, *, scale: Any = None) -> Call:
    return _call(_check(q, k, v, keep, scale))


def _call(args: _Args) -> Call:
    q, k, v = args.tensors[:3]
    dtypes = (("q", q.dtype), ("k", k.dtype), ("v", v.dtype))
    return Call(_OP, q.device.type, dtypes, args.needs_grad, {"tokens": q.shape[2], "depth": q.shape[3]})


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    ops = torch.ops.fastssl
    run = ops.masked_attention_forward if backend == "cpp" else ops.masked_attention_forward_triton
    results: tuple[Tensor, Tensor] = run(*arguments)  # (B, N, H, d), and (B, H, N)
    return results


def backward_of(backend: str, grad: Tensor, saved_tensors: Any, scale: float) -> Tensor:
    """(B, N, 3, H, d): the gradients of q, k and v side by side, as a qkv projection has them; grad is (B, N, H, d)."""
    ops = torch.ops.fastssl
    run = ops.masked_attention_backward if backend == "cpp" else ops.masked_attention_backward_triton
    result: Tensor = run(grad.transpose(1, 2), *saved_tensors, scale)
    return result


class _MaskedAttention(torch.autograd.Function):
    """Saves q, k, v and what `kept_for_backward` says."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(backend, q, k, v, keep, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, (*kept_for_backward(ctx.backend, output), *tensors))

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        gradients = backward_of(ctx.backend, grad, saved(ctx), ctx.scale).unbind(2)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return tuple(g.transpose(1, 2) if wants else None for g, wants in wanted) + (None,) * 3


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor keep, float scale"
_FORWARD = f"masked_attention_forward_triton({_ARGUMENTS}) -> (Tensor, Tensor)"
_BACKWARD = f"masked_attention_backward_triton(Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor"


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, depth = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((batch, length, heads, depth)), q.new_empty((batch, heads, length), dtype=work)


def _fake_backward(grad: Tensor, *arguments: Any) -> Tensor:
    batch, heads, length, depth = grad.shape
    return grad.new_empty((batch, length, 3, heads, depth))


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastssl.kernels.masked_attention import forward

    return forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from fastssl.kernels.masked_attention import backward

    return backward(*args)


_library.register_fake("masked_attention_forward", _fake_forward)
_library.register_fake("masked_attention_backward", _fake_backward)
_library.define(_FORWARD, _triton_forward, _fake_forward)
_library.define(_BACKWARD, _triton_backward, _fake_backward)

register(
    Op(
        name=_OP,
        describe=_describe,
        backends=(
            Backend("cpp", ("cpu",), FLOATING, _library.why_not_on, cpp_limits),
            Backend("triton", ("cuda", "cpu"), HALF_AND_SINGLE, _triton_missing, triton_limits),
            Backend("reference", (), FLOATING, always),
        ),
    )
)
