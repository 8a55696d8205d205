"""A comparison as text for the terminal, as Markdown, as JSON and as figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.comparison import DIFFERENCES, Comparison, Difference
from common.console import BEST_NOTE, LATENCIES, Column, metric_columns, wrapped
from common.provenance import provenance_line
from common.results import replacing
from common.runs import LoadedRun

WIDTH = 120
STATS = {"mean": "mean", "median": "P50", "p90": "P90", "p99": "P99", "p999": "P99.9"}
NAMES = {**{key: title.split(" (")[0] for key, title in LATENCIES.items()}, "e2el": "JCT"}


def _latencies(*keys: str) -> tuple[Column, ...]:
    return tuple((f"{stat}_{key}_ms", f"{NAMES[key]} {shown}", 1, -1) for key in keys for stat, shown in STATS.items())


BLOCKS: dict[str, tuple[Column, ...]] = {
    "Latency, ms: first token (TTFT) and per output token (TPOT)": _latencies("ttft", "tpot"),
    "Latency, ms: between tokens (ITL) and end to end (JCT)": _latencies("itl", "e2el"),
    "Throughput, goodput and GPUs": (
        ("completed", "finished", 1, 0), ("request_throughput", "requests /s", 1, 1),
        ("output_throughput", "output tok/s", 1, 1), ("goodput", "goodput req/s", 1, 1),
        ("slo_attainment", "SLO met %", 100, 1), ("mean_num_gpus", "GPUs mean", 1, -1),
        ("peak_num_gpus", "GPUs peak", 1, -1), ("gpu_seconds", "GPU s", 1, -1),
    ),
    "Memory and movement": (
        ("mean_kv_utilisation", "KV mean %", 100, 0), ("peak_kv_utilisation", "KV peak %", 100, 0),
        ("num_preemptions", "preemp- tions", 1, -1), ("num_migrations", "migra- tions", 1, 0),
        ("bytes_moved", "moved GB", 1e-9, 0), ("cached_token_share", "prompt cached %", 100, 0),
    ),
}  # fmt: skip


def text(comparison: Comparison, width: int = WIDTH) -> str:
    """The one table, in blocks for a terminal of `width` columns, each under its title."""
    rows = [row.averaged() for row in comparison.rows]
    parts = [provenance_line([run.manifest for row in comparison.rows for run in row.runs])]
    for title, block in BLOCKS.items():
        table = wrapped(["run", *(run.name for run in rows)], metric_columns(rows, block), width)
        parts.append(f"{title}\n{table}" if table else "")
    parts.append(BEST_NOTE)
    columns = difference_columns(comparison)
    if columns:
        names = ["", *(row.name for row in comparison.rows if row.name != comparison.baseline)]
        parts.append(f"against {comparison.baseline}:\n" + wrapped(names, columns, width))
    parts.append("\n".join(f"note: {note}" for note in comparison.notes))
    limits = not_for(comparison)
    if limits:
        parts.append("not designed for:\n" + "\n".join(f"  {name:<14} {what}" for name, what in limits))
    return "\n\n".join(part for part in parts if part)


def not_for(comparison: Comparison) -> list[tuple[str, str]]:
    """(system, what it was not designed for), from the configuration of its runs."""
    out: dict[str, str] = {}
    for row in comparison.rows:
        system: Any = row.runs[0].config.get("system")
        if isinstance(system, dict) and system.get("not_for"):
            out.setdefault(str(system.get("name", row.name)), str(system["not_for"]))
    return list(out.items())


def shown(difference: Difference) -> str:
    """'-12% [-15, -9]': the change and its interval, in percent."""
    digits = 0 if abs(difference.change) >= 0.1 else 1
    change = f"{100 * difference.change:+.{digits}f}%"
    if difference.interval is None:
        return change
    low, high = (f"{100 * value:+.{digits}f}" for value in difference.interval)
    return f"{change} [{low}, {high}]"


def difference_columns(comparison: Comparison) -> list[list[str]]:
    """Two lines of heading, then a cell per row beside the baseline: '-12% [-15, -9]'."""
    others = [row.name for row in comparison.rows if row.name != comparison.baseline]
    by = {(difference.metric, difference.row): shown(difference) for difference in comparison.differences}
    out = []
    for key, name in DIFFERENCES:
        cells = [by.get((key, row), "-") for row in others]
        if any(cell != "-" for cell in cells):
            out.append([*name.rsplit(" ", 1), *cells])
    return out


def markdown(comparison: Comparison) -> str:
    """The same as Markdown."""
    rows = [row.averaged() for row in comparison.rows]
    parts = ["# Comparison", provenance_line([run.manifest for row in comparison.rows for run in row.runs])]
    for title, block in BLOCKS.items():
        columns = metric_columns(rows, block)
        if columns:
            parts += [f"## {title}", _pipes(["run", *(run.name for run in rows)], columns)]
    parts.append(BEST_NOTE.replace("*", "`*`", 1))
    columns = difference_columns(comparison)
    if columns:
        others = [row.name for row in comparison.rows if row.name != comparison.baseline]
        parts += [f"## Against {comparison.baseline}", _pipes(["run", *others], columns)]
    parts.append("\n".join(f"- {note}" for note in comparison.notes))
    limits = not_for(comparison)
    if limits:
        parts += ["## Not designed for", "\n".join(f"- `{name}`: {what}" for name, what in limits)]
    return "\n\n".join(parts) + "\n"


def _pipes(names: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    head = [heading(column) for column in columns]
    lines = ["| " + " | ".join([names[0], *head]) + " |", "|---|" + "---:|" * len(columns)]
    for i, name in enumerate(names[1:]):
        lines.append("| " + " | ".join([name, *(column[i + 2].strip() for column in columns)]) + " |")
    return "\n".join(lines)


def heading(column: Sequence[str]) -> str:
    """A column's two lines of heading as one: 'TTFT mean', 'preemptions'."""
    first, second = column[0].strip(), column[1].strip()
    return first[:-1] + second if first.endswith("-") else f"{first} {second}".strip()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every metric of every seed, the means, and the differences."""
    return {
        "label": provenance_line([run.manifest for row in comparison.rows for run in row.runs]),
        "baseline": comparison.baseline,
        "rows": [
            {"name": row.name, "seeds": list(row.seeds), "runs": [run.path.name for run in row.runs],
             "mean": {key: row.mean(key) for key in row.runs[0].summary},
             "per_seed": {key: row.values(key) for key in row.runs[0].summary}}
            for row in comparison.rows
        ],
        "differences": [
            {"metric": d.metric, "row": d.row, "change": d.change, "interval": d.interval, "num_seeds": d.num_seeds}
            for d in comparison.differences
        ],
        "notes": list(comparison.notes),
        "not_designed_for": dict(not_for(comparison)),
    }  # fmt: skip


def files(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.json, comparison.md and the figures (of each row's first seed); the paths to name."""
    from common.plots import draw_comparison

    for name, content in (
        ("comparison.json", json.dumps(as_json(comparison), indent=1, default=str) + "\n"),
        ("comparison.md", markdown(comparison)),
    ):
        with replacing(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    written = [folder / "comparison.md", folder / "comparison.json"]
    if all((run.config.get("run") or {}).get("figures", True) for run in _runs(comparison)):
        drawn = draw_comparison([row.averaged() for row in comparison.rows], folder, comparison)
        written += [path for path in drawn if path.suffix == ".png"]
    return written


def _runs(comparison: Comparison) -> list[LoadedRun]:
    return [run for row in comparison.rows for run in row.runs]
