"""Compiles Triton kernels for GPUs that are not there, and says what became of them: registers, spills, tensor cores.

    python tests/aot.py --list                                       every case: module, architecture, configuration
    python tests/aot.py [--arch 80 90 100] [--match TEXT] [--jobs 2]   one JSON object per case that contains TEXT

A case is a configuration that a kernel module declares (fastssl.kernels.common.Configuration) on an architecture. Tests
use `cases`, `run` and `faults`; `run` works in a process of its own, because under TRITON_INTERPRET, which tests set,
triton compiles nothing. Compilations are kept in triton's cache, $TRITON_CACHE_DIR or ~/.triton/cache, as far as that
can be written to, so that a second run takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

#: Architecture → shared memory that one block may have, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: Columns of tensor memory (sm_100) that one block may have.
TENSOR_MEMORY_LIMIT = 512


class Case(NamedTuple):
    module: str  # below fastssl.kernels
    arch: int
    description: str  # of the configuration

    def __str__(self) -> str:
        return f"{self.module} sm_{self.arch} {self.description}"


def modules() -> list[str]:
    """Kernel modules that declare configurations."""
    package = importlib.import_module("fastssl.kernels")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"fastssl.kernels.{name}"), "configurations")]


def _configurations(module: str) -> list[Any]:
    return list(importlib.import_module(f"fastssl.kernels.{module}").configurations())


def cases() -> list[Case]:
    """Every one; that descriptions are unique is what lets them name configurations."""
    found = [
        Case(module, arch, configuration.description)
        for module in modules()
        for configuration in _configurations(module)
        for arch in SHARED_LIMIT
        if arch in (configuration.archs or SHARED_LIMIT)
    ]
    assert len(set(found)) == len(found), "two configurations have the same description"
    return found


def environment() -> dict[str, str]:
    """That of a process in which triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(wanted: list[Case], jobs: int | None = None) -> dict[Case, dict[str, Any]]:
    """Compiles the cases in a new process and returns their records."""
    command = [sys.executable, __file__, "--cases", *(["--jobs", str(jobs)] if jobs else [])]
    done = subprocess.run(
        command, input=json.dumps(wanted), env=environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {Case(record["module"], record["arch"], record["description"]): record for record in records}


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel, one sentence each; empty if nothing is."""
    if record.get("error"):
        return [f"it does not compile: {record['error']}"]
    found = []
    limit = SHARED_LIMIT[record["arch"]]
    if record["shared"] > limit:
        found.append(f"{record['shared']} bytes of shared memory, a block has {limit}")
    if record["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"{record['tensor_memory']} columns of tensor memory, a block has {TENSOR_MEMORY_LIMIT}")
    if record["stack"] or record["local"]:
        found.append(f"spills: {record['stack']} bytes of stack, {record['local']} of local memory")
    half = [(rows, depth, columns) for dtype, rows, depth, columns in record["products"] if dtype in ("bf16", "f16")]
    if half and not sum(record[name] for name in ("mma", "wgmma", "tcgen05")):
        found.append("products of 16-bit operands without tensor cores")
    # A warp group of wgmma multiplies 64 rows; narrower tiles use mma, of which every architecture has the sm_80 kind.
    large = any(rows >= 64 for rows, _, _ in half) and record["num_warps"] >= 4
    if large and record["arch"] == 90 and not record["wgmma"]:
        found.append("a product with 64 rows without wgmma")
    return found


def _types(configuration: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as ASTSource wants them."""
    signature, constants, attributes = {}, dict(configuration.constexprs), {}
    for index, name in enumerate(configuration.kernel.arg_names):
        kind, _, hint = configuration.signature.get(name, "constexpr").partition(":")
        if hint == "1":  # as at a real launch, the integer 1 becomes a constant
            kind, constants[name] = "constexpr", 1
        elif hint:
            attributes[(index,)] = [["tt.divisibility", int(hint)]]
        signature[name] = kind
    return signature, constants, attributes


def _compile_case(case: Case) -> dict[str, Any]:
    configuration = next(c for c in _configurations(case.module) if c.description == case.description)
    return case._asdict() | compile_configuration(configuration, case.arch)


def compile_configuration(configuration: Any, arch: int) -> dict[str, Any]:
    """The record of one configuration; it holds an "error" if compiling failed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    record: dict[str, Any] = {"arch": arch, "num_warps": configuration.num_warps, "triton": triton.__version__}
    start = time.perf_counter()
    try:
        compiled = triton.compile(
            ASTSource(configuration.kernel, *_types(configuration)),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": configuration.num_warps, "num_stages": configuration.num_stages},
        )
        record |= _resources(Path(triton.__file__).parent, compiled.asm["cubin"])
    except Exception as exception:
        return record | {"error": f"{type(exception).__name__}: {exception}"[:2000]}
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    record["shared"] = compiled.metadata.shared
    record["tensor_memory"] = getattr(compiled.metadata, "tmem_size", None) or 0
    record["mma"] = len(re.findall(r"\bmma\.sync\.", ptx))
    record["wgmma"] = len(re.findall(r"\bwgmma\.mma_async\.", ptx))
    record["tcgen05"] = len(re.findall(r"\btcgen05\.mma\.", ptx))
    record["accesses"], record["wide"] = _accesses(ptx)
    record["products"] = [_shape(line) for line in ttir.splitlines() if " tt.dot " in line]
    record["seconds"] = round(time.perf_counter() - start, 2)
    return record


def _shape(line: str) -> tuple[str, int, int, int]:
    """("bf16", 64, 32, 128) from a tt.dot of tensor<64x32xbf16> * tensor<32x128xbf16>."""
    (rows, depth, dtype), (_, columns, _) = re.findall(r"tensor<(\d+)x(\d+)x(\w+)>", line)[:2]
    return dtype, int(rows), int(depth), int(columns)


def _accesses(ptx: str) -> tuple[int, int]:
    """How many instructions read or write device memory, and how many of them 16 bytes per thread."""
    plain = re.findall(r"\b(?:ld|st)\.global\.[\w.:]*?(?:v(\d)\.)?[bfsu](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", ptx)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in plain] + [int(size, 16) for size in copies]
    return len(sizes), sum(size >= 16 for size in sizes)


def _resources(triton: Path, cubin: bytes) -> dict[str, int]:
    """ptxas keeps spilled registers on the stack."""
    tool = triton / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    values = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(values["REG"]), "stack": int(values["STACK"]), "local": int(values["LOCAL"])}


def _private_cache() -> None:
    """Where the home directory cannot be written to, a cache of this run alone."""
    home = Path.home()
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(home, os.W_OK):
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastssl-triton-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--match", default="", help="only cases that contain this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--list", action="store_true", help="print the cases instead of compiling them")
    parser.add_argument("--cases", action="store_true", help="read the cases from standard input, as JSON")
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        print("aot: TRITON_INTERPRET is ignored: the interpreter compiles nothing", file=sys.stderr)
    _private_cache()
    if arguments.cases:
        chosen = [Case(*case) for case in json.load(sys.stdin)]
    else:
        chosen = [case for case in cases() if case.arch in arguments.arch and arguments.match in str(case)]
    if arguments.list:
        print("\n".join(map(str, chosen)))
        return
    # Forked workers share the imports made above.
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("fork")) as pool:
        for record in pool.map(_compile_case, chosen):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
