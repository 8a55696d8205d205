"""Small matrices of simulated runs, compared exactly with results/baselines/*.json (`python -m bench.regress`).

`HARNESS`: the baseline system through the features of the harness. `SYSTEMS`: four systems on four workloads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import run
from common.metrics import summarize
from common.record import RunRecord

BASELINE = Path(__file__).resolve().parent.parent / "results" / "baselines" / "golden.json"
SMALL = ["cluster.num_instances=2", "engine.max_num_seqs=64", "run.sample_ms=1000"]
MATRIX: dict[str, list[str]] = {
    "burst": ["workload=burst", "workload.rate=10", "workload.duration_s=60", "workload.first_burst_s=20"],
    "burst, little memory": ["workload=burst", "workload.rate=10", "workload.duration_s=60", "engine.kv_blocks=900"],
    "burst, prefill first": ["workload=burst", "workload.rate=10", "workload.duration_s=60",
                             "engine.scheduler=prefill_first"],
    "sessions, prefix caching": ["workload=sessions", "workload.num_requests=200", "engine.prefix_caching=true"],
    "shared prefix, little memory": ["workload=shared_prefix", "workload.num_requests=200", "workload.rate=8",
                                     "engine.prefix_caching=true", "engine.kv_blocks=800"],
    "closed loop": ["workload=closed_loop", "workload.concurrency=24", "workload.num_requests=120"],
    "diurnal, an instance lost": ["workload=diurnal", "workload.duration_s=90", "cluster.lost=[[30,1]]"],
    "70B at TP2": ["workload=burst", "workload.rate=2", "workload.duration_s=60", "model=llama2-70b",
                   "hardware=a100-80g", "cluster.tp=2"],
    "in-engine tables, uneven lengths": ["workload=burst_sharegpt", "workload.rate=4", "workload.duration_s=40",
                                         "model=llama3.1-8b", "hardware=rtxpro6000"],
    "L40S at TP2": ["workload=poisson", "workload.rate=3", "workload.num_requests=150", "model=llama3.1-8b",
                    "hardware=l40s", "cluster.tp=2"],
    "long context, round robin": ["workload=long_context", "workload.num_requests=60", "system.dispatch=round_robin",
                                  "engine.max_model_len=131072"],
}  # fmt: skip
TIGHT = ["cluster.num_instances=4", "model=llama2-7b", "hardware=a100-80g"]
ARENAS: dict[str, list[str]] = {
    "burst, little memory": [*TIGHT, "workload=burst", "workload.rate=8", "workload.duration_s=30",
                             "workload.first_burst_s=8", "engine.kv_blocks=500"],
    "poisson": [*TIGHT, "workload=poisson", "workload.rate=6", "workload.num_requests=120"],
    "sessions": [*TIGHT, "workload=sessions", "workload.num_requests=100"],
    "long context": [*TIGHT, "workload=long_context", "workload.num_requests=30", "engine.max_model_len=131072"],
}  # fmt: skip
KEYS = ("completed", "rejected", "duration_s", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms",
        "mean_itl_ms", "p99_e2el_ms", "num_preemptions", "cached_token_share", "output_throughput")  # fmt: skip


def digest(record: RunRecord) -> str:
    """Of every per-request column."""
    columns = record.requests
    sha = hashlib.sha256()
    for column in (columns.arrival_ns, columns.first_token_ns, columns.finish_ns, columns.prompt_tokens,
                   columns.output_tokens, columns.status, columns.num_preemptions, columns.cached_tokens,
                   columns.instance):  # fmt: skip
        sha.update(column.tobytes())
    return sha.hexdigest()


@dataclass(frozen=True)
class Matrix:
    """Cells of one baseline file: overrides by case, the seeds, and the metrics that are compared."""

    baseline: Path
    cases: dict[str, list[str]]
    keys: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1)

    def cells(self) -> list[tuple[str, int]]:
        """All (case, seed)."""
        return [(case, seed) for case in self.cases for seed in self.seeds]

    def measure(self, case: str, seed: int) -> dict[str, Any]:
        """One cell of the matrix."""
        config, record = run([*SMALL, *self.cases[case], f"seed={seed}"])
        summary = summarize(record, config.slo, config.cluster.tp)
        return {"requests_sha256": digest(record), "num_events": record.num_events,
                **{key: summary[key] for key in self.keys}}  # fmt: skip

    def read(self) -> dict[str, Any]:
        """The baselines: reasons, and metrics by cell."""
        old: dict[str, Any] = {"reasons": [], "cells": {}}
        return json.loads(self.baseline.read_text()) if self.baseline.exists() else old


HARNESS = Matrix(BASELINE, MATRIX, KEYS)
SYSTEMS = Matrix(
    BASELINE.with_name("systems.json"),
    {f"{system}: {name}": [f"system={system}", *overrides]
     for system in ("kunserve", "infinite_llm", "memserve", "mell") for name, overrides in ARENAS.items()},
    (*KEYS, "num_migrations", "bytes_moved", "gpu_seconds", "peak_kv_utilisation"),
)  # fmt: skip


def moved(matrix: Matrix, case: str, seed: int, found: dict[str, Any], baselines: dict[str, Any]) -> list[str]:
    """What moved in one cell, by how much: a line per metric."""
    wanted = baselines["cells"].get(f"{case}/{seed}")
    if wanted is None:
        return [f"{case}, seed {seed}: no baseline in {matrix.baseline.name} (bless one)"]
    keys = [*found, *(key for key in wanted if key not in found)]
    pairs = [(key, wanted.get(key), found.get(key)) for key in keys]
    return [f"{case}, seed {seed}: {key} was {old}, is {new}{_by(old, new)}" for key, old, new in pairs if old != new]


def _by(old: Any, new: Any) -> str:
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    return f" ({100 * (new / old - 1):+.3g}%)" if numbers and old else ""
