"""The tests that need a GPU, rehearsed without one: FASTSSL_REHEARSE_GPU=1 pytest -m gpu.

A few of each test run on the CPU with Triton's interpreter, so that no minute on a GPU is lost to a typing error in a
test. bfloat16 is left out where the interpreter would have to multiply it, and what needs CUDA C++ skips as elsewhere.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

ASKED = os.environ.get("FASTSSL_REHEARSE_GPU") == "1"
#: How many cases of each test; 0: all. `make gpu` asks for some on a GPU too.
CASES = int(os.environ.get("FASTSSL_GPU_CASES", "3" if ASKED else "0"))


class Stream:
    """There is one order of things only."""

    def wait_stream(self, other: Stream) -> None:
        pass


def pretend() -> None:
    """Before test modules are imported, which ask whether there is a GPU."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 2
    cuda.current_device = lambda: 0
    cuda.set_sync_debug_mode = lambda mode: None
    cuda.synchronize = lambda device=None: None
    cuda._sleep = lambda cycles: None
    cuda.Stream = cuda.current_stream = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()


def replay_of(step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
    """As a captured graph has it: a function that runs `step` again, and its results, which stay where they are."""
    results = step()

    def replay() -> None:
        for old, new in zip(results, step(), strict=True):
            old.copy_(new)

    return replay, results


def choose(items: list[Any]) -> list[Any]:
    """Tests marked gpu, of each function, and op where it takes one, CASES that would run.

    Without a GPU the smallest ones, on one some from the smallest to the largest.
    """
    functions = defaultdict(list)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        values = list(parameters.values())
        skipped = any(item.iter_markers("skip")) or any(mark.args[0] for mark in item.iter_markers("skipif"))
        skipped |= ASKED and torch.bfloat16 in values
        if item.get_closest_marker("gpu") is not None and not skipped:
            function = item.nodeid.partition("[")[0], parameters.get("what"), parameters.get("op")
            functions[function].append((_size(values), item))
    chosen = []
    for cases in functions.values():
        ordered = [item for _, item in sorted(cases, key=lambda case: case[0])]
        number = min(CASES, len(ordered))
        spread = [(2 * i + 1) * len(ordered) // (2 * number) for i in range(number)]
        chosen += ordered[:number] if ASKED else [ordered[i] for i in spread]
    return chosen


def _size(values: Any) -> int:
    """A number that grows with the numbers among a test's parameters."""
    if isinstance(values, int):
        return abs(values)
    return sum(map(_size, values)) if isinstance(values, list | tuple) else 0
