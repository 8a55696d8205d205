"""What the experiments of KunServe share: runs, the demand for KV over time, numbers, claims, reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.harness import latencies, run, write_report
from common.config import RunConfig, compose
from common.metrics import as_numpy, summarize
from common.plots.style import new_figure, save, styled
from common.record import RunRecord

Floats = npt.NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "kunserve"
FIGURES = ROOT / "results" / "figures" / "kunserve"
# The first is what the others are compared with. Those that conf/system lacks are left out, so that they join when
# they are there. Oracles know or have what no system can, and are never the best baseline.
DECLARED = ("vllm", "vllm_pp", "infercept", "llumnix", "kunserve", "infinite_kv", "static_pp")
ORACLES = ("infinite_kv", "static_pp")
UNLIMITED = "engine.kv_blocks=1000000"
QUIET = ("run.sample_ms=500", "log.segments=false")
PERCENTS = (50.0, 99.0, 99.9)


class Found(NamedTuple):
    """One run."""

    config: RunConfig
    record: RunRecord
    summary: dict[str, Any]


def systems(oracles: bool = True) -> list[str]:
    """The declared systems that exist here, in order."""
    names = [name for name in DECLARED if (ROOT / "conf" / "system" / f"{name}.yaml").exists()]
    return [name for name in names if oracles or name not in ORACLES]


@cache
def simulate(experiment: str, *overrides: str) -> Found:
    """Run conf/experiment/kunserve/<experiment>.yaml with changes; nothing is run twice in one process."""
    config, record = run([f"experiment=kunserve/{experiment}", *QUIET, *overrides])
    if record.partial:  # interrupted or stalled: a part of a run is no result
        raise SystemExit(f"{experiment} {' '.join(overrides)}: {record.stopped}")
    return Found(config, record, summarize(record, config.slo, config.cluster.tp))


def best_static(experiment: str, *overrides: str) -> Found:
    """The oracle "static best PP": of all depths that divide the cluster, the one with the least P99 TTFT here."""
    num = compose([f"experiment=kunserve/{experiment}"]).cluster.num_instances
    depths = [depth for depth in range(1, num + 1) if num % depth == 0]
    found = [simulate(experiment, "system=static_pp", f"system.stages={depth}", *overrides) for depth in depths]
    return min(found, key=lambda one: float(numbers(one)["p99_ttft_ms"]))


def played(experiment: str, name: str, seed: int) -> Found:
    """One of the declared systems on an experiment."""
    if name == "static_pp":
        return best_static(experiment, f"seed={seed}")
    free = ("engine.kv_blocks=null",) if name == "infinite_kv" else ()
    return simulate(experiment, f"system={name}", f"seed={seed}", *free)


def bubbles(found: Found, begin_s: float, end_s: float) -> float:
    """Percent of the time that stages of pipelines at work idled between two times."""
    rows = found.record.stages
    start, end, busy = (as_numpy(column) / 1e9 for column in (rows.start_ns, rows.end_ns, rows.busy_ns))
    inside = (start >= begin_s) & (end <= end_s)
    return float(100 * (1 - busy[inside].sum() / (end - start)[inside].sum())) if inside.any() else float("nan")


def demand(record: RunRecord) -> tuple[Floats, Floats, Floats]:
    """Seconds, KV blocks in use and KV blocks there are, of the whole cluster, at every sample."""
    rows = record.timeline
    times, place = np.unique(as_numpy(rows.time_ns), return_inverse=True)
    used, have = (np.bincount(place, as_numpy(column)).astype(np.float64)
                  for column in (rows.kv_used_blocks, rows.kv_capacity_blocks))  # fmt: skip
    return times / 1e9, used, have


def mean_until(seconds: Floats, values: Floats, end_s: float) -> float:
    """Mean over time from 0 to `end_s` of a quantity that is sampled."""
    within = seconds <= end_s
    return float(np.trapezoid(values[within], seconds[within]) / end_s)


def numbers(found: Found) -> dict[str, Any]:
    """Percentiles of TTFT and TPOT in ms, throughput, and counts."""
    times = latencies(found.record)
    out: dict[str, Any] = {}
    for name, values in (("ttft", times.ttft), ("tpot", times.tpot)):
        points = np.percentile(values, PERCENTS)
        out |= {f"{label}_{name}_ms": float(at) for label, at in zip(("p50", "p99", "p999"), points)}
    out["output_tokens_per_s"] = found.summary["output_throughput"]
    out["preemptions"] = found.summary["num_preemptions"]
    out["unfinished"] = found.summary["live_at_end"] + found.summary["rejected"]
    out["drops"] = marked(found.record, "drop")
    out["stages idle, %"] = 100 * (found.summary.get("stage_idle_share") or 0.0)  # of the time pipelines are at work
    out["stalled by exchange"] = found.summary.get("num_parked_stalls") or 0
    out["mean_stall_ms"] = found.summary.get("mean_parked_stall_ms") or 0.0
    out["moved_gb"] = found.summary.get("copy_gb") or 0.0
    return out


def marked(record: RunRecord, kind: str) -> int:
    """How often the policy noted this."""
    return sum(mark[2] == kind for mark in record.marks)


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of every number over seeds."""
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]}


def claim(paper: str, ours: str, why: str) -> dict[str, str]:
    """One line of the table that every report ends with."""
    return {"paper says": paper, "we measure (simulated)": ours, "why they differ": why}


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Median and range over seeds."""
    return f"{np.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def keep(name: str, title: str, notes: list[str], tables: dict[str, list[dict[str, Any]]]) -> None:
    """results/kunserve/<name>.{json,md}."""
    write_report(name, f"{title} (simulated)", ["Simulated. " + notes[0], *notes[1:]], tables, RESULTS)


def draw(figure: Any, name: str) -> None:
    """results/figures/kunserve/<name>.{png,pdf}, with the label that every figure has."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.text(0.005, 0.005, "simulated: bench/kunserve", fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    save(figure, FIGURES, name)


__all__ = ["Found", "bubbles", "claim", "demand", "draw", "keep", "marked", "mean_until", "medians", "new_figure",
           "numbers", "played", "simulate", "spread", "styled", "systems"]  # fmt: skip
