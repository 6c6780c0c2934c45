"""simpool: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, HALF_AND_SINGLE, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._gradients import first_derivatives_only, save, saved, wants_gradient
from fastssl.reference.simpool import simpool as _reference

_OP = "simpool"
_VALUE_MINIMA = ("batch", "channel")


def simpool(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    bq: Tensor | None = None,
    bk: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    gamma: float | None = None,
    beta: Tensor | None = None,
    value_min: str = "batch",
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    return_attention: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SimPool: one query, made from the mean token, attends to the normalised tokens; in place of a class token.

    Equivalent to::

        y = layer_norm(x, (C,), norm_weight, norm_bias, norm_eps)               # (B, N, C)
        q = linear(x.mean(1), wq, bq).unflatten(-1, (num_heads, -1))            # (B, H, d)
        k = linear(y, wk, bk).unflatten(-1, (num_heads, -1))                    # (B, N, H, d)
        a = (scale * einsum("bhd,bnhd->bhn", q, k)).softmax(-1)                 # (B, H, N)
        v = y.unflatten(-1, (num_heads, -1))                                    # (B, N, H, d)
        out = einsum("bhn,bnhd->bhd", a, v)                                     # gamma=None
        out = einsum("bhn,bnhd->bhd", a, (v - min + eps)**gamma)**(1 / gamma) + beta
        out = out.flatten(1)                                                    # (B, C)

    but the key projection is folded into the query, ``q·(Wk y) = (Wkᵀq)·y``, and y is never in memory: what is left
    is reading x.

    Args:
        x: tokens (B, N, C) without the class token, or a feature map (B, C, h, w), read as (B, h·w, C), a view where
            its strides allow; N of at least 1; float32, float64, bfloat16 or float16, any strides. Arithmetic is
            float32 (float64 if any argument is float64). The dtypes of the others may differ.
        wq, wk: (C, C), weights of the query's and the keys' projection, as `torch.nn.Linear` has them.
        norm_weight, norm_bias: (C,), of the LayerNorm of the tokens.
        bq: (C,), bias of the query's projection.
        bk: (C,), bias of the keys' projection. It cancels in the softmax; its gradient is exactly zero.
        num_heads: H, a divisor of C; d = C/H.
        scale: factor of the dot products; None means d**-0.5.
        gamma: exponent of the generalised mean, a finite number above 0; None for a plain weighted mean.
        beta: one number, added to the result; needs `gamma`.
        value_min: the minimum that is subtracted before the power. "batch", as the paper's code has it: of all
            values of the batch, so that an image's result depends on the others (an image with NaN is NaN, and may be
            left out of it). "channel", as timm's SimPool has it: of each channel of each image. Gradients flow through
            it; values that tie share them evenly.
        eps: added after the minimum is subtracted, above 0; ``eps**gamma`` must not be 0 in the arithmetic's dtype.
        norm_eps: of the LayerNorm, above 0.
        return_attention: also return the attention.
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        The pooled vectors (B, C) in x's dtype; with `return_attention` also the attention (B, H, N) in x's dtype,
        each row of which sums to 1.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Bitwise repeatable, for any number of threads. First derivatives in reverse mode only.

    Source: SimPool (arXiv 2309.06891), Algorithm 1 and eq. 12; timm's SimPool1d for value_min="channel".
    """
    given = (wq, wk, norm_weight, norm_bias, bq, bk, num_heads, scale, gamma, beta, value_min, eps, norm_eps)
    args = _check(x, *given, return_attention)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        pooled, attention = _reference(
            x,
            wq,
            wk,
            norm_weight,
            norm_bias,
            bq=bq,
            bk=bk,
            num_heads=num_heads,
            scale=scale,
            gamma=gamma,
            beta=None if beta is None else args.tensors[6],
            value_min=value_min,
            eps=eps,
            norm_eps=norm_eps,
        )
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    elif args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        pooled, attention = _SimPool.apply(*args.tensors, args.bk, *args.numbers, chosen)[:2]
    else:
        pooled, attention = _forward(chosen, *args.tensors, *args.numbers)[:2]
    return (pooled, attention) if return_attention else pooled


class _Numbers(NamedTuple):
    """The numbers of a call, in the order of the raw operators."""

    num_heads: int
    scale: float
    gamma: float  # 0: no power
    channel_min: int
    eps: float
    norm_eps: float


class _Args(NamedTuple):
    """A checked call. An absent tensor has no elements, as the raw operators want it."""

    tensors: tuple[Tensor, ...]  # x (B, N, C), wq, bq, wk, norm_weight, norm_bias, beta
    bk: Tensor | None
    numbers: _Numbers
    needs_grad: bool
    dtypes: tuple[tuple[str, torch.dtype], ...]


