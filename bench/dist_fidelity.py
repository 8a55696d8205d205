"""python -m bench.dist_fidelity --profile FILE: does the simulator say what workers do on this machine?

The same trace under each system: `runtime=dist` by the wall clock, several times, of which the two with the quickest
iterations count, as neighbours only slow things down; and `runtime=sim` over a profile of this
machine: operators (`python -m common.cost.fit --measure`), links (`python -m bench.comm --base`) and what a worker's
iterations cost beyond their operators (`python -m bench.worker_cost --base`). The profile has never seen a trace.
Aimed at: P50 and throughput within 15%, P99 within 30%."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import exit_with, run, write_report
from bench.local_fidelity import numbers
from common.config import compose
from common.errors import ConfigError
from common.record import RequestColumns, RunRecord

OUT = Path(__file__).resolve().parent.parent / "results" / "comm"
MODEL = ["model=tiny_llama", "model.dtype_bytes=4", "cost.traits=profile", "engine.max_num_batched_tokens=256",
         "engine.max_num_seqs=32", "engine.max_model_len=1024", "workload.max_prompt_tokens=800",
         "workload.overlong=clip"]  # fmt: skip
STEADY = ["workload=poisson", "workload.lengths=azure_conv", "workload.length_scale=0.2", "workload.num_requests=60"]
SYSTEMS = {
    "vllm": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=200"],
    "kunserve": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=60", "system.poll_ms=20",
                 "system.min_pipeline_ms=200", "system.min_serving_ms=50", "system.calm_polls=2"],
    "infinite_llm": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=60",
                     "system.period_ms=100", "system.low_share=0.2", "system.pace=64"],
    "memserve": ["workload=sessions", "workload.think_mean_s=0.5", "workload.length_scale=0.25", "workload.rate=2",
                 "workload.system_tokens=64", "workload.num_requests=60", "cluster.num_instances=2",
                 "engine.kv_blocks=300", "engine.prefix_caching=true", "system.roles=1P1D"],
    "mell": [*STEADY, "workload.rate=8", "cluster.num_instances=2", "engine.kv_blocks=60", "system.epoch_ms=100",
             "system.cooldown_s=2"],
}  # fmt: skip
GOALS = {"p50_ttft_ms": 0.15, "p99_ttft_ms": 0.30, "p50_tpot_ms": 0.15, "p99_tpot_ms": 0.30,
         "output_tokens_per_s": 0.15}  # fmt: skip


def run_workers(overrides: Sequence[str]) -> tuple[RunRecord, dict[str, float]]:
    """One run on workers of this machine; nothing is written. Also what an iteration took, in ms: of the clock as the
    policy process saw it and at the worker, and of CPU at the worker and in the policy process."""
    from common.build_dist import dist_executor
    from common.driver import drive
    from run import served
    from systems.registry import make_policy
    from workloads.build import build

    config = compose([*overrides, "runtime=dist", "runtime.clock=measured"])
    workload = served(build(config.workload, config.seed), config.engine.max_model_len)
    record = RunRecord(RequestColumns.empty(workload.num_requests))
    executor = dist_executor(config, workload, record)
    try:
        policy = make_policy(config.system, executor.cluster.info(), config.engine, config.system_options)
        begin = time.thread_time()
        drive(policy, executor, record)
        policy_s = time.thread_time() - begin
        report = executor.report()
    finally:
        executor.close()
    spent = {"clock": iteration_ms(record), "clock, at the worker": report["stage_wall_ms"],
             "CPU, at the worker": report["stage_cpu_ms"],
             "CPU, in the policy process": 1e3 * policy_s / max(1, report["stages"])}  # fmt: skip
    return record, spent


def iteration_ms(record: RunRecord) -> float:
    """Mean time of an iteration, from its order to its end."""
    record.segments.flush()
    rows = record.segments
    return (sum(rows.end_ns) - sum(rows.start_ns)) / max(1, sum(rows.iterations)) / 1e6


def table(system: str, profile: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows by metric: the two quickest real runs, the simulated one, and how far off it is from the first; and an
    iteration's time in the first real run and in the simulated one."""
    overrides = [f"system={system}", *MODEL, *SYSTEMS[system], f"hardware={profile}"]
    runs = sorted((run_workers(overrides) for _ in range(rounds)), key=lambda one: one[1]["clock"])
    (record, spent), (other, _), simulated = runs[0], runs[1], run(overrides)[1]
    first, second = numbers(record), numbers(other)
    spent = {**spent, "clock, slowest run": runs[-1][1]["clock"]}
    sim, rows = numbers(simulated), []
    for key, goal in GOALS.items():
        off = sim[key] / first[key] - 1
        rows.append({"metric": key, "dist": first[key], "dist again": second[key], "sim": sim[key],
                     "difference of dist again": second[key] / first[key] - 1, "difference of sim": off,
                     "within": "yes" if abs(off) <= goal else f"no ({goal:.0%})"})  # fmt: skip
    modelled = iteration_ms(simulated)
    work = spent["CPU, at the worker"] + spent["CPU, in the policy process"]
    off = modelled / work - 1
    return rows, {"an iteration (ms)": system, **spent, "sim": modelled, "difference of sim to CPU": off}


def main() -> int:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.dist_fidelity", description=__doc__)
    parser.add_argument("--profile", required=True, help="a hardware file of this machine")
    parser.add_argument("--system", action="append", choices=tuple(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=2, help="real runs of each system, at least 2")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    if options.rounds < 2:
        raise ConfigError(f"--rounds {options.rounds}: give at least 2")
    found = {system: table(system, options.profile, options.rounds) for system in options.system or SYSTEMS}
    rows = [row for table, _ in found.values() for row in table]
    spent = [iteration for _, iteration in found.values()]
    share = float(np.median([(one["CPU, at the worker"] + one["CPU, in the policy process"]) / one["clock"]
                             for one in spent]))  # fmt: skip
    tables = {**{system: table for system, (table, _) in found.items()}, "Where an iteration's time goes": spent}
    good = sum(row["within"] == "yes" for row in rows)
    sim, noise = (float(np.median([abs(row[f"difference of {name}"]) for row in rows]))
                  for name in ("sim", "dist again"))  # fmt: skip
    off = float(np.median([one["difference of sim to CPU"] for one in spent]))
    notes = [
        f"Measured (dist) and simulated (sim): tiny_llama in float32, two workers and the policy process on "
        f"{os.cpu_count()} cores that others use as well (load {load:.1f} to {os.getloadavg()[0]:.1f}); torch "
        f"{torch.__version__}; 60 requests a run; of {options.rounds} runs of each system the two with the "
        "quickest iterations.",
        f"{good} of {len(rows)} numbers are within their goal (P50 and throughput 15%, P99 30%). The simulator is off "
        f"by {sim:.0%} in the median; a second real run by {noise:.0%}, which is how much of it the machine is.",
        f"The misses: of the time between an iteration's order and its end, {share:.0%} (median of the "
        "systems) is CPU time of worker and policy process; the rest is waiting, for a core (three processes share "
        "those of this machine with its other users) and for each other. That the simulator cannot know: it has the "
        "policy process answer at once, and every instance a core of its own. The last table sets the CPU time beside "
        f"the simulator's iteration: {off:+.0%} (median) is how far off the profile itself is.",
    ]
    write_report("dist_fidelity", "Workers and their simulation", notes, tables, options.out)
    return 0


if __name__ == "__main__":
    exit_with(main)
