"""`make gpu`: everything that needs a GPU in one command, from a bare checkout and without a network.

Stages, each with its own log and time-out: machine facts, build, compilation of what the benches run, tests marked
`gpu`, small calls of every op under compute-sanitizer, benches. A stage that fails is reported and the next one runs;
the exit code is 0 if all passed, 1 if one did not, 2 without a CUDA device. New ops join by existing: tests with the
marker `gpu`, a call in tests/small_calls.py and a benches/bench_<op>.py. `--rehearse` runs the same stages on the CPU,
which proves this script without a GPU. What runs in a stage is in gpu_inside.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INSIDE = ROOT / "benches" / "gpu_inside.py"
RESULTS = {False: ROOT / "benches" / "results", True: ROOT / "build" / "bench-quick"}  # by --quick
PASSING = ("ok", "absent")
NO_TESTS = 5  # pytest's exit code when it collects nothing
SANITIZER_FOUND = 99
TAIL = 25
WITHIN = "{seconds}"  # in a command: how many it has to begin something new, with some left to finish it
DEADLINE = {False: 480.0, True: 120.0}  # by --quick
BENCHES = 0.35  # their share of the time, whatever the other stages take


def judge_exit(code: int, text: str) -> tuple[str, str]:
    """(status, note) of a stage that ended by itself."""
    return ("ok", "") if code == 0 else ("failed", f"exit code {code}")


@dataclass
class Stage:
    """A command, how long it may take, and what its exit code and output mean."""

    name: str
    command: list[str]
    timeout: float
    env: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], tuple[str, str]] = judge_exit
    absent: str = ""  # why there is nothing to run


@dataclass
class Outcome:
    name: str
    status: str  # ok, absent, failed, timed out, not run
    seconds: float
    note: str
    log: str


def run_stage(stage: Stage, folder: Path, remaining: float) -> Outcome:
    """Runs the command in its own process group until it ends, its time is up, or the deadline comes."""
    log = folder / f"{stage.name}.log"
    if stage.absent:
        return Outcome(stage.name, "absent", 0.0, stage.absent, "")
    limit = min(stage.timeout, remaining)
    if limit < 1.0:
        return Outcome(stage.name, "not run", 0.0, "the deadline came before it", "")
    grace = min(10.0, 0.2 * limit)  # for pytest to write its summary after the interrupt
    start = time.monotonic()
    command = [part.replace(WITHIN, f"{0.85 * (limit - grace):.0f}") for part in stage.command]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **stage.env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended = _wait(process, limit - grace)
        if not ended:
            _signal(process, signal.SIGINT)
            _wait(process, grace)
        _signal(process, signal.SIGKILL)  # also what it may have left behind in its group
        process.wait()
    seconds = time.monotonic() - start
    if not ended:
        return Outcome(stage.name, "timed out", seconds, f"stopped after {seconds:.0f} s", str(log))
    status, note = stage.judge(process.returncode, log.read_text(errors="replace"))
    return Outcome(stage.name, status, seconds, note, str(log))


def run_all(stages: list[Stage], folder: Path, end: float, for_last: float = 0.0) -> list[Outcome]:
    """Every stage in turn, whatever became of the one before; `end` is a time.monotonic().

    for_last: so many seconds are kept for the last one.
    """
    outcomes = []
    for number, stage in enumerate(stages, 1):
        print(f"[{number}/{len(stages)}] {stage.name} …", flush=True)
        kept = for_last if number < len(stages) else 0.0
        outcome = run_stage(stage, folder, end - kept - time.monotonic())
        outcomes.append(outcome)
        print(f"      {outcome.status}, {outcome.seconds:.0f} s {outcome.note}".rstrip(), flush=True)
        if outcome.status not in PASSING and outcome.log:
            lines = Path(outcome.log).read_text(errors="replace").splitlines()[-TAIL:]
            print("\n".join(f"      | {line}" for line in lines), flush=True)
    return outcomes


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def judge_tests(code: int, text: str) -> tuple[str, str]:
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "").strip("= ")
    if code == NO_TESTS:
        return "failed", "no test was found"
    return ("ok" if code == 0 else "failed"), last


def judge_sanitizer(code: int, text: str) -> tuple[str, str]:
    if "Device not supported" in text:
        return "absent", "compute-sanitizer does not support this device"
    if code == SANITIZER_FOUND:
        return "failed", "compute-sanitizer found errors"
    return judge_exit(code, text)


def plan(facts: dict[str, Any], rehearse: bool, quick: bool, seconds: float) -> list[Stage]:
    """The stages after the facts. `seconds` is what is left for all of them."""
    device = "cpu" if rehearse else "cuda"
    short = ["--quick"] if quick or rehearse else []
    cores = os.cpu_count() or 1
    jobs = min(cores, 12)
    build_env = {"MAX_JOBS": str(cores)}
    if not rehearse and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        build_env["TORCH_CUDA_ARCH_LIST"] = facts["capability"]  # this chip alone, to save time
    compiling = [sys.executable, str(INSIDE), "compile", "--device", device, "--jobs", str(jobs), "--within", WITHIN]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    workers = ["-n", str(jobs), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    marked = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    tests = [*pytest, *workers, *marked, "-m", "gpu", "--durations=5"]
    sources = [*pytest, *workers, *map(str, sorted((ROOT / "tests").glob("test_cuda_*.py"))), "-m", "not proof"]
    here = "" if rehearse else "the kernels themselves are tested here"
    tests_env = {"OMP_NUM_THREADS": str(max(cores // jobs, 1))}
    if rehearse:
        tests_env["FASTSSL_REHEARSE_GPU"] = "1"
    cases = {(False, False): "48", (False, True): "3", (True, False): "3", (True, True): "1"}[rehearse, quick]
    # Of each test: they compile their kernels. FASTSSL_GPU_CASES=0 runs all, which takes many minutes.
    tests_env["FASTSSL_GPU_CASES"] = os.environ.get("FASTSSL_GPU_CASES", cases)
    benches = [
        *(*pytest, "benches", "--bench-device", device, *short, "--within", WITHIN),
        *("--disable-warnings", "--show-capture=no", "--benchmark-quiet"),
        f"--benchmark-json={ROOT / 'build' / 'benchmark.json'}",
    ]
    return [
        Stage("build", [sys.executable, str(INSIDE), "build", *["--quick"] * quick], seconds, build_env),
        # one thread of inductor for each of our processes
        Stage("compile", [*compiling, *short], 0.2 * seconds, {"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
        Stage("tests", tests, 0.35 * seconds, tests_env, judge_tests),
        Stage("sources", sources, 0.2 * seconds, judge=judge_tests, absent=here),  # CUDA sources run on the CPU
        *(sanitized(tool, device, rehearse, quick, 0.1 * seconds) for tool in ("memcheck", "racecheck")),
        Stage("benches", benches, seconds, judge=judge_tests),
    ]


def sanitized(tool: str, device: str, rehearse: bool, quick: bool, seconds: float) -> Stage:
    """Small calls of every op under one of compute-sanitizer's tools, or on the CPU under none."""
    calls = [sys.executable, str(INSIDE), "calls", "--device", device, "--within", WITHIN]
    if rehearse:
        return Stage(tool, calls, seconds, {"TRITON_INTERPRET": "1"})
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    absent = "" if Path(sanitizer).exists() else "compute-sanitizer is not installed"
    absent = "left out by --quick" if quick else absent
    # errors of the driver's interface that a library asks for and handles are none of ours
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(SANITIZER_FOUND)]
    command = [sanitizer, *options, *calls]
    # torch's cache would hand out parts of one large block, in which a stray access is not an error
    return Stage(tool, command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, judge_sanitizer, absent)


