"""Measures fastssl's ops beside their float64 references, and beside what one would write in PyTorch."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastssl
from fastssl import _library
from fastssl.reference.self_relation import self_relation
from fastssl.reference.self_relation_loss import self_relation_loss
from fastssl.reference.simpool import simpool

#: What counts as equal: the largest difference and the relative-norm error of values, and that of gradients.
LIMIT, GRADIENT_LIMIT = 2e-6, 2e-5
#: Where it is not that. Pooled values are up to 10, and a root of a sum of powers; those of relations are below 1.
OTHER_LIMITS = {"simpool": (1e-5, 5e-5)}
#: Measuring time of one row, both sides together, and the fewest rounds whatever they take.
SECONDS, ROUNDS = 1.5, 3
#: How many rows `cases` gives.
ROWS = 12


Side = Callable[["_Call"], Tensor]


class Case(NamedTuple):
    """One row: some inputs, the arguments of the call, and whether its gradient is wanted."""

    data: str
    what: str
    inputs: list[Tensor]
    arguments: dict[str, Any]  # of a relation kind, num_heads, scale, temp, normalize; else those of its equation
    backward: bool
    op: str = "self_relation"
    teachers: list[Tensor] | None = None  # of a loss, one per input
    weights: dict[str, Tensor] | None = None  # of a layer, by the names of the arguments; they get gradients too


class Row(NamedTuple):
    """What was measured; times are medians in milliseconds, memory is the peak in bytes."""

    data: str
    what: str
    shapes: list[list[int]]
    arguments: dict[str, Any]
    backend: str
    largest_difference: float
    value_error: float
    gradient_error: float | None
    eager_value_error: float
    eager_gradient_error: float | None
    rounds: int
    fused_ms: float
    eager_ms: float
    speedup: float
    fused_peak_bytes: int
    eager_peak_bytes: int
    op: str = "self_relation"

    @property
    def limits(self) -> tuple[float, float]:
        """Of values and of gradients."""
        return OTHER_LIMITS.get(self.op, (LIMIT, GRADIENT_LIMIT))

    @property
    def equal(self) -> bool:
        limit, gradient_limit = self.limits
        near = self.largest_difference <= limit and self.value_error <= limit  # a NaN is not
        return near and (self.gradient_error is None or self.gradient_error <= gradient_limit)

    @property
    def name(self) -> str:
        return f"{self.data}, {self.what}"


def cases(features: Sequence[Tensor], pixel: dict[str, Any], channel: dict[str, Any]) -> list[Case]:
    """The photographs' features and the shape of a ViT-S: B = 8, N = 196, C = 384, six heads."""
    tokens = torch.randn(8, 196, 384, generator=torch.Generator().manual_seed(0))
    photographs = f"{len(features)} photograph{'s' * (len(features) > 1)}"
    rows = []
    plain = {"num_heads": 6, "temp": 1.0, "normalize": False}
    for data, inputs, for_pixel, for_channel in (
        (photographs, list(features), pixel, channel),
        ("ViT-S tokens", [tokens], {"scale": 64**-0.5, **plain}, {"scale": 1 / 196, **plain}),
    ):
        for_pixel, for_channel = {"kind": "pixel", **for_pixel}, {"kind": "channel", **for_channel}
        rows.append(Case(data, "pixel forward", inputs, for_pixel, False))
        rows.append(Case(data, "pixel forward+backward", inputs, for_pixel, True))
        rows.append(Case(data, "channel forward", inputs, for_channel, False))
    teacher = 0.5 * (tokens + torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1)))
    for kind, num_heads, temp in (("pixel", 6, 0.5), ("channel", 1, 0.1)):  # SERE's own
        loss = {"kind": kind, "num_heads": num_heads, "teacher_temp": temp}
        what = f"{kind} loss forward+backward"
        rows.append(Case("ViT-S tokens", what, [tokens], loss, True, "self_relation_loss", [teacher]))
    for gamma in (None, 1.25):
        for backward in (False, True):
            what = f"simpool{'' if gamma is None else ' gamma'} {'forward+backward' if backward else 'forward'}"
            pool = {"num_heads": 1, "gamma": gamma}
            rows.append(Case("ViT-S tokens", what, [tokens], pool, backward, "simpool", None, _layer(384)))
    return rows


