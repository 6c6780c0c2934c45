"""The bench harness: what it refuses, counts and keeps."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import equality
import harness
import memory
import pytest
import report
import timing
import torch
from equality import Mismatch, Step
from harness import Case, Floor, Side
from timing import Sample, Settings

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000


def square(x):
    return x.exp() * 2


def case(*sides, **changes):
    """A case of exp(x)·2 with `sides` beside the right eager one."""
    arguments = {
        "op": "toy",
        "shape": "64x64",
        "dtype": torch.float32,
        "device": "cpu",
        "make_inputs": lambda g: (torch.randn(64, 64, generator=g),),
        "sides": (Side("eager", square), *sides),
        "floors": {mode: Floor(read=64 * 64 * 4, written=64 * 64 * 4) for mode in harness.MODES},
    }
    return Case(**arguments | changes)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = square(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] * 1.001


def _writes_to_input(x):
    out = square(x)
    x.data.add_(1e-3)
    return out


WRONG = {
    "value": (lambda x: square(x) * 1.001, "forward"),
    "nan": (lambda x: square(x) / torch.where(x == x.max(), 0.0, 1.0) * 0, "forward"),
    "unwritten": (lambda x: torch.empty_like(x), "forward"),
    "shape": (lambda x: square(x)[:, :-1], "forward"),
    "gradient": (_WrongGradient.apply, "backward"),
    "gradient beside a right value": (_WrongGradient.apply, "forward+backward"),
}


@pytest.mark.parametrize(("run", "mode"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_side_is_refused_by_name(run, mode):
    with pytest.raises(Mismatch, match=r"toy 64x64 float32 .* is not timed: ours is off by"):
        equality.check(case(Side("ours", run, ours=True)), mode, seed=0)


def test_a_side_that_writes_to_its_input_is_refused():
    with pytest.raises(Mismatch, match="ours wrote to an input"):
        equality.check(case(Side("ours", _writes_to_input, ours=True)), "forward", seed=0)


def test_a_truth_that_is_nan_lets_nothing_pass():
    with pytest.raises(Mismatch, match="eager is off by nan; ours is off by nan"):
        equality.check(case(Side("ours", square, ours=True), truth=lambda x: x * float("nan")), "forward", 0)


def test_a_refused_row_is_not_timed(monkeypatch):
    monkeypatch.setattr(harness, "_ceilings", lambda device: RATES)
    monkeypatch.setattr(timing, "interleave", lambda *_: pytest.fail("a wrong side was timed"))
    with pytest.raises(Mismatch):
        harness.measure(case(Side("ours", WRONG["value"][0], ours=True)), "forward", Settings())


@pytest.mark.parametrize("mode", harness.MODES)
def test_right_sides_pass_with_errors_of_value_and_gradient(mode):
    steps, errors = equality.check(case(Side("ours", square, ours=True)), mode, seed=0)
    assert list(steps) == ["eager", "ours"]
    expected = {"forward": 1, "backward": 1, "forward+backward": 2}[mode]
    assert [len(e) for e in errors.values()] == [expected, expected]
    assert all(0 < e < 1e-6 for side in errors.values() for e in side)


def test_inputs_differ_from_seed_to_seed():
    seen = []
    toy = case(Side("ours", lambda x: (seen.append(x.clone()), square(x))[1], ours=True))
    equality.check(toy, "forward", seed=1)
    equality.check(toy, "forward", seed=2)
    assert not torch.equal(*seen)


def _three_buffers(x):
    y = x * 2  # 4 MB
    z = y + 1  # 8 MB
    del y  # 4 MB
    w = z.exp()  # 8 MB
    return w + z  # 12 MB


def _aoti_allocation(x):
    """4 MB from torch's CPU allocator through the C functions that stable-ABI operators use."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    handle = ctypes.c_void_p()
    one = ctypes.c_int64 * 1
    error = library.aoti_torch_empty_strided(
        ctypes.c_int64(1), one(MB), one(1), library.aoti_torch_dtype_float32(), 0, 0, ctypes.byref(handle)
    )
    assert error == 0
    assert library.aoti_torch_delete_tensor_object(handle) == 0
    return x[0]


@pytest.mark.parametrize(
    ("run", "expected"),
    [(_three_buffers, 12 * MB), (torch.Tensor.detach, 0), (_aoti_allocation, 4 * MB)],
    ids=["python", "nothing", "C++"],
)
def test_peak_memory_of_a_known_expression(run, expected):
    x = torch.rand(MB)
    step = Step(lambda: None, lambda _: (run(x),))
    memory.extra_bytes(step, "cpu")
    extra = memory.extra_bytes(step, "cpu")
    assert expected <= extra <= expected + 1000  # scalars become tensors of a few bytes