def summary(outcomes: list[Outcome], files: list[Path], seconds: float) -> str:
    width = max(len(o.name) for o in outcomes)
    lines = [f"{o.name:<{width}}  {o.status:<9} {o.seconds:6.1f} s  {o.note}".rstrip() for o in outcomes]
    where = [f"results: {f}" for f in files] or ["results: none were written"]
    return "\n".join([*lines, f"{'total':<{width}}  {'':<9} {seconds:6.1f} s", *where])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="build, test and measure fastssl on this machine's GPU")
    parser.add_argument("--deadline", type=float, help="seconds for everything (default 480, with --quick 120)")
    parser.add_argument("--quick", action="store_true", help="few tests and rows, kept out of benches/results")
    parser.add_argument("--rehearse", action="store_true", help="the same stages on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="logs and copies of results")
    args = parser.parse_args(argv)
    start, began = time.monotonic(), time.time()
    end = start + (args.deadline or DEADLINE[args.quick])
    args.out.mkdir(parents=True, exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    outcomes = run_all([Stage("facts", [sys.executable, str(INSIDE), "facts"], 90)], args.out, end)
    facts = read_facts(outcomes[0])
    if not facts["cuda"] and not args.rehearse:
        print(f"make gpu needs a CUDA device: {facts['reason']} (--rehearse runs the stages on the CPU).")
        return 2
    stages = plan(facts, args.rehearse, args.quick, end - time.monotonic())
    outcomes += run_all(stages, args.out, end, for_last=BENCHES * (end - time.monotonic()))
    folder = RESULTS[args.quick or args.rehearse]
    files = sorted(f for f in folder.glob("*.*") if f.stat().st_mtime >= began)
    for file in files:
        shutil.copy(file, args.out)
    seconds = time.monotonic() - start
    record = {"facts": facts, "stages": [asdict(o) for o in outcomes], "seconds": seconds}
    (args.out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{summary(outcomes, files, seconds)}\nlogs: {args.out}")
    return 0 if all(o.status in PASSING for o in outcomes) else 1


def read_facts(outcome: Outcome) -> dict[str, Any]:
    """The last line of the facts' log, or why there is none."""
    lines = Path(outcome.log).read_text(errors="replace").splitlines() if outcome.log else []
    try:
        facts: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"cuda": False, "reason": f"its facts could not be read ({(lines or ['no output'])[-1]})"}
    return facts


if __name__ == "__main__":
    sys.exit(main())
