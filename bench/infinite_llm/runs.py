"""What the experiments of Infinite-LLM share: runs, the numbers that are compared, tables and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import run, write_report
from common.build import cluster_model
from common.config import compose
from common.metrics import summarize
from common.plots.style import save
from common.predictions import Tokens
from common.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "infinite_llm"
FIGURES = ROOT / "results" / "figures" / "infinite_llm"
SEEDS = (0, 1, 2)
QUIET = ("run.sample_ms=2000",)
SYSTEMS = {"vllm_multi": ("system=vllm_multi",), "vllm_single": ("system=vllm_single",), "dcp": ("system=dcp",),
           "proactive": ()}  # fmt: skip
Row = dict[str, Any]
KEPT = ("output_throughput", "total_token_throughput", "p99_e2el_ms", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
        "p99_tpot_ms", "num_preemptions", "completed", "rejected", "duration_s")  # fmt: skip
CREDITOR = ("creditor_slowdown", "creditor_tpot_serving_ms", "creditor_tpot_alone_ms", "remote_served_s",
            "creditor_tokens_serving")  # fmt: skip


def simulate(experiment: str, *overrides: str) -> RunRecord:
    """Run conf/experiment/infinite_llm/<experiment>.yaml with changes. A part of a run is no result."""
    _, record = run([f"experiment=infinite_llm/{experiment}", *QUIET, *overrides])
    if record.partial:
        raise SystemExit(f"{experiment} {' '.join(overrides)}: {record.stopped}")
    return record


@cache
def tokens_each(experiment: str, *overrides: str) -> int:
    """Tokens that one instance's KV memory holds."""
    model = cluster_model(compose([f"experiment=infinite_llm/{experiment}", *overrides]))
    return model.instances[0].kv_cells // model.instances[0].num_layers * model.block_size


def measure(experiment: str, *overrides: str) -> Row:
    """One run's numbers. `window_tps`: output tokens per second from a quarter of the arrivals' time to the last one,
    which does not hang on the one request that ends last, as tokens / duration does. `normal_ms`: end-to-end latency
    per output token, of the requests that one instance could hold alone (so of the same ones under every system)."""
    record = simulate(experiment, *overrides)
    config = compose([f"experiment=infinite_llm/{experiment}", *overrides])
    found = summarize(record, config.slo, config.cluster.tp)
    columns = record.requests
    names = ("arrival_ns", "finish_ns", "prompt_tokens", "output_tokens")
    arrival, finish, prompt, output = (np.array(getattr(columns, name), np.float64) for name in names)
    last = int(arrival.max())
    every = tuple(range(config.cluster.num_instances))
    alone = (finish >= 0) & (prompt + output <= tokens_each(experiment, "system=vllm"))
    row: Row = {key: found.get(key) for key in (*KEPT, *CREDITOR)}
    row["window_tps"] = Tokens(record).per_second(every, last // 4, last)
    row["normal_ms"] = float(np.mean((finish - arrival)[alone] / output[alone])) / 1e6
    row["served_tokens"] = float((prompt + output)[finish >= 0].sum())
    row["moved_gb"] = float(found["bytes_moved"] or 0) / 1e9
    row["moves"] = found.get("num_moves_made") or 0
    row["kv_utilisation"] = found["mean_kv_utilisation"]
    print(experiment, *overrides, f"{row['window_tps']:.0f} tokens/s", file=sys.stderr, flush=True)
    return row


def span(values: Sequence[float | None], form: str = ".1f", scale: float = 1.0) -> str:
    """Median and range over seeds."""
    some = [value * scale for value in values if value is not None]
    if not some:
        return ""
    if len(some) == 1:
        return f"{some[0]:{form}}"
    return f"{np.median(some):{form}} ({min(some):{form}}..{max(some):{form}})"


def against(rows: Sequence[Row], base: Sequence[Row], key: str = "window_tps") -> str:
    """Change in % against the same seeds of another system: median and range."""
    theirs = {row["seed"]: row[key] for row in base}
    return span([row[key] / theirs[row["seed"]] - 1 for row in rows if theirs.get(row["seed"])], "+.1f", 100)


def only(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def line(rows: Sequence[Row], base: Sequence[Row]) -> Row:
    """Service, over seeds."""
    return {
        "output tokens/s while requests arrive": span([row["window_tps"] for row in rows], ".0f"),
        "against vllm_multi, %": against(rows, base),
        "tokens / duration, %": against(rows, base, "output_throughput"),
        "latency per output token, ms": span([row["normal_ms"] for row in rows], ".0f"),
        "mean TPOT, ms": span([row["mean_tpot_ms"] for row in rows]),
        "mean TTFT, s": span([row["mean_ttft_ms"] for row in rows], ".1f", 1e-3),
        "P99 TTFT, s": span([row["p99_ttft_ms"] for row in rows], ".0f", 1e-3),
        "preemptions": span([row["num_preemptions"] for row in rows], ".0f"),
        "refused": span([row["rejected"] for row in rows], ".0f"),
        "moved, GB": span([row["moved_gb"] for row in rows], ".0f"),
    }


def serving(rows: Sequence[Row]) -> Row:
    """What creditors' own requests pay, over seeds."""
    return {
        "time given to others, s": span([row["remote_served_s"] for row in rows], ".1f"),
        "own tokens made meanwhile": span([row["creditor_tokens_serving"] for row in rows], ".0f"),
        "their iterations longer by, %": span([row["creditor_slowdown"] for row in rows], ".2f", 100),
        "ms per own token while serving": span([row["creditor_tpot_serving_ms"] for row in rows]),
        "else": span([row["creditor_tpot_alone_ms"] for row in rows]),
    }


def keep(name: str, title: str, notes: list[str], tables: dict[str, list[Row]]) -> None:
    """results/infinite_llm/<name>.{json,md}."""
    notes = ["Simulated. " + notes[0], *notes[1:]]
    write_report(name, title, notes, {key: rows for key, rows in tables.items() if rows}, RESULTS)


def draw(figure: Any, name: str, label: str = "simulated: bench/infinite_llm") -> None:
    """results/figures/infinite_llm/<name>.{png,pdf}."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.text(0.005, 0.005, label, fontsize=7, color="#555555")
    save(figure, FIGURES, name)


def band(axis: Any, x: Sequence[float], groups: Sequence[Sequence[float]], **style: Any) -> None:
    """Medians as a line, the range over seeds as a band."""
    some = [(at, values) for at, values in zip(x, groups) if len(values)]
    at = [item[0] for item in some]
    axis.plot(at, [float(np.median(item[1])) for item in some], marker="o", ms=3, **style)
    axis.fill_between(at, [min(item[1]) for item in some], [max(item[1]) for item in some], color=style.get("color"),
                      alpha=0.15, lw=0)  # fmt: skip
