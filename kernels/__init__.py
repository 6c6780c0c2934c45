"""Triton kernels and their launches. Nothing is imported from triton until a kernel is asked for."""

from __future__ import annotations

import importlib.util
import os

_installed = importlib.util.find_spec("triton") is not None

#: Whether kernels run under Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before fastssl is imported.
interpreted: bool = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def why_not(device: str) -> str | None:
    """One sentence saying why Triton kernels cannot run on this kind of device, or None if they can."""
    if not _installed:
        return "triton is not installed"
    if device == "cpu" and not interpreted:
        return "on the CPU it runs under Triton's interpreter alone (TRITON_INTERPRET=1 before importing fastssl)"
    return None
