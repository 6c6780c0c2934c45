"""`make gpu-static`: what compilers say of every GPU kernel, without a GPU, compared with what is kept.

Two tables in benches/static: kernels.tsv, one line for each Triton configuration and CUDA kernel on each architecture
(registers, shared memory, spilled bytes, tensor-core instructions, how many of the accesses to device memory are of 16
bytes a thread, blocks that a multiprocessor can hold), and floors.tsv, the least time that an H100 needs for each row
of the benches, and what binds it. The command makes them anew and fails where a kernel has a fault or a line is another
than the kept one, so that a change that starts to spill is seen in review; `--write` keeps the new ones. Compilations
are cached: a second run takes a minute or two.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch
from no_gpu import NoGpu

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benches" / "static"

#: What an H100 reaches when measured: GB/s copied (read + written), Gflop/s of bfloat16 products, G/s of exponentials.
H100 = {"copy_gbs": 3000.0, "write_gbs": 3000.0, "gflops": {"bfloat16": 790e3}, "gexps": 3700.0}
#: Architecture → shared memory of a multiprocessor in bytes, of which each block takes 1 KiB more than it asks for.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of a multiprocessor, on all three

KERNEL_COLUMNS = (
    "source",
    "kernel",
    "arch",
    "warps",
    "registers",
    "shared",
    "spilled",
    "tensor cores",
    "16-byte accesses",
    "blocks per SM",
)
FLOOR_COLUMNS = ("op", "shape", "dtype", "mode", "floor us", "bound")


def blocks_per_multiprocessor(arch: int, warps: int, registers: int, shared: int) -> int:
    """How many blocks fit, by registers (given to warps in units of 256, in each of four parts), memory and warps."""
    per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = REGISTERS // 4 // max(per_warp, 256) * 4
    return min(BLOCKS, WARPS // warps, warps_by_registers // warps, SHARED[arch] // (shared + 1024))


def triton_lines(match: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """A line for each case of tests/aot.py, and one sentence for each fault."""
    aot = importlib.import_module("aot")
    cases = [case for case in aot.cases() if match in str(case)]
    lines, faults = [], []
    for case, record in aot.run(cases).items():
        faults += [f"{case}: {fault}" for fault in aot.faults(record)]
        if record.get("error"):
            continue
        counts = [f"{record[name]} {name}" for name in ("mma", "wgmma", "tcgen05") if record[name]]
        lines.append(
            _line(
                f"kernels/{case.module}.py",
                case.description,
                case.arch,
                record["num_warps"],
                record["registers"],
                record["shared"],
                record["stack"] + record["local"],
                ", ".join(counts) or "-",
                f"{record['wide']} of {record['accesses']}",
            )
        )
    return lines, faults


def cuda_lines(match: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """The same of csrc/cuda; shared memory is what is declared, not what a launch adds."""
    sources = importlib.import_module("cuda_sources")
    threads = threads_of_blocks()
    lines, faults = [], []
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for arch in SHARED:
            if match not in f"{path.name} sm_{arch}":
                continue
            for kernel in sources.ptxas_records(path.name, f"sm_{arch}"):
                name, spilled = demangled(kernel.name), kernel.stack + kernel.spill_stores + kernel.spill_loads
                if kernel.registers is None or spilled:
                    faults.append(f"{path.name} sm_{arch} {name}: {spilled} bytes of local memory, or a call")
                registers, warps = kernel.registers or 0, threads[name.partition("::")[0]] // 32
                lines.append(
                    _line(f"csrc/cuda/{path.name}", name, arch, warps, registers, kernel.shared, spilled, "-", "-")
                )
    return lines, faults


def threads_of_blocks() -> dict[str, int]:
    """Namespace of CUDA kernels → kThreads of their blocks."""
    pattern = re.compile(r"namespace fastssl::cuda::(\w+) \{.*?\bkThreads = (\d+);", re.DOTALL)
    files = (path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    return {name: int(threads) for text in files for name, threads in pattern.findall(text)}


def _line(
    source: str,
    kernel: str,
    arch: int,
    warps: int,
    registers: int,
    shared: int,
    spilled: int,
    products: str,
    accesses: str,
) -> tuple[str, ...]:
    blocks = blocks_per_multiprocessor(arch, warps, registers, shared)
    return (
        source,
        kernel,
        f"sm_{arch}",
        *map(str, (warps, registers, shared, spilled)),
        products,
        accesses,
        str(blocks),
    )


def demangled(name: str) -> str:
    """`simpool<float, true>` of a mangled name: without namespaces and arguments."""
    text = subprocess.check_output(["c++filt", name], text=True).strip()  # comes with g++'s assembler
    return text.removeprefix("void ").replace("fastssl::cuda::", "").rpartition("(")[0] or text


def floor_lines(match: str) -> list[tuple[str, ...]]:
    """The floors of the GPU's rows in bfloat16, from the benches themselves."""
    lines: list[tuple[str, ...]] = []
    for path in sorted((ROOT / "benches").glob("bench_*.py")):
        with NoGpu():
            cases = importlib.import_module(path.stem).cases("cuda", False)
        for case in cases:
            for mode, floor in case.floors.items():
                needs = floor.seconds(H100, "bfloat16")
                bound = max(needs, key=lambda name: needs[name])
                line = (case.op, case.shape, "bfloat16", mode, f"{needs[bound] * 1e6:.1f}", bound)
                if case.dtype == torch.bfloat16 and match in " ".join(line):
                    lines.append(line)
    return lines