def _check(
    x: Any,
    wq: Any,
    wk: Any,
    norm_weight: Any,
    norm_bias: Any,
    bq: Any,
    bk: Any,
    num_heads: Any,
    scale: Any,
    gamma: Any,
    beta: Any,
    value_min: Any,
    eps: Any,
    norm_eps: Any,
    return_attention: Any,
) -> _Args:
    _checks.check_tensor(_OP, "x", x)
    rows = _checks.tokens(_OP, "x", x)
    _, length, width = rows.shape
    if width < 1 or length < 1:
        raise ValueError(f"{_OP}: x must have at least one token and one channel, got {_checks.shape(x)}")
    given = {"x": x, "wq": wq, "bq": bq, "wk": wk, "bk": bk, "norm_weight": norm_weight, "norm_bias": norm_bias}
    shapes = {"wq": (width, width), "wk": (width, width)}
    for name, value in given.items():
        if name == "x" or (value is None and name in ("bq", "bk")):
            continue
        _checks.check_tensor(_OP, name, value)
        _checks.check_same_device(_OP, name, value, "x", x)
        wanted = shapes.get(name, (width,))
        if tuple(value.shape) != wanted:
            letters = "(C, C)" if len(wanted) == 2 else "(C,)"
            raise ValueError(
                f"{_OP}: {name} must be {letters} = {wanted} for C = {width} of x, got {_checks.shape(value)}"
            )
    _checks.check_count(_OP, "num_heads", num_heads)
    if width % num_heads != 0:
        raise ValueError(f"{_OP}: num_heads must divide the C channels of x, got {num_heads} for C = {width}")
    if scale is not None:
        _checks.check_number(_OP, "scale", scale)
    _checks.check_choice(_OP, "value_min", value_min, _VALUE_MINIMA)
    _checks.check_number(_OP, "eps", eps, positive=True)
    _checks.check_number(_OP, "norm_eps", norm_eps, positive=True)
    _checks.check_flag(_OP, "return_attention", return_attention)
    if beta is not None:
        _checks.check_tensor(_OP, "beta", beta)
        _checks.check_same_device(_OP, "beta", beta, "x", x)
        if beta.numel() != 1:
            raise ValueError(f"{_OP}: beta must have one element, got {_checks.shape(beta)}")
        if gamma is None:
            raise ValueError(f"{_OP}: beta must be None where gamma is None, got a Tensor")
        beta = beta.reshape(())
        given["beta"] = beta
    present = {name: value for name, value in given.items() if value is not None}
    if gamma is not None:
        _checks.check_number(_OP, "gamma", gamma, positive=True)
        double = any(value.dtype == torch.float64 for value in present.values())
        smallest = 2.0**-1022 if double else 2.0**-126  # normal number of the arithmetic's dtype
        if eps < smallest:
            raise ValueError(f"{_OP}: eps must be at least {smallest:.3g}, got {eps}")
        largest = math.inf if eps >= 1 else math.log(smallest) / math.log(eps)
        if gamma > largest:
            raise ValueError(
                f"{_OP}: gamma must be at most {largest:.4g} where eps is {eps} (or eps**gamma is 0), got {gamma}"
            )
    numbers = _Numbers(
        num_heads,
        float((width // num_heads) ** -0.5 if scale is None else scale),
        0.0 if gamma is None else float(gamma),
        int(gamma is not None and value_min == "channel"),
        float(eps),
        float(norm_eps),
    )
    needs_grad = torch.is_grad_enabled() and any(wants_gradient(value) for value in present.values())
    # One each: torch.compile takes no tensor twice.
    bq, beta = (wq.new_empty(0) if value is None else value for value in (bq, beta))
    tensors = (rows, wq, bq, wk, norm_weight, norm_bias, beta)
    return _Args(tensors, bk, numbers, needs_grad, tuple((name, value.dtype) for name, value in present.items()))


def _describe(
    x: Any,
    wq: Any,
    wk: Any,
    norm_weight: Any,
    norm_bias: Any,
    *,
    bq: Any = None,
    bk: Any = None,
    num_heads: Any = 1,
    scale: Any = None,
    gamma: Any = None,
    beta: Any = None,
    value_min: Any = "batch",
    eps: Any = 1e-6,
    norm_eps: Any = 1e-6,
    return_attention: Any = False,
) -> Call:
    given = (wq, wk, norm_weight, norm_bias, bq, bk, num_heads, scale, gamma, beta, value_min, eps, norm_eps)
    return _call(_check(x, *given, return_attention))


def _call(args: _Args) -> Call:
    x = args.tensors[0]
    sizes = {"tokens": x.shape[1], "channels": x.shape[2], "heads": args.numbers.num_heads}
    return Call(_OP, x.device.type, args.dtypes, args.needs_grad, sizes)


def _forward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    ops = torch.ops.fastssl
    results: tuple[Tensor, ...] = (ops.simpool_forward if backend == "cpp" else ops.simpool_forward_triton)(*arguments)
    return results


class _SimPool(torch.autograd.Function):
    """Saves the tokens, a few numbers per token (B, 2 + 2H, N) and a few vectors per image (B, 3 + H, C)."""

    @staticmethod
    def forward(
        x: Tensor,
        wq: Tensor,
        bq: Tensor,
        wk: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        beta: Tensor,
        bk: Tensor | None,
        num_heads: int,
        scale: float,
        gamma: float,
        channel_min: int,
        eps: float,
        norm_eps: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        numbers = (num_heads, scale, gamma, channel_min, eps, norm_eps)
        return _forward(backend, x, wq, bq, wk, norm_weight, norm_bias, beta, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, wq, bq, wk, norm_weight, norm_bias, beta, bk, *ctx.numbers, ctx.backend = inputs
        _, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        save(ctx, (x, wq, bq, wk, norm_weight, norm_bias, beta, bk, *kept))

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor | None, grad_attention: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        *inputs, bk, rows, vectors, minimum = saved(ctx)
        if grad is None and grad_attention is None:
            return (None,) * 15
        x = inputs[0]
        if grad is None:
            grad = x.new_zeros((x.shape[0], x.shape[2]))
        if grad_attention is None:
            grad_attention = x.new_empty(0)
        ops = torch.ops.fastssl
        run = ops.simpool_backward if ctx.backend == "cpp" else ops.simpool_backward_triton
        wanted = int(ctx.needs_input_grad[0]) + 2 * int(any(ctx.needs_input_grad[1:7]))
        results = run(grad, grad_attention, rows, vectors, minimum, *inputs, *ctx.numbers, wanted)
        gradients = [r if wants else None for r, wants in zip(results, ctx.needs_input_grad[:7], strict=True)]
        # softmax does not see what is added to all of its logits: the same bits for any bk, so exactly zero.
        grad_bk = torch.zeros_like(bk) if ctx.needs_input_grad[7] else None
        return (*gradients, grad_bk) + (None,) * 7


_ARGUMENTS = (
    "Tensor x, Tensor wq, Tensor bq, Tensor wk, Tensor norm_weight, Tensor norm_bias, Tensor beta, int num_heads, "
    "float scale, float gamma, int channel_min, float eps, float norm_eps"
)
_FORWARD = f"simpool_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"simpool_backward(Tensor grad, Tensor grad_attention, Tensor rows, Tensor vectors, Tensor minimum, {_ARGUMENTS}, "
    "int wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake_forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor,
    wk: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    beta: Tensor,
    num_heads: int,
    scale: float,
    gamma: float,
    channel_min: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    batch, length, width = x.shape
    tensors = (x, wq, bq, wk, norm_weight, norm_bias, beta)
    work = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    minimum = (batch, width) if channel_min else (int(gamma != 0.0),)
    return (
        x.new_empty((batch, width)),
        x.new_empty((batch, num_heads, length)),
        x.new_empty((batch, 2 + 2 * num_heads, length), dtype=work),
        x.new_empty((batch, 3 + num_heads, width), dtype=work),
        x.new_empty(minimum, dtype=work),
    )


def _fake_backward(
    grad: Tensor,
    grad_attention: Tensor,
    rows: Tensor,
    vectors: Tensor,
    minimum: Tensor,
    x: Tensor,
    wq: Tensor,
    bq: Tensor,
    wk: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    beta: Tensor,
    num_heads: int,
    scale: float,
    gamma: float,
    channel_min: int,
    eps: float,
    norm_eps: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x) if wanted & 1 else x.new_empty(0)
    parameters = (wq, bq, wk, norm_weight, norm_bias, beta)
    return grad_x, *(torch.empty_like(p) if wanted & 2 else p.new_empty(0) for p in parameters)


def _triton_forward(*args: Any) -> tuple[Tensor, ...]:
    from fastssl.kernels.simpool import forward

    return forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from fastssl.kernels.simpool import backward

    return backward(*args)


_library.register_fake("simpool_forward", _fake_forward)
_library.register_fake("simpool_backward", _fake_backward)
_library.define(_FORWARD.replace("(", "_triton(", 1), _triton_forward, _fake_forward)
_library.define(_BACKWARD.replace("(", "_triton(", 1), _triton_backward, _fake_backward)


#: What surely fits into the shared memory of a block (kMaxChannels, kMaxHeads in csrc/cuda/simpool_tiles.cuh).
CUDA_LARGEST = {"channels": 4096, "heads": 128}


def _cpp_limits(call: Call) -> list[str]:
    if call.device != "cuda":
        return []
    reasons = [f"its CUDA kernels take no float64 {name}" for name, dtype in call.dtypes if dtype == torch.float64]
    for size, largest in CUDA_LARGEST.items():
        if call.sizes[size] > largest:
            reasons.append(f"its CUDA kernels take at most {largest} {size}, got {call.sizes[size]}")
    return reasons


register(
    Op(
        name=_OP,
        describe=_describe,
        backends=(
            Backend("cpp", ("cpu", "cuda"), FLOATING, _library.why_not_on, _cpp_limits),
            Backend("triton", ("cuda", "cpu"), HALF_AND_SINGLE, _triton_missing),
            Backend("reference", (), FLOATING, always),
        ),
    )
)
