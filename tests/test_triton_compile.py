"""Every Triton configuration, compiled without a GPU for sm_80, sm_90 and sm_100: memory, spills, tensor cores.

A few are compiled in plain tests, all of them in proofs.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import aot

#: Forward and backward of each op on 197 tokens of depth 64, or of 384 channels, in bfloat16 and float32: what plain
#: tests compile.
USUAL = re.compile(
    r"relation_rows\[T0=128,T1=64,T2=16,.*ALIGNMENT=1,.*\] (bf16|fp32) tokens"
    r"|relation_product\[DIRECT=1,TRANSPOSED=1,MIXED=0,ALIGNMENT=1,.*BLOCK_DEPTH=64,.*\] (bf16|fp32) tokens"
    r"|loss_rows\[WHOLE=(1,BLOCK_ROWS=64,.*\] bf16|0,BLOCK_ROWS=64,.*MIXED=0,.*\] fp32) tokens"
    r"|loss_product\[DIRECT=1,TRANSPOSED=1,WEIGHTS=1,"
    r"WHOLE=(1,BLOCK_OUTER=64,.*\] bf16|0,BLOCK_OUTER=64,.*\] fp32) tokens"
    r"|gram_squares\[NORMALIZE=1,BLOCK_ROWS=(64,.*\] bf16|32,.*\] fp32) tokens"
    r"|gram_product\[NORMALIZE=1,BLOCK_ROWS=(64,.*BLOCK_DEPTH=256,.*\] bf16|32,.*BLOCK_DEPTH=128,.*\] fp32) tokens"
    r"|(attend|grad_logits|grad_tokens)\[MINIMUM=0,MANY=0,.*BLOCK_CHANNELS=512,.*\] (bf16|fp32) tokens"
    r"|attention_(rows|grad_queries|grad_keys)\[(SHORT=64,WHOLE=256,|)BLOCK=64,.*DEPTH=64,.*INDEXED=0,.*\] bf16"
    r"|attention_(rows|grad_queries|grad_keys)\[.*DEPTH=64,.*INDEXED=0,.*\] fp32"
)
CASES = aot.cases()


def is_usual(case):
    return USUAL.fullmatch(case.description) is not None


PARAMETERS = [pytest.param(case, id=str(case), marks=() if is_usual(case) else pytest.mark.proof) for case in CASES]


@pytest.fixture(scope="session")
def compiled(request):
    """Records of all cases that this session was asked to run, compiled together in one process."""
    items = [item for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())]
    return aot.run([item.callspec.params["case"] for item in items])


@pytest.mark.parametrize("case", PARAMETERS)
def test_compiles_within_the_chip(compiled, case):
    assert aot.faults(compiled[case]) == []


def test_the_usual_cases_are_there():
    assert sum(map(is_usual, CASES)) == 24 * len(aot.SHARED_LIMIT)


# ---- the judge is judged ---------------------------------------------------------------------------------------

GOOD = {
    "arch": 90,
    "num_warps": 4,
    "registers": 168,
    "stack": 0,
    "local": 0,
    "shared": 50_000,
    "tensor_memory": 0,
    "mma": 0,
    "wgmma": 6,
    "tcgen05": 0,
    "products": [["bf16", 64, 32, 128]],
}


def test_a_good_record_has_no_faults():
    assert aot.faults(GOOD) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"stack": 8}, "spills: 8 bytes"),
        ({"local": 16}, "16 of local memory"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"arch": 80, "shared": 163 * 1024 + 1}, "shared memory"),
        ({"arch": 100, "tensor_memory": 1024}, "tensor memory"),
        ({"wgmma": 0}, "without tensor cores"),
        ({"wgmma": 0, "mma": 6}, "without wgmma"),
        ({"arch": 80, "wgmma": 0, "products": [["f16", 16, 16, 16]]}, "without tensor cores"),
        ({"error": "CompilationError: at 3:4"}, "does not compile"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_record_is_found_out(change, fault):
    assert any(fault in sentence for sentence in aot.faults(GOOD | change))


@pytest.mark.parametrize(
    "change",
    [
        {"products": [["f32", 64, 16, 64]], "wgmma": 0},
        {"arch": 80, "wgmma": 0, "mma": 6},
        {"arch": 100, "wgmma": 0, "tcgen05": 4},
        {"products": [["bf16", 32, 32, 16]], "num_warps": 2, "wgmma": 0, "mma": 6},
    ],
    ids=["float32", "sm_80", "sm_100", "narrow"],
)
def test_what_needs_no_wgmma_passes_without(change):
    assert aot.faults(GOOD | change) == []


PTX = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
    @%p2 ld.global.b32 { %r5 }, [ %rd4 + 0 ];
    st.global.v2.b32 [ %rd5 + 0 ], { %r6, %r7 };
    cp.async.cg.shared.global [ %r8 + 0 ], [ %rd6 + 0 ], 0x10, %r9;
    cp.async.ca.shared.global [ %r8 + 0 ], [ %rd6 + 0 ], 0x8, %r9;
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r10 ];
"""


def test_accesses_to_device_memory_are_counted():
    assert aot._accesses(PTX) == (6, 3)


CROWDED = """
import json
import aot, triton, triton.language as tl
from fastssl.kernels.common import Choice, configuration

@triton.jit
def crowd(x, y, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    value = tl.load(x + at)
    tl.store(y + at, value - tl.sum(value))

chosen = configuration(Choice(crowd, {"WIDTH": 32 * 1024}, 1, 1), "", "*fp32:16 *fp32:16")
print(json.dumps(aot.compile_configuration(chosen, 80)))
"""


def test_a_kernel_that_spills_is_found_out(tmp_path):
    """The whole way: a kernel whose every thread keeps 1024 values, four times the registers there are."""
    script = tmp_path / "crowded.py"
    script.write_text(CROWDED)
    path = os.pathsep.join([str(Path(aot.__file__).parent), os.environ.get("PYTHONPATH", "")])
    printed = subprocess.check_output([sys.executable, script], env={**aot.environment(), "PYTHONPATH": path})
    faults = aot.faults(json.loads(printed))
    assert any("spills" in fault for fault in faults), faults
