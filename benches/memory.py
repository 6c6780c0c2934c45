"""Peak memory that a step adds to what was allocated before it.

CPU: the running sum of torch's own allocation events, so it is exact to the byte, but sees only what goes
through torch's allocator on the calling thread: a C++ op's tensors yes, its `malloc` no. CUDA: the
allocator's peak counter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def running_peak(sizes: Iterable[int]) -> int:
    """The largest partial sum of allocations (positive) and frees (negative), at least 0."""
    now = peak = 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return peak


def extra_bytes(step: Any, device: str) -> int:
    """`step` is a equality.Step, warmed up before; what `prepare` allocates is not counted."""
    state = step.prepare()
    if device == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = step.run(state)
        events = profiler.profiler.kineto_results.events()  # the summaries of the public API drop some frees
        changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
        peak = running_peak(size for _, _, size in changes)
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step.run(state)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    del results, state
    return peak
