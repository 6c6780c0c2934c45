"""sample_tokens: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._gradients import first_derivatives_only, wants_gradient
from fastssl.reference.sample_tokens import sample_tokens as _reference

_OP = "sample_tokens"


def sample_tokens(
    x: Tensor, grid: Tensor, *, grid_size: tuple[int, int] | None = None, backend: str | None = None
) -> Tensor:
    """Tokens at the points of a grid: `torch.nn.functional.grid_sample` for tokens, without copies of the map.

    Equivalent, for a feature map, to::

        sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled.flatten(2).transpose(1, 2)                               # (B, k·k', C)

    and, for tokens, to the same with ``x.unflatten(1, (h, w)).permute(0, 3, 1, 2)``. Each point blends the four tokens
    around it. As sampling is linear, relating sampled tokens is the same as sampling the relation of all tokens on
    both of its axes: R₁ (X Xᵀ) R₂ᵀ = (R₁X)(R₂X)ᵀ.

    Args:
        x: tokens (B, N, C) of a map, in raster order and without a class token, or a feature map (B, C, h, w), which
            is not copied; float32, float64, bfloat16 or float16, any strides. Arithmetic is float32 (float64 for a
            float64 x).
        grid: points (B, k, k', 2) as (x, y), of the same dtypes, any strides; -1 and 1 are the borders of the map.
            Tokens outside the map count as zero: a point up to half a token beyond the border is still a part of the
            map, those farther out, such as (-2, -2), are zero tokens. A NaN or infinite coordinate gives a token of
            NaN, as from grid_sample on the CPU, and no gradient to x. Kernels locate points in float64.
        grid_size: (h, w) with h·w = N for the tokens of a map that is not square; None: N = h² (or the size of the
            feature map).
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        (B, k·k', C) tokens in x's dtype, contiguous, the points in the order of the grid.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Gradients for x and for the grid; at the centre of a token, where the latter jumps, it is the one towards the next
    token. Bitwise repeatable, for any number of threads (not so the reference's gradients on CUDA, where grid_sample
    adds them up in any order). First derivatives in reverse mode only: no second derivatives, no forward mode and no
    vmap with gradients, for which there is ``backend="reference"``.

    Source: SERE (arXiv 2206.05184), which samples the relation to align two views; here the tokens are sampled before.
    """
    args = _check(x, grid, grid_size)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        return _reference(x, grid, grid_size=grid_size)
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    if args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        result: Tensor = _SampleTokens.apply(args.x, args.grid, chosen)
        return result
    return _forward(chosen, args.x, args.grid)


class _Args(NamedTuple):
    """A checked call. The first two go to the raw operators."""

    x: Tensor  # (B, h, w, C), any strides
    grid: Tensor  # (B, P, 2), any strides
    needs_grad: bool


def _check(x: Any, grid: Any, grid_size: Any) -> _Args:
    _checks.check_tensor(_OP, "x", x)
    _checks.check_tensor(_OP, "grid", grid)
    _checks.check_same_device(_OP, "grid", grid, "x", x)
    tokens = _checks.map_of_tokens(_OP, "x", x, grid_size)
    if grid.dim() != 4 or grid.shape[3] != 2:
        raise ValueError(f"{_OP}: grid must be (B, k, k', 2), got {_checks.shape(grid)}")
    if grid.shape[0] != tokens.shape[0]:
        raise ValueError(f"{_OP}: grid must have x's batch (B = {tokens.shape[0]}), got {_checks.shape(grid)}")
    needs_grad = (wants_gradient(x) or wants_gradient(grid)) and torch.is_grad_enabled()
    return _Args(tokens, grid.flatten(1, 2), needs_grad)


def _describe(x: Any, grid: Any, *, grid_size: Any = None) -> Call:
    return _call(_check(x, grid, grid_size))


def _call(args: _Args) -> Call:
    """What the backends are asked about."""
    dtypes = (("x", args.x.dtype), ("grid", args.grid.dtype))
    _, height, width, channels = args.x.shape
    sizes = {"height": height, "width": width, "channels": channels, "points": args.grid.shape[1]}
    return Call(_OP, args.x.device.type, dtypes, args.needs_grad, sizes)


def _forward(backend: str, x: Tensor, grid: Tensor) -> Tensor:
    ops = torch.ops.fastssl
    run = ops.sample_tokens_forward if backend == "cpp" else ops.sample_tokens_forward_triton
    result: Tensor = run(x, grid)
    return result


class _SampleTokens(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(x: Tensor, grid: Tensor, backend: str) -> Tensor:
        return _forward(backend, x, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, grid, ctx.backend = inputs
        ctx.save_for_backward(x, grid)

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, grid = ctx.saved_tensors
        ops = torch.ops.fastssl
        run = ops.sample_tokens_backward if ctx.backend == "cpp" else ops.sample_tokens_backward_triton
        wants_x, wants_grid = ctx.needs_input_grad[:2]
        grad_x, grad_grid = run(grad, x, grid, int(wants_x) + 2 * int(wants_grid))
        return grad_x if wants_x else None, grad_grid if wants_grid else None, None


_FORWARD = "sample_tokens_forward(Tensor x, Tensor grid) -> Tensor"
_BACKWARD = "sample_tokens_backward(Tensor grad, Tensor x, Tensor grid, int wanted) -> (Tensor, Tensor)"


def _fake_forward(x: Tensor, grid: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], grid.shape[1], x.shape[3]))


def _fake_backward(grad: Tensor, x: Tensor, grid: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x) if wanted & 1 else x.new_empty(0)
    grad_grid = grid.new_empty(grid.shape) if wanted & 2 else grid.new_empty(0)
    return grad_x, grad_grid


def _triton_forward(*args: Any) -> Tensor:
    from fastssl.kernels.sample_tokens import forward

    return forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastssl.kernels.sample_tokens import backward

    return backward(*args)


_library.register_fake("sample_tokens_forward", _fake_forward)
_library.register_fake("sample_tokens_backward", _fake_backward)
_library.define(_FORWARD.replace("(", "_triton(", 1), _triton_forward, _fake_forward)
_library.define(_BACKWARD.replace("(", "_triton(", 1), _triton_backward, _fake_backward)


def _cpp_missing(device: str) -> str | None:
    return _library.why_not


_HALF = (torch.float32, torch.bfloat16, torch.float16)


register(
    Op(
        name=_OP,
        describe=_describe,
        backends=(
            Backend("cpp", ("cpu",), FLOATING, _cpp_missing),
            Backend("triton", ("cuda", "cpu"), _HALF, _triton_missing),
            Backend("reference", (), FLOATING, always),
        ),
    )
)
