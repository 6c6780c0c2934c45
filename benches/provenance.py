"""Where and with what a figure was measured: every row of the results carries this."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_FLAGS = (
    *("f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "sve", "bf16"),
)


def facts(device: str) -> dict[str, Any]:
    """All facts of this process and machine, with the time of the call."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"date": now.isoformat(timespec="seconds"), "load": os.getloadavg()[0], **_constant(device)}


def slug(device: str) -> str:
    """The name of this device's results file: `amd-epyc-family-25-2-threads`, `nvidia-h100-80gb-hbm3`.

    Virtual machines often hide all of the processor's name but its maker; families differ twofold in peak rates.
    """
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        family = f" family {_cpu()['family']}" if _cpu()["family"] else ""
        name = f"{_cpu()['model']}{family} {torch.get_num_threads()} threads"
    name = re.sub(r"\((r|tm)\)", "", name.lower())  # Intel(R) Xeon(R)
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


@cache
def _constant(device: str) -> dict[str, Any]:
    import fastssl
    from fastssl import _library

    return {
        **_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu()["model"],
        "gpu": _gpu() if device == "cuda" else {},
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fastssl": fastssl.__version__,
        "build": {
            "loaded": _library.loaded(),
            "why_not": _library.why_not,
            **_library.facts,
            **_binary(_library.path),
        },
    }


def _binary(path: str) -> dict[str, Any]:
    """Which binary it was, and whether a source is newer than it: the commit alone does not say what ran."""
    library = Path(path)
    if not path or not library.exists():
        return {}
    built = library.stat().st_mtime
    is_here = library.is_relative_to(ROOT)
    newest = max((f.stat().st_mtime for f in (ROOT / "csrc").rglob("*") if f.is_file()), default=0.0)
    return {
        "sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "stale": is_here and newest > built,
    }


def _commit() -> dict[str, Any]:
    """The git commit, and whether files differ from it; results do not count, a bench run writes them."""
    head = _git("rev-parse", "HEAD")
    if head is None:  # a copy of the tree without its history: whoever copied it can say
        return {"commit": os.environ.get("FASTSSL_COMMIT"), "dirty": None}
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)benches/results")
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    # safe.directory: in a container the checkout often belongs to another user
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _cpu() -> dict[str, Any]:
    model, family, flags, mhz = platform.processor() or platform.machine(), "", set(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                model = value
            elif key == "cpu family":
                family = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
            elif key == "cpu MHz":
                mhz.append(round(float(value)))
    return {
        "model": model,
        "family": family,
        "cpus": os.cpu_count(),
        "flags": [f for f in _FLAGS if f in flags],
        "mhz": max(mhz, default=None),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpu() -> dict[str, Any]:
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "cuda": torch.version.cuda,
    }
    smi = shutil.which("nvidia-smi")
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    if smi:
        command = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.update(zip(fields, (v.strip() for v in done.stdout.split(",")), strict=False))
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