def _layer(width: int) -> dict[str, Tensor]:
    """SimPool's parameters."""
    wq, wk = torch.randn(2, width, width, generator=torch.Generator().manual_seed(2)) / width**0.5
    return {"wq": wq, "wk": wk, "norm_weight": torch.ones(width), "norm_bias": torch.zeros(width)}


def eager(x: Tensor, *, kind: str, num_heads: int, scale: float, temp: float, normalize: bool) -> Tensor:
    """The relation as users write it."""
    q = x.view(*x.shape[:2], num_heads, -1)
    q = q.transpose(1, 2) if kind == "pixel" else q.permute(0, 2, 3, 1)
    if normalize:
        q = F.normalize(q, dim=-1)
    relation: Tensor = (scale / temp * q @ q.mT).softmax(-1)
    return relation


def eager_loss(student: Tensor, teacher: Tensor, *, kind: str, num_heads: int, teacher_temp: float) -> Tensor:
    """The distillation of relations as users write it."""

    def logits(x: Tensor) -> Tensor:
        q = x.view(*x.shape[:2], num_heads, -1)
        q = q.transpose(1, 2) if kind == "pixel" else q.permute(0, 2, 3, 1)
        return (q.shape[-1] ** -0.5 if kind == "pixel" else 1 / q.shape[-1]) * q @ q.mT

    with torch.no_grad():
        target = (logits(teacher) / teacher_temp).softmax(-1)
    loss: Tensor = -(target * logits(student).log_softmax(-1)).sum(-1).mean()
    return loss


def eager_pool(
    x: Tensor, *, wq: Tensor, wk: Tensor, norm_weight: Tensor, norm_bias: Tensor, num_heads: int, gamma: float | None
) -> Tensor:
    """SimPool as users write it."""
    y = F.layer_norm(x, x.shape[2:], norm_weight, norm_bias, 1e-6)
    q = F.linear(x.mean(1, keepdim=True), wq).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = F.linear(y, wk).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = y.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    attention = (q.shape[-1] ** -0.5 * q @ k.mT).softmax(-1)
    if gamma is None:
        return (attention @ v).flatten(1)
    pooled: Tensor = (attention @ (v - v.min() + 1e-6) ** gamma) ** (1 / gamma)
    return pooled.flatten(1)


def _true_pool(x: Tensor, **arguments: Any) -> Tensor:
    return simpool(x, **arguments)[0]


#: The reference of each op, and what one would write.
SIDES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "self_relation": (self_relation, eager),
    "self_relation_loss": (self_relation_loss, eager_loss),
    "simpool": (_true_pool, eager_pool),
}


