"""The demo's figures: what is measured, when a row counts as equal, and how the table says it."""

from __future__ import annotations

import math

import pytest
import torch

import fastssl
from fastssl.cli import comparison, table


def row(**changes: object) -> comparison.Row:
    good = comparison.Row(
        data="tokens",
        what="pixel forward",
        shapes=[[1, 4, 8]],
        arguments={},
        backend="cpp",
        largest_difference=1e-7,
        value_error=1e-7,
        gradient_error=1e-6,
        eager_value_error=1e-7,
        eager_gradient_error=1e-6,
        rounds=3,
        fused_ms=1.0,
        eager_ms=2.0,
        speedup=2.0,
        fused_peak_bytes=2048,
        eager_peak_bytes=3 * 2**20,
    )
    return good._replace(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"largest_difference": 3e-6},
        {"value_error": 3e-6},
        {"gradient_error": 3e-5},
        {"largest_difference": math.nan},
        {"gradient_error": math.nan},
    ],
)
def test_verdict_names_the_row_beyond_the_limit(changes: dict[str, float]) -> None:
    assert table.verdict([row()]) == (True, table.verdict([row()])[1])
    assert table.verdict([row()])[1].startswith("fused == reference")
    equal, sentence = table.verdict([row(), row(what="pixel backward", **changes)])
    assert not equal
    assert "pixel backward" in sentence
    assert "pixel forward" not in sentence


def test_verdict_does_not_call_the_reference_fused() -> None:
    equal, sentence = table.verdict([row(backend="reference")])
    assert equal
    assert "fused ==" not in sentence
    assert "1 of 2 rows ran on the reference" in table.verdict([row(), row(backend="reference")])[1]


def test_table_aligns_and_formats() -> None:
    facts = {"threads": 2, "processor": "A chip", "torch": "2", "fastssl": "0"}
    lines = table.on_screen([row(), row(gradient_error=None)], facts).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert "2.00x" in lines[2]
    assert "2 KiB" in lines[2]
    assert "3.0 MiB" in lines[2]
    assert lines[-1].startswith("2 threads")


def test_peak_is_the_running_sum_of_allocations() -> None:
    size = 2**20

    def in_turn() -> None:
        for _ in range(3):
            torch.empty(size, dtype=torch.uint8).fill_(1)

    def together() -> None:
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(size, dtype=torch.uint8)
        del first
        torch.empty(size // 2, dtype=torch.uint8).copy_(second[: size // 2])

    assert comparison.peak_bytes(in_turn) == size
    assert comparison.peak_bytes(together) == 2 * size


def test_errors_are_measured_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "SECONDS", 0.0)
    x = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"kind": "pixel", "num_heads": 2, "scale": 0.5, "temp": 1.0, "normalize": False}
    measured = comparison.measure(comparison.Case("x", "y", [x], arguments, True), "reference")
    truth = fastssl.self_relation(x.double(), backend="reference", **arguments)
    value = fastssl.self_relation(x, backend="reference", **arguments)
    assert measured.largest_difference == float((value - truth).abs().max())
    assert measured.value_error == float((value - truth).norm() / truth.norm())
    assert 0 < measured.gradient_error < 1e-5
    assert measured.backend == "reference"


def test_simpool_has_limits_of_its_own() -> None:
    pooled = row(op="simpool", largest_difference=9e-6, value_error=3e-6, gradient_error=4e-5)
    equal, sentence = table.verdict([row(), pooled])
    assert equal
    assert sentence.endswith("limits 2e-06, gradients 2e-05, of simpool 1e-05 and 5e-05)")
    assert not table.verdict([pooled._replace(value_error=2e-5)])[0]
    assert not table.verdict([pooled._replace(gradient_error=math.nan)])[0]
    assert "simpool" not in table.verdict([row()])[1]


@pytest.mark.parametrize("gamma", [None, 1.25])
def test_plain_pytorch_of_simpool_is_simpool(gamma: float | None) -> None:
    weights = comparison._layer(24)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))
    arguments = {"num_heads": 2, "gamma": gamma}
    expected = fastssl.simpool(x, **weights, backend="reference", **arguments)
    torch.testing.assert_close(comparison.eager_pool(x, **weights, **arguments), expected)


def test_errors_of_a_layer_are_those_of_its_worst_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "SECONDS", 0.0)
    real = fastssl.simpool

    def wrong(x: torch.Tensor, *, wk: torch.Tensor, backend: str | None = None, **rest: object) -> torch.Tensor:
        return real(x, wk=wk + 0.1 * (wk - wk.detach()), backend="reference", **rest)

    monkeypatch.setattr(fastssl, "simpool", wrong)
    x = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_heads": 1, "gamma": 1.25}
    case = comparison.Case("x", "y", [x], arguments, True, "simpool", None, comparison._layer(8))
    measured = comparison.measure(case, "reference")
    assert measured.value_error < 1e-6
    assert measured.gradient_error == pytest.approx(0.1, rel=1e-3)
    assert not measured.equal
