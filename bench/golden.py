"""python -m bench.golden: a small matrix of simulated runs, compared exactly with results/baselines/golden.json.

Exits 1 and names what moved. `--bless "why"` writes new baselines with the reason. CI runs the same comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from bench.harness import run
from common.metrics import summarize
from common.record import RunRecord
from common.results import replacing

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


def measure(case: str, seed: int) -> dict[str, Any]:
    """One cell of the matrix."""
    config, record = run([*SMALL, *MATRIX[case], f"seed={seed}"])
    summary = summarize(record, config.slo, config.cluster.tp)
    return {"requests_sha256": digest(record), "num_events": record.num_events, **{key: summary[key] for key in KEYS}}


def cells() -> list[tuple[str, int]]:
    """All (case, seed)."""
    return [(case, seed) for case in MATRIX for seed in (0, 1)]


def differences(case: str, seed: int, expected: dict[str, Any]) -> list[str]:
    """What moved in one cell, by how much."""
    wanted = expected["cells"].get(f"{case}/{seed}")
    if wanted is None:
        return [f"{case}, seed {seed}: no baseline (bless one)"]
    found = measure(case, seed)
    return [f"{case}, seed {seed}: {key} was {wanted.get(key)}, is {value}"
            for key, value in found.items() if wanted.get(key) != value]  # fmt: skip


def main() -> int:
    """Compare or bless."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bless", metavar="WHY", help="write new baselines; the reason goes into the file")
    options = parser.parse_args()
    old: dict[str, Any] = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"reasons": [], "cells": {}}
    if options.bless:
        fresh = {f"{case}/{seed}": measure(case, seed) for case, seed in cells()}
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        with replacing(BASELINE) as path:
            path.write_text(json.dumps({"reasons": [*old["reasons"], options.bless], "cells": fresh}, indent=1) + "\n")
        return 0
    moved = [line for case, seed in cells() for line in differences(case, seed, old)]
    print("\n".join(moved) if moved else f"{len(cells())} cells unchanged")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
