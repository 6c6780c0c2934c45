"""packed_attention: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, HALF_AND_SINGLE, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._attention import check_heads, cpp_limits, kept_for_backward, triton_limits
from fastssl.ops._gradients import first_derivatives_only, save, saved, wants_gradient
from fastssl.reference.packed_attention import packed_attention as _reference

_OP = "packed_attention"


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within each of several sequences that lie one behind the other: crops of several sizes in one call.

    Equivalent to::

        parts = zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)))     # each (N_i, H, d)
        heads = [[x.transpose(0, 1) for x in part] for part in parts]              # each (H, N_i, d)
        out = cat([((scale * q @ k.mT).softmax(-1) @ v).transpose(0, 1) for q, k, v in heads])

    but in one call, without a matrix of logits in memory, neither in forward nor kept for backward.

    Args:
        q, k, v: (T, H, d), T tokens in all; float32, float64, bfloat16 or float16, any strides: views of one
            (T, 3, H, d) tensor are read where they are. Arithmetic is float32 (float64 if any of them is float64).
        cu_seqlens: (S + 1,) int32 or int64, where each of S sequences begins, and T at the end, as
            `torch.nn.attention.varlen` has it. Lengths of zero are fine. On the CPU its values are checked; on a GPU
            that would mean to wait for it: the kernels then read and write no further than T, and rows that are in no
            sequence are left undefined.
        max_seqlen: a hint, at least the longest sequence's length, from which GPU kernels choose their tiles.
        scale: factor of the dot products; None means d**-0.5.
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        (T, H, d) in q's dtype, contiguous.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Bitwise repeatable, for any number of threads. First derivatives in reverse mode only.

    Source: block-diagonal attention, as DINOv2 (arXiv 2304.07193) packs its crops.
    """
    args = _check(q, k, v, cu_seqlens, max_seqlen, scale)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        return _reference(q, k, v, cu_seqlens, scale=args.scale)
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    if args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        result: Tensor = _PackedAttention.apply(*args.tensors, args.max_seqlen, args.scale, chosen)[0]
        return result
    return _forward(chosen, *args.tensors, args.max_seqlen, args.scale)[0]


class _Args(NamedTuple):
    """A checked call."""

    tensors: tuple[Tensor, ...]  # q, k, v, cu_seqlens in int32
    max_seqlen: int  # 0: not known
    scale: float
    needs_grad: bool


def _check(q: Any, k: Any, v: Any, cu_seqlens: Any, max_seqlen: Any, scale: Any) -> _Args:
    scale = check_heads(_OP, q, k, v, ("T", "H", "d"), scale)
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{_OP}: cu_seqlens must be a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = str(cu_seqlens.dtype).removeprefix("torch.")
        raise TypeError(f"{_OP}: cu_seqlens must have dtype int32 or int64, got dtype {kind}")
    _checks.check_strided(_OP, "cu_seqlens", cu_seqlens)
    _checks.check_same_device(_OP, "cu_seqlens", cu_seqlens, "q", q)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{_OP}: cu_seqlens must be (S + 1,), got {_checks.shape(cu_seqlens)}")
    if cu_seqlens.shape[0] == 1 and q.shape[0] > 0:
        raise ValueError(f"{_OP}: cu_seqlens must end with T = {q.shape[0]}, got {_checks.shape(cu_seqlens)}")
    if max_seqlen is not None:
        _checks.check_count(_OP, "max_seqlen", max_seqlen)
    if q.shape[0] > 2**31 - 1:
        raise ValueError(f"{_OP}: q must have less than 2^31 tokens, got {q.shape[0]}")
    # Values can be looked at where they are at hand: not while tracing, and not on a GPU, which would have to finish.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu_seqlens) is Tensor:
        _check_values(cu_seqlens.tolist(), q.shape[0], max_seqlen)
    needs_grad = torch.is_grad_enabled() and any(wants_gradient(x) for x in (q, k, v))
    return _Args((q, k, v, cu_seqlens.to(torch.int32)), max_seqlen or 0, scale, needs_grad)


def _check_values(starts: list[int], total: int, max_seqlen: int | None) -> None:
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(
            f"{_OP}: cu_seqlens must begin with 0 and end with T = {total}, got {starts[0]} and {starts[-1]}"
        )
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{_OP}: cu_seqlens must not fall, got {starts[at]} before {starts[at + 1]}")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"{_OP}: max_seqlen must be at least the longest sequence's {max(lengths)} tokens, got {max_seqlen}"
        )


def _describe(q: Any, k: Any, v: Any, cu_seqlens: Any, *, max_seqlen: Any = None, scale: Any = None) -> Call:
    return _call(_check(q, k, v, cu_seqlens, max_seqlen, scale))


def _call(args: _Args) -> Call:
    q, k, v = args.tensors[:3]
    dtypes = (("q", q.dtype), ("k", k.dtype), ("v", v.dtype))
    return Call(_OP, q.device.type, dtypes, args.needs_grad, {"tokens": q.shape[0], "depth": q.shape[2]})


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    ops = torch.ops.fastssl
    results: tuple[Tensor, Tensor]
    if backend == "cpp":
        *tensors, _, scale = arguments  # it finds the lengths itself
        results = ops.packed_attention_forward(*tensors, scale)
    else:
        results = ops.packed_attention_forward_triton(*arguments)
    return results


def backward_of(backend: str, grad: Tensor, saved_tensors: Any, max_seqlen: int, scale: float) -> Tensor:
    """(T, 3, H, d): the gradients of q, k and v side by side, as a qkv projection has them."""
    ops = torch.ops.fastssl
    result: Tensor
    if backend == "cpp":
        result = ops.packed_attention_backward(grad, *saved_tensors, scale)
    else:
        result = ops.packed_attention_backward_triton(grad, *saved_tensors, max_seqlen, scale)
    return result


class _PackedAttention(torch.autograd.Function):
    """Saves q, k, v and what `kept_for_backward` says."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _forward(backend, q, k, v, cu_seqlens, max_seqlen, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.max_seqlen, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, (*kept_for_backward(ctx.backend, output), *tensors))

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 7
        gradients = backward_of(ctx.backend, grad, saved(ctx), ctx.max_seqlen, ctx.scale).unbind(1)
        wanted = zip(gradients, ctx.needs_input_grad, strict=False)
        return tuple(g if wants else None for g, wants in wanted) + (None,) * 4


# max_seqlen is symbolic: graphs are for any of it.
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale"
_FORWARD = f"packed_attention_forward_triton({_ARGUMENTS}) -> (Tensor, Tensor)"
_BACKWARD = f"packed_attention_backward_triton(Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor"


def _fake_forward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    total, heads, depth = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((total, heads, depth)), q.new_empty((heads, total), dtype=work)


def _fake_backward(grad: Tensor, *arguments: Any) -> Tensor:
    total, heads, depth = grad.shape
    return grad.new_empty((total, 3, heads, depth))


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastssl.kernels.packed_attention import forward

    return forward(*args)


def _triton_backward(*args: Any) -> Tensor:
    from fastssl.kernels.packed_attention import backward

    return backward(*args)


_library.register_fake("packed_attention_forward", _fake_forward)
_library.register_fake("packed_attention_backward", _fake_backward)
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
