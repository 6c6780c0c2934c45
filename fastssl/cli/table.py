"""The demo's table on the screen, as Markdown and as JSON, and the sentence under it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastssl.cli.comparison import GRADIENT_LIMIT, LIMIT, OTHER_LIMITS, Row

NOTES = (
    "Errors are against `fastssl.reference` in float64: the largest difference of a value, and "
    "the norm of the difference over the norm of the truth, of values and of gradients. Times are medians, "
    "the two sides taking turns in one process; speed is PyTorch's time over fastssl's, so above 1x fastssl "
    "is faster. PyTorch is `(scale * q @ q.mT).softmax(-1)`, after `F.normalize` where the call normalises, and "
    "for a loss `-(q.softmax(-1) * p.log_softmax(-1)).sum(-1).mean()` of two such relations, and for simpool "
    "a layer norm, two projections and an attention, with powers of the values where it says gamma. "
    "Memory is the most that torch's allocator held for the call beyond what it held before, the result "
    "included; scratch memory that a kernel or the BLAS library allocates for itself is not in it."
)


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether every row agrees with the float64 reference, and the sentence that says so."""
    limits = f"limits {LIMIT:.0e}, gradients {GRADIENT_LIMIT:.0e}"
    for op in [op for op in OTHER_LIMITS if any(row.op == op for row in rows)]:
        limits += f", of {op} {OTHER_LIMITS[op][0]:.0e} and {OTHER_LIMITS[op][1]:.0e}"
    different = [row for row in rows if not row.equal]
    if different:
        return False, f"fused != reference ({limits}): {'; '.join(_errors(row) for row in different)}"
    largest = max(row.largest_difference for row in rows)
    gradient = max(row.gradient_error or 0.0 for row in rows)
    measured = f"largest difference {largest:.1e}, gradients {gradient:.1e}; {limits}"
    plain = [row for row in rows if row.backend == "reference"]
    if len(plain) == len(rows):
        return True, f"no fused kernel ran; the float32 reference agrees with the float64 one ({measured})"
    note = f"; {len(plain)} of {len(rows)} rows ran on the reference itself" if plain else ""
    return True, f"fused == reference ({measured}{note})"


def _errors(row: Row) -> str:
    backward = "" if row.gradient_error is None else f", gradient error {row.gradient_error:.1e}"
    errors = f"largest difference {row.largest_difference:.1e}, value error {row.value_error:.1e}"
    return f"{row.name}: {errors}{backward}"


HEADINGS = (
    "what",
    "backend",
    "largest diff.",
    "value error",
    "grad. error",
    "fastssl",
    "PyTorch",
    "speed",
    "memory",
    "PyTorch's",
)


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (
            row.name,
            row.backend,
            f"{row.largest_difference:.1e}",
            f"{row.value_error:.1e}",
            _number(row.gradient_error),
            f"{row.fused_ms:.2f} ms",
            f"{row.eager_ms:.2f} ms",
            f"{row.speedup:.2f}x",
            _memory(row.fused_peak_bytes),
            _memory(row.eager_peak_bytes),
        )
        for row in rows
    ]


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _memory(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def on_screen(rows: Sequence[Row], provenance: dict[str, Any]) -> str:
    lines = [HEADINGS, *cells(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    text = ["  ".join(_aligned(line, widths)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], _made(provenance)])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The two columns of words to the left, figures to the right."""
    return [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]


def _made(provenance: dict[str, Any]) -> str:
    threads = provenance["threads"]
    return (
        f"{threads} thread{'s' * (threads > 1)}, float32, {provenance['processor']}, "
        f"torch {provenance['torch']}, fastssl {provenance['fastssl']}"
    )


def write(rows: Sequence[Row], provenance: dict[str, Any], folder: Path) -> None:
    """table.md and table.json."""
    equal, sentence = verdict(rows)
    ruler = ["---" if i < 2 else "---:" for i in range(len(HEADINGS))]
    lines = ["| " + " | ".join(line) + " |" for line in (HEADINGS, ruler, *cells(rows))]
    text = "\n".join(lines)
    (folder / "table.md").write_text(f"{text}\n\n{sentence}.\n\n{_made(provenance)}. {NOTES}\n", encoding="utf-8")
    content = {
        "provenance": provenance,
        "limits": {"value": LIMIT, "gradient": GRADIENT_LIMIT, "other": OTHER_LIMITS},
        "equal": equal,
        "verdict": sentence,
        "notes": NOTES,
        "rows": [row._asdict() | {"equal": row.equal} for row in rows],
    }
    (folder / "table.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