def test_peak_memory_of_softmax_backward():
    """Backward allocates the gradient alone; forward + backward the output, which is saved as it is, too."""
    x = torch.rand(1000, 1000)
    upstream = torch.rand(1000, 1000)
    step = equality.make_step(lambda t: t.softmax(-1), "backward", (x,), (0,), upstream)
    assert 4 * MB <= memory.extra_bytes(step, "cpu") <= 4 * MB + 1000
    both = equality.make_step(lambda t: t.softmax(-1), "forward+backward", (x,), (0,), upstream)
    assert 8 * MB <= memory.extra_bytes(both, "cpu") <= 8 * MB + 1000


def test_running_peak_counts_frees():
    assert memory.running_peak([5, 5, -5, 3, -8, 7]) == 10
    assert memory.running_peak([-3, 2]) == 0


def test_quantiles_and_ratio_of_medians():
    assert timing.quantile([3, 1, 2], 0.5) == 2
    assert timing.quantile([4, 1, 2, 3], 0.5) == 2.5
    assert timing.quantile(range(11), 0.2) == 2
    assert timing.quantile([7.0], 0.8) == 7.0
    slow = [Sample(s, s, 2 * s, s / 2) for s in (0.010, 0.012, 1.0)]  # one outlier that a mean would follow
    fast = [Sample(s, s, s, s) for s in (0.004, 0.005, 0.003)]
    sides = {"eager": timing.summarize(slow), "ours": timing.summarize(fast)}
    assert sides["eager"]["median_ms"] == pytest.approx(12)
    assert timing.ratios(sides, ["ours", "absent"]) == {"ours": {"eager": pytest.approx(3.0)}}
    assert timing.ratios(sides, ["ours"], "wall_ms") == {"ours": {"eager": pytest.approx(6.0)}}


