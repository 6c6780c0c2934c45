"""self_relation: public function, check, fakes, autograd, and what each backend accepts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastssl import _checks, _library
from fastssl._backends import FLOATING, HALF_AND_SINGLE, Backend, Call, Op, always, register, select
from fastssl.kernels import why_not as _triton_missing
from fastssl.ops._gradients import first_derivatives_only, wants_gradient
from fastssl.ops._relation import relation_of
from fastssl.reference.self_relation import self_relation as _reference

_OP = "self_relation"
_KINDS = ("pixel", "channel")


def self_relation(
    x: Tensor,
    *,
    kind: str = "pixel",
    num_heads: int = 1,
    scale: float | None = None,
    temp: float = 1.0,
    columns: Tensor | None = None,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """SERE's relation matrix: how much each token (or channel) is like every other one, as probabilities.

    Equivalent, for ``kind="pixel"``, to::

        rows = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)          # (B, H, N, d)
        cols = columns.unflatten(-1, (num_heads, -1)).transpose(1, 2)    # (B, H, M, d)
        ((scale / temp) * rows @ cols.mT).softmax(-1)                    # (B, H, N, M)

    and, for ``kind="channel"``, to the same with ``(B, H, d, N)`` rows and columns. Gram matrix and softmax are one
    kernel; the matrix is written once, and without `columns` only half of the Gram matrix is computed.

    Args:
        x: tokens (B, N, C) or a feature map (B, C, h, w), read as (B, h·w, C), a view where its strides
            allow; float32,
            float64, bfloat16 or float16, any strides. Arithmetic is float32 (float64 for float64).
        kind: "pixel" relates tokens, "channel" relates the channels of each head.
        num_heads: H, a divisor of C; d = C/H.
        scale: factor of the dot products; None means d**-0.5 for pixels and 1/N for channels.
        temp: temperature, a finite number above 0; divides `scale`.
        columns: the tokens that become the columns, (B, M, C) or (B, C, h', w'), None for x itself. For
            "channel" it must have x's N. Its dtype may differ from x's.
        normalize: divide every related vector by its length first (cosine similarity). A zero vector stays zero
            and gets no gradient.
        backend: "reference", "cpp" or "triton" forces one; None chooses.

    Returns:
        (B, H, N, M) for "pixel", (B, H, d, d) for "channel", in x's dtype, contiguous. Each row sums to 1.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, value or device, or a forced backend that cannot take the call.

    Bitwise repeatable, for any number of threads. First derivatives in reverse mode only: no second derivatives, no
    forward mode and no vmap with gradients, for which there is ``backend="reference"``.

    Source: SERE (arXiv 2206.05184), the self-relations of eq. 2 (pixel) and eq. 4 (channel).
    """
    args = _check(x, kind, num_heads, scale, temp, columns, normalize)
    chosen = select(_call(args), backend)
    if chosen == "reference":
        return _reference(
            args.x,
            kind=kind,
            num_heads=num_heads,
            scale=args.scale,
            columns=args.columns,
            normalize=normalize,
        )
    # Forward-mode derivatives would be lost in a raw operator; the Function refuses them.
    if args.needs_grad or torch.autograd.forward_ad._current_level >= 0:
        result: Tensor = _SelfRelation.apply(*args[:6], chosen)
        return result
    return _forward(chosen, *args[:6])


class _Args(NamedTuple):
    """A checked call. The first six go to the raw operators in this order."""

    x: Tensor  # (B, N, C), any strides
    columns: Tensor | None  # (B, M, C), any strides; None: x itself
    channel: int
    num_heads: int
    scale: float  # scale / temp
    normalize: int
    needs_grad: bool


def _check(x: Any, kind: Any, num_heads: Any, scale: Any, temp: Any, columns: Any, normalize: Any) -> _Args:
    _checks.check_tensor(_OP, "x", x)
    _checks.check_choice(_OP, "kind", kind, _KINDS)
    _checks.check_count(_OP, "num_heads", num_heads)
    _checks.check_number(_OP, "temp", temp, positive=True)
    _checks.check_flag(_OP, "normalize", normalize)
    names = ("x", "columns", "temp")
    rows, cols, factor = relation_of(_OP, names, x, columns, kind == "channel", num_heads, scale, temp)
    needs_grad = wants_gradient(x) or (cols is not None and wants_gradient(cols))
    return _Args(
        rows,
        cols,
        int(kind == "channel"),
        num_heads,
        factor,
        int(normalize),
        needs_grad and torch.is_grad_enabled(),
    )


def _describe(
    x: Any,
    *,
    kind: Any = "pixel",
    num_heads: Any = 1,
    scale: Any = None,
    temp: Any = 1.0,
    columns: Any = None,
    normalize: Any = False,
) -> Call:
    return _call(_check(x, kind, num_heads, scale, temp, columns, normalize))


def _call(args: _Args) -> Call:
    """What the backends are asked about: R rows and M columns of depth K."""
    depth = args.x.shape[2] // args.num_heads
    length = args.x.shape[1]
    others = length if args.columns is None else args.columns.shape[1]
    dtypes: tuple[tuple[str, torch.dtype], ...] = (("x", args.x.dtype),)
    if args.columns is not None:
        dtypes += (("columns", args.columns.dtype),)
    if args.channel:
        sizes = {"rows": depth, "columns": depth, "depth": length}
    else:
        sizes = {"rows": length, "columns": others, "depth": depth}
    return Call(_OP, args.x.device.type, dtypes, args.needs_grad, sizes)


def _forward(
    backend: str,
    x: Tensor,
    columns: Tensor | None,
    channel: int,
    num_heads: int,
    scale: float,
    normalize: int,
) -> Tensor:
    ops = torch.ops.fastssl
    run = ops.self_relation_forward if backend == "cpp" else ops.self_relation_forward_triton
    symmetric = int(columns is None)
    result: Tensor = run(x, x if columns is None else columns, channel, num_heads, scale, normalize, symmetric)
    return result


class _SelfRelation(torch.autograd.Function):
    """Saves the relation matrix, which is the output anyway, and the tokens."""

    @staticmethod
    def forward(
        x: Tensor,
        columns: Tensor | None,
        channel: int,
        num_heads: int,
        scale: float,
        normalize: int,
        backend: str,
    ) -> Tensor:
        return _forward(backend, x, columns, channel, num_heads, scale, normalize)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, columns, *ctx.numbers, ctx.backend = inputs
        ctx.symmetric = columns is None
        ctx.save_for_backward(output, x, x if columns is None else columns)

    @staticmethod
    @first_derivatives_only(_OP)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        relation, x, columns = ctx.saved_tensors
        ops = torch.ops.fastssl
        run = ops.self_relation_backward if ctx.backend == "cpp" else ops.self_relation_backward_triton
        wants_x, wants_columns = ctx.needs_input_grad[:2]
        wanted = int(wants_x) + 2 * int(wants_columns)
        grad_x, grad_columns = run(grad, relation, x, columns, *ctx.numbers, int(ctx.symmetric), wanted)
        return (grad_x if wants_x else None, grad_columns if wants_columns else None) + (None,) * 5


_ARGUMENTS = "Tensor x, Tensor columns, int channel, int num_heads, float scale, int normalize, int symmetric"
_FORWARD = f"self_relation_forward({_ARGUMENTS}) -> Tensor"
_BACKWARD = f"self_relation_backward(Tensor grad, Tensor relation, {_ARGUMENTS}, int wanted) -> (Tensor, Tensor)"


def _fake_forward(
    x: Tensor, columns: Tensor, channel: int, num_heads: int, scale: float, normalize: int, symmetric: int
) -> Tensor:
    batch, length, width = x.shape
    depth = width // num_heads
    size = (depth, depth) if channel else (length, columns.shape[1])
    return x.new_empty((batch, num_heads, *size))


def _fake_backward(
    grad: Tensor,
    relation: Tensor,
    x: Tensor,
    columns: Tensor,
    channel: int,
    num_heads: int,
    scale: float,
    normalize: int,
    symmetric: int,
    wanted: int,
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x) if wanted & 1 else x.new_empty(0)
    grad_columns = torch.empty_like(columns) if wanted & 2 else columns.new_empty(0)
    return grad_x, grad_columns


def _triton_forward(*args: Any) -> Tensor:
    from fastssl.kernels.self_relation import forward

    return forward(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastssl.kernels.self_relation import backward

    return backward(*args)


_library.register_fake("self_relation_forward", _fake_forward)
_library.register_fake("self_relation_backward", _fake_backward)
_library.define(_FORWARD.replace("(", "_triton(", 1), _triton_forward, _fake_forward)
_library.define(_BACKWARD.replace("(", "_triton(", 1), _triton_backward, _fake_backward)


def _cpp_limits(call: Call) -> list[str]:
    if call.device != "cuda":
        return []
    reasons = []
    if call.needs_grad:
        reasons.append("its CUDA kernel has no backward")
    reasons += [f"its CUDA kernel takes no float64 {name}" for name, dtype in call.dtypes if dtype == torch.float64]
    shared = cuda_shared_bytes(call.sizes["columns"], call.sizes["depth"], symmetric=len(call.dtypes) == 1)
    if shared > CUDA_SHARED_LIMIT:
        reasons.append(
            f"its CUDA kernel keeps the columns of one head in shared memory: {shared} bytes are more than "
            f"{CUDA_SHARED_LIMIT}"
        )
    return reasons


#: Shared memory that every chip from sm_80 on gives to one block, in bytes: sm_86, sm_89 and sm_120 have no more.
CUDA_SHARED_LIMIT = 99 * 1024


def cuda_shared_bytes(columns: int, depth: int, symmetric: bool) -> int:
    """Shared memory of csrc/cuda/self_relation.cuh for one (image, head), in bytes.

    The vectors are float32 in quads, an odd number of quads apart: the columns (in whole tiles of 8 where they are
    the rows too), else also 32 rows.
    """
    vectors = -(-columns // 8) * 8 if symmetric else columns + 32
    return 16 * vectors * ((depth + 3) // 4 | 1)


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
