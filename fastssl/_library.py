"""Loads the compiled library once, keeps the exception to show it if that fails, and registers operators.

The compiled library defines the raw operators of csrc/schema.cpp. Their fakes, and the `…_triton` operators, which
exist without it, are registered from Python through this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: What went wrong while loading, or None. "Not built" is not an error and is told apart by `built`.
error: BaseException | None = None
#: Whether a compiled library lies beside this package.
built: bool = importlib.util.find_spec("fastssl._C") is not None
#: Build facts of the loaded library (compiler, stable ABI target, CUDA, CPU code paths); empty if not loaded.
facts: dict[str, Any] = {}
#: Where the loaded library lies.
path: str = ""
#: The pybind11 module, or None.
module: Any = None

if built:
    try:
        module = importlib.import_module("fastssl._C")
        facts = dict(module.build_facts())
        path = str(module.__file__)
    except Exception as exception:  # a broken ABI, a missing symbol: kept and shown, never read as "not built"
        error = exception


def loaded() -> bool:
    return built and error is None


def _build_note() -> str:
    note = Path(__file__).with_name("_build.json")
    if not note.exists():
        return "fastssl was not installed by pip; run `pip install --no-build-isolation .`"
    reason: str = json.loads(note.read_text())["native_reason"]
    return reason or "the build left no library; run `pip install --no-build-isolation .` again"


def _why_not() -> str | None:
    if error is not None:
        return f"the compiled library failed to load ({type(error).__name__}: {error})"
    return None if built else f"the compiled library is not built ({_build_note()})"


def _why_no_cuda() -> str | None:
    if not loaded() or facts["cuda_version"]:
        return _why_not()
    return f"the compiled library has no CUDA kernels ({facts['no_cuda_reason']})"


#: One sentence saying why the compiled library cannot be used, or None if it can; settled at import, because
#: torch.compile traces the choice of a backend.
why_not: str | None = _why_not()
#: The same for its CUDA kernels.
why_no_cuda: str | None = _why_no_cuda()


def why_not_on(device: str) -> str | None:
    """`unavailable` of a backend that is in the compiled library for CPUs, and with CUDA kernels for GPUs."""
    return why_not if device == "cpu" else why_no_cuda


def _choose_cpu_path() -> None:
    """FASTSSL_CPU_PATH=portable|avx2|avx512 replaces the widest path that the processor runs."""
    wanted = os.environ.get("FASTSSL_CPU_PATH")
    if wanted and loaded() and not module.use_cpu_path(wanted):
        paths = ", ".join(module.supported_cpu_paths())
        raise ValueError(f"FASTSSL_CPU_PATH: must be one of {paths} on this processor, got {wanted!r}")


_choose_cpu_path()
_fragment = torch.library.Library("fastssl", "FRAGMENT")


def register_fake(operator: str, fake: Callable[..., Any]) -> None:
    """Gives the compiled operator its shapes for tracing; does nothing where the library is not loaded."""
    if loaded():
        torch.library.register_fake(f"fastssl::{operator}", fake, lib=_fragment)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines a raw operator in Python, for CUDA tensors and, under Triton's interpreter, CPU tensors."""
    operator = schema.partition("(")[0]
    _fragment.define(schema)
    for key in ("CUDA", "CPU"):
        _fragment.impl(operator, implementation, key)
    torch.library.register_fake(f"fastssl::{operator}", fake, lib=_fragment)
