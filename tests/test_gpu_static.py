"""`make gpu-static`: occupancy, the comparison with the kept tables, and that these are there for every op."""

import shutil

import gpu_static
import pytest
from gpu_static import blocks_per_multiprocessor, compare, demangled, floor_lines, table

from fastssl._backends import OPS


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        (90, 4, 32, 0, 16),  # 64 warps
        (90, 1, 16, 0, 32),  # 32 blocks
        (90, 4, 128, 0, 4),  # 128 registers: 16 warps
        (90, 4, 255, 0, 2),  # 8 warps
        (90, 8, 168, 0, 1),  # 12 warps
        (90, 4, 32, 227 * 1024, 1),
        (90, 4, 32, 75 * 1024, 3),
        (80, 4, 32, 75 * 1024, 2),
    ],
)
def test_blocks_per_multiprocessor(arch, warps, registers, shared, blocks):
    assert blocks_per_multiprocessor(arch, warps, registers, shared) == blocks


def test_a_table_that_differs_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_static, "KEPT", tmp_path)
    monkeypatch.setattr(gpu_static, "ROOT", tmp_path)
    kept = table("# compilers", ("kernel", "spilled"), [("b", "0"), ("a", "0")])
    assert kept == ["# compilers", "kernel\tspilled", "a\t0", "b\t0"]
    (tmp_path / "t.tsv").write_text("\n".join(kept) + "\n")
    assert compare("t.tsv", kept, False) == []
    assert compare("t.tsv", kept[:3], True) == []
    spills = [*kept[:3], "b\t8"]
    assert {"-b\t0", "+b\t8"} <= set(compare("t.tsv", spills, False))
    assert compare("t.tsv", spills, True) == ["+b\t8"]
    assert "-b\t0" in compare("t.tsv", kept[:3], False)
    (other,) = compare("t.tsv", ["# other compilers", *spills[1:]], False)
    assert other.endswith("not compared")
    assert compare("none.tsv", kept, False)[-1] == "+b\t0"


def test_threads_of_blocks():
    assert gpu_static.threads_of_blocks() == {"self_relation": 128, "products": 128, "simpool": 256}


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_names_of_kernels():
    name = "_ZN7fastssl4cuda7simpool4poolIfLb1EEEvNS1_7ForwardE"
    assert demangled(name) == "simpool::pool<float, true>"


def test_floors_of_every_op():
    lines = floor_lines("")
    assert {line[0] for line in lines} == set(OPS)
    for op, _, dtype, _, microseconds, bound in lines:
        assert dtype == "bfloat16"
        assert 1 < float(microseconds) < 1000, op
        assert bound in ("copy", "write", "flops", "exps")


def test_kept_tables_have_every_op_and_architecture():
    floors = (gpu_static.KEPT / "floors.tsv").read_text().splitlines()
    assert floors[2:] == table("", (), floor_lines(""))[2:]
    kernels = [line.split("\t") for line in (gpu_static.KEPT / "kernels.tsv").read_text().splitlines()[2:]]
    assert {line[2] for line in kernels} == {f"sm_{arch}" for arch in gpu_static.SHARED}
    assert all(line[6] == "0" for line in kernels)
