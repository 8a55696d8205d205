"""python -m bench.local_fidelity: does the simulator say what the engine does on this device?

The same trace three times under the same policy: `runtime=local` with the measured clock, the same again counting the
CPU time of the engine's thread (a CPU that others use as well makes wall time say what the others did), and
`runtime=sim` over a profile of this device measured just before (`python -m common.cost.fit --measure`, or --profile).
The profile has never seen a trace: only operators, and single iterations for the host's share.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import exit_with, latencies, run, statistic, write_report
from common.config import compose
from common.cost.profile import measure
from common.record import RequestColumns, RunRecord

OUT = Path(__file__).resolve().parent.parent / "results" / "engine"
MODEL = ["system=vllm", "engine.kv_blocks=1024", "engine.max_num_batched_tokens=256", "engine.max_num_seqs=32",
         "cost.traits=profile"]  # fmt: skip
TRACES = {
    "tiny_llama, light": ["model=tiny_llama", "workload=poisson", "workload.rate=10", "workload.lengths=fixed",
                          "workload.prompt_tokens=128", "workload.output_tokens=32", "workload.num_requests=60"],
    "llama_23m, light": ["model=llama_23m", "workload=poisson", "workload.rate=0.8", "workload.lengths=fixed",
                         "workload.prompt_tokens=96", "workload.output_tokens=24", "workload.num_requests=24"],
    "llama_23m, queueing": ["model=llama_23m", "workload=poisson", "workload.rate=25", "workload.lengths=azure_conv",
                            "workload.length_scale=0.1", "workload.num_requests=40"],
}  # fmt: skip


def run_local(overrides: Sequence[str], cpu_time: bool) -> RunRecord:
    """One emulated run in this process; nothing is written."""
    from common.driver import drive
    from run import make_executor, served
    from systems.registry import make_policy
    from workloads.build import build

    config = compose([*overrides, "runtime=local"])
    workload = served(build(config.workload, config.seed), config.engine.max_model_len)
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor: Any = make_executor(config, workload, record)
    if cpu_time:
        executor.world.runner.clock = time.thread_time
    drive(make_policy(config.system, executor.cluster.info(), config.engine, config.system_options), executor, record)
    executor.close()
    return record


def numbers(record: RunRecord) -> dict[str, float]:
    """What is compared: ms, and output tokens per second from the first arrival to the last finish."""
    found, columns = latencies(record), record.requests
    span_s = (max(columns.finish_ns) - min(columns.arrival_ns)) / 1e9
    out = {f"{name}_{metric}_ms": statistic(getattr(found, metric), name)
           for metric in ("ttft", "tpot") for name in ("p50", "p99")}  # fmt: skip
    return {**out, "output_tokens_per_s": float(np.sum(columns.output_tokens)) / span_s}


def table(overrides: Sequence[str], hardware: str, device: str) -> list[dict[str, Any]]:
    """Rows by metric: both emulated runs, the simulated one, and how far off it is."""
    size = "4" if device == "cpu" else "2"
    common = [*MODEL, *overrides, f"model.dtype_bytes={size}", f"hardware={hardware}"]
    wall = numbers(run_local([*common, f"runtime.device={device}"], False))
    work = numbers(run_local([*common, f"runtime.device={device}"], True)) if device == "cpu" else wall
    again = numbers(run_local([*common, f"runtime.device={device}"], device == "cpu"))
    sim = numbers(run(common)[1])
    return [{"metric": key, "local (wall)": wall[key], "local (CPU time)": work[key], "sim": sim[key],
             "difference of sim to wall": sim[key] / wall[key] - 1,
             "difference of a second run (CPU time)": again[key] / work[key] - 1,
             "difference of sim to CPU time": sim[key] / work[key] - 1}
            for key in sim]  # fmt: skip


def main() -> int:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.local_fidelity", description=__doc__)
    parser.add_argument("--profile", help="a hardware file measured before; nothing is measured then")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trace", action="append", choices=tuple(TRACES))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        profile = options.profile
        if profile is None:
            models = ["--model", "tiny_llama", "--model", "llama_23m"]
            profile = str(measure(options.device, "measured", Path(folder), models))
        load = os.getloadavg()[0]
        tables = {name: table(TRACES[name], profile, options.device) for name in options.trace or TRACES}
    rows = [row for found in tables.values() for row in found]
    worst = max(rows, key=lambda row: abs(row["difference of sim to CPU time"]))
    noise = float(np.median([abs(row["difference of a second run (CPU time)"]) for row in rows]))
    typical = float(np.median([abs(row["difference of sim to CPU time"]) for row in rows]))
    notes = [
        f"Device: {options.device}, one thread, torch {torch.__version__}; {os.cpu_count()} cores shared with other "
        f"work (load {load:.1f} to {os.getloadavg()[0]:.1f}), which is what wall and CPU time differ by.",
        f"The simulator is off by {typical:.0%} in the median of these numbers (against CPU time, which is what the "
        f"profile counts), at worst {worst['difference of sim to CPU time']:+.0%} in {worst['metric']}. "
        f"A second run of the engine differs from the first by {noise:.0%} in the median.",
        "In the light traces requests hardly meet, so the simulator gives all of them the same times: its tails are "
        "those of the schedule, the engine's also those of the machine.",
    ]
    write_report("local_fidelity", "The engine and its simulation", notes, tables, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
