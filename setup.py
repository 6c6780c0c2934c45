"""Builds fastssl's native library. One function, `plan`, decides what is built and with which flags, and prints it.

CPU code is always built. CUDA code is built when torch has CUDA and an nvcc of the same major version is found,
never because a GPU is present. Environment:

    FASTSSL_CUDA=0|1      leave CUDA out, or demand it (1 without nvcc is an error)
    FASTSSL_EXTENSION=0   pure Python: nothing is compiled
    TORCH_CUDA_ARCH_LIST  architectures (default 8.0, 9.0 and 10.0+PTX, as far as nvcc knows them)
    MAX_JOBS              parallel compiler processes
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
STABLE_ABI_TARGET = "2.10"
TORCH_TARGET_VERSION = "0x020a000000000000"
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")


@dataclass
class Plan:
    """What will be built, and why not more."""

    native: bool = False
    cuda: bool = False
    native_reason: str = ""
    cuda_reason: str = ""
    cuda_version: str = ""
    architectures: str = ""
    sources: list[str] = field(default_factory=list)
    cxx_flags: list[str] = field(default_factory=list)
    nvcc_flags: list[str] = field(default_factory=list)

    def report(self) -> str:
        lines = ["fastssl build:"]
        if not self.native:
            lines.append(f"  native library: no ({self.native_reason}); a pure-Python install follows")
            return "\n".join(lines)
        lines.append(f"  native library: yes, {len(self.sources)} sources, stable ABI target {STABLE_ABI_TARGET}")
        cuda = f"yes, nvcc {self.cuda_version}, for {self.architectures}" if self.cuda else f"no ({self.cuda_reason})"
        lines.append(f"  CUDA kernels: {cuda}")
        lines.append(f"  c++ flags: {' '.join(self.cxx_flags)}")
        if self.cuda:
            lines.append(f"  nvcc flags: {' '.join(self.nvcc_flags)}")
        return "\n".join(lines)


def find_nvcc() -> tuple[str, str]:
    """(path, version) of nvcc, or ("", "") where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if path and Path(path).exists():
            out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            found = re.search(r"release (\d+\.\d+)", out)
            if found:
                return path, found.group(1)
    return "", ""


def known_architectures(nvcc: str) -> str:
    """The default architectures that this nvcc can compile for, the newest with PTX."""
    out = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '')}" in out.split()]
    return ";".join(known) + "+PTX" if known else ""


def plan() -> Plan:
    p = Plan()
    wanted = os.environ.get("FASTSSL_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTSSL_CUDA must be 0 or 1, got {wanted!r}")
    if os.environ.get("FASTSSL_EXTENSION") == "0":
        p.native_reason = p.cuda_reason = "FASTSSL_EXTENSION=0"
    else:
        try:
            import torch
        except (ImportError, OSError) as error:  # OSError: a torch whose own libraries do not load
            p.native_reason = p.cuda_reason = (
                f"torch is not importable in the build environment ({error}); "
                "install torch first and build with --no-build-isolation"
            )
        else:
            version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
            p.native = version >= (2, 10)
            if p.native:
                decide_cuda(p, torch, wanted)
            else:
                p.native_reason = p.cuda_reason = f"torch is {torch.__version__}, 2.10 or later is needed"
    if wanted == "1" and not p.cuda:
        raise SystemExit(f"FASTSSL_CUDA=1, but CUDA kernels cannot be built: {p.cuda_reason}")
    if p.native:
        p.sources = sorted(str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*.cpp"))
        p.cxx_flags = [
            "-std=c++17",
            "-O3",
            "-g0",  # Python's own flags have -g: a fifth of the time and most of the size
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
        ]
        p.cxx_flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    if p.cuda:
        p.sources += sorted(str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*.cu"))
        p.cxx_flags += ["-DUSE_CUDA", "-DFASTSSL_WITH_CUDA"]
        p.nvcc_flags = [
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-DUSE_CUDA",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        ]
    return p


def decide_cuda(p: Plan, torch, wanted: str) -> None:
    nvcc, p.cuda_version = find_nvcc()
    if wanted == "0":
        p.cuda_reason = "FASTSSL_CUDA=0"
    elif torch.version.cuda is None:
        p.cuda_reason = "this torch has no CUDA"
    elif not nvcc:
        p.cuda_reason = "no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda"
    elif p.cuda_version.split(".")[0] != torch.version.cuda.split(".")[0]:
        p.cuda_reason = f"nvcc is {p.cuda_version}, torch was built with CUDA {torch.version.cuda}"
    else:
        p.architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or known_architectures(nvcc)
        if not p.architectures:
            p.cuda_reason = f"nvcc {p.cuda_version} knows none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}"
            return
        p.cuda = True
        os.environ["TORCH_CUDA_ARCH_LIST"] = p.architectures
        os.environ.setdefault("CUDA_HOME", str(Path(nvcc).resolve().parent.parent))


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the file's time alone where the text is the same, so that ninja rebuilds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def facts_header(p: Plan) -> Path:
    """The header through which csrc/module.cpp learns what was decided here."""
    folder = ROOT / "build" / "facts"
    facts = {
        "STABLE_ABI": STABLE_ABI_TARGET,
        "CUDA_VERSION_TEXT": p.cuda_version if p.cuda else "",
        "CUDA_ARCHITECTURES": p.architectures,
        "NO_CUDA_REASON": p.cuda_reason,
    }
    text = "".join(f"#define FASTSSL_{key} {json.dumps(value)}\n" for key, value in facts.items())
    write_if_changed(folder / "fastssl_build_facts.h", text)
    return folder


class BuildPython(build_py):
    """Leaves a note of the decision beside the package, so that `python -m fastssl info` can repeat it."""

    def run(self):
        super().run()
        target = ROOT if self.editable_mode else Path(self.build_lib)
        write_if_changed(target / "fastssl" / "_build.json", json.dumps(asdict(PLAN), indent=1) + "\n")


def native_arguments(p: Plan) -> dict:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    include = [str(ROOT / "csrc"), str(facts_header(p))]
    try:
        import pybind11

        include.append(pybind11.get_include())
    except ImportError:
        pass  # torch carries a copy of pybind11's headers
    kind = CUDAExtension if p.cuda else CppExtension
    flags = {"cxx": p.cxx_flags, "nvcc": p.nvcc_flags} if p.cuda else p.cxx_flags
    extension = kind(
        "fastssl._C",
        p.sources,
        include_dirs=include,
        extra_compile_args=flags,
        depends=[str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*.*h")],
    )

    class Build(BuildExtension):
        """Keeps objects in build/, so that an editable install, which would use a fresh folder, is incremental too."""

        def finalize_options(self) -> None:
            super().finalize_options()
            versions = f"{sys.implementation.cache_tag}-{torch.__version__}-{p.cuda_version or 'cpu'}"
            self.build_temp = str(ROOT / "build" / f"temp-{versions}")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build, "build_py": BuildPython}}


PLAN = plan()
print(PLAN.report(), file=sys.stderr, flush=True)
setup(**(native_arguments(PLAN) if PLAN.native else {"cmdclass": {"build_py": BuildPython}}))
