"""Interleaved rounds of several sides, the clocks for CPU and CUDA, medians and ratios."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from equality import Step


class Sample(NamedTuple):
    """Seconds of one call. On the CPU all are the same."""

    seconds: float  # the device's work, with nothing of its inputs in L2
    host: float  # until the call returns to Python
    wall: float  # until its result is ready
    warm: float  # the device's work right after the same call


@dataclass(frozen=True)
class Settings:
    """Rounds go on until the budget is spent, but there are never fewer than `min_rounds`."""

    budget_s: float = 8.0
    min_rounds: int = 20
    max_rounds: int = 400
    warmup: int = 3


def interleave(
    steps: dict[str, Step], sample: Callable[[Step], Sample], settings: Settings, seed: int
) -> dict[str, list[Sample]]:
    """Rounds in which every side is sampled once, in an order shuffled anew for each round."""
    for step in steps.values():
        for _ in range(settings.warmup):
            sample(step)
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    order, shuffler = list(steps), random.Random(seed)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + settings.budget_s
        for done in range(settings.max_rounds):
            if done >= settings.min_rounds and time.perf_counter() > end:
                break
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(sample(steps[name]))
    finally:
        if was_enabled:
            gc.enable()
    return samples


def cpu_sample(step: Step) -> Sample:
    """Times the second of two calls in a row.

    The first leaves allocator and caches as a loop over this side alone leaves them; without it they are as
    the neighbour in the round left them, whose freed pages then serve as this side's output. Allocating
    outputs is inside the clock, dropping them outside it, alike for every side.
    """
    step.run(step.prepare())
    state = step.prepare()
    start = time.perf_counter()
    results = step.run(state)
    seconds = time.perf_counter() - start
    del results, state
    return Sample(seconds, seconds, seconds, seconds)


class CudaTimer:
    """Every sample runs the step for host and wall time, then for the GPU time with a cold L2, then with a warm one.

    For the GPU time the device first sleeps and, for a cold L2, overwrites a buffer larger than that. Meanwhile the
    host queues the whole step, so that the events enclose the step's kernels and not the gaps of a slow host.
    """

    CLOCK_HZ = 2.0e9  # where the device's clock is lower, it sleeps longer than wanted, which only costs time
    LONGEST_SLEEP_S = 0.02

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 64 << 20), dtype=torch.int8, device="cuda")

    def sample(self, step: Step) -> Sample:
        host, wall = self._host(step)
        return Sample(self._device(step, host, cold=True), host, wall, self._device(step, host, cold=False))

    def _host(self, step: Step) -> tuple[float, float]:
        state = step.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        results = step.run(state)
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        del results, state
        return host, wall

    def _device(self, step: Step, host: float, cold: bool) -> float:
        state = step.prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(2 * host + 1e-4, self.LONGEST_SLEEP_S) * self.CLOCK_HZ))
        if cold:
            self._flush.zero_()
        begin.record()
        results = step.run(state)
        end.record()
        torch.cuda.synchronize()
        del results, state
        return begin.elapsed_time(end) / 1e3


def run_queue() -> tuple[int, int] | None:
    """(ns on a CPU, ns ready but waiting for one) of this process's threads so far; None where unknown."""
    ran = ready = 0
    try:
        for file in Path("/proc/self/task").glob("*/schedstat"):
            parts = file.read_text().split()
            ran += int(parts[0])
            ready += int(parts[1])
    except (OSError, ValueError, IndexError):
        return None
    return (ran, ready) if ran else None


def waited(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of the time between two `run_queue` in which our threads waited for a CPU others had.

    A few per cent already turn medians of parallel code into multiples of the scheduler's slice.
    """
    if before is None or after is None:
        return None
    ran, ready = after[0] - before[0], after[1] - before[1]
    return ready / (ran + ready) if ran + ready > 0 else 0.0


def quantile(values: Iterable[float], share: float) -> float:
    """Linear between the two nearest ranks; `share` 0.5 is the median."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: list[Sample]) -> dict[str, Any]:
    times = [s.seconds * 1e3 for s in samples]
    return {
        "median_ms": quantile(times, 0.5),
        "q20_ms": quantile(times, 0.2),
        "q80_ms": quantile(times, 0.8),
        "host_ms": quantile([s.host * 1e3 for s in samples], 0.5),
        "wall_ms": quantile([s.wall * 1e3 for s in samples], 0.5),
        "warm_ms": quantile([s.warm * 1e3 for s in samples], 0.5),
    }


def ratios(sides: dict[str, dict[str, Any]], ours: Iterable[str], of: str = "median_ms") -> dict[str, Any]:
    """{our side: {other side: other's median / our median}}: above 1, ours is faster."""
    return {o: {n: s[of] / sides[o][of] for n, s in sides.items() if n != o} for o in ours if o in sides}
