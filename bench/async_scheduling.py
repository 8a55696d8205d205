"""python -m bench.async_scheduling: what it gains that a worker knows its next iteration before it has answered the
present one (`runtime.async_scheduling`, `common.executors.ahead`), by the wall clock.

Closed loops of equal requests on one worker, and a Poisson trace on two, each with it and without it in turn, several
times; the ratio of each pair, and the median of the ratios, count. An order that is not needed after all costs its
worker an iteration at most: so times to first token are there as well."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import exit_with, latencies, write_report
from bench.workers import MODEL, OUT, iteration_ms, run_workers
from common.errors import ConfigError

FIXED = ["workload.lengths=fixed", "workload.prompt_tokens=64", "workload.output_tokens=48"]
LOOP = ["cluster.num_instances=1", "workload=closed_loop", *FIXED]
CASES = {
    "closed loop of 1": [*LOOP, "workload.concurrency=1", "workload.num_requests=12"],
    "closed loop of 4": [*LOOP, "workload.concurrency=4", "workload.num_requests=48"],
    "closed loop of 16": [*LOOP, "workload.concurrency=16", "workload.num_requests=96"],
    "Poisson, 8 requests/s on two": ["cluster.num_instances=2", "workload=poisson", "workload.rate=8",
                                     "workload.num_requests=60", *FIXED],
}  # fmt: skip


def once(case: str, wanted: bool) -> dict[str, float]:
    """One run, in ms."""
    options = ["system=vllm", *MODEL, "hardware=cpu", "cost.traits=device-only", "engine.kv_blocks=400", *CASES[case]]
    record, spent, report = run_workers([*options, f"runtime.async_scheduling={str(wanted).lower()}"])
    found, ahead = latencies(record), report["iterations_ahead"]
    return {"P50 TPOT (ms)": float(np.median(found.tpot)), "P50 TTFT (ms)": float(np.median(found.ttft)),
            "P99 TTFT (ms)": float(np.percentile(found.ttft, 99)), "an iteration (ms)": iteration_ms(record),
            "at the worker (ms)": spent["clock, at the worker"],
            "ordered ahead": ahead["ordered"] / report["stages"],
            "dropped": 1 - ahead["used"] / ahead["ordered"] if ahead["ordered"] else 0.0}  # fmt: skip


def compare(case: str, rounds: int) -> list[dict[str, Any]]:
    """Rows: without, with, and the median ratio of pairs."""
    pairs = [(once(case, False), once(case, True)) for _ in range(rounds)]
    rows: list[dict[str, Any]] = []
    for name, side in (("without", 0), ("with", 1)):
        rows.append({"": name, **{key: float(np.median([pair[side][key] for pair in pairs])) for key in pairs[0][0]}})
    ratios = {key: float(np.median([pair[1][key] / pair[0][key] for pair in pairs]))
              for key in pairs[0][0] if key.endswith("(ms)")}  # fmt: skip
    return [*rows, {"": "with / without", **ratios, "ordered ahead": None, "dropped": None}]


def main() -> int:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.async_scheduling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: give at least 1")
    torch.set_num_threads(1)
    tables = {case: compare(case, options.rounds) for case in CASES}
    notes = [
        f"Measured: tiny_llama in float32 on workers of one machine, torch {torch.__version__}; medians of "
        f"{options.rounds} pairs of runs in turn. `ordered ahead`: share of all iterations; `dropped`: of those, what "
        "an interrupt made needless.",
    ]
    write_report("async_scheduling", "A worker that knows its next iteration", notes, tables, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
