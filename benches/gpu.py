"""`make gpu`: everything that needs a GPU in one command, from a bare checkout and without a network.

Stages, each with its own log and time-out: machine facts, build, tests marked `gpu`, a smoke run under
compute-sanitizer, benches. A stage that fails is reported and the next one runs; the exit code is 0 if all
passed, 1 if one did not, 2 without a CUDA device. New ops join by existing: tests with the marker `gpu` and
a benches/bench_<op>.py. `--rehearse` runs the same stages on the CPU, which proves this script without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
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
RESULTS = {False: ROOT / "benches" / "results", True: ROOT / "build" / "bench-quick"}  # by --quick
PASSING = ("ok", "absent")
NO_TESTS = 5  # pytest's exit code when it collects nothing
SANITIZER_FOUND = 99
TAIL = 25


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
    with log.open("wb") as out:
        process = subprocess.Popen(
            stage.command,
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


def run_all(stages: list[Stage], folder: Path, end: float) -> list[Outcome]:
    """Every stage in turn, whatever became of the one before; `end` is a time.monotonic()."""
    outcomes = []
    for number, stage in enumerate(stages, 1):
        print(f"[{number}/{len(stages)}] {stage.name} …", flush=True)
        outcome = run_stage(stage, folder, end - time.monotonic())
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
        return "failed", "no test carries the marker gpu"
    return ("ok" if code == 0 else "failed"), last


def judge_sanitizer(code: int, text: str) -> tuple[str, str]:
    if "Device not supported" in text:
        return "absent", "compute-sanitizer does not support this device"
    if code == SANITIZER_FOUND:
        return "failed", "compute-sanitizer found errors"
    return judge_exit(code, text)


def plan(facts: dict[str, Any], rehearse: bool, quick: bool, seconds: float) -> list[Stage]:
    """The stages after the facts. `seconds` is what is left for all of them."""
    python, script = sys.executable, str(Path(__file__).resolve())
    device = "cpu" if rehearse else "cuda"
    short = ["--quick"] if quick or rehearse else []
    build_env = {"MAX_JOBS": str(os.cpu_count() or 1)}
    if not rehearse and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        build_env["TORCH_CUDA_ARCH_LIST"] = facts["capability"]  # this chip alone, to save time
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, "tests", "-m", "gpu", "--durations=5"]
    tests_env = {"FASTSSL_REHEARSE_GPU": "1"} if rehearse else {}
    smoke = [python, script, "--inside", "smoke", "--device", device, *short]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    absent = ""
    if not rehearse:
        options = ["--tool", "memcheck", "--error-exitcode", str(SANITIZER_FOUND)]
        smoke = [sanitizer, *options, *smoke]
        absent = "" if Path(sanitizer).exists() else "compute-sanitizer is not installed"
    bench_seconds = max(60.0, seconds - 180.0)
    benches = [
        *(*pytest, "benches", "--bench-device", device, *short, "--within", f"{bench_seconds:.0f}"),
        *("--disable-warnings", "--show-capture=no", "--benchmark-quiet"),
        f"--benchmark-json={ROOT / 'build' / 'benchmark.json'}",
    ]
    # torch's cache would hand out parts of one large block, in which a stray access is not an error
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("build", [python, script, "--inside", "build"], seconds / 2, build_env),
        Stage("tests", tests, 150, tests_env, judge_tests),
        Stage("memcheck", smoke, 90, uncached, judge_sanitizer, absent),
        Stage("benches", benches, seconds, judge=judge_tests),
    ]


def summary(outcomes: list[Outcome], files: list[Path], seconds: float) -> str:
    width = max(len(o.name) for o in outcomes)
    lines = [f"{o.name:<{width}}  {o.status:<9} {o.seconds:6.1f} s  {o.note}".rstrip() for o in outcomes]
    where = [f"results: {f}" for f in files] or ["results: none were written"]
    return "\n".join([*lines, f"{'total':<{width}}  {'':<9} {seconds:6.1f} s", *where])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="build, test and measure fastssl on this machine's GPU")
    parser.add_argument("--deadline", type=float, default=480, help="seconds for everything (default 480)")
    parser.add_argument("--quick", action="store_true", help="few bench rows, kept out of benches/results")
    parser.add_argument("--rehearse", action="store_true", help="the same stages on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="logs and copies of results")
    parser.add_argument("--inside", choices=sorted(INSIDE), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        return INSIDE[args.inside](args)
    start, began = time.monotonic(), time.time()
    end = start + args.deadline
    args.out.mkdir(parents=True, exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    ask = [sys.executable, str(Path(__file__).resolve()), "--inside", "facts"]
    outcomes = run_all([Stage("facts", ask, 90)], args.out, end)
    facts = read_facts(outcomes[0])
    if not facts["cuda"] and not args.rehearse:
        print(f"make gpu needs a CUDA device: {facts['reason']} (--rehearse runs the stages on the CPU).")
        return 2
    stages = plan(facts, args.rehearse, args.quick, end - time.monotonic())
    outcomes += run_all(stages, args.out, end)
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


def inside_facts(args: argparse.Namespace) -> int:
    """Prints what the machine is; the last line is JSON for `read_facts`."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
        fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], check=False)
    try:
        import torch
    except ImportError as error:
        print(json.dumps({"cuda": False, "reason": f"torch cannot be imported ({error})"}))
        return 1
    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.cuda.is_available(), "reason": ""}
    if facts["cuda"]:
        p = torch.cuda.get_device_properties(0)
        print(p)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}"}
    else:
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        facts["reason"] = f"torch {torch.__version__}, {built}, finds none"
    print(json.dumps(facts), flush=True)
    return 0


def inside_build(args: argparse.Namespace) -> int:
    """Installs this checkout in place into the Python at hand."""
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-v"]
    code, text = _stream([*pip, "-e", "."])
    if code != 0 and "externally-managed-environment" in text:  # PEP 668
        code, _ = _stream([*pip, "--break-system-packages", "-e", "."])
    return code


def _stream(command: list[str]) -> tuple[int, str]:
    """Runs it and passes its output on line by line, so that the log of a stopped build has it too."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def inside_smoke(args: argparse.Namespace) -> int:
    """Runs our sides of every bench once, untimed, in every mode: what the memory checker watches."""
    import torch

    harness, equality = importlib.import_module("harness"), importlib.import_module("equality")
    for file in sorted(Path(__file__).parent.glob("bench_*.py")):
        for case in importlib.import_module(file.stem).cases(args.device, args.quick):
            inputs = case.make_inputs(torch.Generator().manual_seed(0))
            inputs = tuple(equality.to_case(x, case) for x in inputs)
            for mode in harness.MODES:
                for side in (s for s in case.present(mode) if s.ours):
                    out = side.run(*inputs)
                    upstream = torch.randn_like(out) if out.dim() else None
                    step = equality.make_step(side.run, mode, inputs, case.differentiable, upstream)
                    results = step.run(step.prepare())
                    finite = all(bool(r.isfinite().all()) for r in results)
                    label = f"{case.op} {case.shape} {equality.name(case.dtype)} {mode} {side.name}"
                    print(f"{label}: {'ok' if finite else 'not finite'}", flush=True)
                    if not finite:
                        return 1
    return 0


INSIDE: dict[str, Callable[[argparse.Namespace], int]] = {
    "facts": inside_facts,
    "build": inside_build,
    "smoke": inside_smoke,
}

if __name__ == "__main__":
    sys.exit(main())
