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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
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
    if args.quick and not list((ROOT / "fastssl").glob("_C*")):
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


def rows(device: str, quick: bool) -> Iterator[Row]:
    for file in sorted(BENCHES.glob("bench_*.py")):
        for i, case in enumerate(importlib.import_module(file.stem).cases(device, quick)):
            yield from (Row(file.stem, i, mode, device, quick) for mode in case.floors)


def compile_(args: argparse.Namespace) -> int:
    """Runs every side of every row once, in several processes: the benches then find all in the compilers' caches."""
    failed = 0
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for text, good in pool.map(run_once, rows(args.device, args.quick)):
            print(text, flush=True)
            failed += not good
    return 1 if failed else 0


def run_once(row: Row) -> tuple[str, bool]:
    import torch

    equality = importlib.import_module("equality")
    torch.set_num_threads(1)
    case = importlib.import_module(row.module).cases(row.device, row.quick)[row.case]
    inputs = tuple(equality.to_case(x, case) for x in case.make_inputs(torch.Generator().manual_seed(0)))
    errors = []
    for side in case.present(row.mode):
        try:
            out = side.run(*inputs)
            upstream = torch.randn_like(out) if out.dim() else None
            step = equality.make_step(side.run, row.mode, inputs, case.differentiable, upstream)
            step.run(step.prepare())
        except Exception as error:
            errors.append(f"{side.name}: {type(error).__name__}: {error}"[:500])
    name = f"{case.op} {case.shape} {equality.name(case.dtype)} {row.mode}"
    return f"{name}: {'; '.join(errors) or 'ok'}", not errors


def calls(args: argparse.Namespace) -> int:
    """Runs a small call of each op and backend, and its gradients, in two dtypes: what compute-sanitizer watches."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    small = importlib.import_module("small_calls")
    half = torch.bfloat16 if args.device == "cuda" else torch.float16  # Triton's interpreter multiplies no bfloat16
    for name, call in small.SMALL_CALLS.items():
        for backend in ("cpp", "triton"):
            for dtype in (torch.float32, half):
                for size in ((1, 1, 48), (2, 37, 48)):
                    arguments = call.arguments(size, args.device, dtype)
                    if call.why_not(arguments, backend):
                        arguments = call.arguments(size, args.device, dtype, grad=False)
                    reasons = call.why_not(arguments, backend)
                    if reasons:
                        print(f"{name} {backend}: {'; '.join(reasons)}")
                        break
                    good = all(bool(x.isfinite().all()) for x in call.step(arguments, backend))
                    print(f"{name} {backend} {dtype} {size}: {'ok' if good else 'not finite'}", flush=True)
                    if not good:
                        return 1
    return 0


STAGES = {"facts": facts, "build": build, "compile": compile_, "calls": calls}


def main() -> int:
    parser = argparse.ArgumentParser(description="one stage of make gpu")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    return STAGES[args.stage](args)


if __name__ == "__main__":
    sys.exit(main())
