"""Collects bench_*.py and joins the harness to pytest-benchmark.

A bench file has `cases(device, quick) -> list[Case]` and one test that takes the fixture `bench` and calls
it. It runs once per case, mode and side. The first of a case and mode measures all its sides in turns; each
test then hands its own side's samples to pytest-benchmark, whose clock replays them. Thus its table and JSON
have an entry per side, and the ratios taken within the interleaved rounds are in `extra_info`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equality
import harness
import provenance
import pytest
import report
import timing
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastssl benches")
    group.addoption("--quick", action="store_true", help="few rows and rounds; results go to build/bench-quick")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda where torch has one")
    group.addoption("--budget", type=float, help="seconds of interleaved rounds per row (default 8, quick 1)")
    group.addoption("--within", type=float, help="seconds for all rows; shortens their budgets to fit")
    group.addoption("--results", type=Path, help="folder of <device>.json (default benches/results)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[_RUN] = Run(config)


class Clock:
    """A timer for pytest-benchmark that tells one already measured duration after the other."""

    __name__ = "interleaved"

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        self._ticks = iter([t for sample in samples for t in (0.0, sample)])

    def __call__(self) -> float:
        return next(self._ticks)


CLOCK = Clock()


class Run:
    """This session's cases and what was measured of them."""

    def __init__(self, config: pytest.Config) -> None:
        quick = config.getoption("--quick")
        self.quick = quick
        self.device = config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
        default = timing.Settings(budget_s=1.0, min_rounds=5) if quick else timing.Settings()
        budget = config.getoption("--budget")
        self.settings = default if budget is None else dataclasses.replace(default, budget_s=budget)
        folder = ROOT / ("build/bench-quick" if quick else "benches/results")
        self.folder = config.getoption("--results") or folder
        self.entries: dict[str, tuple[harness.Case, str, harness.Side]] = {}
        self.rows: list[dict[str, Any]] = []
        self.path: Path | None = None
        self.end = float("inf")
        self._done: dict[tuple[int, str], Any] = {}

    def add(self, case: harness.Case) -> list[str]:
        """One entry per mode and side, side by side so that a row is complete before the next begins."""
        names = []
        for mode in case.floors:
            for side in (s for s in case.sides if mode in s.modes):
                dtype = equality.name(case.dtype)
                name = f"{case.shape}-{dtype}-{mode}-{side.name}".replace(" ", "-")
                self.entries[f"{case.op}-{name}"] = (case, mode, side)
                names.append(f"{case.op}-{name}")
        return names

    def fit(self, seconds: float) -> None:
        """Shortens budgets so that all rows take about `seconds`, half of it for checks and compilation.

        What is still left when the time is up is not measured.
        """
        self.end = time.monotonic() + seconds
        rows = {(id(case), mode) for case, mode, _ in self.entries.values()}
        share = seconds / (2 * max(len(rows), 1))
        self.settings = dataclasses.replace(self.settings, budget_s=min(self.settings.budget_s, share))

    def measured(self, case: harness.Case, mode: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Measures at the first call; if that fails, so does every other side's test."""
        key = (id(case), mode)
        if key not in self._done:
            if time.monotonic() > self.end:
                pytest.skip("the time for all rows was up")
            self._done[key] = None
            try:
                self._done[key] = harness.measure(case, mode, self.settings)
            except equality.Mismatch as mismatch:
                pytest.fail(str(mismatch), pytrace=False)
            row = self._done[key][0]
            self.rows.append(row)
            self.path = report.write(self.folder, provenance.slug(self.device), [row])
        if self._done[key] is None:
            pytest.fail("no figure: checking or timing this row failed, see its first side", pytrace=False)
        return self._done[key]


_RUN = pytest.StashKey[Run]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench_entry" not in metafunc.fixturenames:
        return
    run = metafunc.config.stash[_RUN]
    if run.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda, but torch finds no CUDA device")
    names = [n for case in metafunc.module.cases(run.device, run.quick) for n in run.add(case)]
    metafunc.parametrize("bench_entry", names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    within = config.getoption("--within")
    if within is not None:
        run = config.stash[_RUN]
        run.fit(within)
        # What is asked for most comes first.
        items.sort(key=lambda item: harness.rank(*run.entries[item.callspec.params["bench_entry"]][:2]))
    for item in items:
        if "bench_entry" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def bench(bench_entry: str, request: pytest.FixtureRequest, benchmark: Any) -> Any:
    run = request.config.stash[_RUN]
    case, mode, side = run.entries[bench_entry]

    def record() -> None:
        if side.absent:
            pytest.skip(side.absent)
        row, samples = run.measured(case, mode)
        CLOCK.load(samples[side.name])
        benchmark.group = " ".join(report.key(row))
        benchmark.extra_info.update(
            {k: row[k] for k in report.KEYS},
            side=side.name,
            **row["sides"][side.name],
            **{k: row[k] for k in ("ratios", "wall_ratios", "floor", "share_of_floor", "seed", "provenance")},
        )
        benchmark.pedantic(lambda: None, rounds=len(samples[side.name]))

    return record


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[_RUN]
    if run.rows:
        terminalreporter.section(f"fastssl benches on {provenance.slug(run.device)}")
        terminalreporter.write_line(report.text(report.merge([], run.rows)))
        terminalreporter.write_line(f"merged into {run.path} and {run.path.with_suffix('.md').name}")