class _Call(NamedTuple):
    """One call's tensors: the first, those after it, which get no gradient, and a layer's."""

    x: Tensor
    others: tuple[Tensor, ...]
    weights: dict[str, Tensor]

    def of(self, function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        return function(self.x, *self.others, **self.weights, **arguments)

    def copy(self, dtype: torch.dtype, backward: bool) -> _Call:
        def leaf(t: Tensor) -> Tensor:
            return t.detach().clone().to(dtype).requires_grad_(backward)

        weights = {name: leaf(w) for name, w in self.weights.items()}
        return _Call(leaf(self.x), tuple(t.to(dtype) for t in self.others), weights)


def measure(case: Case, backend: str | None) -> Row:
    """Checks first, then times with the two sides taking turns, then looks at memory."""
    generator = torch.Generator().manual_seed(1)
    others: list[tuple[Tensor, ...]] = [(t,) for t in case.teachers or ()] or [()] * len(case.inputs)
    given = [_Call(x, other, case.weights or {}) for x, other in zip(case.inputs, others, strict=True)]
    calls = [call.copy(torch.float32, case.backward) for call in given]
    reference, formula = SIDES[case.op]
    truths, upstream = [], []
    for call in given:
        wide = call.copy(torch.float64, case.backward)
        value = wide.of(reference, case.arguments)
        upstream.append(torch.randn(value.shape, generator=generator) if case.backward else None)
        truths.append(_gradients(value, wide, upstream[-1]))

    def fused(call: _Call) -> Tensor:
        return call.of(getattr(fastssl, case.op), {"backend": backend, **case.arguments})

    def plain(call: _Call) -> Tensor:
        return call.of(formula, case.arguments)

    def run(side: Side) -> None:
        for call, up in zip(calls, upstream, strict=True):
            _gradients(side(call), call, up)

    first = calls[0]
    chosen = fastssl.explain(case.op, first.x, *first.others, backend=backend, **first.weights, **case.arguments).chosen
    errors = {side: _errors(side, calls, upstream, truths) for side in (fused, plain)}
    fused_ms, eager_ms, rounds = _times(lambda: run(fused), lambda: run(plain))
    return Row(
        data=case.data,
        what=case.what,
        shapes=[list(x.shape) for x in case.inputs],
        arguments=case.arguments,
        backend=str(chosen),
        largest_difference=errors[fused][0],
        value_error=errors[fused][1],
        gradient_error=errors[fused][2],
        eager_value_error=errors[plain][1],
        eager_gradient_error=errors[plain][2],
        rounds=rounds,
        fused_ms=fused_ms,
        eager_ms=eager_ms,
        speedup=eager_ms / fused_ms,
        fused_peak_bytes=peak_bytes(lambda: run(fused)),
        eager_peak_bytes=peak_bytes(lambda: run(plain)),
        op=case.op,
    )


def _gradients(value: Tensor, call: _Call, upstream: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value and, where there is an upstream gradient, the gradients of x and of a layer's weights."""
    if upstream is None:
        return value, ()
    leaves = [call.x, *call.weights.values()]
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def _errors(
    side: Side, calls: list[_Call], upstream: list[Tensor | None], truths: list[tuple[Tensor, tuple[Tensor, ...]]]
) -> tuple[float, float, float | None]:
    """The worst over all calls: largest difference, relative-norm error of value and of gradients."""
    largest, of_value, of_gradient = [], [], []
    for call, up, (true_value, true_gradients) in zip(calls, upstream, truths, strict=True):
        value, gradients = _gradients(side(call), call, up)
        largest.append((value.double() - true_value).abs().max())
        of_value.append(_relative(value, true_value))
        of_gradient += [_relative(g, truth) for g, truth in zip(gradients, true_gradients, strict=True)]
    # torch's max keeps a NaN, Python's may lose it
    worst = [float(torch.stack(e).max()) if e else None for e in (largest, of_value, of_gradient)]
    return worst[0] or 0.0, worst[1] or 0.0, worst[2]


def _relative(value: Tensor, truth: Tensor) -> Tensor:
    """‖value − truth‖ / ‖truth‖; where the truth is zero, the norm of the value."""
    norm = truth.norm()
    error: Tensor = (value.double() - truth).norm() / torch.where(norm > 0, norm, 1.0)
    return error


def _times(fused: Callable[[], None], plain: Callable[[], None]) -> tuple[float, float, int]:
    """Medians in milliseconds; in every other round the other side goes first."""
    taken: dict[Callable[[], None], list[float]] = {fused: [], plain: []}
    end = perf_counter() + SECONDS
    rounds = 0
    while rounds < ROUNDS or perf_counter() < end:
        for side in (fused, plain) if rounds % 2 else (plain, fused):
            start = perf_counter()
            side()
            taken[side].append(1e3 * (perf_counter() - start))
        rounds += 1
    return median(taken[fused]), median(taken[plain]), rounds


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that torch's allocator holds at once for `run`, over what it held before.

    The running sum of the profiler's allocation events. Scratch memory that a kernel or the BLAS library
    allocates for itself is not seen, on either side.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce its start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def provenance() -> dict[str, Any]:
    """Where and with what the table was made."""
    return {
        "fastssl": fastssl.__version__,
        "compiled_library": _library.facts if _library.loaded() else _library.why_not,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