def versions() -> str:
    """The compilers that the numbers of kernels depend on."""
    import triton

    sources = importlib.import_module("cuda_sources")
    nvcc = subprocess.check_output([sources.nvcc(), "--version"], text=True).split("release ")[1].split(",")[0]
    return f"# triton {triton.__version__}, nvcc {nvcc}"


def table(head: str, columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    return [head, "\t".join(columns), *("\t".join(line) for line in sorted(lines, key=_order))]


def _order(line: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.rjust(6) if part.startswith("sm_") else part for part in line)


def compare(name: str, made: list[str], partial: bool) -> list[str]:
    """The lines by which a table differs from the kept one; with `partial`, made has only some of them."""
    path = KEPT / name
    kept = path.read_text().splitlines() if path.exists() else []
    if kept and kept[0] != made[0]:
        return [f"{path.relative_to(ROOT)} was made with other compilers ({kept[0][2:]}): not compared"]
    if partial:
        return [f"+{line}" for line in made if line not in set(kept)]
    diff = difflib.unified_diff(kept, made, f"{name} as kept", f"{name} now", lineterm="", n=0)
    return [line for line in diff if not line.startswith("@@")]


def main(argv: list[str] | None = None) -> int:
    sys.path.insert(0, str(ROOT / "tests"))  # for aot and cuda_sources
    parser = argparse.ArgumentParser(description="compile every GPU kernel and compare with benches/static")
    parser.add_argument("--match", default="", help="only kernels and rows that contain this")
    parser.add_argument("--write", action="store_true", help="keep the new tables")
    args = parser.parse_args(argv)
    if args.write and args.match:
        parser.error("--write keeps whole tables: leave --match out")
    if importlib.util.find_spec("triton") is None:
        print("make gpu-static needs triton")
        return 2
    triton, faults = triton_lines(args.match)
    cuda, more = cuda_lines(args.match)
    tables = {
        "kernels.tsv": table(versions(), KERNEL_COLUMNS, triton + cuda),
        "floors.tsv": table("# H100, ceilings as measured", FLOOR_COLUMNS, floor_lines(args.match)),
    }
    changed = []
    for name, made in tables.items():
        print(f"{name}: {len(made) - 2} lines")
        if args.write:
            KEPT.mkdir(exist_ok=True)
            (KEPT / name).write_text("\n".join(made) + "\n")
        else:
            found = compare(name, made, bool(args.match))
            print("\n".join(found) if found else "  as kept")
            changed += [line for line in found if not line.endswith("not compared")]
    print("\n".join(["faults:", *faults, *more]) if faults or more else "no faults: nothing spills, all fits")
    if changed:
        print("If this is meant, `make gpu-static ARGS=--write` keeps it.")
    return 1 if faults or more or changed else 0


if __name__ == "__main__":
    sys.exit(main())
