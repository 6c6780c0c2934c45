"""`python -m fastssl info`: versions, paths, devices, code paths, and which backend runs what and why not another."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import traceback
from pathlib import Path

import torch

import fastssl
from fastssl import _backends, _library
from fastssl._backends import FLOATING, OPS, STRICT, forced_backend, reasons_against
from fastssl._preference import PREFERENCE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    print("\n".join([*versions(), *native(), *devices(), *settings(), *operators()]))
    return 0


def versions() -> list[str]:
    """What is installed and where."""
    return [
        f"fastssl  {fastssl.__version__}  {Path(fastssl.__file__).parent}",
        f"python   {platform.python_version()}  {sys.executable}",
        f"torch    {torch.__version__}  CUDA {torch.version.cuda or 'none'}  {Path(torch.__file__).parent}",
        f"triton   {_version('triton')}",
    ]


def native() -> list[str]:
    """The compiled library: its facts, or why there is none, with the whole exception if it failed to load."""
    if not _library.loaded():
        lines = ["", f"compiled library: no: {_library.why_not}"]
        if _library.error is not None:
            lines += [f"    {line}" for line in "".join(traceback.format_exception(_library.error)).splitlines()]
        return lines
    facts = _library.facts
    features = ", ".join(name if here else f"no {name}" for name, here in _library.module.cpu_features().items())
    cuda = f"CUDA {facts['cuda_version']} for {facts['cuda_architectures']}" if facts["cuda_version"] else None
    return [
        "",
        f"compiled library: {_library.path}",
        f"    compiler         {facts['compiler']}",
        f"    stable ABI       torch {facts['stable_abi']} and later",
        f"    CUDA kernels     {cuda or 'no: ' + facts['no_cuda_reason']}",
        f"    CPU code paths   {', '.join(facts['cpu_paths'])}",
        f"    runs here        {', '.join(_library.module.supported_cpu_paths())}",
        f"    in use           {_library.module.cpu_path()}",
        f"    CPU features     {features}",
    ]


def devices() -> list[str]:
    lines = ["", f"cpu      {_processor()}, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        return [*lines, "cuda     no device"]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}   {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {memory}")
    return lines


def settings() -> list[str]:
    forced = forced_backend()
    return [
        "",
        f"FASTSSL_BACKEND  {forced or 'not set: chosen per call'}",
        f"FASTSSL_STRICT   {'on: falling back to the reference is an error' if STRICT else 'off'}",
    ]


def operators() -> list[str]:
    """Per op and device: the order of preference, then every backend with every reason against it."""
    lines = []
    for op in OPS.values():
        for device in ("cpu", "cuda"):
            lines += ["", f"{op.name} on {device}"]
            evidence = {c.backend: c.evidence for c in PREFERENCE[op.name].get(device, ())}
            others = [b.name for b in op.backends if b.name not in evidence and b.name != "reference"]
            order = [*evidence, "reference", *others]
            chosen = None
            for name in order:
                reasons = _standing_reasons(op.backend(name), device)
                if not reasons and chosen is None:
                    chosen = name
                mark = "->" if name == chosen else "  "
                dtypes = ", ".join(str(d).removeprefix("torch.") for d in FLOATING if d in op.backend(name).dtypes)
                verdict = "no: " + "; ".join(reasons) if reasons else dtypes
                note = f"   [{evidence[name]}]" if name in evidence else ""
                lines.append(f" {mark} {name:<10} {verdict}{note}")
    return lines


def _standing_reasons(backend: _backends.Backend, device: str) -> list[str]:
    """The reasons that hold for every call on this device: a call that asks for nothing in particular."""
    call = _backends.Call(backend.name, device, (), False, {})
    return reasons_against(_backends.Backend(backend.name, backend.devices, (), backend.unavailable), call)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
