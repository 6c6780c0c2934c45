"""Both attentions of a qkv projection's whole output, whose gradient the raw backward returns as it is, without a copy.

q, k and v given apart would each get a gradient of the whole, zero in the other two, and a sum of the three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl._backends import select
from fastssl.ops import masked_attention as masked
from fastssl.ops import packed_attention as packed
from fastssl.ops._attention import kept_for_backward
from fastssl.ops._gradients import first_derivatives_only, save, saved
from fastssl.reference.masked_attention import masked_attention as masked_reference
from fastssl.reference.packed_attention import packed_attention as packed_reference


def qkv_masked_attention(qkv: Tensor, keep: Tensor | None, scale: float | None = None) -> Tensor:
    """`fastssl.masked_attention` of (B, N, 3, H, d); returns (B, N, H, d), contiguous."""
    q, k, v = _image_heads(qkv)
    args = masked._check(q, k, v, keep, scale)
    chosen = select(masked._call(args))
    if chosen == "reference":
        return masked_reference(q, k, v, keep, scale=args.scale).transpose(1, 2)
    if _needs_function(args.needs_grad):
        result: Tensor = _QkvMasked.apply(qkv, args.tensors[3], args.scale, chosen)[0]
        return result
    return masked._forward(chosen, *args.tensors, args.scale)[0]


def qkv_packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, scale: float | None = None) -> Tensor:
    """`fastssl.packed_attention` of (T, 3, H, d); returns (T, H, d), contiguous."""
    q, k, v = qkv.unbind(1)
    args = packed._check(q, k, v, cu_seqlens, max_seqlen, scale)
    chosen = select(packed._call(args))
    if chosen == "reference":
        return packed_reference(q, k, v, cu_seqlens, scale=args.scale)
    if _needs_function(args.needs_grad):
        result: Tensor = _QkvPacked.apply(qkv, args.tensors[3], args.max_seqlen, args.scale, chosen)[0]
        return result
    return packed._forward(chosen, *args.tensors, args.max_seqlen, args.scale)[0]


def _needs_function(needs_grad: bool) -> bool:
    """Also where forward-mode derivatives would be lost in a raw operator: the Function refuses them."""
    return needs_grad or torch.autograd.forward_ad._current_level >= 0


def _image_heads(qkv: Tensor) -> list[Tensor]:
    """(B, N, 3, H, d) as three views (B, H, N, d)."""
    return [x.transpose(1, 2) for x in qkv.unbind(2)]


class _QkvMasked(torch.autograd.Function):
    @staticmethod
    def forward(qkv: Tensor, keep: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        return masked._forward(backend, *_image_heads(qkv), keep, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, keep, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, (*kept_for_backward(ctx.backend, output), qkv, keep))

    @staticmethod
    @first_derivatives_only("masked_attention")
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 4
        *kept, qkv, keep = saved(ctx)
        tensors = (*kept, *_image_heads(qkv), keep)
        return masked.backward_of(ctx.backend, grad, tensors, ctx.scale), None, None, None


class _QkvPacked(torch.autograd.Function):
    @staticmethod
    def forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, backend: str) -> tuple[Tensor, Tensor]:
        return packed._forward(backend, *qkv.unbind(1), cu_seqlens, max_seqlen, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        save(ctx, (*kept_for_backward(ctx.backend, output), qkv, cu_seqlens))

    @staticmethod
    @first_derivatives_only("packed_attention")
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 5
        *kept, qkv, cu_seqlens = saved(ctx)
        tensors = (*kept, *qkv.unbind(1), cu_seqlens)
        gradient = packed.backward_of(ctx.backend, grad, tensors, ctx.max_seqlen, ctx.scale)
        return gradient, None, None, None, None
