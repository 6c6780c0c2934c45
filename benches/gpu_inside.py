"""What runs inside the stages of `make gpu` that are no tests or benches; see gpu.py.

python benches/gpu_inside.py facts | build | compile | calls
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as TimeIsUp
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BENCHES = Path(__file__).resolve().parent


def facts(args: argparse.Namespace) -> int:
    """Prints what the machine is; the last line is JSON for gpu.read_facts."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
        fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], check=False)
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"cuda": False, "reason": f"torch cannot be imported ({error})"}))
        return 1
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "reason": ""}
    if found["cuda"]:
        p = torch.cuda.get_device_properties(0)
        print(p)
        found |= {"device": p.name, "capability": f"{p.major}.{p.minor}"}
    else:
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        found["reason"] = f"torch {torch.__version__}, {built}, finds none"
    print(json.dumps(found), flush=True)
    return 0


def build(args: argparse.Namespace) -> int:
    """Installs this checkout in place into the Python at hand; quickly: the Triton kernels alone, where that is all."""
    if args.quick and not any((ROOT / "fastssl" / f"_C{end}").exists() for end in EXTENSION_SUFFIXES):
        print("--quick compiles no C++ and CUDA where none is compiled yet")
        os.environ["FASTSSL_EXTENSION"] = "0"
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    code, text = _stream([*pip, "-e", "."])
    if code != 0 and "externally-managed-environment" in text:  # PEP 668
        code, _ = _stream([*pip, "--break-system-packages", "-e", "."])
    return code


def _stream(command: list[str]) -> tuple[int, str]:
    """Runs it and passes its output on line by line, so that the log of a stopped build has it too."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


class Row(NamedTuple):
    """One case of a bench in one mode."""

    module: str
    case: int
    mode: str
    device: str
    quick: bool


def rows(device: str, quick: bool) -> list[Row]:
    """Those of all benches, what is asked for most first."""
    harness = importlib.import_module("harness")
    found = []
    for file in sorted(BENCHES.glob("bench_*.py")):
        for i, case in enumerate(importlib.import_module(file.stem).cases(device, quick)):
            found += [(harness.rank(case, mode), Row(file.stem, i, mode, device, quick)) for mode in case.floors]
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def compile_(args: argparse.Namespace) -> int:
    """Runs every side of every row once, in several processes: the benches then find all in the compilers' caches.

    What does not fit into the time the benches compile themselves.
    """
    end = time.monotonic() + args.within
    wanted, good = rows(args.device, args.quick), []
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    try:
        for future in as_completed([pool.submit(run_once, row) for row in wanted], timeout=end - time.monotonic()):
            text, fine = future.result()
            print(text, flush=True)
            good.append(fine)
    except TimeIsUp:
        print(f"{len(good)} of {len(wanted)} rows in {args.within:.0f} s")
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()
    return 0 if all(good) else 1


def run_once(row: Row) -> tuple[str, bool]:
    import torch

    equality = importlib.import_module("equality")
    torch.set_num_threads(1)
    torch._dynamo.reset()
    case = importlib.import_module(row.module).cases(row.device, row.quick)[row.case]
    errors = []
    try:
        inputs = tuple(equality.to_case(x, case) for x in case.make_inputs(torch.Generator().manual_seed(0)))
        out = case.sides[0].run(*inputs)
        upstream = torch.randn_like(out) if out.dim() else None
    except Exception as error:
        return f"{row}: {type(error).__name__}: {error}"[:500], False
    for side in case.present(row.mode):
        try:
            step = equality.make_step(side.run, row.mode, inputs, case.differentiable, upstream)
            step.run(step.prepare())
            if row.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            errors.append(f"{side.name}: {type(error).__name__}: {error}"[:500])
    name = f"{case.op} {case.shape} {equality.name(case.dtype)} {row.mode}"
    return f"{name}: {'; '.join(errors) or 'ok'}", not errors


def calls(args: argparse.Namespace) -> int:
    """Runs a small call of each op and backend, and its gradients: what compute-sanitizer watches."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    small = importlib.import_module("small_calls")
    half = torch.bfloat16 if args.device == "cuda" else torch.float16  # Triton's interpreter multiplies no bfloat16
    end = time.monotonic() + args.within
    one, short, *whole, _ = small.SIZES
    kinds = [(half, short), (torch.float32, short)]
    if args.device == "cuda":
        kinds = [*((half, size) for size in whole), *kinds, (half, one), (torch.float32, one)]
    for dtype, size in kinds:
        for name, call in small.SMALL_CALLS.items():
            for backend in ("triton", "cpp"):
                if time.monotonic() > end:
                    print(f"the time was up before {name} {backend} {dtype} {size}")
                    return 0
                arguments, reasons = small.arguments_for(call, backend, size, args.device, dtype)
                good = not reasons and all(bool(x.isfinite().all()) for x in call.step(arguments, backend))
                found = "ok" if good else "; ".join(reasons) or "not finite"
                print(f"{name} {backend} {dtype} {size}: {found}", flush=True)
                if found == "not finite":
                    return 1
    return 0


STAGES = {"facts": facts, "build": build, "compile": compile_, "calls": calls}


def main() -> int:
    parser = argparse.ArgumentParser(description="one stage of make gpu")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--within", type=float, default=600.0, help="seconds in which to begin something new")
    args = parser.parse_args()
    return STAGES[args.stage](args)


if __name__ == "__main__":
    sys.exit(main())
