"""The tests that need a GPU, rehearsed without one: FASTSSL_REHEARSE_GPU=1 pytest -m gpu.

A few of each test run on the CPU with Triton's interpreter, so that no minute on a GPU is lost to a typing error in a
test. bfloat16 is left out where the interpreter would have to multiply it, and what needs CUDA C++ skips as elsewhere.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import torch

ASKED = os.environ.get("FASTSSL_REHEARSE_GPU") == "1"
#: How many cases of each test, the smallest.
CASES = 3


def pretend() -> None:
    """Before test modules are imported, which ask whether there is a GPU."""
    torch.cuda.is_available = lambda: True
    torch.cuda.set_sync_debug_mode = lambda mode: None
    torch.cuda.synchronize = lambda device=None: None


def choose(items: list[Any]) -> list[Any]:
    """Tests marked gpu, of each function the CASES smallest that would run."""
    functions = defaultdict(list)
    for item in items:
        values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
        skipped = item.get_closest_marker("skip") is not None or torch.bfloat16 in values
        if item.get_closest_marker("gpu") is not None and not skipped:
            functions[item.nodeid.partition("[")[0]].append((_size(values), item))
    return [item for cases in functions.values() for _, item in sorted(cases, key=lambda case: case[0])[:CASES]]


def _size(values: Any) -> int:
    """A number that grows with the numbers among a test's parameters."""
    if isinstance(values, int):
        return abs(values)
    return sum(map(_size, values)) if isinstance(values, list | tuple) else 0
