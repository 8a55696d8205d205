"""python -m bench.worker_cost --base FILE: what an iteration costs beyond its operators when a worker runs it.

Closed loops of 1 to 16 equal requests on one worker, by the wall clock: from token to token nothing happens but one
iteration, its order, its answer and their books. CPU seconds of worker and policy process count, as they work one after
the other, and as neighbours on the cores change them less than the clock; the fastest tenth of the tokens is beside
them. What is left beyond the operators of FILE (python -m common.cost.fit --measure) is fitted as host time, so much
an iteration and so much a request; with FILE's other numbers it makes a new hardware file."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.comm import beside
from bench.dist_fidelity import MODEL, OUT, run_workers
from bench.harness import exit_with, latencies, write_report
from common.build import cluster_model
from common.config import RunConfig, compose
from common.cost.model import InstanceCost
from common.cost.profile import nonnegative
from common.errors import ConfigError

BATCHES = (1, 2, 4, 8, 16)
PROMPT, OUTPUT, ROUNDS = 16, 9, 30  # all prompts of a loop fit in one iteration


def loop(base: Path, batch: int) -> list[str]:
    """A closed loop of so many requests, `ROUNDS` times."""
    return ["system=vllm", *MODEL, f"hardware={base}", "cluster.num_instances=1", "engine.kv_blocks=200",
            "workload=closed_loop", f"workload.concurrency={batch}", f"workload.num_requests={batch * ROUNDS}",
            "workload.lengths=fixed", f"workload.prompt_tokens={PROMPT}",
            f"workload.output_tokens={OUTPUT}"]  # fmt: skip


def operators_ns(config: RunConfig, batch: int) -> float:
    """What the operators of a decode iteration take in the middle of such a request."""
    cost = cluster_model(config).cost(config.model.num_layers, True, True)
    assert isinstance(cost, InstanceCost)
    bare = replace(cost.engine, host_ns=0, host_per_seq_ns=0)
    alone = InstanceCost(config.model, config.hardware, engine=bare)
    return float(alone.iteration_ns([], batch, batch * (PROMPT + OUTPUT // 2), batch))


def measure(base: Path) -> list[dict[str, Any]]:
    """A row for each batch."""
    rows = []
    for batch in BATCHES:
        overrides = loop(base, batch)
        record, spent = run_workers(overrides)
        tpot_ms = latencies(record).tpot
        worker, policy = spent["CPU, at the worker"], spent["CPU, in the policy process"]
        rows.append({"requests": batch, "operators (ms)": operators_ns(compose(overrides), batch) / 1e6,
                     "CPU, at the worker (ms)": worker, "CPU, in the policy process (ms)": policy,
                     "CPU (ms)": worker + policy, "clock, P10 (ms)": float(np.percentile(tpot_ms, 10)),
                     "clock, P50 (ms)": float(np.percentile(tpot_ms, 50))})  # fmt: skip
    return rows


def fit(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Host time in ns: of an iteration, and of each of its requests."""
    batch, took, device = (np.array([row[key] for row in rows]) for key in ("requests", "CPU (ms)", "operators (ms)"))
    shape = np.stack([np.ones(len(rows)), batch], axis=1)
    host = nonnegative(shape, (took - device) * 1e6, 1.0 / took)
    for row, value in zip(rows, shape @ host):
        row["with host time (ms)"] = row["operators (ms)"] + value / 1e6
    return float(host[0]), float(host[1])


def write_profile(base: Path, name: str, host: tuple[float, float]) -> Path:
    """The hardware file with these host times; its grid beside it."""
    import yaml

    values = yaml.safe_load(base.read_text(encoding="utf-8"))
    values.update(name=name, host_ns=max(1, int(host[0])), host_per_seq_ns=max(1, int(host[1])),
                  provenance=f"{values.get('provenance', '')}; host times: python -m bench.worker_cost")  # fmt: skip
    return beside(base, values)


def main() -> int:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.worker_cost", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="a measured hardware file")
    parser.add_argument("--name", default="measured-workers", help="of the hardware file that gets the host times")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not options.base.is_file():
        raise ConfigError(f"--base {options.base}: no such file")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = measure(options.base)
    host_ns, each_ns = fit(rows)
    path = write_profile(options.base, options.name, (host_ns, each_ns))
    worst = max(abs(row["with host time (ms)"] / row["CPU (ms)"] - 1) for row in rows)
    notes = [
        f"Measured: tiny_llama in float32, one worker and the policy process on {os.cpu_count()} cores, shared with "
        f"others (load {load:.1f} to {os.getloadavg()[0]:.1f}); torch {torch.__version__}; {ROUNDS} rounds of a closed "
        f"loop of equal requests ({PROMPT} + {OUTPUT} tokens).",
        f"Host time: {host_ns / 1e3:,.0f} us an iteration and {each_ns / 1e3:,.0f} us a request; with it the CPU times "
        f"of these loops are met within {worst:.0%}. Hardware file: {path.name}.",
    ]
    write_report("worker_cost", "What a worker's iteration costs beyond its operators", notes, {"Iterations": rows},
                 options.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    exit_with(main)
