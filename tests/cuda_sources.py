"""Proof of CUDA sources without a GPU: drivers that run them on the CPU, and what ptxas says of them.

`driver("cuda_<op>.cpp")` compiles a file beside this one with g++ (through cuda_on_cpu.h) and loads it;
`ptxas_records("<op>.cu", "sm_90")` compiles csrc/cuda/<op>.cu as setup.py does: one record per kernel.
Both keep their results in build/cuda_sources under a hash of the sources, flags and compiler they came from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_sources"
#: Without unique symbols: two drivers in one process must not share their globals.
GXX_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fno-gnu-unique", "-Wno-psabi"]
#: A misaligned access or an index outside of an array traps, and cuda_on_cpu.h reports the trap.
GXX_FLAGS += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
#: What setup.py and torch.utils.cpp_extension give nvcc.
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS += [f"-D__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
NVCC_FLAGS += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "--expt-relaxed-constexpr"]

LOCAL_MEMORY = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel (or of a function that it did not inline: registers is then None)."""

    name: str
    arch: str
    registers: int | None
    shared: int  # static, in bytes
    stack: int
    spill_stores: int
    spill_loads: int


def gxx() -> str:
    """g++, or the test skips."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++ to run CUDA sources on the CPU")
    return found


def nvcc(arch: str = "") -> str:
    """An nvcc that knows `arch`, or the test skips."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else []
    for path in [*places, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if path and Path(path).exists():
            if arch and arch not in _run([path, "--list-gpu-code"]).split():
                pytest.skip(f"{path} does not compile for {arch}")
            return path
    pytest.skip("needs nvcc to compile CUDA sources")


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _key(compiler: str, flags: list[str], *folders: Path) -> str:
    """A hash of all that a result depends on: compiler, torch's headers, flags, every source in `folders`."""
    digest = hashlib.sha256("\n".join([_version(compiler), torch.__version__, *flags]).encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def driver(source: str | Path, include: Path = CSRC) -> ctypes.CDLL:
    """The library made from a driver, in tests/ or elsewhere; `include` holds the cuda/ that it tests."""
    path = TESTS / source
    compiler = gxx()
    key = _key(compiler, [path.read_text(), *GXX_FLAGS], TESTS, include / "cuda")
    built = CACHE / f"{path.stem}-{key}.so"
    if not built.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        _run([compiler, *GXX_FLAGS, f"-I{include}", f"-I{TESTS}", "-o", str(unfinished), str(path)])
        os.replace(unfinished, built)
    return ctypes.CDLL(str(built))


def ptxas_records(source: str, arch: str) -> list[Kernel]:
    """Compiles csrc/cuda/`source` for `arch` ("sm_90") against torch's headers, device code and host code."""
    compiler = nvcc(arch)
    flags = [*NVCC_FLAGS, f"-gencode=arch=compute_{arch[3:]},code={arch}"]
    report = CACHE / f"{source}-{arch}-{_key(compiler, flags, CSRC)}.txt"
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        headers = Path(torch.__file__).parent / "include"
        made = report.with_suffix(f".{os.getpid()}.o")
        command = [compiler, *flags, "-Xptxas", "-v", f"-I{CSRC}", f"-I{headers}"]
        text = _run([*command, "-c", "-o", str(made), str(CSRC / "cuda" / source)])
        made.unlink()
        unfinished = report.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        os.replace(unfinished, report)
    return parse_ptxas(report.read_text())


def parse_ptxas(text: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    kernels: list[Kernel] = []
    name = arch = entry = ""
    sizes: tuple[int, ...] = ()

    def finish(registers: int | None, shared: int) -> None:
        kernels.append(Kernel(name, arch, registers, shared, *sizes))

    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for '(.+)'", line):
            entry, arch = found.groups()
        elif found := re.search(r"Function properties for (\S+)", line):
            if sizes:  # the function before had no "Used … registers": it is called, not launched
                finish(None, 0)
            name, sizes = found.group(1), ()
        elif found := re.search(LOCAL_MEMORY, line):
            sizes = tuple(int(n) for n in found.groups())
        elif (found := re.search(r"Used (\d+) registers", line)) and name == entry:
            smem = re.search(r"(\d+) bytes smem", line)
            finish(int(found.group(1)), int(smem.group(1)) if smem else 0)
            sizes = ()
    if sizes:
        finish(None, 0)
    return kernels


def check_no_spills(kernels: list[Kernel]) -> None:
    """Fails if there is no kernel, or one uses local memory (stack, spills) or calls a function."""
    assert kernels, "ptxas reported no kernel"
    bad = [k for k in kernels if k.registers is None or k.stack or k.spill_stores or k.spill_loads]
    assert not bad, "kernels with local memory or calls:\n" + "\n".join(map(str, bad))
