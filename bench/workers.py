"""One run on workers of this machine, by the wall clock, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import compose
from common.record import RequestColumns, RunRecord

OUT = Path(__file__).resolve().parent.parent / "results" / "comm"
MODEL = ["model=tiny_llama", "model.dtype_bytes=4", "cost.traits=profile", "engine.max_num_batched_tokens=256",
         "engine.max_num_seqs=32", "engine.max_model_len=1024", "workload.max_prompt_tokens=800",
         "workload.overlong=clip"]  # fmt: skip


def run_workers(overrides: Sequence[str]) -> tuple[RunRecord, dict[str, float], dict[str, Any]]:
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
    return record, spent, report


def iteration_ms(record: RunRecord) -> float:
    """Mean time of an iteration, from its order to its end."""
    record.segments.flush()
    rows = record.segments
    return (sum(rows.end_ns) - sum(rows.start_ns)) / max(1, sum(rows.iterations)) / 1e6
