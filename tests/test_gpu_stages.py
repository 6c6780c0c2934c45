"""The stage runner of benches/gpu.py."""

import json
import sys
import time
from pathlib import Path

import gpu
import pytest


def python(code, **stage):
    name = stage.pop("name", "stage")
    return gpu.Stage(name, [sys.executable, "-c", code], stage.pop("timeout", 10.0), **stage)


def test_a_failing_stage_is_reported_and_the_others_go_on(tmp_path, capsys):
    stages = [
        python("print('fine')", name="first"),
        python("import sys; print('the reason'); sys.exit(3)", name="second"),
        python("import os; print(os.environ['GIVEN'])", name="third", env={"GIVEN": "as asked"}),
        python("", name="fourth", absent="no such tool"),
    ]
    outcomes = gpu.run_all(stages, tmp_path, time.monotonic() + 30)
    assert [(o.name, o.status) for o in outcomes] == [
        ("first", "ok"),
        ("second", "failed"),
        ("third", "ok"),
        ("fourth", "absent"),
    ]
    assert outcomes[1].note == "exit code 3"
    assert "the reason" in capsys.readouterr().out
    assert (tmp_path / "third.log").read_text().strip() == "as asked"
    assert "second  failed" in gpu.summary(outcomes, [], 1.0)


def test_a_stage_past_its_time_is_stopped_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    outcome = gpu.run_stage(python(code, timeout=2.0), tmp_path, remaining=30)
    assert outcome.status == "timed out"
    assert outcome.seconds < 5
    child = int((tmp_path / "stage.log").read_text().split()[0])
    state = Path(f"/proc/{child}/stat")
    gone = time.monotonic() + 2
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < gone:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_stage_is_told_how_long_it_has(tmp_path):
    stage = gpu.Stage("stage", [sys.executable, "-c", "import sys; print(sys.argv[1])", gpu.WITHIN], 20.0)
    gpu.run_stage(stage, tmp_path, remaining=15)
    assert (tmp_path / "stage.log").read_text().strip() == "10"  # some is left to finish, and to end when told to


STAGES = ["build", "compile", "tests", "sources", "memcheck", "racecheck", "benches"]


@pytest.mark.parametrize(("quick", "seconds"), [(False, 470.0), (True, 110.0)])
def test_stages_and_their_time(quick, seconds, monkeypatch):
    for name in ("TORCH_CUDA_ARCH_LIST", "FASTSSL_GPU_CASES"):
        monkeypatch.delenv(name, raising=False)
    stages = {stage.name: stage for stage in gpu.plan({"capability": "9.0"}, False, quick, seconds)}
    assert list(stages) == STAGES
    assert stages["build"].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert ("--quick" in stages["benches"].command) == quick
    assert stages["tests"].env["FASTSSL_GPU_CASES"] == ("3" if quick else "48")
    assert "FASTSSL_REHEARSE_GPU" not in stages["tests"].env
    assert {Path(part).name for part in stages["tests"].command} >= {"test_gpu.py", "test_simpool.py"}
    for tool in ("memcheck", "racecheck"):
        assert stages[tool].command[1:3] == ["--tool", tool]
        assert ("left out" in stages[tool].absent) == quick
    assert stages["sources"].absent
    assert "-n" not in stages["benches"].command
    rehearsed = gpu.plan({}, True, False, 900.0)
    assert [stage.name for stage in rehearsed] == STAGES
    assert not any(stage.absent for stage in rehearsed)


def test_the_deadline_stops_a_stage_and_the_rest_do_not_run(tmp_path):
    stages = [python("import time; time.sleep(60)", timeout=60.0), python("print(1)", name="late")]
    start = time.monotonic()
    outcomes = gpu.run_all(stages, tmp_path, start + 1.5)
    assert time.monotonic() - start < 5
    assert [o.status for o in outcomes] == ["timed out", "not run"]


def test_time_is_kept_for_the_last_stage(tmp_path):
    stages = [python("import time; time.sleep(60)", timeout=60.0), python("print(1)", name="last")]
    outcomes = gpu.run_all(stages, tmp_path, time.monotonic() + 6, for_last=4.0)
    assert [o.status for o in outcomes] == ["timed out", "ok"]


def test_what_exit_codes_mean():
    assert gpu.judge_tests(0, "...\n=== 12 passed in 3 s ===\n") == ("ok", "12 passed in 3 s")
    assert gpu.judge_tests(1, "=== 1 failed in 3 s ===")[0] == "failed"
    assert gpu.judge_tests(5, "no tests ran") == ("failed", "no test was found")
    assert gpu.judge_sanitizer(99, "ERROR SUMMARY: 3 errors")[0] == "failed"
    assert gpu.judge_sanitizer(1, "Error: Device not supported")[0] == "absent"


def test_without_a_device_it_says_so_and_exits_2(tmp_path, capsys, monkeypatch):
    def run_all(stages, folder, end, for_last=0.0):
        assert [s.name for s in stages] == ["facts"]
        (folder / "facts.log").write_text('{"cuda": false, "reason": "torch finds none"}\n')
        return [gpu.Outcome("facts", "ok", 0.0, "", str(folder / "facts.log"))]

    monkeypatch.setattr(gpu, "run_all", run_all)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "make gpu needs a CUDA device: torch finds none" in capsys.readouterr().out


def test_one_failed_stage_makes_the_exit_code_1(tmp_path, capsys, monkeypatch):
    facts = {"cuda": True, "capability": "9.0", "device": "some GPU"}
    (tmp_path / "facts.log").write_text(json.dumps(facts))
    statuses = {"tests": "failed", "memcheck": "absent"}

    def run_all(stages, folder, end, for_last=0.0):
        return [gpu.Outcome(s.name, statuses.get(s.name, "ok"), 1.0, "", str(folder / "facts.log")) for s in stages]

    monkeypatch.setattr(gpu, "run_all", run_all)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    statuses["tests"] = "ok"
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert set(json.loads((tmp_path / "summary.json").read_text())) == {"facts", "stages", "seconds"}
    assert "memcheck   absent" in capsys.readouterr().out
