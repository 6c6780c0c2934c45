"""What every test shares: seeds, poisoned memory, float32 that is float32, and a list of what was not run and why."""

import contextlib
import os

# Several processes of tests on the same cores: a thread that waits must not keep one from another process.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Without a GPU the Triton kernels run under Triton's interpreter, which is settled when fastssl is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gpu_rehearsal
import pytest
from no_gpu import NoGpu

from fastssl import _library

if gpu_rehearsal.ASKED:
    gpu_rehearsal.pretend()

CPU_PATHS = list(_library.module.supported_cpu_paths()) if _library.loaded() else []

collect_ignore_glob = ["*.cpp", "*.h"]


@pytest.fixture(autouse=True)
def _same_start():
    """Fixed seed; TF32 off, so that a float32 reference is one."""
    torch.manual_seed(20260717)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh tensors hold NaN, those made in C++ too, so that an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _rehearsal():
    """What a rehearsed test places on the GPU stays on the CPU."""
    with NoGpu() if gpu_rehearsal.ASKED else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(items):
    if gpu_rehearsal.CASES:
        items[:] = gpu_rehearsal.choose(items)


@pytest.fixture(params=CPU_PATHS or ["none"])
def cpu_path(request):
    """Each code path of the CPU kernels that this processor runs, in turn."""
    if not _library.loaded():
        pytest.skip(_library.why_not)
    before = _library.module.cpu_path()
    assert _library.module.use_cpu_path(request.param)
    yield request.param
    _library.module.use_cpu_path(before)


@pytest.fixture(params=["reference", *(f"cpp-{path}" for path in CPU_PATHS)])
def backend(request):
    """The name of each backend that computes on this CPU; cpp once for each of its code paths."""
    name, _, path = request.param.partition("-")
    if not path:
        yield name
        return
    before = _library.module.cpu_path()
    assert _library.module.use_cpu_path(path)
    yield name
    _library.module.use_cpu_path(before)


def pytest_terminal_summary(terminalreporter):
    """Says at the end which proofs this machine could not run, and what is missing for them."""
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    if reasons:
        terminalreporter.section("not run on this machine")
        for reason, tests in sorted(reasons.items()):
            terminalreporter.line(f"{len(tests):4d} tests: {reason}")