def test_rounds_are_interleaved_in_changing_order():
    calls = []
    steps = {n: Step(lambda: None, lambda _, n=n: (calls.append(n),)) for n in "abc"}

    def sample(step):
        step.run(step.prepare())
        return Sample(1.0, 1.0, 1.0, 1.0)

    samples = timing.interleave(steps, sample, Settings(budget_s=0, min_rounds=12, warmup=1), seed=0)
    assert [len(s) for s in samples.values()] == [12, 12, 12]
    rounds = [tuple(calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert len(rounds) == 12
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


def test_rounds_end_with_the_budget():
    def sample(step):
        time.sleep(0.01)
        return Sample(1.0, 1.0, 1.0, 1.0)

    steps = {"a": Step(lambda: None, lambda _: ())}
    samples = timing.interleave(steps, sample, Settings(budget_s=0.2, min_rounds=2), seed=0)
    assert 2 <= len(samples["a"]) <= 21


def test_gpu_time_starts_after_a_cold_cache_and_with_the_step_queued(monkeypatch):
    """On a stand-in for a CUDA device: the order of what is queued, and which clock gives which number."""
    calls = []

    def note(word, value=None):
        return lambda *_, **__: (calls.append(word), value)[1]

    events = iter(("begin", "end") * 2)

    class Event:
        def __init__(self, enable_timing):
            self.record = note(next(events))

        def elapsed_time(self, end):
            return 5.0

    properties = types.SimpleNamespace(L2_cache_size=1 << 20)
    flush = types.SimpleNamespace(zero_=note("flush"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", note("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", note("sleep"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", note("allocate", flush))
    timer = timing.CudaTimer()
    sample = timer.sample(Step(note("prepare"), note("run")))
    host, device = calls[1:5], calls[5:]
    assert host == ["prepare", "wait", "run", "wait"]
    cold = ["prepare", "wait", "sleep", "flush", "begin", "run", "end", "wait"]
    assert device == [*cold, *(word for word in cold if word != "flush")]
    assert sample.seconds == pytest.approx(0.005)
    assert 0 < sample.host <= sample.wall < 0.005


def test_waiting_for_a_cpu_is_a_share():
    assert timing.waited((100, 50), (300, 150)) == pytest.approx(1 / 3)
    assert timing.waited((100, 50), (100, 50)) == 0.0
    assert timing.waited(None, (1, 1)) is None


RATES = {"copy_gbs": 40.0, "write_gbs": 20.0, "gflops": {"float32": 300.0}, "gexps": 6.0}


@pytest.mark.parametrize(
    ("floor", "ms", "bound"),
    [
        (Floor(read=30e6, written=10e6), 1.0, "copy"),
        (Floor(read=0, written=40e6), 2.0, "write"),
        (Floor(read=1e6, written=1e6, flops=0.9e9), 3.0, "flops"),
        (Floor(read=1e6, written=1e6, flops=0.3e9, exps=24e6), 4.0, "exps"),
    ],
)
def test_floor_is_the_largest_need(floor, ms, bound):
    facts = harness.floor_facts(floor, RATES, "float32")
    assert (facts["ms"], facts["bound"]) == (pytest.approx(ms), bound)
    assert facts["written"] == floor.written


def test_floors_add():
    assert Floor(1, 2, 3, 4) + Floor(10, 20, 30, 40) == Floor(11, 22, 33, 44)


def test_measure_gives_a_row_with_share_ratio_memory_and_provenance(monkeypatch):
    monkeypatch.setattr(harness, "_ceilings", lambda device: RATES)
    known = {"eager": 6e-3, "ours": 2e-3}

    def interleave(steps, sample, settings, seed):
        return {n: [Sample(*[known[n]] * 4)] * 3 for n in steps}

    monkeypatch.setattr(timing, "interleave", interleave)
    floors = {"forward": Floor(read=0, written=20e6)}
    toy = case(Side("ours", square, ours=True, backends={"forward": "cpp"}), floors=floors)
    row, samples = harness.measure(toy, "forward", Settings())
    assert row["ratios"] == {"ours": {"eager": pytest.approx(3.0)}}
    assert row["share_of_floor"] == {"ours": pytest.approx(0.5)}
    assert row["sides"]["ours"]["backend"] == "cpp"
    assert 2 * 64 * 64 * 4 <= row["sides"]["eager"]["extra_bytes"] <= 2 * 64 * 64 * 4 + 100
    assert samples["ours"] == [2e-3] * 3
    needed = {"commit", "dirty", "date", "device", "cpu", "threads", "torch", "triton", "python", "build"}
    assert needed <= set(row["provenance"])
    json.dumps(row)


def row(op="toy", shape="64x64", mode="forward", ms=1.0):
    side = {"median_ms": ms, "host_ms": ms, "wall_ms": ms, "warm_ms": ms / 2, "extra_bytes": 4 * MB}
    return {
        "op": op,
        "shape": shape,
        "dtype": "float32",
        "mode": mode,
        "sides": {"eager": {**side, "median_ms": 3 * ms}, "ours": {**side, "backend": "cpp"}},
        "ratios": {"ours": {"eager": 3.0, "sdpa": 1.5}},
        "wall_ratios": {"ours": {"eager": 3.0}},
        "floor": {"ms": ms / 2, "bound": "copy"},
        "share_of_floor": {"ours": 0.5},
        "waited": 0.0,
        "ceilings": RATES,
        "provenance": {
            **{"date": "2026-01-02T03:04:05", "commit": f"{op:0<40}", "dirty": False, "gpu": {}},
            **{"device": "some CPU", "cpu": {"flags": []}, "threads": 2},
            **{"torch": "2", "triton": None, "python": "3"},
        },
    }


def test_a_partial_run_keeps_the_rows_of_others(tmp_path):
    report.write(tmp_path, "box", [row("first"), row("second", ms=1.0), row("second", mode="backward")])
    report.write(tmp_path, "box", [row("second", ms=2.0)])
    rows = json.loads((tmp_path / "box.json").read_text())["rows"]
    found = [(r["op"], r["mode"], r["sides"]["ours"]["median_ms"]) for r in rows]
    assert found == [("first", "forward", 1.0), ("second", "forward", 2.0), ("second", "backward", 1.0)]
    table = (tmp_path / "box.md").read_text()
    assert "| first | 64x64 | float32 | forward | cpp | 3 |" in table
    assert "| 1 | 3.00 |" in table
    assert "| sdpa 1.50 | 4.0 → 4.0 | 50 | copy |" in table
    assert "| first00000 | 2026-01-02 |" in table  # every row has its own commit
    assert sorted(f.name for f in tmp_path.iterdir()) == ["box.json", "box.md"]


def test_a_row_of_a_busy_machine_is_marked():
    busy = copy.deepcopy(row())
    busy["waited"] = 0.4
    assert report.BUSY in report.text([busy])
    assert report.BUSY not in report.text([row()])


def test_a_busy_row_replaces_no_quiet_one(tmp_path):
    busy, quiet = row(ms=7.0), row(ms=1.0)
    busy["waited"] = 0.4
    for rows, kept in (([busy], 7.0), ([quiet], 1.0), ([busy], 1.0), ([row(ms=2.0)], 2.0)):
        report.write(tmp_path, "box", rows)
        (found,) = json.loads((tmp_path / "box.json").read_text())["rows"]
        assert found["sides"]["ours"]["median_ms"] == kept


def test_a_row_of_a_stale_library_is_marked():
    stale = copy.deepcopy(row())
    stale["provenance"]["build"] = {"stale": True}
    assert report.STALE in report.text([stale])
    stale["sides"]["ours"]["backend"] = "triton"  # does not run that library
    assert report.STALE not in report.text([stale])


def test_each_forced_backend_gets_its_own_line():
    both = row()
    both["sides"]["ours[triton]"] = {**both["sides"]["ours"], "backend": "triton"}
    for name in ("ratios", "wall_ratios", "share_of_floor"):
        both[name]["ours[triton]"] = both[name]["ours"]
    lines = report.text([both]).splitlines()
    assert len(lines) == 3
    assert "triton forced" in lines[2]
    assert "wall" not in lines[0]


def test_a_gpu_row_shows_host_and_wall_time_apart():
    on_gpu = row(ms=2.0)
    on_gpu["provenance"]["gpu"] = {"capability": "9.0"}
    header, line = report.text([on_gpu]).splitlines()
    assert [name for name in report.WALL if name not in header] == []
    assert line.split("copy")[1].split() == ["1.000", "1.000", "2.000", "2.000", "2000", "3.00"]


BENCH = """
import torch
from harness import Case, Floor, Side

def cases(device, quick):
    wrong = Side("ours", lambda x: x.exp() * 1.01, ours=True)
    right = Side("ours", lambda x: x.exp(), ours=True, backends={"forward": "cpp"})
    gone = Side("library", torch.exp, absent="not on this machine")
    def case(shape, *sides):
        return Case("toy", shape, torch.float32, device, lambda g: (torch.randn(9, generator=g),),
                    (Side("eager", torch.exp), *sides), {"forward": Floor(36, 36)})
    return [case("good", right, gone), case("bad", wrong)]

def test_toy(bench):
    bench()
"""


def run_toy(folder, *options):
    """Runs BENCH in a copy of the harness; returns what pytest printed."""
    pytest.importorskip("pytest_benchmark")
    benches = folder / "benches"
    benches.mkdir()
    for file in (ROOT / "benches").glob("*.py"):
        if not file.name.startswith("bench_"):
            (benches / file.name).write_text(file.read_text())
    # the real ceilings take seconds
    (benches / "ceilings.py").write_text(f"def measure(device): return {RATES!r}\n")
    (benches / "bench_toy.py").write_text(BENCH)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = benches\n")
    command = [sys.executable, "-m", "pytest", "benches", "--quick", "--budget", "0.01", "-q", "-rs"]
    files = ["--bench-device", "cpu", "--benchmark-json", "b.json", "--results", "results"]
    # A benchmark does not run in a worker process of pytest-xdist: this one is not to think it is in one.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *files, *options], cwd=folder, env=alone, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_pytest_benchmark_gets_an_entry_per_side_and_none_for_a_wrong_row(tmp_path):
    printed = run_toy(tmp_path)
    assert "2 failed, 2 passed, 1 skipped" in printed
    assert "ours is off by 0.01" in printed
    assert "not on this machine" in printed
    entries = json.loads((tmp_path / "b.json").read_text())["benchmarks"]
    assert [(e["extra_info"]["side"], e["group"]) for e in entries] == [
        ("eager", "toy good float32 forward"),
        ("ours", "toy good float32 forward"),
    ]
    medians = {e["extra_info"]["side"]: e["stats"]["median"] for e in entries}
    for entry in entries:
        info = entry["extra_info"]
        assert entry["stats"]["median"] * 1e3 == pytest.approx(info["median_ms"])
        assert info["ratios"]["ours"]["eager"] == pytest.approx(medians["eager"] / medians["ours"])
        assert len(entry["stats"]["data"]) >= 5
    rows = [r for file in (tmp_path / "results").glob("*.json") for r in json.loads(file.read_text())["rows"]]
    assert [r["shape"] for r in rows] == ["good"]
    assert rows[0]["absent"] == {"library": "not on this machine"}


def test_what_does_not_fit_into_the_time_is_left_out(tmp_path):
    printed = run_toy(tmp_path, "--within", "0")
    assert "5 skipped" in printed
    assert "the time for all rows was up" in printed
    assert not list(tmp_path.glob("results/*.json"))
