"""Peak memory of the losses on the CPU: it grows with the tokens, never with a matrix of their relations."""

import json
import math
import os
import subprocess
import sys

import pytest

from fastssl import _library

pytestmark = [
    pytest.mark.skipif(not _library.loaded(), reason=_library.why_not or ""),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

#: KB by which the process's address space grows in one step, scratch memory of the kernels included, once per length.
#: Every length has a child of its own, which begins by using up what earlier work has left free in the heap.
PEAK = """
import json, os, sys, torch, fastssl
torch.set_num_threads(1)
op, shapes, options, lengths = json.loads(sys.argv[1])

def make(length):
    sizes = {name: [length if size == "N" else size for size in shape] for name, shape in shapes.items()}
    return {name: torch.randn(size, requires_grad=name.startswith("student")) for name, size in sizes.items()}

def step(given):
    getattr(fastssl, op)(**given, **options, backend="cpp").backward()

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

def measure(length):
    small, large = make(16), make(length)
    step(small)  # what torch allocates once
    ballast = []
    for bits in range(22, 12, -1):
        before = kilobytes("VmSize")
        while kilobytes("VmSize") == before:
            ballast.append(torch.empty(1 << bits, dtype=torch.uint8))
    ballast.append(torch.empty(1024 * (kilobytes("VmPeak") - kilobytes("VmSize") + 64), dtype=torch.uint8))
    before = kilobytes("VmPeak")
    step(large)
    print(kilobytes("VmPeak") - before, flush=True)

for length in lengths:
    child = os.fork()
    if not child:
        measure(length)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
#: Every piece of memory of some KB is mapped on its own, and given back when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def pair(*shape):
    return {"student": shape, "teacher": shape}


def columns(*shape):
    return {"student_columns": shape, "teacher_columns": shape}


#: op, shapes, options, and two lengths of which the longer is four times the other.
CASES = {
    "pixel": ("self_relation_loss", pair(2, "N", 64), {}, (1024, 4096)),
    "channel": ("self_relation_loss", pair(2, 64, "N"), {"kind": "channel"}, (1024, 4096)),
    "many heads": ("self_relation_loss", pair(2, "N", 64), {"num_heads": 4}, (512, 2048)),
    "columns": ("self_relation_loss", pair(2, "N", 64) | columns(2, "N", 64), {"num_heads": 4}, (512, 2048)),
    "few columns": ("self_relation_loss", pair(2, "N", 64) | columns(2, 36, 64), {}, (1024, 4096)),
    # In one pass there is one matrix per thread, whatever the number of heads: 64 would be 40 MB, or 80.
    "one-pass": ("self_relation_loss", pair(32, "N", 32), {"num_heads": 2}, (100, 400)),
    "one-pass columns": (
        "self_relation_loss",
        pair(32, "N", 32) | columns(32, "N", 32),
        {"num_heads": 2},
        (100, 400),
    ),
    "gram": ("gram_loss", pair(2, "N", 64), {}, (1024, 4096)),
    "gram, many images": ("gram_loss", pair(8, "N", 64), {}, (512, 2048)),
    "gram, one-pass": ("gram_loss", pair(64, "N", 32), {}, (100, 400)),
    "gram, batch": ("gram_loss", pair(8, "N", 64), {"per_image": False}, (256, 1024)),
}


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_grows_with_the_tokens_and_not_with_their_square(name):
    op, shapes, options, lengths = CASES[name]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, json.dumps([op, shapes, options, lengths])],
        capture_output=True, text=True, timeout=300, env={**os.environ, **MALLOC},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    gradients = [
        sum(
            4 / 1024 * math.prod(length if size == "N" else size for size in shape)
            for student, shape in shapes.items()
            if student.startswith("student")
        )
        for length in lengths
    ]
    assert small >= 0.9 * gradients[0]  # else what is measured is not the step
    assert large <= 6 * small  # 4 times the tokens; their square would be 16 times as much
    assert large <= 6 * gradients[1]
