"""One harness for the bench of every op: all sides are compared with float64 first, then timed in turns.

A bench file says what is computed (`Case`); `measure` returns one row, a plain dict, per case and mode:

1. equality.check: every side runs exactly the step that is timed later, and value and gradients are compared
   with the same step in float64. One side that is off, and nothing of that row is timed.
2. timing.interleave: rounds in which every side runs once, in an order shuffled anew. A ratio is a ratio of
   medians.
3. memory.extra_bytes: the peak that the step adds to what was allocated before it.
4. ceilings and provenance: what the machine can do at best, and where, when and with what this was measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import ceilings
import equality
import memory
import provenance
import timing
import torch
from torch import Tensor

MODES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Floor:
    """What the smallest algorithm cannot avoid: bytes through memory, operations, exponentials."""

    read: float
    written: float
    flops: float = 0.0
    exps: float = 0.0

    def __add__(self, other: Floor) -> Floor:
        return Floor(
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
            self.exps + other.exps,
        )

    def seconds(self, rates: dict[str, Any], dtype: str) -> dict[str, float]:
        """The time each resource needs at this machine's measured ceilings; the floor is the largest."""
        return {
            "copy": (self.read + self.written) / (rates["copy_gbs"] * 1e9),
            "write": self.written / (rates["write_gbs"] * 1e9),
            "flops": self.flops / (rates["gflops"][dtype] * 1e9),
            "exps": self.exps / (rates["gexps"] * 1e9),
        }


@dataclass(frozen=True)
class Side:
    """One way to compute the op: `run(*inputs)` returns the output tensor."""

    name: str
    run: Callable[..., Tensor]
    ours: bool = False
    backends: dict[str, str] = field(default_factory=dict)  # mode -> fastssl's backend
    modes: tuple[str, ...] = MODES
    absent: str = ""  # why this side cannot run here; the other sides are measured without it


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype. The first side is eager: the plain formula as users write it."""

    op: str
    shape: str
    dtype: torch.dtype
    device: str
    make_inputs: Callable[[torch.Generator], tuple[Tensor, ...]]  # on the CPU; cast and moved afterwards
    sides: tuple[Side, ...]
    floors: dict[str, Floor]  # one per mode to measure
    differentiable: tuple[int, ...] = (0,)  # the inputs that get a gradient
    truth: Callable[..., Tensor] | None = None  # run in float64; None: the first side's formula
    tolerance: float | None = None

    def present(self, mode: str) -> list[Side]:
        return [s for s in self.sides if mode in s.modes and not s.absent]


def rank(case: Case, mode: str) -> tuple[int, int]:
    """By which rows are sorted where there may not be the time for all."""
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    return dtypes.index(case.dtype), -MODES.index(mode)


def measure(case: Case, mode: str, settings: timing.Settings) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Checks and times one case in one mode: its row for the results, and every side's samples in seconds."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # or torch.compile falls to dynamic shapes because another case came before
    seed = int.from_bytes(os.urandom(4), "little")
    rates = _ceilings(case.device)
    steps, errors = equality.check(case, mode, seed)
    sample = timing.cpu_sample if case.device == "cpu" else _cuda_timer().sample
    before = timing.run_queue()
    samples = timing.interleave(steps, sample, settings, seed)
    waited = timing.waited(before, timing.run_queue())
    sides = {name: timing.summarize(s) for name, s in samples.items()}
    for side in case.present(mode):
        sides[side.name]["extra_bytes"] = memory.extra_bytes(steps[side.name], case.device)
        sides[side.name]["errors"] = errors[side.name]
        if side.ours:
            sides[side.name]["backend"] = side.backends.get(mode, "")
    ours = [s.name for s in case.present(mode) if s.ours]
    dtype = equality.name(case.dtype)
    floor = floor_facts(case.floors[mode], rates, dtype)
    row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": dtype,
        "mode": mode,
        "sides": sides,
        "absent": {s.name: s.absent for s in case.sides if s.absent},
        "ratios": timing.ratios(sides, ours),
        "wall_ratios": timing.ratios(sides, ours, "wall_ms"),
        "floor": floor,
        "share_of_floor": {o: floor["ms"] / sides[o]["median_ms"] for o in ours},
        "rounds": len(next(iter(samples.values()))),
        "waited": waited,
        "seed": seed,
        "ceilings": rates,
        "provenance": provenance.facts(case.device),
    }
    return row, {name: [x.seconds for x in s] for name, s in samples.items()}


def floor_facts(floor: Floor, rates: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The floor as a row holds it: its counts, its time, and which resource sets it."""
    needs = floor.seconds(rates, dtype)
    bound = max(needs, key=needs.__getitem__)
    return {**vars(floor), "ms": needs[bound] * 1e3, "bound": bound}


@cache
def _ceilings(device: str) -> dict[str, Any]:
    return ceilings.measure(device)


@cache
def _cuda_timer() -> timing.CudaTimer:
    return timing.CudaTimer()
