"""Rows to files and screen: one JSON and one Markdown table per device, merged row by row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MODES = ("forward", "backward", "forward+backward")


#: What names a row.
KEYS = ("op", "shape", "dtype", "mode")


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[k] for k in KEYS)


def merge(old: list[Row], new: list[Row]) -> list[Row]:
    """A new row takes the place of the old one with its (op, shape, dtype, mode); every other row stays.

    One that is no evidence does not take the place of one that is.
    """
    rows = {key(r): r for r in old}
    for row in new:
        before = rows.get(key(row))
        if before is None or is_evidence(row) or not is_evidence(before):
            rows[key(row)] = row
    return sorted(rows.values(), key=lambda r: (*key(r)[:3], MODES.index(r["mode"])))


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(folder: Path, slug: str, rows: list[Row]) -> Path:
    """Merges `rows` into <slug>.json and renders <slug>.md from all of them; returns the JSON's path."""
    path = folder / f"{slug}.json"
    merged = merge(read(path), rows)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps({"device": slug, "rows": merged}, indent=1) + "\n")
    _replace(path.with_suffix(".md"), markdown(slug, merged))
    return path


def _replace(path: Path, text: str) -> None:
    """In one step, so that a run that is killed leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


HEADER = (
    *("op", "shape", "dtype", "mode", "ours is", "eager ms", "compile ms", "ours ms", "× eager", "× compile"),
    *("× others", "extra MB eager → ours", "% of floor", "bound"),
)
#: Marks a row whose threads waited for a CPU longer than this share of their time.
BUSY, BUSY_SHARE = "(busy)", 0.03
#: Marks a row of compiled code that is older than its sources.
STALE = "(stale)"
WALL = ("warm ms eager", "warm ms ours", "wall ms eager", "wall ms ours", "host µs ours", "× eager wall")


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """The table's cells: a header, and one line per row and side of ours."""
    wall = any(r["provenance"].get("gpu") for r in rows)
    table = [HEADER + WALL if wall else HEADER]
    for row in rows:
        for name in row["ratios"]:
            table.append(_line(row, name) + (_wall(row, name) if wall else ()))
    return table


def _line(row: Row, name: str) -> tuple[str, ...]:
    sides, mine = row["sides"], row["sides"][name]
    return (
        *key(row),
        " ".join(filter(None, (mine["backend"], "[" in name and "forced", *_marks(row, mine["backend"])))),
        _ms(sides.get("eager")),
        _ms(sides.get("compile")),
        _ms(mine),
        _times(row["ratios"][name].get("eager")),
        _times(row["ratios"][name].get("compile")),
        _others(row, name),
        f"{_mb(sides.get('eager'))} → {_mb(mine)}",
        f"{100 * row['share_of_floor'][name]:.0f}",
        row["floor"]["bound"],
    )


def is_evidence(row: Row) -> bool:
    """Measured while nothing else ran, with compiled code that is that of its sources."""
    return not any(_marks(row, row["sides"][name]["backend"]) for name in row["ratios"])


def _marks(row: Row, backend: str) -> list[str]:
    marks = [BUSY] if (row.get("waited") or 0.0) > BUSY_SHARE else []
    stale = backend == "cpp" and row["provenance"].get("build", {}).get("stale")
    return [*marks, STALE] if stale else marks


def _others(row: Row, name: str) -> str:
    """Library peers, each with its name; forced backends of ours have lines of their own."""
    known = {"eager", "compile", *row["ratios"]}
    return ", ".join(f"{n} {_times(r)}" for n, r in row["ratios"][name].items() if n not in known) or "–"


def _wall(row: Row, name: str) -> tuple[str, ...]:
    eager, mine = row["sides"]["eager"], row["sides"][name]
    ratio = row["wall_ratios"][name].get("eager")
    times = [f"{side[clock]:.3f}" for clock in ("warm_ms", "wall_ms") for side in (eager, mine)]
    return *times, f"{1e3 * mine['host_ms']:.0f}", _times(ratio)


def _ms(side: Row | None) -> str:
    return "–" if side is None else f"{side['median_ms']:.3g}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _mb(side: Row | None) -> str:
    return "–" if side is None else f"{side['extra_bytes'] / 1e6:.1f}"


def text(rows: list[Row]) -> str:
    """The table for the screen."""
    table = lines(rows)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def markdown(slug: str, rows: list[Row]) -> str:
    table = lines(rows)
    table[0] += ("commit", "date")
    stamps = [_stamp(row) for row in rows for _ in row["ratios"]]
    body = [line + stamp for line, stamp in zip(table[1:], stamps, strict=True)]
    out = [f"# {slug}", "", *_machine(rows), "", _row(table[0]), _row(("---",) * len(table[0]))]
    return "\n".join([*out, *map(_row, body), "", *NOTES, ""])


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _stamp(row: Row) -> tuple[str, str]:
    p = row["provenance"]
    commit = (p["commit"] or "unknown")[:10] + ("+changes" if p["dirty"] else "")
    return commit, p["date"][:10]


def _machine(rows: list[Row]) -> list[str]:
    """Facts of the newest row; each row of the JSON has its own."""
    if not rows:
        return []
    row = max(rows, key=lambda r: r["provenance"]["date"])
    p, c = row["provenance"], row["ceilings"]
    flops = ", ".join(f"{k} {v:,.0f}" for k, v in c["gflops"].items())
    return [
        f"{p['device']}, {p['threads']} threads ({', '.join(p['cpu']['flags'])}); torch {p['torch']}, "
        f"triton {p['triton'] or 'not installed'}, Python {p['python']}.",
        f"Ceilings measured here: copy {c['copy_gbs']:.0f} GB/s (read + written), write {c['write_gbs']:.0f} "
        f"GB/s, exponentials {c['gexps']:.1f} G/s, Gflop/s: {flops}.",
    ]


NOTES = (
    "Medians over rounds in which every side runs once, in shuffled order, after all sides agreed with "
    "float64. × is the other side's median over ours. `forward` records no gradients, `backward` is timed "
    "alone. Extra MB is the peak that one call adds to the memory before it.",
    "The floor is the smallest algorithm's largest need (bytes, flops, exponentials) at the ceilings above. "
    "These were measured past the caches: more than 100 % means that data stayed in one. On a GPU, ms is "
    "device time with a cold L2, warm ms with what the same call left there; wall and host are the eager call's.",
    f"A row marked {BUSY} was measured while other processes held the CPUs, one marked {STALE} with compiled "
    "code older than its sources; neither is evidence, nor takes the place of a row that is. Written by the "
    "benches; the JSON beside this file has every row's quantiles and provenance.",
)
