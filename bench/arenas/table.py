"""An arena's results as Markdown: the verdict, the table, the search, and what was the same for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.arenas.verdict import complete, mean, own_text, row_of, sentences

WHY = Path(__file__).with_name("why")
COLUMNS = (  # title, key, factor, which way is better
    ("targets met %", "slo_attainment", 100, 1), ("TTFT's %", "met_ttft", 100, 1), ("TPOT's %", "met_tpot", 100, 1),
    ("TTFT mean ms", "mean_ttft_ms", 1, -1),
    ("TTFT P99 ms", "p99_ttft_ms", 1, -1), ("TPOT mean ms", "mean_tpot_ms", 1, -1),
    ("TPOT P99 ms", "p99_tpot_ms", 1, -1), ("JCT mean s", "mean_e2el_ms", 1e-3, -1),
    ("output tok/s", "output_throughput", 1, 1), ("GPU s", "gpu_seconds", 1, -1), ("rejected", "rejected", 1, -1),
    ("preempted", "num_preemptions", 1, -1), ("migrated", "num_migrations", 1, 0), ("moved GB", "bytes_moved", 1e-9, 0),
    ("KV peak %", "peak_kv_utilisation", 100, 0), ("prompt cached %", "cached_token_share", 100, 0),
)  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The whole page of one arena."""
    git = result["git"]
    state = str(git.get("commit"))[:12] + (" with uncommitted changes" if git.get("dirty") else "")
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    what = "windows of the trace" if result["windows"] else "seeds"
    parts = [
        f"# Arena: {result['arena'].replace('_', ' ')}", result["question"],
        f"Simulated, at commit {state}. Means over {what} {seeds}; each system at its defaults and at its own best "
        f"configuration, found on {what.split()[0]} {', '.join(str(seed) for seed in result['tuning_seeds'])} only.",
        "## Verdict", " ".join(sentences(result)), why(result["arena"]), "## Table", table(result),
        f"*best* is the search's choice; `*` marks the best of a column among rows that are no oracle. Intervals in "
        f"the text are 95% percentile-bootstrap intervals of the ratio of means over paired {what} (all resamples; "
        f"with five they are narrow for what they claim).",
        "## The same for all", "\n".join(f"- `{text}`" for text in result["common"]),
        "## What was searched", searched(result), "## Not designed for", limits(result),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def why(arena: str) -> str:
    """What was found out about the reasons, written by hand; empty where nothing was."""
    path = WHY / f"{arena}.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def table(result: dict[str, Any]) -> str:
    """A line per system and configuration."""
    rows = [row for row in result["rows"] if row["kind"] == "default" or row["own"]]
    marks = {key: _best([row for row in rows if complete(row) and not row["oracle"]], key, way)
             for _, key, _, way in COLUMNS if way}  # fmt: skip
    lines = ["| system | " + " | ".join(title for title, *_ in COLUMNS) + " |", "|---|" + "---:|" * len(COLUMNS)]
    for row in rows:
        name = row["system"] + (" (oracle)" if row["oracle"] else "") + (", *best*" if row["own"] else "")
        if not complete(row):
            error = next(run["error"] for run in row["runs"] if "error" in run)
            lines.append(f"| {name} | {error} |" + " |" * (len(COLUMNS) - 1))
            continue
        cells = []
        for _, key, factor, _ in COLUMNS:
            value = mean(row, key)
            mark = "\\*" if value == marks.get(key) and not row["oracle"] else ""
            shown = value * factor
            cells.append((f"{shown:,.3g}" if abs(shown) < 100 else f"{shown:,.0f}") + mark)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(rows: list[dict[str, Any]], key: str, way: int) -> float | None:
    found = [mean(row, key) for row in rows]
    return (max if way > 0 else min)(found) if len(set(found)) > 1 else None


def searched(result: dict[str, Any]) -> str:
    """Per system: how many configurations were tried, and the choice."""
    objective = result["objective"]
    rule = ("the highest share of requests that meet the targets, ties by mean JCT"
            if objective["metric"] == "slo_attainment" else
            f"the fewest GPU-seconds among those that meet the targets for {100 * objective['floor']:.0f}% of requests "
            "on every tuning seed")
    lines = [f"Objective: {rule}. One pass over the axes of `conf/arena`; all tries are in the JSON beside it.", ""]
    for system in dict.fromkeys(row["system"] for row in result["rows"]):
        row = row_of(result, system, "best")
        failed = [one for one in row["search"]["tried"] if one["error"]]
        note = f" ({len(failed)} could not run)" if failed else ""
        lines.append(f"- `{system}`: {len(row['search']['tried'])} tried{note}; best: {own_text(row)}")
    return "\n".join(lines)


def limits(result: dict[str, Any]) -> str:
    """What each system was not made for."""
    return "\n".join(f"- `{system}`: {what}" for system, what in result["not_for"].items() if what)
