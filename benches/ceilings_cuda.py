"""The ceilings of a CUDA device, by events: best of several repeats, on random data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the exponential rate is then torch's, which memory limits
    triton = None

BUFFER = 1 << 30
REPEATS = 10
MATRIX = 8192

if triton is not None:

    @triton.jit
    def _exponentials(x, y, rounds, BLOCK: tl.constexpr):
        """`rounds` dependent exponentials per element, in registers; 2^-v of a positive v stays in (0, 1]."""
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at)
        for _ in range(rounds):
            v = tl.exp2(-v)
        tl.store(y + at, v)


def measure() -> dict[str, Any]:
    copy, write = _memory()
    how = "triton" if triton is not None else "torch"
    gflops = {n: _matmul(getattr(torch, n)) for n in ("bfloat16", "float16", "float32", "float64")}
    torch.cuda.empty_cache()
    return {
        "copy_gbs": 2 * BUFFER / copy / 1e9,
        "write_gbs": BUFFER / write / 1e9,
        "gflops": gflops,
        "gexps": (_exps_triton() if triton is not None else _exps_torch()) / 1e9,
        "how": {"copy": "torch", "write": "torch", "flops": "torch.matmul (no tf32)", "exps": how},
    }


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of REPEATS calls."""
    times = []
    for _ in range(REPEATS + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times[2:])


def _memory() -> tuple[float, float]:
    target = torch.empty(BUFFER, dtype=torch.int8, device="cuda")
    source = torch.randint(-128, 128, (BUFFER,), dtype=torch.int8, device="cuda")
    return best(lambda: target.copy_(source)), best(lambda: target.fill_(1))


def _matmul(dtype: torch.dtype) -> float:
    size = MATRIX // 2 if dtype in (torch.float32, torch.float64) else MATRIX
    a = torch.randn(size, size, device="cuda").to(dtype)
    b = torch.randn(size, size, device="cuda").to(dtype)
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return 2 * size**3 / best(lambda: torch.matmul(a, b, out=out)) / 1e9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _exps_triton() -> float:
    n, rounds, block = 1 << 22, 512, 1024
    x = torch.rand(n, device="cuda")
    y = torch.empty_like(x)
    return n * rounds / best(lambda: _exponentials[(n // block,)](x, y, rounds, BLOCK=block))


def _exps_torch() -> float:
    x = torch.rand(1 << 20, device="cuda")
    y = torch.empty_like(x)
    return x.numel() / best(lambda: torch.exp(x, out=y))
